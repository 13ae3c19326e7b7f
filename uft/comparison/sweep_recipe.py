"""The recipe of a sweep: that of a training, and what of it is searched.

model, train_dataset, ...            # what `uft train` takes; or `arms`, each swept with as many trials
sweep:
  learning_rate: {low: 1e-6, high: 1e-4, log: true}
  objective.beta: [0.05, 0.1, 0.5]   # keys as on the command line
  lora_r: {low: 4, high: 64, log: true}          # whole numbers where the field is one; else `whole: true`
  train_dataset.preferences.weight: {low: 0.5, high: 4, log: true}
metric: eval_loss                    # of the trainer's evaluation, or of `measure`
direction: minimize                  # by default what is better for the metric
trials: 20                           # of each arm; by default 20, or the whole grid
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

from uft.comparison.recipe import NAME, Arm, _measure, arms_of, seeds_of, train_recipe, want_known
from uft.comparison.sweep_space import Parameter, space_of, without_effect
from uft.comparison.tables import less_is_better
from uft.config import UnifiedConfig
from uft.evaluation.config import EvaluationConfig
from uft.recipe import _FIELDS, _OWN, RecipeError, override

OWN = ("sweep", "metric", "direction", "trials", "sampler", "seeds", "pruner", "arms", "measure")
# a trial has its seed of `seeds`, and goes on by itself
NOT_OF_TRIALS = (*OWN, "seed", "resume", "resume_from_checkpoint")
SAMPLERS = ("tpe", "gp", "random", "grid")
DIRECTIONS = ("minimize", "maximize")
PRUNERS = ("none", "median")
NOT_SEARCHED = ("output_dir", "seed", "model", "resume", "resume_from_checkpoint", "import")
TRIALS = 20
ONE = "one"  # the arm of a recipe without arms


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
    def arm(self) -> Arm:
        """The arm with what its recipe says, nothing searched."""
        return Arm(self.name, self.recipe)

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
    trials: int | None
    sampler: str
    seeds: tuple[int, ...]
    pruner: str
    measured: Mapping[str, Any] | None
    measure: EvaluationConfig | None
    output_dir: Path
    values: Mapping[str, Any]

    def wanted(self, arm: Swept) -> int:
        """How many trials an arm gets: of a grid, all of it."""
        if self.sampler == "grid":
            return math.prod(len(parameter.values or ()) for parameter in arm.space)
        return TRIALS if self.trials is None else self.trials

    @property
    def has_arms(self) -> bool:
        return self.arms[0].changes is not None

    def better(self, a: float, b: float) -> bool:
        return a < b if self.direction == "minimize" else a > b

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> Sweep:
        """Checks every key, and the recipe at both ends of every range.  Raises RecipeError, which names the key."""
        for key in values:
            want_known(key, (*_FIELDS, *_OWN, *OWN, "import"), "")
        common = {key: value for key, value in values.items() if key not in NOT_OF_TRIALS}
        if values.get("arms") is None:
            swept = (Swept(ONE, common, None, space_of(values.get("sweep"), "sweep")),)
            assert swept[0].arm.plan
        else:
            arms_of(values["arms"], common, ("sweep",))
            for name, arm in values["arms"].items():
                if arm and arm.get("budget") is not None:
                    raise RecipeError(f"arms.{name}.budget: trials are as long as they say; want max_steps, or stages")
            swept = tuple(_swept(name, arm or {}, common, values.get("sweep")) for name, arm in values["arms"].items())
        for each in swept:
            _check_space(each)
        metric, measured, measure = values.get("metric", "eval_loss"), None, None
        if not isinstance(metric, str) or not metric:
            raise RecipeError(f"metric is {metric!r}; want a name, such as eval_loss")
        if values.get("measure") is not None:  # in the layout of training, as `uft compare` measures
            measured, measure = _measure(values["measure"], swept[0].arm.plan.args)
        if metric.startswith("eval_") and not common.get("eval_dataset"):
            raise RecipeError(f"metric is {metric!r} and there is no eval_dataset; want one, or a metric of `measure`")
        if not metric.startswith("eval_") and measure is None:
            raise RecipeError(f"metric is {metric!r} and nothing is measured; want `measure`, or a metric eval_...")
        found = cls(
            swept, metric,
            _one_of(values, "direction", DIRECTIONS, DIRECTIONS[0 if less_is_better(metric) else 1]),
            values.get("trials"), _one_of(values, "sampler", SAMPLERS, "tpe"), _seeds(values),
            _one_of(values, "pruner", PRUNERS, "none"), measured, measure,
            Path(str(values.get("output_dir", "runs/sweep"))), dict(values),
        )  # fmt: skip
        found._check()
        return found

    def _check(self) -> None:
        trials = self.trials
        if trials is not None and (not isinstance(trials, int) or isinstance(trials, bool) or trials < 1):
            raise RecipeError(f"trials is {trials!r}; want a whole number from 1 on")
        if self.sampler == "grid":
            for parameter in (p for arm in self.arms for p in arm.space):
                if parameter.values is None:
                    raise RecipeError(f"sweep.{parameter.key} is a range; want a list of values for sampler grid")
            for arm in self.arms:
                if trials is not None and trials < self.wanted(arm):
                    of = f" of arm {arm.name!r}" if self.has_arms else ""
                    raise RecipeError(
                        f"trials is {trials} and the grid{of} has {self.wanted(arm)} combinations; want no `trials`, "
                        "which runs it whole, or a smaller grid"
                    )
        if self.pruner == "median":
            looks = "pruner median looks at evaluations in training"
            if not self.metric.startswith("eval_"):
                raise RecipeError(f"{looks}; want a metric eval_..., not {self.metric!r}")
            if any(_last_args(arm).eval_strategy == "no" for arm in self.arms):
                raise RecipeError(f"{looks}; want eval_strategy: steps")


def _seeds(values: Mapping[str, Any]) -> tuple[int, ...]:
    seed, seeds = values.get("seed"), values.get("seeds")
    if seed is not None and seeds is not None:
        raise RecipeError(f"seed is {seed!r} and seeds is {seeds!r}; want seeds alone")
    return seeds_of(seeds if seeds is not None else 0 if seed is None else seed)


def _last_args(arm: Swept) -> UnifiedConfig:
    """The arguments of the last stage, whose evaluations are looked at."""
    plan = arm.arm.plan
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
    space = space_of(of_all if own is None else own, "sweep" if own is None else f"arms.{name}.sweep")
    return Swept(name, common, changes, space)


def _check_space(arm: Swept) -> None:
    where = "sweep" if arm.changes is None else f"arms.{arm.name}.sweep"
    of = "" if arm.changes is None else f" in arm {arm.name!r}"
    keys = [parameter.key for parameter in arm.space]
    for parameter in arm.space:
        if not NAME.match(parameter.key) or parameter.key.split(".")[0] in NOT_SEARCHED:
            raise RecipeError(f"{where}.{parameter.key}: is nothing that a trial may change; want a key of training")
        somewhere = () if parameter.values is not None or parameter.whole else ((parameter.low + parameter.high) / 2,)
        for value in (*parameter.some, *somewhere):
            try:
                plan = arm.with_values({parameter.key: value}).plan
            except RecipeError as error:
                raise RecipeError(f"{where}.{parameter.key}: {error}") from None
        if why := without_effect(parameter.key, plan, keys):
            raise RecipeError(f"{where}.{parameter.key}: has no effect{of}, since {why}")
