"""The recipe of a comparison: what all arms share, and in what each differs.

model: Qwen/Qwen3-0.6B-Base          # what `uft train` takes, for all arms
train_dataset: {instructions: {path: demonstrations.jsonl}, preferences: {path: pairs.parquet}}
max_steps: 1000
arms:
  sequential: {stages: [{objective: sft, on: instructions, max_steps: 500}, {objective: dpo, on: preferences}]}
  joint: {objective: dpo_nll, learning_rate: 1e-5}
seeds: [0, 1, 2]
budget: {flops: equal}               # the first arm decides; {flops: ARM}, a number, examples or steps, or none
measure: {...}                       # what `uft eval` takes; of the base and after every stage of every arm
kept: demonstrations/nll             # the two outcomes that contrasts are tested in
gained: pairs/rewards/accuracies
contrasts: [[joint, sequential]]     # named beforehand; by default every arm against the first
"""

from __future__ import annotations

import copy
import difflib
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from uft.comparison.budget import UNITS, Total
from uft.config import UnifiedConfig
from uft.data.rows import is_number
from uft.evaluation.config import EvaluationConfig
from uft.presets import make_objective
from uft.recipe import _FIELDS, _OWN, Recipe, RecipeError, parse
from uft.stages import Stage

OWN = ("arms", "seeds", "budget", "measure", "kept", "gained", "contrasts", "workers", "save_models")
OF_ALL_ARMS = ("model", "tokenizer", "output_dir", "seed", "resume", "resume_from_checkpoint", "import")
OF_ARM = ("objective", "stages", "on", "budget", "train_dataset", "eval_dataset")
# what is tested unless the recipe says it: the first that is measured
KEPT = ("verifiable/accuracy", "demonstrations/nll")
GAINED = ("pairs/rewards/accuracies", "harmlessness/rewards", "refusals/refusal", "demonstrations/nll")
NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_-]*")  # no dots: summary.json, cost.png and others are the report's
MOST_SEEDS = 20  # whose signs can all be flipped


@dataclass(frozen=True)
class Arm:
    """One way of training.

    values   its whole recipe, as `uft train` takes it, what it imports included
    total    a budget of its own; None: the comparison's
    """

    name: str
    values: Mapping[str, Any]
    total: Total | None = None

    @cached_property
    def plan(self) -> Recipe:
        return parse({key: value for key, value in self.values.items() if key != "import"})

    @property
    def stages(self) -> tuple[Stage, ...]:
        return self.plan.stages or (Stage("train", self.plan.objective),)


@dataclass(frozen=True)
class Comparison:
    """What `uft compare --config` runs.

    decider   the arm whose cost the others are given; None where a number, or nothing, was said
    total     what every arm is given, where it is a number
    unit      flops, examples or steps; None: every arm trains as long as it says
    measured  the recipe of the evaluation as it was given, with what it shares with training
    """

    arms: tuple[Arm, ...]
    seeds: tuple[int, ...]
    output_dir: Path
    unit: str | None
    decider: str | None
    total: Total | None
    measured: Mapping[str, Any]
    measure: EvaluationConfig
    kept: str | None
    gained: str | None
    contrasts: tuple[tuple[str, str], ...]
    workers: int
    save_models: bool
    values: Mapping[str, Any]

    @property
    def outcomes(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(name for name in (self.kept, self.gained) if name))

    def arm(self, name: str) -> Arm:
        return next(arm for arm in self.arms if arm.name == name)

    @property
    def order(self) -> list[Arm]:
        """The deciding arm first: the others wait for its cost."""
        return sorted(self.arms, key=lambda arm: arm.name != self.decider)

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> Comparison:
        """Checks every key and parses every arm.  Raises RecipeError, which names `arms.NAME.KEY`."""
        common = {key: value for key, value in values.items() if key not in OWN}
        for key in common:
            want_known(key, (*_FIELDS, *_OWN, *OWN, "import"), "")
        if "seed" in common:
            raise RecipeError(f"seed is {common['seed']!r}; want seeds, a list such as [0, 1, 2], one for each run")
        arms = arms_of(values.get("arms"), common)
        names = [arm.name for arm in arms]
        if len(arms) < 2:
            raise RecipeError(f"arms has {names[0]!r} alone; want two or more")
        unit, decider, total = _budget(values.get("budget"), names)
        for arm in arms:
            last = make_objective(arm.stages[-1].objective)
            given = arm.total or (unit if arm.name != decider else None)
            if _unit_of(given) == "flops" and (last.rests or last.balancer is not None):
                raise RecipeError(
                    f"arms.{arm.name}: weights of {last.name!r} decide in training what a step costs, so that it "
                    f"cannot be cut to FLOPs beforehand; want `budget: {{flops: {arm.name}}}`, or examples or steps"
                )
            if given is not None and any(vars(arm.stages[-1].budget).values()):
                raise RecipeError(
                    f"arms.{arm.name}.stages.{len(arm.stages) - 1}.budget: the last stage gets what the comparison's "
                    "budget leaves; want none here"
                )
        measured, measure = _measure(values.get("measure"), arms[0].plan.args)
        kept, gained = _outcome(values, "kept", KEPT, measure, ()), None
        gained = _outcome(values, "gained", GAINED, measure, (kept,))
        if kept is None and gained is None:
            raise RecipeError("kept and gained are missing; want the names of metrics, which contrasts are tested in")
        workers, save_models = values.get("workers", 1), values.get("save_models", True)
        if not isinstance(workers, int) or isinstance(workers, bool) or workers < 1:
            raise RecipeError(f"workers is {workers!r}; want a whole number from 1 on")
        if not isinstance(save_models, bool):
            raise RecipeError(f"save_models is {save_models!r}; want true or false")
        return cls(
            arms, seeds_of(values.get("seeds", [0, 1, 2])), Path(str(values.get("output_dir", "runs/comparison"))),
            unit, decider, total, measured, measure, kept, gained, _contrasts(values.get("contrasts"), names), workers,
            save_models, dict(values),
        )  # fmt: skip


# ---- arms ----


def arms_of(value: Any, common: Mapping[str, Any], more: Collection[str] = ()) -> tuple[Arm, ...]:
    """Every arm, parsed.  `more` are keys that an arm may have beside those of training."""
    if not isinstance(value, Mapping) or not value:
        raise RecipeError(f"arms is {value!r}; want a mapping such as {{joint: {{objective: dpo_nll}}}}")
    found = []
    for name, changes in value.items():
        if not isinstance(name, str) or not NAME.fullmatch(name) or name == "base":
            raise RecipeError(f"arms: name is {name!r}; want letters from a to z, digits, - and _, and not base")
        changes = {} if changes is None else changes
        if not isinstance(changes, Mapping):
            raise RecipeError(f"arms.{name} is {changes!r}; want a mapping such as {{objective: dpo_nll}}")
        for key in changes:
            if key in OF_ALL_ARMS:
                raise RecipeError(f"arms.{name}.{key}: is the same for all arms; want it beside 'arms'")
            want_known(key, (*_FIELDS, *OF_ARM, *more), f"arms.{name}.")
        changes = {key: each for key, each in changes.items() if key not in more}
        arm = Arm(name, train_recipe(common, changes, f"arms.{name}"), _own_total(changes.get("budget"), name))
        try:
            assert arm.plan
        except RecipeError as error:
            raise RecipeError(_placed(str(error), name, changes, common)) from None
        found.append(arm)
    return tuple(found)


def train_recipe(common: Mapping[str, Any], changes: Mapping[str, Any], where: str) -> dict[str, Any]:
    """The recipe of `uft train` that an arm is: its keys over the common ones, those of data sets source by source."""
    own = {key: value for key, value in changes.items() if key not in ("on", "budget")}
    result = copy.deepcopy(dict(common))
    if own.get("objective") and own.get("stages"):
        raise RecipeError(f"{where}: want either 'objective' (one stage) or 'stages' (a list)")
    for one, other in (("objective", "stages"), ("stages", "objective")):
        if own.get(one):
            result.pop(other, None)
    for key, value in own.items():
        if key in ("train_dataset", "eval_dataset") and isinstance(value, Mapping):
            result[key] = _sources(result.get(key) or {}, value)
        else:
            result[key] = copy.deepcopy(value)
    if changes.get("on"):
        if not result.get("objective"):
            raise RecipeError(f"{where}.on: stages each say what they are on; want it in them")
        result["stages"] = [{"name": "train", "objective": result.pop("objective"), "on": changes["on"]}]
    return result


def _sources(common: Mapping[str, Any], own: Mapping[str, Any]) -> dict[str, Any]:
    result = copy.deepcopy(dict(common))
    for name, options in own.items():
        there = result.get(name)
        if isinstance(options, Mapping) and there is not None:
            options = (dict(there) if isinstance(there, Mapping) else {"path": there}) | dict(options)
        result[name] = options
    return result


def _placed(message: str, name: str, changes: Mapping[str, Any], common: Mapping[str, Any]) -> str:
    """A message of `parse`, by the arm where what it is about stands in the arm."""
    if changes.get("on"):
        message = re.sub(r"^stages\.0(\.|: )", "", message)
    key = re.match(r"\w*", message).group()
    if key in changes:
        return f"arms.{name}.{message}"
    return message if key in common else f"arms.{name}: {message}"


def want_known(key: Any, names: Sequence[str], prefix: str) -> None:
    if key not in names:
        near = difflib.get_close_matches(str(key), names, n=1)
        raise RecipeError(f"{prefix}{key} is no key that is known" + (f"; did you mean {near[0]!r}?" if near else ""))


# ---- the other keys ----


def seeds_of(value: Any) -> tuple[int, ...]:
    seeds = value if isinstance(value, (list, tuple)) else [value]
    if not seeds or any(not isinstance(seed, int) or isinstance(seed, bool) or seed < 0 for seed in seeds):
        raise RecipeError(f"seeds is {value!r}; want whole numbers from 0 on, such as [0, 1, 2]")
    if len(set(seeds)) < len(seeds) or len(seeds) > MOST_SEEDS:
        raise RecipeError(f"seeds is {value!r}; want each once, and at most {MOST_SEEDS}")
    return tuple(seeds)


def _amount(value: Any, where: str) -> tuple[str, Any]:
    if not isinstance(value, Mapping) or len(value) != 1 or next(iter(value)) not in UNITS:
        raise RecipeError(f"{where} is {value!r}; want one of {', '.join(UNITS)}, such as {{flops: equal}}")
    return next(iter(value.items()))


def _budget(value: Any, names: Sequence[str]) -> tuple[str | None, str | None, Total | None]:
    """Unit, deciding arm, total."""
    if value == "none":
        return None, None, None
    unit, amount = _amount({"flops": "equal"} if value is None else value, "budget")
    if amount == "equal" or amount in names:
        return unit, names[0] if amount == "equal" else amount, None
    if not is_number(amount) or amount <= 0:
        raise RecipeError(f"budget.{unit} is {amount!r}; want equal, a number, or one of {', '.join(names)}")
    return unit, None, Total(unit, amount)


def _own_total(value: Any, name: str) -> Total | None:
    if value is None:
        return None
    unit, amount = _amount(value, f"arms.{name}.budget")
    if not is_number(amount) or amount <= 0:
        raise RecipeError(f"arms.{name}.budget.{unit} is {amount!r}; want a number > 0")
    return Total(unit, amount)


def _unit_of(given: Total | str | None) -> str | None:
    return given.unit if isinstance(given, Total) else given


def _measure(value: Any, args: UnifiedConfig) -> tuple[dict[str, Any], EvaluationConfig]:
    if not isinstance(value, Mapping) or not value:
        raise RecipeError(
            f"measure is {value!r}; want what `uft eval` takes, such as {{pairs: {{mine: {{path: FILE}}}}}}"
        )
    # the layout of training, so that measuring changes nothing that comes after it
    shared = {key: getattr(args, key) for key in ("max_length", "layout", "fused_head")}
    try:
        return shared | dict(value), EvaluationConfig.of(shared | dict(value))
    except RecipeError as error:
        raise RecipeError(f"measure: {error}") from None


def _outcome(
    values: Mapping[str, Any], key: str, usual: Sequence[str], measure: EvaluationConfig, taken: Collection[Any]
) -> str | None:
    value = values.get(key)
    if value is None:
        return next((n for n in usual if getattr(measure, n.split("/")[0]) and n not in taken), None)
    section = value.partition("/")[0] if isinstance(value, str) else ""
    if not getattr(measure, section, None) or "/" not in value:
        raise RecipeError(f"{key} is {value!r}; want a metric of what is measured, such as {usual[0]}")
    return value


def _contrasts(value: Any, names: Sequence[str]) -> tuple[tuple[str, str], ...]:
    if value is None:
        return tuple((name, names[0]) for name in names[1:])
    pairs, seen = value if isinstance(value, list) else None, {}
    for k, pair in enumerate(pairs or [None]):
        if not isinstance(pair, list) or len(pair) != 2 or pair[0] == pair[1]:
            raise RecipeError(f"contrasts.{k} is {pair!r}; want two arms, such as [{names[1]}, {names[0]}]")
        for name in pair:
            if name not in names:
                raise RecipeError(f"contrasts.{k}: there is no arm {name!r}; want some of {', '.join(names)}")
        first = seen.setdefault(frozenset(pair), k)
        if first != k:
            raise RecipeError(
                f"contrasts.{k} is {pair!r}, which contrasts.{first} tests already; want every two arms once"
            )
    return tuple(map(tuple, pairs))
