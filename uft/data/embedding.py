"""Pairs as vectors, from the hidden states of a model: what diversity and selection look at.

pooled     mean of the last hidden states over all tokens of prompt and response; of a pair the mean over its sides,
           which is the same whichever of them stands first
last       last hidden state at the last token, which the head of a reward model reads
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import nn
from tqdm import tqdm

from uft.collation import Collator, rows_of
from uft.feedback import Example
from uft.rlhf.reward_model import RewardModel
from uft.undisturbed import undisturbed


def states(
    body: nn.Module, examples: Sequence[Example], pad_token_id: int, *, last: bool = False, batch_size: int = 64
) -> list[np.ndarray]:
    """Of every example float32 [responses, d], pooled or at the last token; see the top of the file.

    body   a transformer without a head, such as `model.base_model`
    """
    rows = [row for i, example in enumerate(examples) for row in rows_of(example, i)]
    order = sorted(range(len(rows)), key=lambda i: -len(rows[i].prompt) - len(rows[i].tokens))
    collate = Collator(pad_token_id, tuple(dict.fromkeys(example.source for example in examples)))
    device = next(body.parameters()).device
    found: list[np.ndarray | None] = [None] * len(rows)
    bar = tqdm(total=len(rows), desc="hidden states", unit=" responses", disable=None, delay=1, leave=False)
    with undisturbed(body), bar:
        for start in range(0, len(order), batch_size):
            part = order[start : start + batch_size]
            batch = collate.batch([rows[i] for i in part]).to(device)
            mask = batch.attention_mask
            hidden = body(input_ids=batch.input_ids, attention_mask=mask, use_cache=False).last_hidden_state.float()
            if last:
                at = (torch.arange(mask.shape[1], device=device) * mask).argmax(-1)
                values = hidden[torch.arange(len(mask), device=device), at]
            else:
                inside = mask.bool().unsqueeze(-1)
                values = torch.where(inside, hidden, 0.0).sum(1) / inside.sum(1)
            for i, value in zip(part, values.cpu().numpy()):
                found[i] = value
            bar.update(len(part))
    ends = np.cumsum([0, *(len(example.responses) for example in examples)])
    return [np.stack(found[ends[i] : ends[i + 1]]) for i in range(len(examples))]


def pair_embedding(body: nn.Module, pairs: Sequence[Example], pad_token_id: int) -> np.ndarray:
    """float32 [pairs, d], pooled."""
    return np.stack([each.mean(0) for each in states(body, pairs, pad_token_id)])


def pair_features(reward: RewardModel, pairs: Sequence[Example]) -> np.ndarray:
    """float32 [pairs, d]: h_a − h_b at the last token, in the units of the reward: w · (h_a − h_b) is the margin."""
    found = states(reward.model.base_model, pairs, reward.pad_token_id, last=True)
    return np.stack([each[0] - each[1] for each in found]) / reward.scale
