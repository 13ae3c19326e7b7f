"""Balancers: weights of an objective's terms decided from what was measured, once per optimiser step.

A balancer starts from the terms' own weights w_i (numbers or schedules) at this moment.  What it must remember is a
mapping of JSON values that is saved with every checkpoint; the balancer itself is a value and does not change.

    Alright            one term per step, drawn at random                         [XR] ALRIGHT
    Maxright           one term per step, the one with the largest weighted gap   [XR] MAXRIGHT
    ForgettingBudget   as much of the other terms as a measured quantity allows
    EntropyWeights     weights that fall and rise with the policy's entropy       [SRFT] arXiv:2506.19767

[XR] arXiv:2410.15483.  There the weights are (lambda, 1 - lambda) for preferences and likelihood.  Here the term that
is chosen gets the sum of all weights, which is 1 there, so that ALRIGHT's step is in the mean that of the weighted sum.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from uft.feedback import ROWS

Memory = dict[str, Any]  # JSON values, bitwise the same after resumption


@dataclass(frozen=True)
class Moment:
    """What a balancer may ask before an optimiser step; the same on all ranks.

    step        optimiser steps taken before this one
    seed        of the run
    weights     the terms' own weights
    present     those of nonzero weight with items in this step
    losses      the mean loss of each present term over this step's data, by a pass without gradient
    measure     metrics of the evaluation data that hold the metric of this name
    entropy     the policy's mean entropy per counted token of this step's rows of a name (`uft.feedback.ROWS`), in
                nats, by a pass without gradient; None where the step has none
    """

    step: int
    seed: int
    weights: Mapping[str, float]
    present: tuple[str, ...]
    losses: Callable[[], dict[str, float]]
    measure: Callable[[str], dict[str, float]]
    entropy: Callable[[str], float | None] = lambda on: None


class Balancer:
    """What every balancer has.  Subclasses are frozen dataclasses whose fields are their options."""

    rests = False  # whether it gives a term weight 0 for whole steps
    watches = False  # whether it asks what the terms' losses were
    quantity: str | None = None  # the metric of evaluation data that it measures

    def check(self, terms: tuple[str, ...]) -> None:
        """Raises ValueError where it does not fit the terms of an objective."""

    def weights(self, now: Moment, memory: Memory) -> dict[str, float]:
        """The weights of the step, by term."""
        raise NotImplementedError

    def saw(self, losses: Mapping[str, float], memory: Memory) -> None:
        """The mean loss of each term that was trained, after a step."""

    def logged(self, now: Moment, memory: Memory) -> dict[str, float]:
        """What is logged of a step, as `balance/<name>`."""
        return {}


def _alone(chosen: str, now: Moment) -> dict[str, float]:
    """All the weight on one term."""
    return {name: sum(now.weights.values()) if name == chosen else 0.0 for name in now.weights}


@dataclass(frozen=True)
class Alright(Balancer):
    """Each step trains one term, drawn with probability w_i / (sum of weights).  Costs no measurement.

    The draw depends on the run's seed and the number of the step alone.  Terms without items in a step are not drawn.
    """

    rests = True

    def weights(self, now: Moment, memory: Memory) -> dict[str, float]:
        odds = np.array([now.weights[name] for name in now.present])
        if not len(odds):
            return dict(now.weights)
        at = np.random.default_rng([now.seed, now.step]).random() * odds.sum()
        place = int(np.searchsorted(odds.cumsum(), at, side="right"))
        return _alone(now.present[min(place, len(odds) - 1)], now)


@dataclass(frozen=True)
class Maxright(Balancer):
    """Each step trains the term with the largest w_i (f_i - optimum_i), f_i being the loss when it was last seen.

    The loss of the trained term is seen in its own step; every `refresh` steps those of all terms are measured on the
    step's data before the choice, which costs a forward pass (and the reference's) over them.

    optimum   per term, the lowest loss it can reach, as trained alone; 0 is a bound that every loss of ours keeps
    """

    optimum: Mapping[str, float]
    refresh: int = 10

    rests = True
    watches = True

    def __post_init__(self):
        if not isinstance(self.optimum, Mapping) or not all(map(_is_number, self.optimum.values())):
            raise ValueError(f"maxright: optimum is {self.optimum!r}; want the lowest loss of each term, by name")
        _want_steps("maxright", "refresh", self.refresh)

    def check(self, terms: tuple[str, ...]) -> None:
        if set(self.optimum) != set(terms):
            raise ValueError(f"maxright: optimum is of {', '.join(self.optimum)}; want that of {', '.join(terms)}")

    def weights(self, now: Moment, memory: Memory) -> dict[str, float]:
        seen = memory.setdefault("losses", {})
        if now.step % self.refresh == 0 or not set(now.present) <= set(seen):
            seen.update(now.losses())
        if not now.present:
            return dict(now.weights)
        gaps = self._gaps(now, memory)
        return _alone(max(now.present, key=lambda name: gaps[name]), now)

    def saw(self, losses: Mapping[str, float], memory: Memory) -> None:
        memory["losses"].update(losses)

    def logged(self, now: Moment, memory: Memory) -> dict[str, float]:
        return {f"gap/{name}": gap for name, gap in self._gaps(now, memory).items()}

    def _gaps(self, now: Moment, memory: Memory) -> dict[str, float]:
        return {name: now.weights[name] * (memory["losses"][name] - self.optimum[name]) for name in now.present}


@dataclass(frozen=True)
class ForgettingBudget(Balancer):
    """Trains the objective as far as a measured quantity stays within its budget.

    Every `every` steps, and before the first, m is measured on held-out data.  Its violation of the budget,
    g = (m - budget) / unit, moves a multiplier by a PI rule, of which integral control alone is projected dual ascent
    on the constraint m <= budget:

        I      <- clip(I + integral g, 0, most)
        lambda <- clip(I + proportional g, 0, most)
        w_i    <- w_i / (1 + lambda), and for the terms that keep m low  (w_i + lambda) / (1 + lambda)

    So the weights stay between w_i and the ends 0 and 1 however large lambda grows, and the learning rate with them.

    quantity       a metric of the evaluation data, such as eval_demonstrations/nll or eval_prior_kl
    rise           how far above its value before the first step it may be; this is also the unit
    limit          or: the value it may have; the unit is its distance from the value before the first step
    every          optimiser steps between measurements, each of which is an evaluation
    keep           the terms that keep it low
    """

    quantity: str
    rise: float | None = None
    limit: float | None = None
    every: int = 50
    keep: tuple[str, ...] = ("sft",)
    proportional: float = 1.0
    integral: float = 0.5
    most: float = 100.0

    def __post_init__(self):
        object.__setattr__(self, "keep", (self.keep,) if isinstance(self.keep, str) else tuple(self.keep))
        if not isinstance(self.quantity, str) or not self.quantity.startswith("eval_"):
            raise ValueError(f"forgetting_budget: quantity is {self.quantity!r}; want a metric such as eval_NAME/nll")
        if (self.rise is None) == (self.limit is None):
            raise ValueError(f"forgetting_budget: rise is {self.rise} and limit {self.limit}; want one of them")
        if self.rise is not None and not (_is_number(self.rise) and self.rise > 0):
            raise ValueError(f"forgetting_budget: rise is {self.rise!r}; want a number > 0 (or a limit)")
        if self.limit is not None and not _is_number(self.limit):
            raise ValueError(f"forgetting_budget: limit is {self.limit!r}; want a number")
        for name in ("proportional", "integral", "most"):
            if not (_is_number(getattr(self, name)) and getattr(self, name) >= 0):
                raise ValueError(f"forgetting_budget: {name} is {getattr(self, name)!r}; want a number >= 0")
        if not self.proportional and not self.integral:
            raise ValueError("forgetting_budget: proportional and integral are 0; want one of them above it")
        _want_steps("forgetting_budget", "every", self.every)

    def check(self, terms: tuple[str, ...]) -> None:
        unknown = [name for name in self.keep if name not in terms]
        if unknown or set(self.keep) >= set(terms):
            raise ValueError(
                f"forgetting_budget: keep is {', '.join(self.keep) or 'nothing'}; want some, but not all, of the terms "
                f"{', '.join(terms)}"
            )

    def weights(self, now: Moment, memory: Memory) -> dict[str, float]:
        if now.step % self.every == 0 or "multiplier" not in memory:
            self._update(now.measure(self.quantity), memory)
        m = memory["multiplier"]
        return {name: (w + m * (name in self.keep)) / (1 + m) for name, w in now.weights.items()}

    def _update(self, metrics: Mapping[str, float], memory: Memory) -> None:
        if not math.isfinite(value := metrics.get(self.quantity, math.nan)):
            found = f"is {value}" if self.quantity in metrics else f"is none of {', '.join(sorted(metrics))}"
            raise ValueError(f"forgetting_budget: {self.quantity} {found}; want a finite metric of the evaluation data")
        start = memory.setdefault("start", value)
        budget = self.limit if self.rise is None else start + self.rise
        unit = self.rise or abs(budget - start) or 1.0
        violation = (value - budget) / unit
        integral = min(max(memory.get("integral", 0.0) + self.integral * violation, 0.0), self.most)
        multiplier = min(max(integral + self.proportional * violation, 0.0), self.most)
        memory.update(measured=value, violation=violation, integral=integral, multiplier=multiplier)

    def logged(self, now: Moment, memory: Memory) -> dict[str, float]:
        return {name: memory[name] for name in ("measured", "violation", "multiplier")}


@dataclass(frozen=True)
class EntropyWeights(Balancer):
    """w_i exp(-H) for the terms that fall, w_i exp(H) for those that rise; the others keep theirs.  [SRFT]

    H is the policy's mean entropy per token, in nats, on the step's own rows before it: imitate where the policy is
    sure, explore where it is not.  A step without such rows has the H of the last one, the first the weights w_i.

    falls, rises   names of terms
    on             the rows on which H is measured, which costs a forward pass over them
    """

    falls: tuple[str, ...] = ("sft",)
    rises: tuple[str, ...] = ()
    on: str = "scores"

    def __post_init__(self):
        for name in ("falls", "rises"):
            value = getattr(self, name)
            object.__setattr__(self, name, (value,) if isinstance(value, str) else tuple(value))
        for part in self.on.split("+") if isinstance(self.on, str) else [self.on]:
            if not isinstance(part, str) or part.strip() not in ROWS:
                raise ValueError(f"entropy: on is {self.on!r}; want {', '.join(ROWS)}, or several joined by +")

    def check(self, terms: tuple[str, ...]) -> None:
        named = (*self.falls, *self.rises)
        if not named or len(set(named)) < len(named) or not set(named) <= set(terms):
            found = f"falls is {', '.join(self.falls) or 'nothing'} and rises {', '.join(self.rises) or 'nothing'}"
            raise ValueError(f"entropy: {found}; want different terms of {', '.join(terms)}")

    def weights(self, now: Moment, memory: Memory) -> dict[str, float]:
        if (found := now.entropy(self.on)) is not None:
            memory["entropy"] = found
        sign = dict.fromkeys(self.falls, -1) | dict.fromkeys(self.rises, 1)
        return {name: w * math.exp(sign.get(name, 0) * memory.get("entropy", 0.0)) for name, w in now.weights.items()}

    def logged(self, now: Moment, memory: Memory) -> dict[str, float]:
        return dict(memory)


BALANCERS: dict[str, type[Balancer]] = {
    "alright": Alright, "maxright": Maxright, "forgetting_budget": ForgettingBudget, "entropy": EntropyWeights,
}  # fmt: skip


def make_balancer(spec: Any) -> Balancer | None:
    """A balancer from its name, or from {method: name, option: value, ...}.  Raises ValueError for what is unknown."""
    if spec is None or isinstance(spec, Balancer):
        return spec
    options = {"method": spec} if isinstance(spec, str) else dict(spec) if isinstance(spec, Mapping) else {}
    method = options.pop("method", None)
    if method not in BALANCERS:
        raise ValueError(f"balance: method is {method!r}; want one of {', '.join(BALANCERS)}")
    wanted = [f.name for f in dataclasses.fields(BALANCERS[method])]
    if unknown := set(options) - set(wanted):
        raise ValueError(
            f"balance: {method} has no option {min(map(str, unknown))!r}; want {', '.join(wanted) or 'none'}"
        )
    try:
        return BALANCERS[method](**options)
    except TypeError as error:
        raise ValueError(f"balance: {method}: {str(error).split('() ')[-1]}") from None


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _want_steps(method: str, name: str, value: Any) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError(f"{method}: {name} is {value!r}; want a number of steps")
