"""The terms of an objective: each a loss function with the rows it is on, its weight and its own denominator.

A loss is an ordinary function from `uft.losses`; its arguments are filled by name (`chosen_reward`, `logp`,
`target`, ...).
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from uft import losses
from uft.feedback import ROWS, Batch
from uft.models import Scored
from uft.typing import Bool, Float, Int, Tensor

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

    def __post_init__(self) -> None:
        if isinstance(self.weight, (int, float)) and not self.weight >= 0:
            raise ValueError(f"weight of term {self.name!r} is {self.weight}; want a number >= 0")
        for part in self.on.split("+"):
            if part.strip() not in (*ROWS, "chosen", "rejected"):
                raise ValueError(f"term {self.name!r} is on {part!r}; want {', '.join(ROWS)}, chosen or rejected")

    @property
    def needs_reference(self) -> bool:
        return False

    @property
    def divergence(self) -> str | None:
        """The field of `Scored` that this is a mean of; None for whatever is made of log-probabilities."""
        return None

    @property
    def needs_divergence(self) -> bool:
        return self.divergence is not None

    @property
    def statistics_on(self) -> str | None:
        """The rows to be scored without gradient before the step."""
        return None

    def count(self, batch: Batch) -> Int[Tensor, ""]:
        """How many items of this batch the term averages over."""
        raise NotImplementedError

    def loss(self, scored: Scored, statistics: Mapping[str, Tensor]) -> Float[Tensor, ""]:
        """The loss summed (not averaged) over the items of the batch."""
        raise NotImplementedError

    def metrics(self, scored: Scored) -> Sums:
        return {}


def _parameters(function: Callable[..., Any]) -> Mapping[str, inspect.Parameter]:
    return inspect.signature(function).parameters


def _bind(function: Callable[..., Any], available: Mapping[str, Any], options: Mapping[str, Any]) -> Tensor:
    wanted = {name: available[name] for name in _parameters(function) if name in available and name not in options}
    return function(**wanted, **options)


def _check_options(name: str, function: Callable[..., Any], options: Mapping[str, Any]) -> None:
    keyword_only = [n for n, p in _parameters(function).items() if p.kind is inspect.Parameter.KEYWORD_ONLY]
    for option in options:
        if option not in keyword_only:
            wanted = ", ".join(keyword_only) or "no option"
            raise ValueError(f"{function.__name__} of term {name!r} has no option {option!r}; want {wanted}")


@dataclass(frozen=True)
class Likelihood(Term):
    """-log pi(y | x) of the rows it is on, averaged over tokens (or over sequences of token means)."""

    function: Callable[..., Any] = losses.token_nll
    options: Mapping[str, Any] = field(default_factory=dict)

    @property
    def per_sequence(self) -> bool:
        return "in_response" in _parameters(self.function)

    def count(self, batch: Batch) -> Int[Tensor, ""]:
        rows = batch.rows(self.on)
        return rows.sum() if self.per_sequence else batch.shifted[rows].sum()

    def loss(self, scored: Scored, statistics: Mapping[str, Tensor]) -> Float[Tensor, ""]:
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

    function: Callable[..., Any] = losses.dpo
    beta: float = 0.1
    options: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_options(self.name, self.function, self.options)
        if not isinstance(self.beta, (int, float)) or not self.beta > 0:
            raise ValueError(f"beta of term {self.name!r} is {self.beta!r}; want a number > 0")

    @property
    def needs_reference(self) -> bool:
        return losses.needs_reference(self.function)

    def _reward(self, scored: Scored) -> Float[Tensor, " responses"] | None:
        if scored.reference_logp is None or not self.needs_reference:
            return None
        return losses.implicit_reward(scored.logp, scored.reference_logp, self.beta)

    def _quantities(self, scored: Scored, rows: Tensor, prefix: str = "") -> dict[str, Tensor]:
        found = {"logp": scored.logp[rows], "length": scored.length[rows]}
        reward = self._reward(scored)
        if reward is not None and scored.reference_logp is not None:
            found |= {"reference_logp": scored.reference_logp[rows], "reward": reward[rows]}
        return {prefix + name: value for name, value in found.items()}


@dataclass(frozen=True)
class Pairwise(_Preference):
    """A loss of (chosen, rejected), averaged over pairs."""

    on: str = "pairs"

    def count(self, batch: Batch) -> Int[Tensor, ""]:
        return torch.tensor(len(self._pairs(batch)), device=batch.kind.device)

    def _pairs(self, batch: Batch) -> Int[Tensor, "pairs 2"]:
        return batch.preferences[batch.rows(self.on)[batch.preferences].all(-1)]

    def loss(self, scored: Scored, statistics: Mapping[str, Tensor]) -> Float[Tensor, ""]:
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
    """A loss of one response and its target, averaged over the responses that have a target, or over their tokens.

    A target says how good a response is, in [0, 1]; that of a policy gradient is an advantage, of any sign.
    """

    on: str = "responses"

    def _rows(self, batch: Batch) -> Bool[Tensor, " responses"]:
        return batch.rows(self.on) & ~batch.target.isnan()

    @property
    def per_token(self) -> bool:
        return "token_logp" in _parameters(self.function)

    def count(self, batch: Batch) -> Int[Tensor, ""]:
        rows = self._rows(batch)
        return batch.shifted[rows].sum() if self.per_token else rows.sum()

    def loss(self, scored: Scored, statistics: Mapping[str, Tensor]) -> Float[Tensor, ""]:
        rows = self._rows(scored.batch)
        available = self._quantities(scored, rows) | {"target": scored.batch.target[rows], "beta": self.beta}
        available["token_logp"] = scored.token_logp[rows]
        value = _bind(self.function, available | dict(statistics), self.options)
        if self.per_token:
            value = torch.where(scored.batch.shifted[rows], value, 0.0).sum(-1)
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
        if reward is None:
            raise ValueError(f"term {self.name!r}: found no log-probabilities of the reference; want them scored")
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

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.direction not in ("policy_reference", "reference_policy"):
            raise ValueError(f"direction is {self.direction!r}; want policy_reference or reference_policy")

    @property
    def needs_reference(self) -> bool:
        return True

    @property
    def divergence(self) -> str:
        return "kl" if self.direction == "policy_reference" else "reverse_kl"

    def count(self, batch: Batch) -> Int[Tensor, ""]:
        return batch.shifted[batch.rows(self.on)].sum()

    def loss(self, scored: Scored, statistics: Mapping[str, Tensor]) -> Float[Tensor, ""]:
        rows = scored.batch.rows(self.on)
        return (scored.batch.weight[rows, None] * getattr(scored, self.divergence)[rows]).sum()

    def metrics(self, scored: Scored) -> Sums:
        rows = scored.batch.rows(self.on)
        n = scored.batch.shifted[rows].sum()
        found = {"kl": scored.kl, "reverse_kl": scored.reverse_kl, "entropy": scored.entropy}
        return {name: (value[rows].detach().sum(), n) for name, value in found.items() if value is not None}
