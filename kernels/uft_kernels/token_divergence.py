"""Exact Kullback-Leibler divergences between two next-token distributions, over the full vocabulary.

    KL(p || q)[n] = sum_v p[n, v] (log p[n, v] - log q[n, v]),   p policy, q reference

N rows, V vocabulary.  The reference gets no gradient.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Divergence(NamedTuple):
    """Each [N], in nats.

    kl           KL(policy || reference): large where the policy does what the reference would not
    reverse_kl   KL(reference || policy): large where the policy no longer does what the reference did
    entropy      of the policy
    """

    kl: Tensor
    reverse_kl: Tensor
    entropy: Tensor


def token_divergence_reference(policy_logits_NV: Tensor, reference_logits_NV: Tensor) -> Divergence:
    """The specification.  Computes in float32, or in float64 if given float64."""
    dtype = torch.promote_types(policy_logits_NV.dtype, torch.float32)
    log_p = policy_logits_NV.to(dtype).log_softmax(-1)
    log_q = reference_logits_NV.detach().to(dtype).log_softmax(-1)
    p, q = log_p.exp(), log_q.exp()
    # where, not multiply: a token of probability 0 contributes 0, and 0 * inf is NaN
    kl = torch.where(p > 0, p * (log_p - log_q), 0.0).sum(-1)
    reverse_kl = torch.where(q > 0, q * (log_q - log_p), 0.0).sum(-1)
    entropy = -torch.where(p > 0, p * log_p, 0.0).sum(-1)
    return Divergence(kl, reverse_kl, entropy)


def token_divergence(policy_logits_NV: Tensor, reference_logits_NV: Tensor) -> Divergence:
    """Exact KL both ways and the policy's entropy, per row.

    policy_logits_NV, reference_logits_NV   [N, V], any float dtype; gradients go to the policy only
    returns                                 Divergence of [N] tensors, float32 or float64

    Raises ValueError where the shapes differ.
    """
    if policy_logits_NV.ndim != 2 or policy_logits_NV.shape != reference_logits_NV.shape:
        raise ValueError(f"want [N, V] twice, got {[*policy_logits_NV.shape]} and {[*reference_logits_NV.shape]}")
    return token_divergence_reference(policy_logits_NV, reference_logits_NV)
