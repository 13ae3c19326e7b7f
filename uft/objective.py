"""The joint objective: weighted terms, each with the rows it is on and a denominator of its own.

    L = sum over terms  w_i(progress) * (1 / n_i) * sum over the term's items of its loss

n_i counts tokens, pairs or responses over the **whole optimiser step**: every micro-batch of the accumulation and
every rank.  So L and its gradient do not depend on how the step is cut into micro-batches.

A loss is an ordinary function from `uft.losses`; its arguments are filled by name (`chosen_reward`, `logp`,
`target`, ...).  A preset is a function of its hyperparameters that returns an `Objective`.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from uft import losses
from uft.feedback import KINDS, ROWS, Batch, Need
from uft.models import Scored

Weight = float | Callable[[float], float]  # a constant, or a function of training progress in [0, 1]
Sums = dict[str, tuple[Tensor, Tensor]]  # metric -> (sum, count); the mean over the step is their quotient


@dataclass(frozen=True)
class Term:
    """One summand of the objective.

    name      under which it is logged (`loss/<name>`, `weight/<name>`)
    on        the rows it applies to: names from `uft.feedback.ROWS`, chosen, rejected, joined by +
    weight    a number, or a function of progress
    """

    name: str
    on: str
    weight: Weight = 1.0

    needs_reference = False
    needs_divergence = False
    statistics_on = None  # rows to be scored without gradient before the step

    def __post_init__(self):
        if isinstance(self.weight, (int, float)) and not self.weight >= 0:
            raise ValueError(f"weight of term {self.name!r} is {self.weight}; want a number >= 0")
        for part in self.on.split("+"):
            if part.strip() not in (*ROWS, "chosen", "rejected"):
                raise ValueError(f"term {self.name!r} is on {part!r}; want {', '.join(ROWS)}, chosen or rejected")

    def count(self, batch: Batch) -> Tensor:
        """How many items of this batch the term averages over."""
        raise NotImplementedError

    def loss(self, scored: Scored, statistics: Mapping[str, Tensor]) -> Tensor:
        """The loss summed (not averaged) over the items of the batch."""
        raise NotImplementedError

    def metrics(self, scored: Scored) -> Sums:
        return {}


def _parameters(function: Callable) -> Mapping[str, inspect.Parameter]:
    return inspect.signature(function).parameters


def _bind(function: Callable, available: Mapping[str, Any], options: Mapping[str, Any]) -> Tensor:
    wanted = {name: available[name] for name in _parameters(function) if name in available and name not in options}
    return function(**wanted, **options)


def _check_options(name: str, function: Callable, options: Mapping[str, Any]) -> None:
    keyword_only = [n for n, p in _parameters(function).items() if p.kind is inspect.Parameter.KEYWORD_ONLY]
    for option in options:
        if option not in keyword_only:
            wanted = ", ".join(keyword_only) or "no option"
            raise ValueError(f"{function.__name__} of term {name!r} has no option {option!r}; want {wanted}")


@dataclass(frozen=True)
class Likelihood(Term):
    """-log pi(y | x) of the rows it is on, averaged over tokens (or over sequences of token means)."""

    function: Callable = losses.token_nll
    options: Mapping[str, Any] = field(default_factory=dict)

    @property
    def per_sequence(self) -> bool:
        return "in_response" in _parameters(self.function)

    def count(self, batch: Batch) -> Tensor:
        rows = batch.rows(self.on)
        return rows.sum() if self.per_sequence else batch.shifted[rows].sum()

    def loss(self, scored: Scored, statistics: Mapping[str, Tensor]) -> Tensor:
        rows = scored.batch.rows(self.on)
        available = {"token_logp": scored.token_logp[rows], "in_response": scored.batch.shifted[rows]}
        value = _bind(self.function, available, self.options)
        weight = scored.batch.weight[rows]
        if not self.per_sequence:
            value = torch.where(available["in_response"], value, 0.0).sum(-1)
        return (weight * value).sum()


@dataclass(frozen=True)
class _Preference(Term):
    """What pairwise and pointwise terms share: a function of implicit rewards or log-probabilities."""

    function: Callable = losses.dpo
    beta: float = 0.1
    options: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self):
        super().__post_init__()
        _check_options(self.name, self.function, self.options)
        if not isinstance(self.beta, (int, float)) or not self.beta > 0:
            raise ValueError(f"beta of term {self.name!r} is {self.beta!r}; want a number > 0")

    @property
    def needs_reference(self) -> bool:
        return losses.needs_reference(self.function)

    def _reward(self, scored: Scored) -> Tensor | None:
        if scored.reference_logp is None or not self.needs_reference:
            return None
        return losses.implicit_reward(scored.logp, scored.reference_logp, self.beta)

    def _quantities(self, scored: Scored, rows: Tensor, prefix: str = "") -> dict[str, Tensor]:
        found = {"logp": scored.logp[rows], "length": scored.length[rows]}
        if self.needs_reference:
            found |= {"reference_logp": scored.reference_logp[rows], "reward": self._reward(scored)[rows]}
        return {prefix + name: value for name, value in found.items()}


@dataclass(frozen=True)
class Pairwise(_Preference):
    """A loss of (chosen, rejected), averaged over pairs."""

    on: str = "pairs"

    def count(self, batch: Batch) -> Tensor:
        return torch.tensor(len(self._pairs(batch)), device=batch.kind.device)

    def _pairs(self, batch: Batch) -> Tensor:
        return batch.preferences[batch.rows(self.on)[batch.preferences].all(-1)]

    def loss(self, scored: Scored, statistics: Mapping[str, Tensor]) -> Tensor:
        better, worse = self._pairs(scored.batch).unbind(-1)
        available = self._quantities(scored, better, "chosen_") | self._quantities(scored, worse, "rejected_")
        value = _bind(self.function, available | {"beta": self.beta}, self.options)
        return (scored.batch.weight[better] * value).sum()

    def metrics(self, scored: Scored) -> Sums:
        better, worse = self._pairs(scored.batch).unbind(-1)
        reward = self._reward(scored)
        if reward is None:  # SimPO's and ORPO's reward is the mean log-probability, CPO's the sum
            per_token = "chosen_length" in _parameters(self.function)
            reward = self.beta * (scored.logp / scored.length.clamp(min=1) if per_token else scored.logp)
        margin = reward[better] - reward[worse]
        n = torch.tensor(float(len(better)), device=margin.device)
        # a tie (policy equal to reference) is half right
        right = (margin > 0).float() + 0.5 * (margin == 0).float()
        return {
            "rewards/chosen": (reward[better].sum(), n),
            "rewards/rejected": (reward[worse].sum(), n),
            "rewards/margins": (margin.sum(), n),
            "rewards/accuracies": (right.sum(), n),
            "logps/chosen": (scored.logp[better].sum(), n),
            "logps/rejected": (scored.logp[worse].sum(), n),
        }


@dataclass(frozen=True)
class Pointwise(_Preference):
    """A loss of one response and its target, averaged over the responses that have a target."""

    on: str = "responses"

    def _rows(self, batch: Batch) -> Tensor:
        return batch.rows(self.on) & ~batch.target.isnan()

    def count(self, batch: Batch) -> Tensor:
        return self._rows(batch).sum()

    def loss(self, scored: Scored, statistics: Mapping[str, Tensor]) -> Tensor:
        rows = self._rows(scored.batch)
        available = self._quantities(scored, rows) | {"target": scored.batch.target[rows], "beta": self.beta}
        value = _bind(self.function, available | dict(statistics), self.options)
        return (scored.batch.weight[rows] * value).sum()

    def metrics(self, scored: Scored) -> Sums:
        reward = self._reward(scored)
        if reward is None:
            return {}
        rows = self._rows(scored.batch)
        desired = rows & (scored.batch.target >= 0.5)
        undesired = rows & (scored.batch.target < 0.5)
        found = {}
        for name, side in (("chosen", desired), ("rejected", undesired)):
            n = side.sum().float()
            found[f"rewards/{name}"] = (reward[side].sum(), n)
            found[f"logps/{name}"] = (scored.logp[side].sum(), n)
        return found

    # KTO and BCO shift the reward by a statistic of the step, which must be known before the first micro-batch

    @property
    def statistics_on(self) -> str | None:
        names = _parameters(self.function)
        return "mismatched" if "kl" in names else self.on if "delta" in names else None

    def gather(self, scored: Scored) -> Sums:
        """Sums over this micro-batch from which `statistics` makes what the loss asks for."""
        reward = self._reward(scored)
        if self.statistics_on == "mismatched":
            rows = scored.batch.rows("mismatched")
            return {"kl": ((reward / self.beta)[rows].sum(), rows.sum())}
        rows = self._rows(scored.batch)
        return {"delta": (reward[rows].sum(), rows.sum())}

    def statistics(self, sums: Sums, state: dict[str, float], *, update: bool) -> dict[str, Tensor]:
        """What the loss asks for.  `state` outlives the step; evaluation does not `update` it."""
        if "kl" in sums:
            total, n = sums["kl"]
            return {"kl": (total / n.clamp(min=1)).clamp(min=0)}
        total, n = sums["delta"]
        mean = losses.RunningMean(state.get("mean", 0.0), state.get("count", 0.0))
        if update:
            mean = mean.updated(float(total), float(n))
            state.update(mean.state_dict())
        return {"delta": total.new_tensor(mean.mean)}


@dataclass(frozen=True)
class Divergence(Term):
    """Exact KL over the full vocabulary, per token of the rows it is on.

    direction   "policy_reference"  KL(policy || reference), mode-seeking, what RLHF penalises
                "reference_policy"  KL(reference || policy), mass-covering, keeps what the reference knew
    """

    on: str = "demonstrations+responses"
    direction: str = "policy_reference"

    needs_reference = True
    needs_divergence = True

    def __post_init__(self):
        super().__post_init__()
        if self.direction not in ("policy_reference", "reference_policy"):
            raise ValueError(f"direction is {self.direction!r}; want policy_reference or reference_policy")

    @property
    def divergence(self) -> str:
        """The field of `Scored` that this is a mean of."""
        return "kl" if self.direction == "policy_reference" else "reverse_kl"

    def count(self, batch: Batch) -> Tensor:
        return batch.shifted[batch.rows(self.on)].sum()

    def loss(self, scored: Scored, statistics: Mapping[str, Tensor]) -> Tensor:
        rows = scored.batch.rows(self.on)
        return (scored.batch.weight[rows, None] * getattr(scored, self.divergence)[rows]).sum()

    def metrics(self, scored: Scored) -> Sums:
        rows = scored.batch.rows(self.on)
        n = scored.batch.shifted[rows].sum()
        found = {"kl": scored.kl, "reverse_kl": scored.reverse_kl, "entropy": scored.entropy}
        return {name: (value[rows].detach().sum(), n) for name, value in found.items()}


@dataclass(frozen=True)
class Objective:
    """A weighted sum of terms.  `name` is the preset it came from, or "custom"."""

    terms: tuple[Term, ...]
    name: str = "custom"

    def __post_init__(self):
        names = [term.name for term in self.terms]
        if not names or len(set(names)) < len(names):
            raise ValueError(f"an objective needs terms with different names; got {names}")

    @cached_property
    def needs_reference(self) -> bool:
        return any(term.needs_reference for term in self.terms)

    @cached_property
    def needs_divergence(self) -> bool:
        return any(term.needs_divergence for term in self.terms)

    @property
    def differentiable(self) -> tuple[str, ...]:
        """The divergences that some term is made of."""
        return tuple({term.divergence: None for term in self.terms if term.needs_divergence})

    @cached_property
    def kinds_with_mismatched(self) -> frozenset[str]:
        """The kinds of example that need a response to another prompt, for KTO's KL."""
        terms = tuple(term for term in self.terms if term.statistics_on == "mismatched")
        return Objective(terms).kinds if terms else frozenset()

    @cached_property
    def statistic_terms(self) -> tuple[Pointwise, ...]:
        return tuple(term for term in self.terms if term.statistics_on)

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

    def used_rows(self, batch: Batch) -> Tensor:
        """bool [R]: the responses that some term is on.  The others need no pass through any model."""
        return torch.stack([batch.rows(term.on) for term in self.terms]).any(0)

    def uses(self, kind: str, chosen: bool, rejected: bool) -> bool:
        """Whether some term is on such a response."""
        return any(_is_on(term.on, kind, chosen, rejected) for term in self.terms)

    def need(self, kind: str, chosen: bool, rejected: bool) -> Need | None:
        """What becomes of one response, of an example of this kind, that is the better or worse side of some pair; None
        where nothing does."""
        statistics = tuple(t.name for t in self.statistic_terms if _is_on(t.statistics_on, kind, chosen, rejected))
        gradient = any(_is_on(term.on, kind, chosen, rejected) for term in self.terms)
        if not gradient and not statistics:
            return None
        return Need(gradient, kind in self.kinds_with_reference or kind == "mismatched", statistics)

    @cached_property
    def needs(self) -> tuple[Need, ...]:
        """All that `need` can answer."""
        sides = ((False, False), (True, False), (False, True), (True, True))
        found = (self.need(kind, *side) for kind in KINDS for side in sides)
        return tuple(dict.fromkeys(need for need in found if need is not None))

    def counts(self, batch: Batch) -> Tensor:
        """float64 [terms]: the items of this batch, to be summed over the step."""
        return torch.stack([term.count(batch).double() for term in self.terms])

    def __call__(
        self,
        scored: Scored,
        counts: Tensor,
        statistics: Mapping[str, Mapping[str, Tensor]] | None = None,
        progress: float = 0.0,
    ) -> tuple[Tensor, Sums]:
        """This micro-batch's share of the step's loss, and its metrics as (sum, count).

        counts       [terms], of the whole step (see `counts`)
        statistics   per term name, what its `statistics` returned
        """
        # every rank's backward passes through the same outputs of the model, whatever rows it has
        reached = (scored.token_logp, *(getattr(scored, name) for name in self.differentiable))
        total = sum(torch.nan_to_num(value.sum() * 0.0) for value in reached if value is not None)
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
