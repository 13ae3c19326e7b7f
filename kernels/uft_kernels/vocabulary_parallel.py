"""A vocabulary in shards, one on each rank: what a row of the whole is made of.

Each rank reads its own logits once.  The four numbers that it keeps of each row are gathered and merged, which is the
one collective of the forward; the backward adds up the gradients of the hidden states.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from uft_kernels.token_logprob import Rows


class Shard(NamedTuple):
    """Rank r of `group` holds the entries first <= v < first + V of the vocabulary."""

    group: Any
    first: int

    def local(self, target_N: Tensor, V: int) -> Tensor:
        """Targets within this shard; -1 where they stand in another."""
        local_N = target_N - self.first
        return local_N.masked_fill((local_N < 0) | (local_N >= V), -1)


def merged(parts: Tensor, scale: float = 1.0) -> Rows:
    """Rows of the whole vocabulary from those of its shards.

    parts   [shards, 5, N]: the fields of Rows, and 1 where the target stands in the shard
    scale   k of `raw_logits`

        M = max m_r,   d_r = k (m_r - M),   s = sum_r s_r e^d_r,   H = log s - sum_r w_r z_r,   w_r = s_r e^d_r / s

    with z_r = d_r + log s_r - H_r, the mean logit of shard r under its own softmax, less k M.
    """
    logp, entropy, peak, log_sum, owned = parts.unbind(1)  # each [shards, N]
    top = peak.amax(0)
    fall = (peak - top) * scale
    mass = fall + log_sum
    total = mass.logsumexp(0)
    share = (mass - total).exp()
    mean = (share * (fall + (log_sum - entropy))).sum(0)
    at_target = torch.where(owned > 0, (logp + log_sum) + fall, 0.0).sum(0)
    return Rows(at_target - total, total - mean, top, total)


def gathered(part: Tensor, group: Any) -> Tensor:
    parts = [torch.empty_like(part) for _ in range(torch.distributed.get_world_size(group))]
    torch.distributed.all_gather(parts, part.contiguous(), group=group)
    return torch.stack(parts)
