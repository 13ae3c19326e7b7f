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

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase, set_seed

from uft.collation import Collator
from uft.compute import Cost
from uft.faults import StepGuard
from uft.feedback import Batch, Example
from uft.head import causal_model, has_fused_head
from uft.loading import prepared_policy, without_dropout
from uft.losses.policy_gradient import clipped_surrogate, clipped_value, k3
from uft.metrics import RunState, once
from uft.models import FrozenReference, Reference, Scored, make_reference, score
from uft.responding import ends_of
from uft.rlhf.actor_critic import ActorCritic, ActorCriticTrainer, Prompts
from uft.rlhf.advantages import AdaptiveKL, gae, group_normalised, leave_one_out, token_rewards, whitened
from uft.rlhf.config import RLConfig
from uft.rlhf.rollouts import Critic, Rollout, correlation, distinct, part_of, reference_logp, sampled_logp
from uft.rlhf.sampling import Rewards, ended, sample, with_targets
from uft.rlhf.targets import asked, reward_costs
from uft.watching.attach import watch


class RLTrainer(ActorCriticTrainer):
    """Trains a policy to be given higher rewards.

    policy      hub id, folder, or model
    rewards     a reward per response: a `RewardModel`, a `RewardEnsemble`, a verifier
    prompts     examples, of which only the prompts are used
    critic      for "gae"; see `Critic.of`
    reference   by default the policy as it is now
    spread      the disagreement of an ensemble, per response: logged, and what guards look at
    name        of the reward, by which a checkpoint of another one is refused; by default that of its type

    Raises ValueError where critic and advantage do not fit, or a reward is not finite.
    """

    def __init__(
        self, policy: Any, rewards: Rewards, prompts: Sequence[Example], args: RLConfig,
        tokenizer: PreTrainedTokenizerBase, *, critic: Critic | None = None, reference: Any = None,
        spread: Rewards | None = None, peft_config: Any = None, name: str | None = None, **kwargs: Any,
    ):  # fmt: skip
        if (args.advantage == "gae") != (critic is not None):
            wanted = "a critic (Critic.of(reward_model))" if args.advantage == "gae" else "no critic"
            raise ValueError(f"advantage is {args.advantage!r}; want {wanted}")
        set_seed(args.seed)
        policy = prepared_policy(policy, args, peft_config)
        if critic is not None and args.disable_dropout:
            without_dropout(critic)
        _check_room(policy, prompts, args)
        self.rewards, self.spread, self.tokenizer = rewards, spread, tokenizer
        self.reward_name = name or getattr(rewards, "__qualname__", type(rewards).__qualname__)
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
        frozen = self.reference.model if isinstance(self.reference, FrozenReference) else policy
        self.costs = {"policy": Cost.of(policy), "reference": Cost.of(frozen)}
        self.fused = has_fused_head(policy)
        if critic is not None:
            self.costs["critic"] = Cost.of(critic.model)
        self.reward_costs = reward_costs(rewards)
        self._eos = ends_of(policy, tokenizer)
        self.watched = watch(self)

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
        self.run_state.add({"loss": once(total)})
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
        return asked(rewards, examples, self.tokenizer).flatten().float()

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
            **({} if self.reference is None else {"kl_sequence": kl, "kl_coefficient": coefficient.coefficient}),
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
        self.run_state.add({name: once(value) for name, value in found.items()})
        n, scored = self._lengths(rollout.batch)
        policy, asked_twice = self.costs["policy"], 1 + (self.spread is not None)
        flops = 2 * policy.forward(n, scored).sum()  # writing reads each token once; and the log-probabilities before
        flops += self.costs["reference"].forward(n, scored).sum() if self.reference is not None else 0
        flops += self.costs["critic"].forward(n).sum() if self.critic is not None else 0
        flops += asked_twice * sum(cost.forward(n).sum() for cost in self.reward_costs)
        self.run_state.count(
            generated_tokens=int(mask.sum()), flops=int(flops), rollouts=1, policy_forwards=2 * len(n),
            reference_forwards=len(n) * (self.reference is not None),
            reward_forwards=asked_twice * len(n) * len(self.reward_costs),
            **{f"examples/{name}": count for name, count in Counter(e.source for e in rollout.examples).items()},
        )  # fmt: skip

    def _lengths(self, batch: Batch) -> tuple[np.ndarray, np.ndarray]:
        """Tokens of prompt and response, and those that the policy's head sees."""
        n = batch.length.cpu().numpy().astype(np.int64)
        return n, batch.shifted.sum(-1).cpu().numpy().astype(np.int64) if self.fused else n

    def _count_training(self, batch: Batch) -> None:
        n, scored = self._lengths(batch)
        policy, exact = self.costs["policy"], self.args.kl_in == "loss" and self.args.kl_loss == "exact"
        flops = (policy.forward(n, scored) + policy.backward(n, scored)).sum()
        if self.critic is not None:
            flops += (self.costs["critic"].forward(n) + self.costs["critic"].backward(n)).sum()
        flops += self.costs["reference"].forward(n, scored).sum() if exact else 0
        self.run_state.count(
            tokens=int(n.sum()), response_tokens=int(batch.shifted.sum()), flops=int(flops), backwards=len(n),
            policy_forwards=len(n), reference_forwards=len(n) * exact,
        )  # fmt: skip


def _check_room(policy: nn.Module, prompts: Sequence[Example], args: RLConfig) -> None:
    room = getattr(causal_model(policy).config.get_text_config(), "max_position_embeddings", None)
    for example in prompts:
        if not len(example.prompt):
            raise ValueError(f"row {example.row} of {example.source!r}: found no prompt; want rows with one")
        if room is not None and (n := len(example.prompt)) + args.max_new_tokens > room:
            raise ValueError(
                f"row {example.row} of {example.source!r}: found a prompt of {n} tokens and {args.max_new_tokens} to "
                f"come; want at most {room}, the model's positions"
            )
