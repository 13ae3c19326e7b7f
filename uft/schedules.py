"""Weights as functions of training progress p = (steps taken) / (all steps), which is in [0, 1).

    Constant(2)            2
    Linear(1, 0)           start + (end - start) p
    Cosine(1, 0)           end + (start - end) (1 + cos(pi p)) / 2
    Step(0.5, 1, 0)        before while p < at, after from then on
    Rest(weight)           1 - weight(p), what another weight leaves of 1

The last step has p = 1 - 1/steps, so that an `end` of 0 is approached and not reached.  In YAML a weight is a mapping,
{schedule: cosine, start: 1.0, end: 0.0}; any other function of p is a weight as well.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any


class _Schedule:
    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            number = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
            if not (number and value >= 0):
                raise ValueError(f"{name} of schedule {type(self).__name__} is {value!r}; want a number >= 0")

    def __repr__(self) -> str:
        return f"{type(self).__name__}({', '.join(f'{value:g}' for value in vars(self).values())})"


@dataclass(frozen=True, repr=False)
class Constant(_Schedule):
    value: float

    def __call__(self, progress: float) -> float:
        return self.value


@dataclass(frozen=True, repr=False)
class Linear(_Schedule):
    start: float
    end: float

    def __call__(self, progress: float) -> float:
        return self.start + (self.end - self.start) * progress


@dataclass(frozen=True, repr=False)
class Cosine(_Schedule):
    """Half a period: flat at both ends."""

    start: float
    end: float

    def __call__(self, progress: float) -> float:
        return self.end + (self.start - self.end) * 0.5 * (1 + math.cos(math.pi * progress))


@dataclass(frozen=True, repr=False)
class Step(_Schedule):
    """One number, then another.  Terms with (at, 1, 0) and (at, 0, 1) are trained one after the other."""

    at: float
    before: float
    after: float

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.at > 1:
            raise ValueError(f"at of schedule Step is {self.at!r}; want a share of the training, in [0, 1]")

    def __call__(self, progress: float) -> float:
        return self.before if progress < self.at else self.after


@dataclass(frozen=True)
class Rest:
    """1 less another weight: of two terms that share a weight of 1.  Raises ValueError where that is above 1."""

    weight: float | Callable[[float], float]

    def __post_init__(self) -> None:
        self(0.0)

    def __call__(self, progress: float) -> float:
        weight = self.weight(progress) if callable(self.weight) else self.weight
        if not 0 <= weight <= 1:
            raise ValueError(f"a weight of which the rest is wanted is {weight}; want 0 <= weight <= 1")
        return 1 - weight


SCHEDULES: dict[str, Callable[..., _Schedule]] = {c.__name__.lower(): c for c in (Constant, Linear, Cosine, Step)}


def make_weight(value: Any, name: str = "weight") -> Any:
    """A schedule from a mapping such as {schedule: cosine, start: 1, end: 0}; anything else as it is.

    Raises ValueError naming what is unknown or missing.
    """
    if not isinstance(value, Mapping):
        return value
    options = dict(value)
    schedule = options.pop("schedule", None)
    if schedule not in SCHEDULES:
        raise ValueError(f"{name}: schedule is {schedule!r}; want one of {', '.join(SCHEDULES)}")
    wanted = list(inspect.signature(SCHEDULES[schedule]).parameters)
    if set(options) != set(wanted):
        found = ", ".join(map(str, options)) or "nothing"
        raise ValueError(f"{name}: schedule {schedule!r} has {found}; want {', '.join(wanted)}")
    try:
        return SCHEDULES[schedule](**options)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None
