"""Losses of a reward model, as pure functions of rewards: a number per pair or per response, nothing reduced.

    r_w, r_l     rewards of the chosen and the rejected response, r(x, y_w) and r(x, y_l), in nats: a difference is the
                 log-odds that the one is preferred
    m            margin, how much better the chosen one was said to be
    t            target of a single response, in [0, 1]

[BT]       Bradley and Terry 1952; Ouyang et al. 2022, arXiv:2203.02155, Eq. 1
[Llama2]   Touvron et al. 2023, arXiv:2307.09288, Eq. 2
[centre]   Eisenstein et al. 2023, arXiv:2312.09244, Sec. 2.1
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from uft.typing import Float, Tensor


def bradley_terry(
    chosen_reward: Float[Tensor, " pairs"],
    rejected_reward: Float[Tensor, " pairs"],
    margin: Float[Tensor, " pairs"] | None = None,
) -> Float[Tensor, " pairs"]:
    """−log σ(r_w − r_l − m), in nats; m = 0 without a margin.  [BT], [Llama2]; TRL's RewardTrainer."""
    difference = chosen_reward - rejected_reward
    return -F.logsigmoid(difference if margin is None else difference - margin)


def centering(
    chosen_reward: Float[Tensor, " pairs"], rejected_reward: Float[Tensor, " pairs"]
) -> Float[Tensor, " pairs"]:
    """(r_w + r_l)², in nats²: which of all equivalent rewards is learnt, the one with mean 0.  [centre]"""
    return (chosen_reward + rejected_reward).square()


def squared_error(
    reward: Float[Tensor, " responses"], target: Float[Tensor, " responses"]
) -> Float[Tensor, " responses"]:
    """(σ(r) − t)²: the Brier score of σ(r) for labels."""
    return (torch.sigmoid(reward) - target).square()


def cross_entropy(
    reward: Float[Tensor, " responses"], target: Float[Tensor, " responses"]
) -> Float[Tensor, " responses"]:
    """−t log σ(r) − (1 − t) log σ(−r), in nats; at its smallest where σ(r) = t."""
    return -target * F.logsigmoid(reward) - (1 - target) * F.logsigmoid(-reward)
