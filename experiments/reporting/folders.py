"""Result folders as sections of one report.

comparison   summary.json has `tables`: text and figures are made from it
study        summary.json has `study` and `points`: what the study wrote about itself
other        a folder of a known name with a report.md: what it wrote about itself
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from uft.comparison.tables import markdown_table
from uft.reporting.page import write_page

from .comparison import comparison_text

OTHERS = (
    "kl_law",
    "exact_paths",
    "real_small",
    "paper_uft",
    "label_noise",
    "active_selection",
    "harmlessness",
    "reward_hacking",
)
IMAGE = re.compile(r"!\[([^\]]*)\]\(([^)\s]+)\)")


class ResultError(ValueError):
    """A file of a result folder that cannot be read; the message names it."""


class Result(NamedTuple):
    folder: Path
    kind: str  # comparison, study or other
    summary: Mapping[str, Any]

    @property
    def name(self) -> str:
        return self.folder.name


def read_result(folder: Path) -> Result | None:
    """What a folder holds, or None if it is none of the kinds above.  ResultError names a file that is broken."""
    if not folder.is_dir():
        raise ResultError(f"{folder}: no such folder")
    path = folder / "summary.json"
    if not path.exists():
        return Result(folder, "other", {}) if folder.name in OTHERS and (folder / "report.md").exists() else None
    try:
        summary = json.loads(path.read_text())
    except ValueError as problem:
        raise ResultError(f"{path}: not JSON ({problem})") from problem
    if not isinstance(summary, dict):
        raise ResultError(f"{path}: found a {type(summary).__name__}, want an object")
    if "tables" in summary:
        _check_comparison(path, summary)
        return Result(folder, "comparison", summary)
    if "study" in summary:
        _check_points(path, summary)
        return Result(folder, "study", summary)
    return Result(folder, "other", summary) if folder.name in OTHERS else None


def _check_comparison(path: Path, summary: Mapping[str, Any]) -> None:
    _want(path, summary, ("settings", "search", "tables"), "")
    for title, variants in summary["tables"].items():
        for variant, arms in variants.items():
            for name, arm in arms.items():
                where = f"tables, {title}, {variant}, {name}: "
                _want(path, arm, ("label", "per_seed", "compute", "steps"), where)
                _want(path, arm["per_seed"], ("score", "retention", "alignment", "fact_recall"), f"{where}per_seed: ")


def _check_points(path: Path, summary: Mapping[str, Any]) -> None:
    _want(path, summary, ("study", "question", "points"), "")
    for position, point in enumerate(summary["points"]):
        _want(path, point, ("line", "x", "per_seed", "compute"), f"points, {position}: ")


def _want(path: Path, found: Any, names: Sequence[str], where: str) -> None:
    if not isinstance(found, dict):
        raise ResultError(f"{path}: {where}found a {type(found).__name__}, want an object with {', '.join(names)}")
    if missing := [name for name in names if name not in found]:
        raise ResultError(f"{path}: {where}lacks {', '.join(missing)}")


def joint_report(folders: Sequence[Path], output: Path) -> list[Path]:
    """Writes report.md, report.html and figures into `output`; returns the folders that were skipped."""
    results, skipped = [], []
    for folder in folders:
        result = read_result(folder)
        skipped.append(folder) if result is None else results.append(result)
    if not results:
        raise ResultError(f"nothing to report in {', '.join(map(str, folders)) or 'no folder'}")
    if repeated := {r.name for r in results if [o.name for o in results].count(r.name) > 1}:
        raise ResultError(f"two folders of one name: {', '.join(sorted(repeated))}")
    results.sort(key=_place)
    output.mkdir(parents=True, exist_ok=True)
    text = ["# Single-stage unified fine-tuning: all results", "", *_overview(results)]
    for result in results:
        text += ["", *_section(result, output)]
    if skipped:
        text += ["", "## Not shown", "", f"No part of this report: {', '.join(folder.name for folder in skipped)}.", ""]
    write_page(output, "\n".join(text))
    return skipped


def _place(result: Result) -> tuple[int, int, str]:
    kinds = ("comparison", "study", "other")
    order = OTHERS.index(result.name) if result.name in OTHERS else 0
    return kinds.index(result.kind), order, result.name


def _overview(results: Sequence[Result]) -> list[str]:
    rows = []
    for result in results:
        runs = _computes(result)
        hours = sum(run.get("seconds", 0) for run in runs) / 3600
        flops = sum(run.get("flops", 0) for run in runs) / 1e12
        rows.append(
            [_question(result), result.name, f"{len(runs):,}" if runs else "–", f"{flops:,.1f}" if runs else "–",
             f"{hours:.1f}" if runs else "–", str(result.summary.get("date", "–"))[:10],
             str(result.summary.get("commit", "–"))]
        )  # fmt: skip
    header = ["question", "folder", "runs", "TFLOPs", "hours of training", "date", "commit"]
    note = (
        "Arms that begin alike share that beginning: it is counted in each of them, so the hours spent were fewer. A "
        "commit with a + had changes that were not committed."
    )
    return [markdown_table(header, rows), "", note, ""]


def _computes(result: Result) -> list[Mapping[str, float]]:
    summary = result.summary
    groups = [
        arm for variants in summary.get("tables", {}).values() for arms in variants.values() for arm in arms.values()
    ]
    groups += summary.get("points", [])
    groups += summary.get("arms", {}).values() if isinstance(summary.get("arms"), dict) else []
    return [run for group in groups for run in group.get("compute", []) if run]


def _question(result: Result) -> str:
    if result.kind == "comparison":
        return "Does one joint stage forget less than two?"
    return result.summary.get("question") or _own_text(result)[0].removeprefix("# ")


def _section(result: Result, output: Path) -> list[str]:
    """The section of one folder: its title a level deeper, its figures copied under its name."""
    if result.kind == "comparison":
        own = [
            f"# {result.name}: sequential against unified fine-tuning",
            "",
            result.summary["settings"]["description"],
            "",
        ]
        own += comparison_text(result.summary, output, prefix=f"{result.name}-", detail=False)
        own += [f"All measures, compute and search: report.md in {result.name}.", ""]
    else:
        own = [_copied(line, result, output) for line in _own_text(result)]
    return _deeper(own)


def _own_text(result: Result) -> list[str]:
    path = result.folder / "report.md"
    if not path.exists():
        raise ResultError(f"{path}: no such file; it is written beside summary.json")
    lines = path.read_text().strip().splitlines()
    if not lines or not lines[0].startswith("# "):
        raise ResultError(f"{path}: want a title (# ...) in its first line")
    return lines


def _copied(line: str, result: Result, output: Path) -> str:
    def put(match: re.Match) -> str:
        source = result.folder / match[2]
        if not source.is_file():
            raise ResultError(f"{source}: report.md shows this figure, and there is no such file")
        name = f"{result.name}-{source.name}"
        shutil.copy(source, output / name)
        return f"![{match[1]}]({name})"

    return IMAGE.sub(put, line)


def _deeper(lines: Sequence[str]) -> list[str]:
    """Headings one level down; not inside code."""
    result, code = [], False
    for line in lines:
        code ^= line.startswith("```")
        result.append(f"#{line}" if line.startswith("#") and not code else line)
    return result
