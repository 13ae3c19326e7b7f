"""Reinforcement learning from a reward: PPO with a critic, RLOO and GRPO, by one loop.

    RLTrainer(policy, rewards, prompts, RLConfig(output_dir="runs/ppo", max_steps=400), tokenizer,
              critic=Critic.of(reward_model)).train()

A rollout samples the policy, asks for rewards, and credits tokens:

    gae    advantages from a critic                          PPO, arXiv:1707.06347; arXiv:2203.02155, Sec. 3.5
    rloo   each response against the others of its prompt    arXiv:2402.14740; ratio and clip of whole responses
    grpo   the same, divided by the group's deviation        arXiv:2402.03300; ratio and clip per token

The KL to the reference is part of the reward (per token; per response for rloo), or a loss (exact over the vocabulary,
or k3).  Losses are means over the tokens of an optimiser step (over its responses for rloo), however it is cut into
micro-batches.  Sampling depends on seed and rollout alone, and checkpoints fall between rollouts, so that a resumed run
is the same.  One process; TRL's trainers for several are reached through `uft.rlhf.through_trl`.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from transformers import PreTrainedTokenizerBase, set_seed

from uft.collation import Collator
from uft.compute import Cost
from uft.faults import GuardedTrainer, StepGuard
from uft.feedback import Batch, Example
from uft.head import is_peft, unwrapped
from uft.loading import prepared_policy
from uft.losses.policy_gradient import clipped_surrogate, clipped_value, k3
from uft.metrics import RunState
from uft.models import FrozenReference, Reference, Scored, make_reference, score
from uft.record import environment, peak_memory_bytes, reset_peak_memory, write_json
from uft.rlhf.advantages import AdaptiveKL, gae, group_normalised, leave_one_out, token_rewards, whitened
from uft.rlhf.config import RLConfig
from uft.rlhf.rollouts import Critic, Rollout, correlation, distinct, part_of, reference_logp, sampled_logp
from uft.rlhf.sampling import Rewards, ended, sample, with_targets


class ActorCritic(nn.Module):
    """What is trained; the critic may be missing."""

    def __init__(self, policy: nn.Module, critic: Critic | None):
        super().__init__()
        self.policy, self.critic = policy, critic

    @property
    def config(self) -> Any:
        return self.policy.config


class Prompts(Dataset):
    """Item i: the prompts of the rollout that optimiser step i trains on.  Each epoch has an order of its own."""

    def __init__(self, prompts: Sequence[Example], args: RLConfig):
        self.prompts, self.size = prompts, args.per_device_train_batch_size
        self.seed, self.updates, self.steps = args.seed, args.updates, args.max_steps
        if len(prompts) < self.size:
            raise ValueError(f"found {len(prompts)} prompts; want at least the {self.size} of a rollout")

    def __len__(self) -> int:
        return self.steps

    def __getitem__(self, step: int) -> list[Example]:
        per_epoch = len(self.prompts) // self.size
        epoch, place = divmod(step // self.updates, per_epoch)
        order = np.random.default_rng([self.seed, epoch]).permutation(len(self.prompts))
        return [self.prompts[i] for i in order[place * self.size : (place + 1) * self.size]]


class RLTrainer(GuardedTrainer):
    """Trains a policy to be given higher rewards.

    policy      hub id, folder, or model
    rewards     a reward per response: a `RewardModel`, a `RewardEnsemble`, a verifier
    prompts     examples, of which only the prompts are used
    critic      for "gae"; see `Critic.of`
    reference   by default the policy as it is now
    spread      the disagreement of an ensemble, per response: logged, and what guards look at
    reward_cost a `Cost` of the reward model for each token, to be counted (several members: a list)

    Raises ValueError where critic and advantage do not fit, or a reward is not finite.
    """

    loss_is_scaled_for_ga = True

    def __init__(
        self, policy: Any, rewards: Rewards, prompts: Sequence[Example], args: RLConfig,
        tokenizer: PreTrainedTokenizerBase, *, critic: Critic | None = None, reference: Any = None,
        spread: Rewards | None = None, reward_cost: Cost | Sequence[Cost] = (), peft_config: Any = None, **kwargs: Any,
    ):  # fmt: skip
        if (args.advantage == "gae") != (critic is not None):
            wanted = "a critic (Critic.of(reward_model))" if args.advantage == "gae" else "no critic"
            raise ValueError(f"advantage is {args.advantage!r}; want {wanted}")
        set_seed(args.seed)
        policy = prepared_policy(policy, args, peft_config)
        self.rewards, self.spread, self.tokenizer = rewards, spread, tokenizer
        self.reference = None
        if args.kl_in != "none" or reference is not None:
            own = reference if isinstance(reference, Reference) else None
            given = None if reference is None else own or FrozenReference(reference)
            self.reference = given or make_reference(policy, "auto")
        if isinstance(self.reference, FrozenReference):
            self.reference.model.to(args.device)
        pad = tokenizer.pad_token_id
        collate = Collator(tokenizer.eos_token_id if pad is None else pad, sorted({e.source for e in prompts}))
        super().__init__(
            model=ActorCritic(policy, critic), args=args, train_dataset=Prompts(prompts, args), data_collator=collate,
            processing_class=tokenizer, **kwargs,
        )  # fmt: skip
        self.model_accepts_loss_kwargs = True
        self.add_callback(RunState())
        self.guard = StepGuard(self)
        self.add_callback(self.guard)
        self.rollout: Rollout | None = None
        self.costs = {"policy": Cost.of(policy), "reference": Cost.of(policy)}
        if critic is not None:
            self.costs["critic"] = Cost.of(critic.model)
        self.reward_costs = [reward_cost] if isinstance(reward_cost, Cost) else list(reward_cost)
        own_eos = np.atleast_1d(policy.generation_config.eos_token_id or []).astype(int).tolist()
        self._eos = {tokenizer.eos_token_id, *own_eos}
        self._clock = time.perf_counter()

    # ---- what transformers asks ----

    @property
    def run_state(self) -> RunState:
        return next(c for c in self.callback_handler.callbacks if isinstance(c, RunState))

    @property
    def policy(self) -> nn.Module:
        return self.accelerator.unwrap_model(self.model).policy

    @property
    def critic(self) -> Critic | None:
        return self.accelerator.unwrap_model(self.model).critic

    def get_train_dataloader(self) -> DataLoader:
        return DataLoader(self.train_dataset, batch_size=1, collate_fn=_only, generator=torch.Generator())

    def get_batch_samples(self, epoch_iterator, num_batches: int, device: torch.device):
        self.guard.begin()
        return [next(epoch_iterator)], None

    def create_optimizer(self, *args: Any, **kwargs: Any):
        if self.optimizer is None and self.critic is not None:
            kind, options = self.get_optimizer_cls_and_kwargs(self.args, self.model)
            rate = self.args.critic_learning_rate or self.args.learning_rate
            groups = [
                {"params": [p for p in part.parameters() if p.requires_grad], "lr": lr}
                for part, lr in ((self.policy, self.args.learning_rate), (self.critic, rate))
            ]
            self.optimizer = kind(groups, **options | {"weight_decay": self.args.weight_decay})
        return super().create_optimizer(*args, **kwargs)

    def floating_point_ops(self, inputs: Any) -> int:
        return 0  # counted in `counters`

    def train(self, resume_from_checkpoint: str | None = None, **kwargs: Any):
        self.check_folders(resume_from_checkpoint)
        self.identity = {
            "rl": {name: repr(getattr(self.args, name)) for name in _DECIDING},
            "data": self._prompts_digest(),
            "optimiser_state": not self.args.save_only_model,
        }
        if resume_from_checkpoint:
            self.check_resumable(resume_from_checkpoint)
        reset_peak_memory()
        self._clock = time.perf_counter()
        output = self.guarded_train(resume_from_checkpoint=resume_from_checkpoint, **kwargs)
        self.run_state.count(seconds=self._elapsed())
        if self.args.should_save:
            write_json(Path(self.args.output_dir) / "run.json", self.record())
        return output

    def _prompts_digest(self) -> str:
        import hashlib

        digest = hashlib.sha256()
        for example in self.train_dataset.prompts:
            digest.update(np.ascontiguousarray(example.prompt).tobytes() + b"|")
        return digest.hexdigest()[:16]

    def record(self) -> dict[str, Any]:
        """Configuration, metrics over time and compute: what another person needs to judge a run."""
        return {
            "config": self.args.to_sanitized_dict(),
            "prompts": len(self.train_dataset.prompts),
            "steps": self.state.global_step,
            "planned_steps": self.state.max_steps,
            "compute": {**dict(sorted(self.run_state.counters.items())), "peak_memory_bytes": peak_memory_bytes()},
            "metrics": self.state.log_history,
            **environment(),
        }

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs:
            logs.update(self.run_state.take())
            self.run_state.count(seconds=self._elapsed())
            logs["num_tokens"] = self.run_state.counters.get("tokens", 0)
        super().log(logs, start_time)

    def _save_checkpoint(self, model, trial) -> None:
        self.run_state.count(seconds=self._elapsed())
        self.run_state.collect(list)
        super()._save_checkpoint(model, trial)

    def _save(self, output_dir: str | None = None, state_dict=None) -> None:
        folder = Path(output_dir or self.args.output_dir)
        unwrapped(self.policy).save_pretrained(folder)
        self.tokenizer.save_pretrained(folder)
        if self.critic is not None and folder.name.startswith("checkpoint-"):
            self.critic.model.save_pretrained(folder / "critic")
        torch.save(self.args, folder / "training_args.bin")

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model=None) -> None:
        folder, policy = Path(resume_from_checkpoint), unwrapped(self.policy)
        if is_peft(policy):
            from peft import set_peft_model_state_dict

            set_peft_model_state_dict(policy, load_file(folder / "adapter_model.safetensors"))
        else:
            policy.load_state_dict(load_file(folder / "model.safetensors"), strict=False)  # tied weights stand once
        if self.critic is not None:
            self.critic.model.load_state_dict(load_file(folder / "critic" / "model.safetensors"), strict=False)

    def _elapsed(self) -> float:
        now = time.perf_counter()
        elapsed, self._clock = now - self._clock, now
        return elapsed

    # ---- a step ----

    def training_step(self, model, inputs: list[Example], num_items_in_batch=None) -> Tensor:
        """One optimiser step on a part of the rollout, which is sampled anew every `args.updates` steps."""
        turn = self.state.global_step % self.args.updates
        if turn == 0 or self.rollout is None:
            self.rollout = self.collect(inputs, self.state.global_step // self.args.updates)
        model.train()
        rows = self._rows(turn)
        whole = part_of(self.rollout.batch, rows)
        tokens, responses = whole.shifted.sum(), len(whole.kind)
        size = self.args.micro_batch_size or responses
        total = torch.zeros((), device=self.args.device)
        for start in range(0, responses, size):
            part = whole if size >= responses else part_of(whole, torch.arange(start, min(start + size, responses)))
            with self.compute_loss_context_manager():
                loss = self._loss(Batch(part).to(self.args.device), tokens, responses)
            self.accelerator.backward(loss)
            total += loss.detach()
        self._count_training(whole)
        self.run_state.add({"loss": _mean(total)})
        return total

    def _rows(self, turn: int) -> Tensor:
        """Which responses of the rollout this step trains on."""
        n, parts = len(self.rollout.reward), self.args.minibatches
        if parts == 1:
            return torch.arange(n)
        epoch, part = divmod(turn, parts)
        number = self.state.global_step // self.args.updates
        order = torch.from_numpy(np.random.default_rng([self.args.seed, number, epoch, 1]).permutation(n))
        return torch.tensor_split(order, parts)[part]

    def _loss(self, batch: Batch, tokens: Tensor, responses: int) -> Tensor:
        """This micro-batch's share of the loss of the step."""
        args, mask = self.args, batch.shifted
        exact = args.kl_in == "loss" and args.kl_loss == "exact"
        scored = score(self.policy, batch, self.reference if exact else None, divergence=exact, differentiable=("kl",))
        if args.advantage == "rloo":
            of_response = (batch.advantage * mask).sum(-1) / mask.sum(-1)
            before = batch.old_logp.sum(-1)
            surrogate, log_ratio = clipped_surrogate(scored.logp, before, of_response, args.clip), scored.logp - before
            n = responses
        else:
            surrogate = clipped_surrogate(scored.token_logp, batch.old_logp, batch.advantage, args.clip)[mask]
            log_ratio, n = (scored.token_logp - batch.old_logp)[mask], tokens
        loss, here, log_ratio = surrogate.sum() / n, surrogate.new_tensor(len(surrogate)), log_ratio.detach()
        metrics = {
            "loss/policy": (surrogate.sum(), here),
            "policy/clipped": (((log_ratio.exp() - 1).abs() > args.clip).float().sum(), here),
            "policy/kl_old": ((log_ratio.exp() - 1 - log_ratio).sum(), here),
        }
        if args.kl_in == "loss":
            kl = scored.kl if exact else k3(scored.token_logp, batch.reference_token_logp)
            kl = torch.where(mask, kl, 0.0).sum()
            loss = loss + self._coefficient().coefficient * kl / (responses if args.advantage == "rloo" else tokens)
            metrics["loss/kl"] = (kl.detach(), mask.sum().float())
        if self.critic is not None:
            value = self.critic(batch)
            each = clipped_value(value, batch.old_value, batch.returns, args.value_clip or None)
            of_value = torch.where(mask, each, 0.0).sum()
            loss = loss + args.value_coefficient * of_value / tokens
            metrics["loss/value"] = (of_value.detach(), mask.sum().float())
        self.run_state.add(metrics)
        self.guard.saw(loss, Scored(batch, scored.token_logp, scored.logp, scored.length))
        return loss

    # ---- a rollout ----

    @torch.no_grad()
    def collect(self, prompts: Sequence[Example], number: int) -> Rollout:
        """Samples the policy as it is now and credits every token."""
        args, was_training = self.args, self.model.training
        self.model.eval()
        examples = sample(
            self.policy, self.tokenizer, prompts, samples=args.samples, max_new_tokens=args.max_new_tokens,
            seed=[args.seed, number], batch_size=args.generation_batch_size,
        )  # fmt: skip
        reward = self._asked(self.rewards, examples)
        examples = with_targets(examples, reward.reshape(-1, args.samples).tolist())
        finished = torch.tensor([ended(r, self._eos) for e in examples for r in e.responses])
        batch = self.data_collator([replace(e, kind="score") for e in examples])
        mask = batch.shifted
        with self.compute_loss_context_manager():
            old = self._forward(batch, lambda part: sampled_logp(self.policy, part))
            theirs = old
            if self.reference is not None:
                theirs = self._forward(batch, lambda part: reference_logp(self.reference, self.policy, part))
            value = None if self.critic is None else self._forward(batch, self.critic)
        log_ratio = torch.where(mask, old - theirs, 0.0)
        kl, coefficient = log_ratio.sum(-1), self._coefficient()
        of_kl = coefficient.coefficient if args.kl_in == "reward" else 0.0
        shaped = reward - args.unended_penalty * (~finished)
        batch["old_logp"] = old
        if args.kl_in == "loss" and args.kl_loss == "k3":
            batch["reference_token_logp"] = theirs
        if args.advantage == "gae":
            value = torch.where(mask, value, 0.0)
            advantage, returns = gae(token_rewards(shaped, log_ratio, mask, of_kl), value, mask, args.gamma, args.lam)
            batch |= {"old_value": value, "returns": returns}
            batch["advantage"] = whitened(advantage, mask) if args.whiten else advantage
        else:
            of_group = leave_one_out if args.advantage == "rloo" else group_normalised
            batch["advantage"] = torch.where(mask, of_group(shaped - of_kl * kl, args.samples)[:, None], 0.0)
        rollout = Rollout(examples, Batch(batch), reward, log_ratio, finished)
        self._tell(rollout, coefficient)
        self.model.train(was_training)
        return rollout

    def _asked(self, rewards: Rewards, examples: Sequence[Example]) -> Tensor:
        found = torch.tensor([float(value) for of_example in rewards(examples) for value in of_example])
        for i in (~found.isfinite()).nonzero()[:1, 0].tolist():
            example = examples[i // self.args.samples]
            text = self.tokenizer.decode(example.prompt)
            raise ValueError(
                f"data set {example.source!r}, row {example.row}: the reward of a response to {text[:60]!r} is "
                f"{found[i].item()}; want a finite number"
            )
        if len(found) != len(examples) * self.args.samples:
            raise ValueError(f"found {len(found)} rewards for {len(examples) * self.args.samples} responses")
        return found

    def _forward(self, batch: Batch, function: Any) -> Tensor:
        """A model's numbers for all responses, [R, T - 1] on the CPU, in parts."""
        n, size = len(batch.kind), self.args.micro_batch_size or len(batch.kind)
        found = torch.zeros(batch.shifted.shape)
        for start in range(0, n, size):
            rows = torch.arange(start, min(start + size, n))
            part = function(Batch(part_of(batch, rows)).to(self.args.device)).float().cpu()
            found[rows, : part.shape[1]] = part
        return found

    def _coefficient(self) -> AdaptiveKL:
        kept = self.run_state.balance.get("kl_coefficient", self.args.kl_coefficient)
        return AdaptiveKL(kept, self.args.kl_target or float("inf"))

    def _tell(self, rollout: Rollout, coefficient: AdaptiveKL) -> None:
        """Logs a rollout, counts its compute, and moves an adaptive coefficient."""
        kl, mask = rollout.kl.mean().item(), rollout.batch.shifted
        if self.args.kl_target:
            self.run_state.balance["kl_coefficient"] = coefficient.after(kl).coefficient
        lengths = rollout.lengths
        found = {
            "reward": rollout.reward.mean(),
            "reward/std": rollout.reward.std(unbiased=False),
            "kl_sequence": kl,
            "kl_coefficient": coefficient.coefficient,
            "entropy": -rollout.batch.old_logp[mask].mean(),
            "length": lengths.mean(),
            "ended": rollout.ended.float().mean(),
            "distinct_2": distinct(rollout.examples),
            "length_reward_correlation": correlation(lengths.tolist(), rollout.reward.tolist()),
        }
        if self.spread is not None:
            found["reward/spread"] = self._asked(self.spread, rollout.examples).mean()
        if "old_value" in rollout.batch:
            returns, left = rollout.batch.returns[mask], (rollout.batch.returns - rollout.batch.old_value)[mask]
            found["value/explained_variance"] = 1 - left.var() / returns.var().clamp(min=1e-12)
        self.run_state.add({name: _mean(value) for name, value in found.items()})
        n = rollout.batch.length.numpy().astype(np.int64)
        flops = self.costs["policy"].forward(n).sum()  # generating reads and writes each token once
        flops += self.costs["policy"].forward(n).sum() * (1 + (self.reference is not None))
        flops += self.costs["critic"].forward(n).sum() if self.critic is not None else 0
        flops += sum(cost.forward(n).sum() for cost in self.reward_costs)
        self.run_state.count(
            generated_tokens=int(mask.sum()), flops=int(flops), rollouts=1, policy_forwards=2 * len(n),
            reference_forwards=len(n) * (self.reference is not None), reward_forwards=len(n) * len(self.reward_costs),
            **{f"examples/{source}": count for source, count in _sources(rollout.examples).items()},
        )  # fmt: skip

    def _count_training(self, batch: Batch) -> None:
        n = batch.length.cpu().numpy().astype(np.int64)
        flops = sum(
            (self.costs[name].forward(n) + self.costs[name].backward(n)).sum()
            for name in ("policy", "critic")
            if name in self.costs
        )
        exact = self.args.kl_in == "loss" and self.args.kl_loss == "exact"
        flops += self.costs["reference"].forward(n).sum() if exact else 0
        self.run_state.count(
            tokens=int(n.sum()), response_tokens=int(batch.shifted.sum()), flops=int(flops), backwards=len(n),
            policy_forwards=len(n), reference_forwards=len(n) * exact,
        )  # fmt: skip


# fields that decide what a run becomes, so that a checkpoint of another one is refused
_DECIDING = (
    "advantage", "samples", "epochs_per_rollout", "minibatches", "clip", "value_clip", "value_coefficient",
    "critic_learning_rate", "gamma", "lam", "whiten", "kl_coefficient", "kl_in", "kl_loss", "kl_target",
    "max_new_tokens", "unended_penalty", "seed", "learning_rate", "per_device_train_batch_size", "max_steps",
)  # fmt: skip


def _only(items: list[list[Example]]) -> list[Example]:
    return items[0]


def _mean(value: Any) -> tuple[Tensor, Tensor]:
    return torch.as_tensor(float(value), dtype=torch.float64), torch.tensor(1.0)


def _sources(examples: Sequence[Example]) -> dict[str, int]:
    found: dict[str, int] = {}
    for example in examples:
        found[example.source] = found.get(example.source, 0) + 1
    return found
