"""Recipes: a YAML file, and the command line on top of it, become sources, an objective and a UnifiedConfig.

model: Qwen/Qwen3-0.6B-Base
objective: dpo_nll                   # a preset, {preset: name, option: value}, or a mapping of terms
train_dataset:
  instructions: {path: demonstrations.jsonl}
  preferences: {path: pairs.parquet, weight: 2.0}
eval_dataset: {...}                  # the same
stages:                              # instead of objective: sequential training
- {name: sft, objective: sft, on: instructions, learning_rate: 1e-4}
max_steps: 1000                      # any field of UnifiedConfig
"""

from __future__ import annotations

import copy
import dataclasses
import difflib
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from transformers import HfArgumentParser

from uft.config import UnifiedConfig
from uft.data.sources import Source, shown
from uft.objective import Objective
from uft.presets import make_objective
from uft.stages import Budget, Stage
from uft.trl_names import hint

_OWN = ("model", "tokenizer", "objective", "train_dataset", "eval_dataset", "stages", "resume")
_OF_STAGE = ("name", "objective", "on", "reference", "boundary", "budget")
_OF_ALL_STAGES = ("max_length", "on_bad_row", "output_dir", "use_peft")
_FIELDS = tuple(f.name for f in dataclasses.fields(UnifiedConfig) if f.init)
_SOURCE = tuple(f.name for f in dataclasses.fields(Source) if f.name not in ("name", "data"))


class RecipeError(ValueError):
    """A recipe or command line that cannot be used; the message says which key and what was wanted."""


@dataclass(frozen=True)
class Recipe:
    """What `uft train` runs: one objective, or stages one after the other.

    model           hub id or path
    tokenizer       hub id or path; by default the model's
    objective       a preset, {preset: name, option: value}, or a mapping of terms; or `stages` in its place
    stages          a list of stages, for sequential training
    train_dataset   sources by name
    eval_dataset    the same, held out; each stage evaluates on the sources that it trains on
    args            every other key: a field of `UnifiedConfig`
    resume          true: go on from the newest whole checkpoint in output_dir, or start where there is none
    """

    model: str
    tokenizer: str
    objective: Objective | None
    stages: tuple[Stage, ...]
    train_dataset: dict[str, Source]
    eval_dataset: dict[str, Source] | None
    args: UnifiedConfig
    resume: bool = False


# ---- YAML ----


class _Loader(yaml.SafeLoader):
    """YAML as most people think it is: `on` is a word, 1e-5 a number, and a key stands only once."""

    yaml_implicit_resolvers = {}  # noqa: RUF012

    def construct_mapping(self, node, deep=False):
        keys = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode) and key.value != "<<"]
        if twice := next((key for key in keys if keys.count(key) > 1), None):
            mark = [key.start_mark for key, _ in node.value if key.value == twice][-1]
            raise yaml.constructor.ConstructorError(None, None, f"key {twice!r} stands twice", mark)
        return super().construct_mapping(node, deep)


for _tag, _pattern, _first in (
    ("bool", r"true|True|TRUE|false|False|FALSE", "tTfF"),
    ("int", r"[-+]?(0|[1-9][0-9_]*)", "-+0123456789"),
    (
        "float",
        r"[-+]?(\.[0-9]+|[0-9][0-9_]*(\.[0-9_]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)",
        "-+.0123456789",
    ),
    ("null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    ("merge", r"<<", "<"),
):
    _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(f"^(?:{_pattern})$"), list(_first))


def read_yaml(path: str) -> dict[str, Any]:
    try:
        found = yaml.load(Path(path).read_text(encoding="utf-8"), _Loader)
    except FileNotFoundError:
        raise RecipeError(f"{path}: no such file") from None
    except UnicodeDecodeError:
        raise RecipeError(f"{path}: not valid YAML (it is no UTF-8 text)") from None
    except yaml.YAMLError as error:
        where = f", line {error.problem_mark.line + 1}" if getattr(error, "problem_mark", None) else ""
        raise RecipeError(f"{path}{where}: not valid YAML ({getattr(error, 'problem', error)})") from None
    if not isinstance(found, dict):
        raise RecipeError(f"{path}: holds {'nothing' if found is None else shown(found)}; want keys and values")
    return found


# ---- the command line ----


def override(recipe: dict[str, Any], words: Sequence[str]) -> dict[str, Any]:
    """The recipe with `--key value`, `--key=value` and `--a.b.c value` from the command line put over it."""
    result = copy.deepcopy(recipe)
    for key, value in _assignments(words):
        node = result
        *path, last = _by_position(result, key.split("."))
        for depth, part in enumerate(path):
            child = _child(node, part, ".".join(path[: depth + 1]), key)
            if isinstance(child, str):  # `objective: dpo` with `--objective.beta 0.2`; `source: file` likewise
                child = node[part] = {"preset" if _is_objective(path[: depth + 1]) else "path": child}
            node = child
        if isinstance(node, list):
            _child(node, last, key, key)
            node[int(last)] = value
        else:
            node[last] = value
    return result


def _by_position(node: Any, path: Sequence[str]) -> list[str]:
    """The path with names of stages replaced by their places in the list."""
    found = []
    for part in path:
        if isinstance(node, list):
            names = [each.get("name") if isinstance(each, Mapping) else None for each in node]
            part = str(names.index(part)) if part in names else part
            node = node[int(part)] if part.isdecimal() and int(part) < len(node) else None
        else:
            node = node.get(part) if isinstance(node, Mapping) else None
        found.append(part)
    return found


def _is_objective(path: Sequence[str]) -> bool:
    """Whether what stands there is an objective, of the recipe, a stage or an arm, and not a source."""
    return path[0] == "objective" or (path[-1] == "objective" and not {"train_dataset", "eval_dataset"} & {*path})


def _child(node: Any, part: str, where: str, key: str) -> Any:
    if isinstance(node, list):
        if not part.isdecimal() or int(part) >= len(node):
            raise RecipeError(f"--{key}: {where} is not there; want a name, or a number from 0 to {len(node) - 1}")
        child = node[int(part)]
    else:
        child = node.setdefault(part, {})
    if child is None:
        child = node[part] = {}
    if key != where and not isinstance(child, (dict, str, list)):
        raise RecipeError(f"--{key}: {where} is {child!r}, which has no keys")
    return child


def _assignments(words: Sequence[str]) -> Iterable[tuple[str, Any]]:
    position = 0
    while position < len(words):
        word = words[position]
        if not word.startswith("--") or len(word) == 2:
            raise RecipeError(f"{word!r} on the command line; want --key value")
        key, equals, text = word[2:].partition("=")
        position += 1
        values = [text] if equals else []
        while not equals and position < len(words) and not words[position].startswith("--"):
            values.append(words[position])
            position += 1
        try:
            parsed = [yaml.load(v, _Loader) if v else v for v in values]
        except yaml.YAMLError as error:
            raise RecipeError(f"--{key}: {' '.join(values)!r} is not valid YAML ({error.problem})") from None
        yield key, True if not parsed else parsed[0] if len(parsed) == 1 else parsed


# ---- what it says ----


def parse(recipe: Mapping[str, Any]) -> Recipe:
    """Checks every key and builds what the trainer takes.  Raises RecipeError."""
    for key in recipe:
        _known(key, (*_FIELDS, *_OWN), "")
    for key in ("model", "train_dataset"):
        if not recipe.get(key):
            raise RecipeError(f"key {key!r} is missing")
    for key in ("model", "tokenizer"):
        if not isinstance(recipe.get(key, ""), str):
            raise RecipeError(f"{key} is {recipe[key]!r}; want a hub id or a path")
    if bool(recipe.get("objective")) == bool(recipe.get("stages")):
        raise RecipeError("want either 'objective' (one stage) or 'stages' (a list)")
    train_dataset = _sources(recipe["train_dataset"], "train_dataset")
    eval_dataset = _sources(recipe["eval_dataset"], "eval_dataset") if recipe.get("eval_dataset") else None
    stages = _stages(recipe.get("stages") or [], train_dataset, eval_dataset)
    values = {key: value for key, value in recipe.items() if key in _FIELDS}
    resume = recipe.get("resume", False)
    if not isinstance(resume, bool):
        raise RecipeError(f"resume is {resume!r}; want true or false")
    if isinstance(values.get("resume_from_checkpoint"), bool):  # as transformers has it: true is the newest
        resume = values.pop("resume_from_checkpoint") or resume
    if stages and values.get("resume_from_checkpoint"):
        raise RecipeError("resume_from_checkpoint names one checkpoint; stages go on with 'resume: true'")
    return Recipe(
        model=recipe["model"],
        tokenizer=recipe.get("tokenizer") or recipe["model"],
        objective=None if stages else _objective(recipe["objective"], "objective"),
        stages=stages,
        train_dataset=train_dataset,
        eval_dataset=eval_dataset,
        args=parse_config(values),
        resume=resume,
    )


def _known(key: Any, names: Sequence[str], where: str) -> None:
    if key not in names:
        near = difflib.get_close_matches(str(key), names, n=1)
        meant = hint(key) if names[: len(_FIELDS)] == _FIELDS else None
        told = f"; {meant}" if meant else f"; did you mean {near[0]!r}?" if near else ""
        raise RecipeError(f"{where}unknown key {key!r}{told}")


class _Parser(HfArgumentParser):
    def error(self, message: str):
        raise RecipeError(re.sub(r"^argument --([^/:]+)[^:]*", r"\1", message))


def parse_config(values: Mapping[str, Any], where: str = "", of: type = UnifiedConfig) -> Any:
    """A UnifiedConfig, or another dataclass, from plain values, converted to the types of its fields."""
    words: list[str] = []
    for key, value in values.items():
        if value is None:
            continue
        items = value if isinstance(value, list) else [value]
        words += [f"--{key}", *(json.dumps(v) if isinstance(v, dict) else str(v) for v in items)]
    if "output_dir" not in values:
        words += ["--output_dir", "runs/unified"]
    try:
        return _Parser(of, allow_abbrev=False).parse_args_into_dataclasses(words)[0]
    except (ValueError, TypeError) as error:
        raise RecipeError(f"{where}{error}") from None


def _objective(value: Any, where: str) -> Objective:
    if isinstance(value, Mapping) and "preset" not in value:
        for name, term in value.items():
            if not isinstance(term, Mapping) and name != "balance":
                raise RecipeError(f"{where}.{name} is {term!r}; want a mapping such as {{loss: dpo, beta: 0.1}}")
    for term, weight in _weights(value):
        if not isinstance(weight, (int, float, Mapping)) or isinstance(weight, bool):
            raise RecipeError(f"{where}: weight of term {term!r} is {weight!r}; want a number, or a schedule")
    try:
        objective = make_objective(value)
    except ValueError as error:
        raise RecipeError(f"{where}: {error}") from None
    except (TypeError, AttributeError) as error:
        raise RecipeError(f"{where}: {value!r} holds a value of the wrong type ({error})") from None
    for term in objective.terms:
        if not callable(term.weight) and not isinstance(term.weight, (int, float)):
            raise RecipeError(f"{where}: weight of term {term.name!r} is {term.weight!r}; want a number")
    return objective


def _weights(value: Any) -> Iterator[tuple[str, Any]]:
    """The weights that an objective's options give, by term."""
    if not isinstance(value, Mapping):
        return
    for key, option in value.items():
        if "preset" in value and str(key).endswith("_weight"):
            yield str(key).removesuffix("_weight"), option
        elif "preset" not in value and isinstance(option, Mapping) and "weight" in option:
            yield str(key), option["weight"]


def _sources(value: Any, key: str) -> dict[str, Source]:
    if not isinstance(value, Mapping) or not value:
        raise RecipeError(f"{key} is {value!r}; want a mapping of names to sources, such as {{pairs: {{path: FILE}}}}")
    found = {}
    for name, options in value.items():
        where = f"{key}.{name}"
        if not isinstance(options, Mapping):
            options = {"path": options}
        for option in options:
            _known(option, _SOURCE, f"{where}: ")
        if not isinstance(options.get("path"), str):
            others = [other for other in value if other != name]
            near = difflib.get_close_matches(str(name), [str(other) for other in others], n=1)
            hint = f"; did you mean {key}.{near[0]}?" if near and "path" not in options else ""
            raise RecipeError(f"{where}: path is {options.get('path')!r}; want a file or the id of a data set{hint}")
        try:
            found[name] = Source(name=name, **options)
        except (ValueError, TypeError) as error:
            raise RecipeError(f"{where}: {error}") from None
    return found


def _stages(value: Any, train: Mapping[str, Any], evaluation: Mapping[str, Any] | None) -> tuple[Stage, ...]:
    if not isinstance(value, list):
        raise RecipeError(f"stages is {value!r}; want a list of mappings with 'objective'")
    stages = tuple(_stage(stage, position, train) for position, stage in enumerate(value))
    names = [stage.name for stage in stages]
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise RecipeError(f"two stages are named {twice!r}; want a name of its own for each")
    for name in (evaluation or ()) if stages else ():
        if name not in train:
            wanted = ", ".join(train)
            raise RecipeError(
                f"eval_dataset.{name}: each stage evaluates on what it trains on; want a name of {wanted}"
            )
    return stages


def _stage(value: Any, position: int, train: Mapping[str, Any]) -> Stage:
    where = f"stages.{position}"
    if not isinstance(value, Mapping) or "objective" not in value:
        raise RecipeError(f"{where} is {value!r}; want a mapping with 'objective'")
    for key in value:
        if key in _OF_ALL_STAGES:
            raise RecipeError(f"{where}: {key!r} is the same for all stages; want it beside 'stages'")
        _known(key, (*_OF_STAGE, *_FIELDS), f"{where}: ")
    value = dict(value)
    own = {key: value.pop(key) for key in _OF_STAGE if key in value}
    own.setdefault("name", f"stage{position + 1}")
    if not isinstance(own["name"], str) or not re.fullmatch(r"\w[\w.-]*", own["name"]):
        raise RecipeError(f"{where}: name is {own['name']!r}; want the name of a folder: letters, digits, - and _")
    own["objective"] = _objective(own["objective"], f"{where}.objective")
    on, budget = own.get("on") or [], own.get("budget") or {}
    on = [on] if isinstance(on, str) else on
    if not isinstance(on, list):
        raise RecipeError(f"{where}: on is {on!r}; want names of data sets")
    for name in on:
        _known(name, tuple(train), f"{where}.on: ")
    own["on"] = tuple(on)
    if not isinstance(budget, Mapping):
        raise RecipeError(f"{where}: budget is {budget!r}; want a mapping such as {{steps: 100}}")
    for key, amount in budget.items():
        _known(key, tuple(f.name for f in dataclasses.fields(Budget)), f"{where}.budget: ")
        if not isinstance(amount, (int, float)):
            raise RecipeError(f"{where}.budget: {key} is {amount!r}; want a number")
    if budget and (both := {"max_steps", "num_train_epochs"} & set(value)):
        raise RecipeError(f"{where}: budget and {both.pop()} both say how long; want one of them")
    converted = parse_config(value, f"{where}: ") if value else None
    try:
        own["budget"] = Budget(**budget)
        return Stage(**own, args={key: getattr(converted, key) for key in value})
    except (ValueError, TypeError) as error:
        raise RecipeError(f"{where}: {error}") from None
