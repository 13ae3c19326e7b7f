"""A data set through policy and reference: log-probabilities and divergences of all its responses, as columns.

The numbers come from `uft.models.score`, in batches that `uft.collation.Cutter` makes: the trainer's own path, so that
what is measured is what is trained, with any head, layout, adapter and reference.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import nn
from tqdm.auto import tqdm

from uft.collation import Collator, Cutter
from uft.feedback import Need
from uft.models import Reference, Scored, score

TOKEN_BUDGET = 8192
BLOCK = 1024  # examples of like length that are held and cut into batches together


@dataclass(frozen=True)
class Scores:
    """One entry per response of a data set, its examples in order.  R responses, P preferences.  Nats.

    names            of the sources
    source           int64 [R], position in `names`
    example          int64 [R], position in the data set
    target           float64 [R], NaN where unknown
    length           float64 [R], tokens that count
    logp             float64 [R], summed over them
    reference_logp   float64 [R], or None without a reference
    kl, reverse_kl, entropy   float64 [R], summed over them, or None: KL(policy || reference), the other way round
    preferences      int64 [P, 2], (better, worse) entries

    Mismatched responses, which only statistics of training use, have NaN everywhere.
    """

    names: tuple[str, ...]
    source: np.ndarray
    example: np.ndarray
    target: np.ndarray
    length: np.ndarray
    logp: np.ndarray
    preferences: np.ndarray
    reference_logp: np.ndarray | None = None
    kl: np.ndarray | None = None
    reverse_kl: np.ndarray | None = None
    entropy: np.ndarray | None = None


@torch.no_grad()
def score_data(
    model: nn.Module,
    data: Any,
    collate: Collator,
    *,
    reference: Reference | None = None,
    divergence: bool = False,
    token_budget: int = TOKEN_BUDGET,
    label: str = "scoring",
) -> Scores:
    """Scores every response of a `FeedbackDataset`.  The model should be in evaluation mode; it stays in its own.

    collate        says how batches are laid out; its sources and cached log-probabilities are not used
    reference      also scores every response
    divergence     also the exact divergences per token, over the whole vocabulary
    token_budget   tokens of a batch, padding included, where a single example allows it

    Raises ValueError for a divergence without a reference, or from one with another vocabulary.
    """
    need = Need(gradient=False, reference=reference is not None)
    collate = replace(collate, sources=tuple(data.sources), reference_logps=None)
    cut = Cutter(collate, lambda kind, *sides: None if kind == "mismatched" else need, (need,), token_budget)
    first = np.asarray(data.sequences.first)
    begin = np.cumsum([0, *data.sizes])
    wanted = ["length", "logp", "target", "reference_logp"] + ["kl", "reverse_kl", "entropy"] * divergence
    columns = {name: np.full(first[-1], np.nan) for name in wanted}
    preferences = []
    device = next(model.parameters()).device
    order = np.argsort(-np.asarray(data.lengths), kind="stable")  # the largest batch first: memory fails at once
    # disable=None: a bar only where stderr is a terminal
    with tqdm(total=len(order), desc=label, unit=" examples", disable=None, delay=1, leave=False) as bar:
        for start in range(0, len(order), BLOCK):
            block = [data[int(i)] for i in order[start : start + BLOCK]]
            for batch in cut(block).batches:
                scored = score(model, batch.to(device), reference, divergence=divergence, differentiable=())
                example = begin[batch.source.numpy()] + batch.index.numpy()
                at = first[example] + batch.response.numpy()
                for name, values in _columns(scored).items():
                    columns[name][at] = values.double().cpu().numpy()
                preferences += at[batch.preferences.numpy()].tolist()
                bar.update(len(np.unique(example)))
    if reference is None:
        del columns["reference_logp"]
    example = np.repeat(np.arange(len(data)), np.diff(first))
    pairs = np.array(sorted(preferences), dtype=np.int64).reshape(-1, 2)
    source = np.searchsorted(begin, example, side="right") - 1
    return Scores(tuple(data.sources), source, example, preferences=pairs, **columns)


def _columns(scored: Scored) -> dict[str, torch.Tensor]:
    found = {"length": scored.length, "logp": scored.logp, "target": scored.batch.target}
    if scored.reference_logp is not None:
        found["reference_logp"] = scored.reference_logp
    for name in ("kl", "reverse_kl", "entropy"):
        if getattr(scored, name) is not None:
            found[name] = getattr(scored, name).double().sum(-1)
    return found
