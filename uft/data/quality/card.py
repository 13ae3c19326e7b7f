"""The card of a filtered data set: README.md for people and hubs, filter.json for programs.  Files are named without
the folders they were in."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from uft.data.quality.markdown import table
from uft.data.quality.rules import RULES
from uft.data.quality.writing import Digest
from uft.data.sources import Source

if TYPE_CHECKING:
    from uft.data.filter import FilterRecipe, Outcome

SCORES = {
    "rank": "their ranks: (rank − 1/2) / n, equal scores sharing the mean",
    "centre": "σ(logit(score) − logit(median)), so that the median is at 0.5",
}


def write_card(folder: Path, name: str, recipe: FilterRecipe, outcomes: Mapping[str, Outcome]) -> None:
    from uft.record import write_json

    facts = {
        "inputs": {key: _input(outcome.source) | {"sha256": outcome.digest} for key, outcome in outcomes.items()},
        "evaluation": {
            key: _input(source) | {"sha256": _sha256(source)} for key, source in recipe.eval_dataset.items()
        },
        "counts": {key: outcome.counts() for key, outcome in outcomes.items()},
        "rules": {
            key: dataclasses.asdict(recipe.rules[key]) | ({"on": recipe.on[key]} if key in recipe.on else {})
            for key in RULES
            if key in recipe.rules
        },
        "scores": {key: list(outcome.scores) for key, outcome in outcomes.items() if outcome.scores},
        "recipe": without_folders(recipe.plain),
    }
    write_json(folder / "filter.json", facts)
    (folder / "README.md").write_text(_readme(folder, name, recipe, outcomes, facts), encoding="utf-8")


def _input(source: Source) -> dict[str, Any]:
    return {"from": without_folders(str(source.path))}


def _sha256(source: Source) -> str | None:
    digest = Digest(source)
    return digest.hexdigest() if digest.path is not None else None


def without_folders(value: Any) -> Any:
    """The same with file names in place of paths; ids on a hub stay as they are."""
    if isinstance(value, Mapping):
        return {key: without_folders(each) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [without_folders(each) for each in value]
    if isinstance(value, str) and "/" in value and (value.startswith(("/", "~", ".")) or Path(value).exists()):
        return Path(value).name
    return value


def _readme(folder: Path, name: str, recipe: FilterRecipe, outcomes: Mapping[str, Outcome], facts: Mapping) -> str:
    from uft.data.filter import summary

    files = {
        key: next(path.name for path in folder.iterdir() if path.stem == key and path.suffix != ".md")
        for key in outcomes
    }
    configs = [{"config_name": key, "data_files": file} for key, file in files.items()]
    inputs = [
        (key, facts["inputs"][key]["from"], files[key], f"`{facts['inputs'][key]['sha256']}`") for key in outcomes
    ]
    parts = [
        f"---\n{yaml.safe_dump({'configs': configs}, sort_keys=False)}---",
        f"# {name}",
        "Made by `uft data filter`: rows of other data sets, with the same columns; those that the rules below drop "
        "are left out.",
        table(("source", "from", "file", "sha256 of what was read"), inputs),
        "## What became of the rows",
        summary(outcomes),
        "Each row is kept or dropped for one reason: that of the first rule, in this order, that found something. "
        "Bad rows cannot be read as their kind of feedback."
        + (" Every dropped row is listed in `dropped.jsonl`." if recipe.list_dropped else ""),
    ]
    if facts["rules"]:
        lines = [
            (rule, ", ".join(f"{k}: {_short(v)}" for k, v in options.items()) or "–")
            for rule, options in facts["rules"].items()
        ]
        parts += ["## Rules", table(("rule", "settings"), lines)]
    if facts["evaluation"]:
        lines = [(key, each["from"], f"`{each['sha256'] or '–'}`") for key, each in facts["evaluation"].items()]
        parts += ["Evaluation files:", table(("name", "from", "sha256"), lines)]
    if facts["scores"]:
        where = "; ".join(f"{key}: {', '.join(columns)}" for key, columns in facts["scores"].items())
        parts.append(f"Scores were replaced by {SCORES[recipe.scores]}, over the rows kept ({where}).")
        if ranged := [key for key in facts["scores"] if outcomes[key].source.score_range is not None]:
            parts.append(
                f"They lie in [0, 1] now: leave `score_range` out where {', '.join(ranged)} is read, though the recipe "
                "below has it for the input."
            )
    recipe_text = yaml.safe_dump(facts["recipe"], sort_keys=False, allow_unicode=True)
    parts += ["## Recipe", f"```yaml\n{recipe_text}```"]
    return "\n\n".join(parts) + "\n"


def _short(value: Any) -> str:
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{k}: {_short(v)}" for k, v in value.items()) + "}"
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(map(_short, value)) + "]"
    return "null" if value is None else without_folders(str(value))
