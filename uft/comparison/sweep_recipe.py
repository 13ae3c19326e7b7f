"""The recipe of a sweep: that of a training, and what of it is searched.

model, train_dataset, ...            # what `uft train` takes; or `arms`, each swept with as many trials
sweep:
  learning_rate: {low: 1e-6, high: 1e-4, log: true}
  objective.beta: [0.05, 0.1, 0.5]   # keys as on the command line
  train_dataset.preferences.weight: {low: 0.5, high: 4, log: true}
metric: eval_loss                    # of the trainer's evaluation, or of `measure`
direction: minimize                  # by default what is better for the metric
trials: 20
sampler: tpe                         # tpe, gp, random, grid
seeds: [0]                           # of every trial; the mean counts
pruner: none                         # median: ends trials that fall behind in the evaluations of training
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from uft.comparison.recipe import NAME, Arm, arms_of, seeds_of, train_recipe, want_known
from uft.comparison.tables import less_is_better
from uft.config import UnifiedConfig
from uft.data.rows import is_number
from uft.evaluation.config import EvaluationConfig
from uft.recipe import _FIELDS, _OWN, RecipeError, override, parse

OWN = ("sweep", "metric", "direction", "trials", "sampler", "seeds", "pruner", "arms", "measure")
SAMPLERS = ("tpe", "gp", "random", "grid")
DIRECTIONS = ("minimize", "maximize")
PRUNERS = ("none", "median")
EDGE = 0.05  # of a range: what lies nearer to an end than this lies at it
ONE = "one"  # the arm of a recipe without arms


@dataclass(frozen=True)
class Parameter:
    """One key of the recipe.

    values    the choices; or None, and the value lies between low and high, on a logarithmic scale or not
    """

    key: str
    values: tuple[Any, ...] | None = None
    low: float = 0.0
    high: float = 0.0
    log: bool = False

    @property
    def whole(self) -> bool:
        return self.values is None and isinstance(self.low, int) and isinstance(self.high, int) and not self.log

    @property
    def some(self) -> tuple[Any, ...]:
        """Values that stand for all: the choices, or both ends."""
        return self.values if self.values is not None else (self.low, self.high)

    def at_edge(self, value: Any) -> bool:
        """Whether a better value may lie outside of what was tried."""
        if self.values is None:
            place = math.log if self.log else float
            share = (place(value) - place(self.low)) / (place(self.high) - place(self.low))
            return not EDGE <= share <= 1 - EDGE
        if len(self.values) < 3 or not all(map(is_number, self.values)):
            return False  # of two numbers both are ends, and words have none
        return value in (min(self.values), max(self.values))

    def __str__(self) -> str:
        if self.values is not None:
            return f"{self.key}: one of {', '.join(map(str, self.values))}"
        return f"{self.key}: {self.low:g} to {self.high:g}{', logarithmic' if self.log else ''}"


@dataclass(frozen=True)
class Swept:
    """An arm and what of it is searched.

    common, changes   what its recipe is made of: the keys that all arms share, and its own
    """

    name: str
    common: Mapping[str, Any]
    changes: Mapping[str, Any] | None
    space: tuple[Parameter, ...]

    def with_values(self, values: Mapping[str, Any]) -> Arm:
        """The arm with these values of its parameters.  Raises RecipeError."""
        recipe = override(self.recipe, as_words(values))
        recipe.setdefault("output_dir", "runs/sweep")
        return Arm(self.name, recipe)

    @property
    def recipe(self) -> dict[str, Any]:
        """That of `uft train`."""
        if self.changes is None:
            return dict(self.common)
        return train_recipe(self.common, self.changes, f"arms.{self.name}")


def as_words(values: Mapping[str, Any]) -> list[str]:
    """Values by nested key as the command line has them."""
    return [f"--{key}={json.dumps(value)}" for key, value in values.items()]


@dataclass(frozen=True)
class Sweep:
    """What `uft sweep` runs.  `measured` is the recipe of the evaluation, where there is one."""

    arms: tuple[Swept, ...]
    metric: str
    direction: str
    trials: int
    sampler: str
    seeds: tuple[int, ...]
    pruner: str
    measured: Mapping[str, Any] | None
    measure: EvaluationConfig | None
    output_dir: Path
    values: Mapping[str, Any]

    @property
    def has_arms(self) -> bool:
        return self.arms[0].changes is not None

    def better(self, a: float, b: float) -> bool:
        return a < b if self.direction == "minimize" else a > b

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> Sweep:
        """Checks every key, and the recipe at both ends of every range.  Raises RecipeError, which names the key."""
        common = {key: value for key, value in values.items() if key not in OWN}
        for key in common:
            want_known(key, (*_FIELDS, *_OWN, *OWN), "")
        if values.get("arms") is None:
            swept = (Swept(ONE, common, None, _space(values.get("sweep"), "sweep")),)
            parse(swept[0].recipe)
        else:
            arms_of(values["arms"], common, ("sweep",))
            swept = tuple(_swept(name, arm or {}, common, values.get("sweep")) for name, arm in values["arms"].items())
        for each in swept:
            _check_space(each)
        metric, measured, measure = values.get("metric", "eval_loss"), None, None
        if not isinstance(metric, str) or not metric:
            raise RecipeError(f"metric is {metric!r}; want a name, such as eval_loss")
        if values.get("measure") is not None:
            try:
                measured, measure = dict(values["measure"]), EvaluationConfig.of(values["measure"])
            except RecipeError as error:
                raise RecipeError(f"measure: {error}") from None
            except (TypeError, ValueError):
                raise RecipeError(f"measure is {values['measure']!r}; want what `uft eval` takes") from None
        if metric.startswith("eval_") and not common.get("eval_dataset"):
            raise RecipeError(f"metric is {metric!r} and there is no eval_dataset; want one, or a metric of `measure`")
        if not metric.startswith("eval_") and measure is None:
            raise RecipeError(f"metric is {metric!r} and nothing is measured; want `measure`, or a metric eval_...")
        found = cls(
            swept, metric,
            _one_of(values, "direction", DIRECTIONS, DIRECTIONS[0 if less_is_better(metric) else 1]),
            values.get("trials", 20), _one_of(values, "sampler", SAMPLERS, "tpe"), seeds_of(values.get("seeds", [0])),
            _one_of(values, "pruner", PRUNERS, "none"), measured, measure,
            Path(str(values.get("output_dir", "runs/sweep"))), dict(values),
        )  # fmt: skip
        found._check()
        return found

    def _check(self) -> None:
        if not isinstance(self.trials, int) or isinstance(self.trials, bool) or self.trials < 1:
            raise RecipeError(f"trials is {self.trials!r}; want a whole number from 1 on")
        if self.sampler == "grid":
            for parameter in (p for arm in self.arms for p in arm.space):
                if parameter.values is None:
                    raise RecipeError(f"sweep.{parameter.key} is a range; want a list of values for sampler grid")
        if self.pruner == "median":
            looks = "pruner median looks at evaluations in training"
            if not self.metric.startswith("eval_"):
                raise RecipeError(f"{looks}; want a metric eval_..., not {self.metric!r}")
            if any(_last_args(arm).eval_strategy == "no" for arm in self.arms):
                raise RecipeError(f"{looks}; want eval_strategy: steps")


def _last_args(arm: Swept) -> UnifiedConfig:
    """The arguments of the last stage, whose evaluations are looked at."""
    plan = parse(arm.recipe)
    return dataclasses.replace(plan.args, **plan.stages[-1].args) if plan.stages else plan.args


def _one_of(values: Mapping[str, Any], key: str, known: tuple[str, ...], usual: str) -> str:
    value = values.get(key, usual)
    value = "none" if value is None and "none" in known else value
    if value not in known:
        raise RecipeError(f"{key} is {value!r}; want one of {', '.join(known)}")
    return value


def _swept(name: str, arm: Mapping[str, Any], common: Mapping[str, Any], of_all: Any) -> Swept:
    changes = {key: value for key, value in arm.items() if key != "sweep"}
    own = arm.get("sweep")
    space = _space(of_all if own is None else own, "sweep" if own is None else f"arms.{name}.sweep")
    return Swept(name, common, changes, space)


def _space(value: Any, where: str) -> tuple[Parameter, ...]:
    if not isinstance(value, Mapping) or not value:
        raise RecipeError(
            f"{where} is {value!r}; want keys with a range or a list, such as "
            "{learning_rate: {low: 1e-6, high: 1e-4, log: true}}"
        )
    return tuple(_parameter(str(key), each, f"{where}.{key}") for key, each in value.items())


def _parameter(key: str, value: Any, where: str) -> Parameter:
    if isinstance(value, list):
        texts = [json.dumps(each, sort_keys=True) for each in value]
        if not value or len(set(texts)) < len(texts):
            raise RecipeError(f"{where} is {value!r}; want one value or more, each once")
        return Parameter(key, tuple(value))
    if not isinstance(value, Mapping) or not {"low", "high"} <= set(value):
        raise RecipeError(f"{where} is {value!r}; want a list of values, or {{low: ..., high: ..., log: true}}")
    for option in value:
        want_known(option, ("low", "high", "log"), f"{where}.")
    low, high, log = value["low"], value["high"], value.get("log", False)
    if not (is_number(low) and is_number(high) and low < high):
        raise RecipeError(f"{where} is from {low!r} to {high!r}; want two numbers, the lower first")
    if not isinstance(log, bool) or (log and low <= 0):
        raise RecipeError(f"{where}: log is {log!r} and low {low!r}; want true or false, and numbers > 0 for true")
    return Parameter(key, None, low, high, log)


def _check_space(arm: Swept) -> None:
    where = "sweep" if arm.changes is None else f"arms.{arm.name}.sweep"
    for parameter in arm.space:
        if not NAME.match(parameter.key) or parameter.key.split(".")[0] in ("output_dir", "seed", "model", "resume"):
            raise RecipeError(f"{where}.{parameter.key}: is nothing that a trial may change; want a key of training")
        for value in parameter.some:
            try:
                parse(arm.with_values({parameter.key: value}).values)
            except RecipeError as error:
                raise RecipeError(f"{where}.{parameter.key}: {error}") from None
