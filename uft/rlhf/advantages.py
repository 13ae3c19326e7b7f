"""From rewards to advantages.  R responses, T tokens; all float32, no gradients; masks say which tokens count.

[GAE]   Schulman et al. 2016, arXiv:1506.02438
[Z]     Ziegler et al. 2019, arXiv:1909.08593: KL as a part of the reward, and its adaptive coefficient
[RLOO]  Ahmadian et al. 2024, arXiv:2402.14740
[GRPO]  Shao et al. 2024, arXiv:2402.03300
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


def token_rewards(reward: Tensor, log_ratio: Tensor | None, mask: Tensor, coefficient: float) -> Tensor:
    """[R, T]: −β log(π / π_ref) at every token, and the response's reward at its last one.  [Z] Eq. 2.

    reward      [R]
    log_ratio   [R, T] of policy and reference, None for no such penalty
    mask        bool [R, T]; every response has a token
    """
    found = torch.zeros(mask.shape) if log_ratio is None else torch.where(mask, -coefficient * log_ratio, 0.0)
    last = mask.shape[1] - 1 - mask.flip(-1).byte().argmax(-1)
    return found.index_put((torch.arange(len(mask)), last), reward.float(), accumulate=True)


def gae(rewards: Tensor, values: Tensor, mask: Tensor, gamma: float = 1.0, lam: float = 0.95) -> tuple[Tensor, Tensor]:
    """Advantages and returns [R, T]: A_t = Σ_l (γλ)^l δ_{t+l}, δ_t = r_t + γ V_{t+1} − V_t.  [GAE] Eq. 16.

    A response ends with the episode, so nothing is expected behind its last token.  Returns are A + V.
    """
    values = torch.where(mask, values, 0.0)
    advantage, running = torch.zeros_like(values), torch.zeros(len(values))
    for t in reversed(range(values.shape[1])):
        after = values[:, t + 1] if t + 1 < values.shape[1] else torch.zeros(len(values))
        delta = rewards[:, t] + gamma * after - values[:, t]
        # outside of the response nothing is carried on
        running = torch.where(mask[:, t], delta + gamma * lam * running, 0.0)
        advantage[:, t] = running
    return advantage, torch.where(mask, advantage + values, 0.0)


def leave_one_out(reward: Tensor, samples: int) -> Tensor:
    """[R]: each reward less the mean of the other responses to its prompt.  [RLOO] Eq. 8.

    reward   [R], `samples` responses to a prompt one after another
    """
    if samples < 2 or len(reward) % samples:
        raise ValueError(f"found {len(reward)} rewards in groups of {samples}; want groups of at least 2")
    group = reward.reshape(-1, samples)
    return ((group - group.mean(-1, keepdim=True)) * samples / (samples - 1)).reshape(-1)


def group_normalised(reward: Tensor, samples: int, eps: float = 1e-4) -> Tensor:
    """[R]: (r − mean) / (std + eps) among the responses to one prompt.  [GRPO] Sec. 4.1.2; eps as TRL has it.

    A group whose rewards are all the same gives 0.
    """
    if samples < 2 or len(reward) % samples:
        raise ValueError(f"found {len(reward)} rewards in groups of {samples}; want groups of at least 2")
    group = reward.reshape(-1, samples)
    centred = group - group.mean(-1, keepdim=True)
    return (centred / (group.std(-1, keepdim=True) + eps)).reshape(-1)


def whitened(advantage: Tensor, mask: Tensor, eps: float = 1e-8) -> Tensor:
    """Mean 0 and variance 1 over the tokens that count."""
    kept = advantage[mask]
    if len(kept) < 2:
        return advantage
    return torch.where(mask, (advantage - kept.mean()) * (kept.var() + eps).rsqrt(), 0.0)


@dataclass(frozen=True)
class AdaptiveKL:
    """A coefficient that keeps the KL near a target: β ← β (1 + K e), e = clip(KL / target − 1, ±0.2).  [Z] Sec. 2.2.

    target    nats per response
    rate      K, 0.1 in the paper
    """

    coefficient: float
    target: float
    rate: float = 0.1

    def after(self, kl: float) -> AdaptiveKL:
        error = min(max(kl / self.target - 1, -0.2), 0.2)
        return AdaptiveKL(self.coefficient * (1 + self.rate * error), self.target, self.rate)
