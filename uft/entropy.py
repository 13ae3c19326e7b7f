"""The policy's entropy at each token, over the whole vocabulary."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from uft.feedback import Batch
from uft.models import response_logits

CHUNK = 1024  # tokens whose float32 log-softmax is held at once


@torch.no_grad()
def summed_entropy(model: nn.Module, batch: Batch, on: str) -> tuple[Tensor, Tensor]:
    """Entropy in nats summed over the counted tokens of the rows `on` (`uft.feedback.ROWS`), and their number."""
    logits, mask = response_logits(model, batch), batch.shifted
    wanted = batch.rows(on)[mask.nonzero()[:, 0]]
    parts = [_entropy(part) for part in logits[wanted].split(CHUNK)]
    return sum(parts, torch.zeros((), dtype=torch.float64, device=logits.device)), wanted.sum()


def _entropy(logits: Tensor) -> Tensor:
    logp = logits.float().log_softmax(-1)
    # a token that cannot come has p log p = 0, not NaN
    return -torch.where(logp > -torch.inf, logp.exp() * logp, 0.0).sum(dtype=torch.float64)
