"""A rollout: responses of the policy to some prompts, their rewards, and what each token is credited with."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from uft.feedback import Batch, Example
from uft.models import Reference, _scatter, token_logps


class Critic(nn.Module):
    """V(x, y_<t) before every token: a transformer with one output, as a reward model is.

    center, scale   of the rewards: a critic that begins as their one model then begins with the right values
    """

    def __init__(self, model: nn.Module, center: float = 0.0, scale: float = 1.0):
        super().__init__()
        self.model, self.center, self.scale = model, center, scale

    @classmethod
    def of(cls, reward_model: Any) -> Critic:
        """A trainable copy of a reward model (`uft.rlhf.reward.RewardModel`)."""
        return cls(copy.deepcopy(reward_model.model).requires_grad_(True), reward_model.center, reward_model.scale)

    def forward(self, batch: Batch) -> Tensor:
        """float32 [R, T - 1]: the value before the token at t is at t - 1, as log-probabilities are."""
        body = getattr(self.model, self.model.base_model_prefix)
        hidden = body(input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False)[0]
        raw = self.model.score(hidden[:, :-1])[..., 0].float()
        return (raw - self.center) / self.scale


@dataclass(frozen=True)
class Rollout:
    """R responses of at most T tokens, K to each prompt one after another.  On the CPU but for what models read.

    examples       a prompt each, with its K responses and their rewards as targets
    batch          all responses, padded; besides what the collator gives it holds, per response,
                   old_logp, advantage (float32 [R, T - 1]) and, with a critic, old_value and returns
    reward         float32 [R], as the reward model gave it
    log_ratio      float32 [R, T - 1]: log π − log π_ref of the sampled tokens, 0 where there is no reference
    ended          bool [R]
    """

    examples: list[Example]
    batch: Batch
    reward: Tensor
    log_ratio: Tensor
    ended: Tensor

    @property
    def kl(self) -> Tensor:
        """[R] nats: an unbiased estimate of KL(π ‖ π_ref) of whole responses."""
        return self.log_ratio.sum(-1)

    @property
    def lengths(self) -> Tensor:
        return self.batch.shifted.sum(-1).float()


def part_of(batch: Batch, rows: Tensor) -> Batch:
    """The part of a padded batch with these responses (int64), in their order in the batch."""
    keep = torch.zeros(len(batch.kind), dtype=torch.bool)
    keep[rows] = True
    part = batch.select(keep.to(batch.kind.device))
    width = int(part.length.max())
    # responses shorter than the longest of the rollout are not padded to it
    for name, value in part.items():
        if isinstance(value, Tensor) and value.ndim == 2 and name != "preferences":
            part[name] = value[:, : width if name in ("input_ids", "attention_mask", "in_loss") else width - 1]
    return part


def sampled_logp(model: nn.Module, batch: Batch) -> Tensor:
    """float32 [R, T - 1]: log-probability of every token of the responses, 0 elsewhere."""
    return _scatter(token_logps(model, batch).logp.float(), batch.shifted)


@torch.no_grad()
def reference_logp(reference: Reference, policy: nn.Module, batch: Batch) -> Tensor:
    """As `sampled_logp`, of the reference."""
    with reference.applied(policy) as model:
        return sampled_logp(model, batch)


def distinct(examples: Sequence[Example], n: int = 2) -> float:
    """Distinct n-grams of tokens over all n-grams of all responses (arXiv:1510.03055); 1 where there is none."""
    grams = [tuple(r.tokens[i : i + n]) for e in examples for r in e.responses for i in range(len(r.tokens) - n + 1)]
    return len(set(grams)) / len(grams) if grams else 1.0


def correlation(a: Sequence[float], b: Sequence[float]) -> float:
    """Pearson's; 0 where one of them does not vary."""
    a, b = np.asarray(a, dtype=np.float64), np.asarray(b, dtype=np.float64)
    if len(a) < 2 or a.std() < 1e-12 or b.std() < 1e-12:
        return 0.0
    return float(np.corrcoef(a, b)[0, 1])
