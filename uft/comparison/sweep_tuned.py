"""The recipes that a sweep leaves: best.yaml for `uft train`, and compare.yaml, all arms at their best."""

from __future__ import annotations

import copy
import re
import textwrap
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from uft.comparison.sweep_recipe import NOT_OF_TRIALS, Sweep, Swept, as_words
from uft.recipe import override, read_yaml

FRESH_SEEDS = 8  # as many as an exact test of several contrasts takes
ALIKE = 0.05  # costs of arms that differ by less count as equal
COMPARE = "compare.yaml"


def ending(plan: Sweep, arm: Swept) -> str:
    return f"-{arm.name}" if plan.has_arms else ""


def write_best(plan: Sweep, arm: Swept, best: Mapping[str, Any], trials: int) -> None:
    """The best trial as a recipe of `uft train`, with its seed; of several the first."""
    name, seed = f"best{ending(plan, arm)}", plan.seeds[0]
    path = plan.output_dir / f"{name}.yaml"
    lines = [f"The best of {trials} trials, number {best['number']}: uft train --config {path}"]
    if len(plan.seeds) > 1:
        lines.append(f"Its value is the mean over seeds {', '.join(map(str, plan.seeds))}; this trains that of {seed}.")
    values = arm.with_values(best["params"]).values
    write_yaml(path, lines, {**values, "seed": seed, "output_dir": str(plan.output_dir / name)})


def write_compare(plan: Sweep, best: Mapping[str, Mapping[str, Any]]) -> None:
    """The recipe of `uft compare` for the arms at their best, but for `measure`, which the user is to fill in.

    What was filled in stays.

    best   by arm, the best trial
    """
    path = plan.output_dir / COMPARE
    costs = ", ".join(f"{name} {trial['flops'] / len(plan.seeds):.3g}" for name, trial in best.items())
    lines = [
        f"Every arm at its best: uft compare --config {path}, once `measure` at the end is filled in.",
        f"seeds are others than those searched ({', '.join(map(str, plan.seeds))}).",
        "budget: none, since every arm is best at the length at which it was tuned; the report says what each cost. "
        f"FLOPs of the best trials: {costs}.",
    ]
    if not alike(best):
        lines.append(
            "These differ. For a comparison at equal cost give the arms lengths that cost the same and tune them "
            "again; {flops: equal} alone would train some for longer or shorter than they were tuned."
        )
    if plan.measured is None and plan.values.get("eval_dataset"):
        lines.append("eval_dataset is what was searched on: what it finds looks better than it is.")
    filled_in = read_yaml(str(path)).get("measure") if path.exists() else None  # of an earlier, shorter sweep
    write_yaml(path, lines, tuned(plan, best) | ({"measure": filled_in} if filled_in else {}))
    if not filled_in:
        measured = _empty(plan.values.get("measure"))
        with path.open("a", encoding="utf-8") as file:
            file.write(_commented(f"Wanted: data that the search has not seen, in place of FILE.\n{_dumped(measured)}"))


def to_fill_in(plan: Sweep) -> str:
    """What is left to do before `uft compare`, as a sentence."""
    return (
        f"{plan.output_dir / COMPARE} compares all arms at their best; it wants its `measure` filled in first, with "
        "data that the search has not seen."
    )


def alike(best: Mapping[str, Mapping[str, Any]]) -> bool:
    """Whether the best trials have cost about the same."""
    costs = [trial["flops"] for trial in best.values()]
    return max(costs) <= (1 + ALIKE) * min(costs)


def tuned(plan: Sweep, best: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """The recipe of `uft compare`, without `measure`."""
    common = {key: value for key, value in plan.values.items() if key not in NOT_OF_TRIALS}
    changed = {}
    for arm in plan.arms:
        own = copy.deepcopy(dict(arm.changes or {}))
        for key, value in best[arm.name]["params"].items():
            first = key.partition(".")[0]
            if first not in own and first in common and "." in key:
                own[first] = copy.deepcopy(common[first])
            own = override(own, as_words({key: value}))
        changed[arm.name] = own
    fresh = max(plan.seeds) + 1
    return {
        **common, "output_dir": str(plan.output_dir / "compare"), "arms": changed,
        "seeds": [*range(fresh, fresh + FRESH_SEEDS)], "budget": "none",
    }  # fmt: skip


def write_yaml(path: Path, comment: list[str], values: Mapping[str, Any]) -> None:
    lines = "\n".join(textwrap.fill(line, 118, break_on_hyphens=False) for line in comment)
    path.write_text(_commented(lines) + _dumped(values), encoding="utf-8")


def _dumped(values: Mapping[str, Any]) -> str:
    return yaml.safe_dump(dict(values), sort_keys=False, allow_unicode=True, width=120)


def _commented(text: str) -> str:
    return re.sub(r"^", "# ", text.rstrip("\n"), flags=re.MULTILINE) + "\n"


def _empty(measured: Mapping[str, Any] | None) -> dict[str, Any]:
    """`measure` as the sweep has it, with FILE for its data."""
    if measured is None:
        return {"measure": {"demonstrations": {"NAME": {"path": "FILE"}}, "pairs": {"NAME": {"path": "FILE"}}}}
    return {"measure": {section: _without_paths(value) for section, value in measured.items()}}


def _without_paths(value: Any) -> Any:
    """Sources by name, as a path or with one among their options; what is none of these stays."""
    if not isinstance(value, Mapping) or not any(isinstance(v, Mapping) and "path" in v for v in value.values()):
        named = isinstance(value, Mapping) and value and all(isinstance(v, str) for v in value.values())
        return dict.fromkeys(value, "FILE") if named else value
    return {
        name: {**each, "path": "FILE"} if isinstance(each, Mapping) and "path" in each else "FILE"
        for name, each in value.items()
    }
