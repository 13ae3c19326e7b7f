"""What watching asks of a trainer, whichever it is: terms, sources, axes of the plane of losses, place among stages."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from uft.data.mixture import FeedbackDataset
from uft.objective import Objective
from uft.terms import Likelihood, Pairwise, Pointwise

Axes = tuple[tuple[str, ...], tuple[str, ...]]  # names of metrics whose sum is x, and whose sum is y


@dataclass(frozen=True)
class Place:
    """Where among the stages of a run a trainer stands.

    names      of all stages, in order
    position   of this one
    costs      expected FLOPs of each, or None where that is not known
    axes       of all stages together
    """

    names: tuple[str, ...]
    position: int
    costs: tuple[float, ...] | None = None
    axes: Axes = ((), ())


def splits_of(trainer: Any) -> tuple[str, ...]:
    """Names of the evaluation data sets, where there are several."""
    return tuple(trainer.eval_dataset) if isinstance(trainer.eval_dataset, Mapping) else ()


def known_sources(trainer: Any) -> tuple[str, ...]:
    return tuple(getattr(trainer.data_collator, "sources", ()))


def axes_of(objective: Objective | None, data: FeedbackDataset | None) -> Axes:
    """Losses of likelihood terms, and of preference terms.  Where an objective has no likelihood term, as Wang et
    al.'s, the likelihood of the data sets of demonstrations and documents stands for it."""
    if objective is None:
        return (), ()
    x = tuple(f"loss/{term.name}" for term in objective.terms if isinstance(term, Likelihood))
    y = tuple(f"loss/{term.name}" for term in objective.terms if isinstance(term, (Pairwise, Pointwise)))
    if not x and isinstance(data, FeedbackDataset):
        imitated = [name for name, kinds in data.kinds().items() if kinds & {"demonstration", "document"}]
        x = tuple(f"{name}/nll" for name in imitated)
    return x, y


def joined(axes: Sequence[Axes]) -> Axes:
    """The axes of several stages as one plane."""
    x, y = (tuple(dict.fromkeys(name for each in axes for name in each[i])) for i in (0, 1))
    return x, y
