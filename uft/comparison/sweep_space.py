"""What a sweep searches: keys of a recipe, each with a range or a list, and whether a key has any effect."""

from __future__ import annotations

import json
import math
import typing
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from functools import cache
from types import NoneType
from typing import Any

from uft.comparison.identity import DECIDES_NOTHING, OF_BEST
from uft.comparison.recipe import want_known
from uft.config import UnifiedConfig
from uft.data.rows import is_number
from uft.data.sources import Source
from uft.recipe import Recipe, RecipeError
from uft.stages import Budget, Stage

EDGE = 0.05  # of a range: what lies nearer to an end than this lies at it
LENGTHS = ("max_steps", "num_train_epochs")  # which a budget takes the place of
OPTIONS = ("low", "high", "log", "whole")


@dataclass(frozen=True)
class Parameter:
    """One key of the recipe.

    values    the choices; or None, and the value lies between low and high, on a logarithmic scale or not
    whole     whole numbers only
    """

    key: str
    values: tuple[Any, ...] | None = None
    low: float = 0.0
    high: float = 0.0
    log: bool = False
    whole: bool = False

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
        how = [", whole numbers"] * self.whole + [", logarithmic"] * self.log
        return f"{self.key}: {self.low:g} to {self.high:g}{''.join(how)}"


def space_of(value: Any, where: str) -> tuple[Parameter, ...]:
    """The parameters of `sweep`.  Raises RecipeError, which names the key."""
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
        want_known(option, OPTIONS, f"{where}.")
    low, high, log = value["low"], value["high"], value.get("log", False)
    if not (is_number(low) and is_number(high) and low < high):
        raise RecipeError(f"{where} is from {low!r} to {high!r}; want two numbers, the lower first")
    if not isinstance(log, bool) or (log and low <= 0):
        raise RecipeError(f"{where}: log is {log!r} and low {low!r}; want true or false, and numbers > 0 for true")
    must = takes_whole_numbers(key)
    whole = value.get("whole", must)
    if not isinstance(whole, bool) or (must and not whole):
        raise RecipeError(f"{where}: whole is {whole!r}; want {'true, which the key asks for' if must else 'a bool'}")
    if whole and not (float(low).is_integer() and float(high).is_integer()):
        raise RecipeError(f"{where} is from {low!r} to {high!r}; want whole numbers")
    number = int if whole else float
    return Parameter(key, None, number(low), number(high), log, whole)


def takes_whole_numbers(key: str) -> bool:
    """Whether the field that a key names is a whole number; options of losses are not known to be, nor are weights."""
    *path, last = key.split(".")
    depth = 2 if path[:1] == ["stages"] else 0  # stages.0.KEY
    if len(path) == depth:
        return last in _whole_fields(UnifiedConfig)
    if depth and path[depth:] == ["budget"]:
        return last in _whole_fields(Budget)
    return path[0] in ("train_dataset", "eval_dataset") and len(path) == 2 and last in _whole_fields(Source)


@cache
def _whole_fields(of: type) -> frozenset[str]:
    return frozenset(name for name, hint in typing.get_type_hints(of).items() if _is_whole(hint))


def _is_whole(hint: Any) -> bool:
    return hint is int or {*typing.get_args(hint)} == {int, NoneType}


def without_effect(key: str, plan: Recipe, beside: Collection[str]) -> str | None:
    """Why a key changes nothing in a recipe, with what to search in its place; None where it may change something.

    beside   the keys that are searched with it
    """
    first, _, rest = key.partition(".")
    if first in DECIDES_NOTHING - OF_BEST:
        return "it changes no number; want it out of the sweep"
    if first == "train_dataset" and plan.stages and all(stage.on for stage in plan.stages):
        name = rest.partition(".")[0]
        if not any(name in stage.on for stage in plan.stages):
            return f"nothing is trained on {name!r}; want it in `on`"
    if not rest and plan.stages and all(_of_stage(first, stage) for stage in plan.stages):
        return f"every stage sets its own; want stages.0.{first}{' or stages.0.budget' * (first in LENGTHS)} and so on"
    steps = [stage.args.get("max_steps", plan.args.max_steps) for stage in plan.stages] or [plan.args.max_steps]
    if first == "num_train_epochs" and "max_steps" not in beside and all(step > 0 for step in steps):
        return "max_steps says how long; want one of them"
    if first.startswith("lora_") and not plan.args.use_peft and "use_peft" not in beside:
        return "use_peft is off; want use_peft: true"
    return None


def _of_stage(key: str, stage: Stage) -> bool:
    """Whether a stage says itself what it takes for a key, so that the common one is not used."""
    return key in stage.args or (key in LENGTHS and any(vars(stage.budget).values()))
