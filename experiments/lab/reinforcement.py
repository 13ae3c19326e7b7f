"""The classical last stage in the lab: a reward model on preferences, then reinforcement learning against it."""

from __future__ import annotations

import shutil
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from transformers import LlamaForCausalLM, PrinterCallback, TrainerCallback

from uft.compute import Cost
from uft.data.mixture import FeedbackDataset
from uft.feedback import Example
from uft.head import fuse_head, has_fused_head
from uft.rlhf.config import RLConfig
from uft.rlhf.ppo import RLTrainer
from uft.rlhf.reward import RewardConfig, RewardEnsemble, RewardModel, train_reward_model
from uft.rlhf.rollouts import Critic
from uft.rlhf.sampling import Rewards, sample

from .measures import MAX_NEW_TOKENS
from .tokenizer import lab_tokenizer

CALIBRATED_ON = 512  # pairs whose answers' rewards get mean 0 and deviation 1


@dataclass(frozen=True)
class Reinforcement:
    """A reward model on preferences, and the policy trained against it.

    advantage     gae (PPO, with a critic that begins as the reward model), rloo or grpo
    kl            coefficient of the KL to the policy before the stage, part of the reward, whose deviation is 1
    reward_share  of the design's draws of preferences, for training the reward model
    reward_rate   its learning rate; also the critic's
    responses     per optimiser step; `samples` of them to each prompt
    members       reward models, of which the mean is the reward; they differ in their heads and in the order of rows
    conservative  times their disagreement, taken from the mean
    times         what the stage may cost, beside what is left of the design's FLOPs
    """

    advantage: str
    kl: float
    reward_share: float = 0.5
    reward_rate: float = 1e-3
    responses: int = 64
    samples: int = 4
    members: int = 1
    conservative: float = 0.0
    times: float = 1.0


@dataclass(frozen=True)
class Rewarding:
    """Trained reward models as one; what they cost in FLOPs and say of the pairs that they were not trained on."""

    members: tuple[RewardModel, ...]
    flops: float

    @property
    def rewards(self) -> Rewards:
        return self.members[0] if len(self.members) == 1 else RewardEnsemble(self.members)


def train_rewards(
    model: LlamaForCausalLM, preferences: Sequence[Example], draws: int, rate: float, batch_size: int, seed: int,
    members: int = 1,
) -> Rewarding:  # fmt: skip
    """Reward models that begin as the policy with a fresh head, each on so many draws of the preferences."""
    trained, flops = [], 0.0
    for member in range(members):
        data = FeedbackDataset({"preferences": preferences}, {"preferences": draws / len(preferences)})
        args = RewardConfig(
            output_dir=tempfile.mkdtemp(prefix="reward-"), use_cpu=True, learning_rate=rate, adam_beta2=0.95,
            per_device_train_batch_size=batch_size, max_steps=max(1, round(draws / batch_size)),
            lr_scheduler_type="cosine", warmup_steps=0.05, save_strategy="no", report_to="none", disable_tqdm=True,
            logging_strategy="no", seed=seed + 1000 * member,
        )  # fmt: skip
        found = train_reward_model(RewardModel.of(model, lab_tokenizer(), seed=seed + 1000 * member), data, args)
        shutil.rmtree(args.output_dir, ignore_errors=True)
        few = preferences[:CALIBRATED_ON]
        lengths = np.array([len(e.prompt) + len(r.tokens) for e in few for r in e.responses], dtype=np.int64)
        flops += found.training_record["flops"] + float(Cost.of(found.model).forward(lengths).sum())
        trained.append(found.calibrated(few))
    return Rewarding(tuple(trained), flops)


def reinforce(
    model: LlamaForCausalLM, rewarding: Rewarding, prompts: Sequence[Example], how: Reinforcement, rate: float,
    steps: int, seed: int, callbacks: Sequence[TrainerCallback] = (), reference: Any = None, logged: int = 20,
) -> RLTrainer:  # fmt: skip
    """Trains the model itself against the rewards; `logged` so many times."""
    group = 1 if how.advantage == "gae" else how.samples
    args = RLConfig(
        output_dir=tempfile.mkdtemp(prefix="rl-"), use_cpu=True, max_steps=steps, advantage=how.advantage,
        per_device_train_batch_size=how.responses // group, samples=group, kl_coefficient=how.kl,
        learning_rate=rate, critic_learning_rate=how.reward_rate, adam_beta2=0.95, lr_scheduler_type="cosine",
        warmup_steps=0.05, max_grad_norm=1.0, max_new_tokens=MAX_NEW_TOKENS, generation_batch_size=how.responses,
        save_strategy="no", report_to="none", disable_tqdm=True, logging_steps=max(1, steps // logged), seed=seed,
    )  # fmt: skip
    rewards, members = rewarding.rewards, rewarding.members
    if how.conservative:
        rewards = RewardEnsemble(members).conservative(how.conservative)
    trainer = RLTrainer(
        model, rewards, prompts, args, lab_tokenizer(), reference=reference, callbacks=list(callbacks),
        critic=Critic.of(members[0]) if how.advantage == "gae" else None,
        spread=RewardEnsemble(members).spread if len(members) > 1 else None,
    )  # fmt: skip
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    trainer.policy.eval()
    shutil.rmtree(args.output_dir, ignore_errors=True)
    return trainer


def flops_per_step(
    model: LlamaForCausalLM, rewarding: Rewarding, prompts: Sequence[Example], how: Reinforcement, seed: int
) -> float:
    """What an optimiser step will cost, as long as responses stay as long as those of the model now."""
    few = [prompts[i] for i in np.random.default_rng(seed).permutation(len(prompts))[:64]]
    written = sample(model, lab_tokenizer(), few, max_new_tokens=MAX_NEW_TOKENS, seed=seed)
    n = np.array([len(e.prompt) + len(r.tokens) for e in written for r in e.responses], dtype=np.int64)
    policy, reward = Cost.of(model), Cost.of(rewarding.members[0].model)
    scored = np.array([len(r.tokens) for e in written for r in e.responses]) if has_fused_head(model) else n
    each = policy.forward(n, scored) * 4 + policy.backward(n, scored)  # generating, before, reference, trained
    asked = len(rewarding.members) * (2 if len(rewarding.members) > 1 else 1)  # for the disagreement again
    each = each + asked * reward.forward(n)
    if how.advantage == "gae":
        each = each + 2 * reward.forward(n) + reward.backward(n)
    return how.responses * float(each.mean())


def train(
    model: LlamaForCausalLM, preferences: Sequence[Example], how: Reinforcement, rate: float, *, draws: int,
    flops: float | None, batch_size: int, seed: int, callbacks: Sequence[TrainerCallback] = (),
) -> tuple[LlamaForCausalLM, dict[str, Any]]:  # fmt: skip
    """Both parts of the stage, and what its record says of them.

    draws   of preferences in the design
    flops   for the whole stage; None: the reward model gets all draws, and the policy one response for each of them
    """
    start = time.perf_counter()
    equal_examples = flops is None
    share = 1.0 if equal_examples else how.reward_share
    rewarding = train_rewards(model, preferences, round(share * draws), how.reward_rate, batch_size, seed, how.members)
    if equal_examples:
        steps = max(1, round(draws / how.responses))
    else:
        left = how.times * flops - rewarding.flops
        if left <= 0:
            raise ValueError(
                f"the reward model spent {rewarding.flops:.3g} of {how.times * flops:.3g} FLOPs; want less"
            )
        fuse_head(model)  # as the trainer will, so that what a step costs is known
        steps = max(1, round(left / flops_per_step(model, rewarding, preferences, how, seed)))
    trainer = reinforce(model, rewarding, preferences, how, rate, steps, seed, callbacks)
    record = trainer.record()
    kept = ("loss", "reward", "kl", "step", "length", "ended", "entropy", "distinct", "value")
    compute = dict(record["compute"])
    spent = [member.training_record for member in rewarding.members]
    compute["flops"] += rewarding.flops
    compute["tokens"] += sum(each["tokens"] for each in spent)
    compute["reward_model_flops"] = rewarding.flops
    compute["examples/preferences"] = round(share * draws) * how.members
    compute["seconds"] = time.perf_counter() - start
    return trainer.policy, {
        "objective": {"name": f"reward model, {how.advantage}", **vars(how)},
        "steps": record["steps"],
        "compute": compute,
        "training": [{k: v for k, v in entry.items() if k.startswith(kept)} for entry in record["metrics"]],
        "reward_model": [{k: v for k, v in each.items() if not isinstance(v, (list, dict))} for each in spent],
    }
