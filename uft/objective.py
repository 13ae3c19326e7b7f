"""The joint objective: weighted terms, each with the rows it is on and a denominator of its own.

    L = sum over terms  w_i(progress) * (1 / n_i) * sum over the term's items of its loss

n_i counts tokens, pairs or responses over the **whole optimiser step**: every micro-batch of the accumulation and
every rank.  So L and its gradient do not depend on how the step is cut into micro-batches.

A weight is a number, a schedule (`uft.schedules`) or any function of progress; a balancer (`uft.balance`) decides them
from what was measured.  A term whose weight is 0 in a step takes no part in it.

A preset is a function of its hyperparameters that returns an `Objective`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch

from uft.balance import Balancer
from uft.feedback import KINDS, ROWS, Batch, Need
from uft.models import Scored
from uft.terms import Pointwise, Sums, Term, Weight
from uft.typing import Bool, Float, Tensor


@dataclass(frozen=True)
class Objective:
    """A weighted sum of terms.  `name` is the preset it came from, or "custom"."""

    terms: tuple[Term, ...]
    name: str = "custom"
    balancer: Balancer | None = None

    def __post_init__(self) -> None:
        names = [term.name for term in self.terms]
        if not names or len(set(names)) < len(names):
            raise ValueError(f"an objective needs terms with different names; got {names}")
        if self.balancer is not None:
            self.balancer.check(tuple(names))

    @cached_property
    def needs_reference(self) -> bool:
        return any(term.needs_reference for term in self.terms)

    @cached_property
    def needs_divergence(self) -> bool:
        return any(term.needs_divergence for term in self.terms)

    @cached_property
    def rests(self) -> bool:
        """Whether some term has weight 0 in several steps, which then leave out the rows that it alone is on."""
        of_a_run = [[weight_at(term.weight, k / 64) for k in range(64)] for term in self.terms]
        return (self.balancer is not None and self.balancer.rests) or any(w.count(0.0) > 1 for w in of_a_run)

    @property
    def differentiable(self) -> tuple[str, ...]:
        """The divergences that some term is made of."""
        return tuple({term.divergence: None for term in self.terms if term.divergence is not None})

    @cached_property
    def kinds_with_mismatched(self) -> frozenset[str]:
        """The kinds of example that need a response to another prompt, for KTO's KL."""
        terms = tuple(term for term in self.terms if term.statistics_on == "mismatched")
        return Objective(terms).kinds if terms else frozenset()

    @cached_property
    def statistic_terms(self) -> tuple[Pointwise, ...]:
        return tuple(term for term in self.terms if isinstance(term, Pointwise) and term.statistics_on)

    @cached_property
    def kinds(self) -> frozenset[str]:
        """The kinds of example that some term uses."""
        names = {part.strip() for term in self.terms for part in term.on.split("+")}
        return frozenset(k for name in names for k in ROWS.get(name, ("pair",)))

    @cached_property
    def kinds_with_reference(self) -> frozenset[str]:
        """The kinds of example whose responses the reference must score."""
        needing = tuple(term for term in self.terms if term.needs_reference)
        return Objective(needing).kinds if needing else frozenset()

    def used_rows(self, batch: Batch) -> Bool[Tensor, " responses"]:
        """bool [R]: the responses that some term is on.  The others need no pass through any model."""
        return torch.stack([batch.rows(term.on) for term in self.terms]).any(0)

    def uses(self, kind: str, chosen: bool, rejected: bool) -> bool:
        """Whether some term is on such a response."""
        return any(_is_on(term.on, kind, chosen, rejected) for term in self.terms)

    def need(self, kind: str, chosen: bool, rejected: bool) -> Need | None:
        """What becomes of one response, of an example of this kind, that is the better or worse side of some pair; None
        where nothing does."""
        statistics = tuple(
            t.name for t in self.statistic_terms if _is_on(t.statistics_on or t.on, kind, chosen, rejected)
        )
        terms = tuple(term.name for term in self.terms if _is_on(term.on, kind, chosen, rejected))
        if not terms and not statistics:
            return None
        reference = kind in self.kinds_with_reference or kind == "mismatched"
        return Need(bool(terms), reference, statistics, terms if self.rests else ())

    @cached_property
    def needs(self) -> tuple[Need, ...]:
        """All that `need` can answer."""
        sides = ((False, False), (True, False), (False, True), (True, True))
        found = (self.need(kind, *side) for kind in KINDS for side in sides)
        return tuple(dict.fromkeys(need for need in found if need is not None))

    def counts(self, batch: Batch) -> Float[Tensor, " terms"]:
        """float64 [terms]: the items of this batch, to be summed over the step."""
        return torch.stack([term.count(batch).double() for term in self.terms])

    def __call__(
        self,
        scored: Scored,
        counts: Float[Tensor, " terms"],
        statistics: Mapping[str, Mapping[str, Tensor]] | None = None,
        progress: float = 0.0,
    ) -> tuple[Float[Tensor, ""], Sums]:
        """This micro-batch's share of the step's loss, and its metrics as (sum, count).

        counts       [terms], of the whole step (see `counts`)
        statistics   per term name, what its `statistics` returned
        """
        # every rank's backward passes through the same outputs of the model, whatever rows it has
        reached = (scored.token_logp, *(getattr(scored, name) for name in self.differentiable))
        total = torch.stack([torch.nan_to_num(value.sum() * 0.0) for value in reached if value is not None]).sum()
        metrics: Sums = {}
        for term, n in zip(self.terms, counts):
            here = term.count(scored.batch)
            weight = weight_at(term.weight, progress)
            if here > 0:
                summed = term.loss(scored, (statistics or {}).get(term.name, {}))
                total = total + weight * summed / n.to(summed.dtype)
                metrics[f"loss/{term.name}"] = (summed.detach(), here)
                for name, (value, items) in term.metrics(scored).items():
                    before = metrics.get(name, (0.0, 0.0))
                    metrics[name] = (before[0] + value.detach(), before[1] + items)
            metrics[f"weight/{term.name}"] = (total.new_tensor(weight), total.new_tensor(1.0))
        return total, metrics

    def weights(self, progress: float) -> dict[str, float]:
        """The terms' own weights at this point of the training."""
        return {term.name: weight_at(term.weight, progress) for term in self.terms}

    def at(self, weights: Mapping[str, float]) -> Objective:
        """The objective of one step: the terms whose weight is not 0, with these numbers as weights."""
        if not any(weights.values()):
            raise ValueError(f"every weight of objective {self.name!r} is 0; want a term to train on")
        terms = tuple(replace(t, weight=weights[t.name]) for t in self.terms if weights[t.name])
        return Objective(terms, self.name)

    def with_weights(self, **weights: Weight) -> Objective:
        """The same objective with other weights, by term name."""
        unknown = set(weights) - {term.name for term in self.terms}
        if unknown:
            raise ValueError(f"no term {', '.join(sorted(unknown))} in {[term.name for term in self.terms]}")
        return replace(self, terms=tuple(replace(t, weight=weights.get(t.name, t.weight)) for t in self.terms))

    def describe(self) -> list[dict[str, Any]]:
        """The terms as plain data, for records and model cards."""
        return [
            {
                "name": term.name,
                "type": type(term).__name__,
                "on": term.on,
                "weight": term.weight if isinstance(term.weight, (int, float)) else repr(term.weight),
                **({"loss": term.function.__name__} if hasattr(term, "function") else {}),
                **({"beta": term.beta} if hasattr(term, "beta") else {}),
                **({"direction": term.direction} if hasattr(term, "direction") else {}),
                **dict(getattr(term, "options", {})),
            }
            for term in self.terms
        ]


def _is_on(on: str, kind: str, chosen: bool, rejected: bool) -> bool:
    """What `Batch.rows` says of a batch, for one response."""
    sides = {"chosen": chosen, "rejected": rejected}
    return any(sides[name] if name in sides else kind in ROWS[name] for name in map(str.strip, on.split("+")))


def weight_at(weight: Weight, progress: float) -> float:
    return float(weight(progress) if callable(weight) else weight)
