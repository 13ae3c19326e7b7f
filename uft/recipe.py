"""Recipes: a YAML file, and the command line on top of it, become sources, an objective and a UnifiedConfig.

model: Qwen/Qwen3-0.6B-Base
objective: dpo_nll                   # a preset, {preset: name, option: value}, or a mapping of terms
train_dataset:
  instructions: {path: demonstrations.jsonl}
  preferences: {path: pairs.parquet, weight: 2.0}
eval_dataset: {...}                  # the same
stages: [...]                        # instead of objective: sequential training
max_steps: 1000                      # any field of UnifiedConfig
"""

from __future__ import annotations

import dataclasses
import difflib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from transformers import HfArgumentParser

from uft.config import UnifiedConfig
from uft.stages import Budget, Stage

_OWN = ("model", "tokenizer", "objective", "train_dataset", "eval_dataset", "stages", "resume")


class RecipeError(ValueError):
    """A recipe or command line that cannot be used; the message says which key and what was wanted."""


@dataclass(frozen=True)
class Recipe:
    """What `uft train` runs.  `stages` has one entry for unified training."""

    model: str
    tokenizer: str
    stages: tuple[Stage, ...]
    train_dataset: dict[str, Any]
    eval_dataset: dict[str, Any] | None
    args: UnifiedConfig
    resume: bool = False


def read_yaml(path: str) -> dict[str, Any]:
    try:
        found = yaml.safe_load(Path(path).read_text())
    except FileNotFoundError:
        raise RecipeError(f"{path}: no such file") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        where = f", line {error.problem_mark.line + 1}" if getattr(error, "problem_mark", None) else ""
        raise RecipeError(f"{path}{where}: not valid YAML ({getattr(error, 'problem', error)})") from None
    if not isinstance(found, dict):
        raise RecipeError(f"{path}: holds {type(found).__name__}; want keys and values")
    return found


def override(recipe: dict[str, Any], words: Sequence[str]) -> dict[str, Any]:
    """The recipe with `--key value`, `--key=value` and `--a.b.c value` from the command line put over it."""
    result = json.loads(json.dumps(recipe))
    for key, value in _assignments(words):
        node = result
        *path, last = key.split(".")
        for depth, part in enumerate(path):
            child = node.setdefault(part, {})
            if isinstance(child, str):  # `objective: dpo` with `--objective.beta 0.2`; `source: file` likewise
                child = node[part] = {"preset" if path[0] == "objective" else "path": child}
            if not isinstance(child, dict):
                raise RecipeError(f"--{key}: {'.'.join(path[: depth + 1])} is not a mapping")
            node = child
        node[last] = value
    return result


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
        parsed = [yaml.safe_load(v) if v else v for v in values]
        yield key, True if not parsed else parsed[0] if len(parsed) == 1 else parsed


def parse(recipe: Mapping[str, Any]) -> Recipe:
    """Checks every key and builds what the trainer takes.  Raises RecipeError."""
    fields = {f.name for f in dataclasses.fields(UnifiedConfig) if f.init}
    for key in recipe:
        if key not in fields and key not in _OWN:
            near = difflib.get_close_matches(key, [*fields, *_OWN], n=1)
            raise RecipeError(f"unknown key {key!r}" + (f"; did you mean {near[0]!r}?" if near else ""))
    for key in ("model", "train_dataset"):
        if not recipe.get(key):
            raise RecipeError(f"key {key!r} is missing")
    if bool(recipe.get("objective")) == bool(recipe.get("stages")):
        raise RecipeError("want either 'objective' (one stage) or 'stages' (a list)")
    train_dataset = _sources(recipe["train_dataset"], "train_dataset")
    args = parse_config({key: value for key, value in recipe.items() if key in fields})
    stages = tuple(_stage(stage, position, fields) for position, stage in enumerate(recipe.get("stages") or ()))
    return Recipe(
        model=recipe["model"],
        tokenizer=recipe.get("tokenizer") or recipe["model"],
        stages=stages or (Stage("unified", recipe["objective"]),),
        train_dataset=train_dataset,
        eval_dataset=_sources(recipe["eval_dataset"], "eval_dataset") if recipe.get("eval_dataset") else None,
        args=args,
        resume=bool(recipe.get("resume", False)),
    )


class _Parser(HfArgumentParser):
    def error(self, message: str):
        raise RecipeError(message.replace("argument --", ""))


def parse_config(values: Mapping[str, Any]) -> UnifiedConfig:
    """A UnifiedConfig from plain values, converted to the types of its fields."""
    words: list[str] = []
    for key, value in values.items():
        if value is None:
            continue
        items = value if isinstance(value, list) else [value]
        words += [f"--{key}", *(json.dumps(v) if isinstance(v, dict) else str(v) for v in items)]
    if "output_dir" not in values:
        words += ["--output_dir", "runs/unified"]
    try:
        return _Parser(UnifiedConfig, allow_abbrev=False).parse_args_into_dataclasses(words)[0]
    except RecipeError:
        raise
    except (ValueError, TypeError) as error:
        raise RecipeError(str(error)) from None


def _sources(value: Any, key: str) -> dict[str, Any]:
    if not isinstance(value, Mapping) or not value:
        raise RecipeError(f"{key} is {value!r}; want a mapping of names to sources, such as {{pairs: {{path: FILE}}}}")
    return {name: dict(source) if isinstance(source, Mapping) else {"path": source} for name, source in value.items()}


def _stage(value: Any, position: int, fields: set[str]) -> Stage:
    if not isinstance(value, Mapping) or "objective" not in value:
        raise RecipeError(f"stages[{position}] is {value!r}; want a mapping with 'objective'")
    value = dict(value)
    own = {key: value.pop(key) for key in ("name", "objective", "reference", "boundary") if key in value}
    own.setdefault("name", f"stage{position + 1}")
    own["on"] = tuple(value.pop("on", ()))
    own["budget"] = Budget(**value.pop("budget", {}))
    for key in value:
        if key not in fields:
            raise RecipeError(f"stages[{position}]: unknown key {key!r}")
    converted = parse_config(value) if value else None
    return Stage(**own, args={key: getattr(converted, key) for key in value})
