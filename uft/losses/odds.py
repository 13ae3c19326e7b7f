"""The odds-ratio loss of ORPO, finite also where a response is certain.

    logp, length    log π(y | x) in nats, summed over the |y| response tokens
    ℓ               logp / |y|, the mean; P = exp(ℓ) is what ORPO calls the probability of the response
    log odds        log P / (1 − P) = ℓ − log(1 − exp(ℓ))

[ORPO]  Hong et al. 2024, arXiv:2403.07691
"""

import math

import torch
import torch.nn.functional as F

from uft.typing import Float, Tensor


def log1mexp(x: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """log(1 − exp(x)) for x < 0, to full relative precision (Mächler 2012)."""
    near = x > -math.log(2)
    # each branch sees only its own half: a where() passes the NaN gradient of the branch it did not take
    return torch.where(
        near,
        torch.log(-torch.expm1(torch.where(near, x, -1.0))),
        torch.log1p(-torch.exp(torch.where(near, -1.0, x))),
    )


def log_odds(mean_logp: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """log P / (1 − P) with log P = `mean_logp` ≤ 0.  [ORPO] Eq. 4.

    A certain response (ℓ = 0, or above it by rounding) would have infinite odds.  ℓ is kept ε² below 0, with ε the
    spacing of its dtype at 1: the log odds end at 32 nats in float32, and the gradient is 0 beyond.
    """
    mean_logp = mean_logp.clamp(max=-(torch.finfo(mean_logp.dtype).eps ** 2))
    return mean_logp - log1mexp(mean_logp)


def orpo(
    chosen_logp: Float[Tensor, " pairs"],
    rejected_logp: Float[Tensor, " pairs"],
    chosen_length: Float[Tensor, " pairs"],
    rejected_length: Float[Tensor, " pairs"],
) -> Float[Tensor, " pairs"]:
    """−log σ(log odds(y_w) − log odds(y_l)), in nats: L_OR alone.  [ORPO] Eq. 7.

    ORPO is likelihood of the chosen response plus λ times this; λ (TRL's `beta`) is the weight of this term.
    """
    chosen = log_odds(chosen_logp / chosen_length.clamp(min=1))
    rejected = log_odds(rejected_logp / rejected_length.clamp(min=1))
    return -F.logsigmoid(chosen - rejected)
