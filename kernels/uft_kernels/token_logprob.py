"""Log-probability of one token per row of logits.

    l[n] = z[n, t[n]] - log sum_v exp z[n, v]

Rows whose target is IGNORE have l = 0 and no gradient.  N rows, V vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor

IGNORE = -100


def token_logprob_reference(logits_NV: Tensor, target_N: Tensor) -> Tensor:
    """The specification.  Computes in float32, or in float64 if given float64."""
    ignored_N = target_N == IGNORE
    logp_NV = logits_NV.to(torch.promote_types(logits_NV.dtype, torch.float32)).log_softmax(-1)
    logp_N = logp_NV.gather(-1, target_N.masked_fill(ignored_N, 0)[:, None]).squeeze(-1)
    return logp_N.masked_fill(ignored_N, 0.0)


def token_logprob(logits_NV: Tensor, target_N: Tensor) -> Tensor:
    """Log-probability of each row's target, in nats.

    logits_NV   [N, V], any float dtype; the arithmetic is float32, or float64 if given float64
    target_N    [N], int64; IGNORE gives 0 and no gradient
    returns     [N], float32 or float64

    Raises ValueError where the shapes do not fit.
    """
    if logits_NV.ndim != 2 or target_N.shape != logits_NV.shape[:1]:
        raise ValueError(f"want [N, V] and [N], got {[*logits_NV.shape]} and {[*target_N.shape]}")
    return token_logprob_reference(logits_NV, target_N)
