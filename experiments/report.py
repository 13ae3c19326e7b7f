"""All results as one page: retention against alignment, forgetting, studies, the KL law, cost.

Reads     result folders, experiments/results/* unless others are named: the main comparison's summary.json (its figures
          are drawn anew from it), and what each study and other experiment has written about itself
Run       python -m experiments.report [FOLDER ...] [--output runs/report]
Writes    runs/report/report.html, which needs nothing else and opens offline; report.md with its figures beside it

The comparisons and studies write their own reports through the functions of this file.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from uft.comparison.tables import markdown_table, terminal_table
from uft.record import environment, write_json
from uft.reporting.page import write_page

from .reporting.comparison import comparison_text, most_followed, summary_of
from .reporting.folders import ResultError, joint_report
from .reporting.tables import (
    COLUMNS,
    COMPUTE_HEADER,
    SHARED,
    Records,
    by_seed,
    compute_rows,
    contrast_rows,
    lost_since_sft,
    mean_of,
)

__all__ = [
    "COLUMNS", "COMPUTE_HEADER", "SHARED", "Records", "by_seed", "compute_rows", "contrast_rows", "lost_since_sft",
    "markdown_table", "mean_of", "terminal_table", "write_page", "write_report",
]  # fmt: skip
RESULTS = Path(__file__).parent / "results"
IN_TERMINAL = ("retention", "alignment", "skill_covered", "skill_uncovered", "refusal!_covered", "refusal.",
               "fact_recall")  # fmt: skip


def write_report(
    folder: Path,
    tables: Mapping[str, Mapping[str, Records]],
    arms: Mapping[str, Any],
    chosen: Mapping[str, Mapping[str, Any]],
    settings: Mapping[str, Any],
) -> str:
    """Writes summary.json, report.md, report.html and figures into `folder`; returns the table for the terminal.

    tables   title of the table -> variant of the preferences -> arm -> records
    """
    folder.mkdir(parents=True, exist_ok=True)
    found = {
        title: {variant: summary_of(records, arms, chosen.get(variant, {})) for variant, records in variants.items()}
        for title, variants in tables.items()
    }
    summary = {"settings": settings, "search": chosen, "tables": found, **environment()}
    return _finished(folder, summary, tables, arms)


def add_arms(
    folder: Path,
    tables: Mapping[str, Mapping[str, Records]],
    arms: Mapping[str, Any],
    chosen: Mapping[str, Mapping[str, Any]],
) -> str:
    """Puts arms into the results of a comparison that are in `folder`, whose other arms stay as they are.

    Raises ResultError where the folder holds no results, or has results of one of these arms.
    """
    path = folder / "summary.json"
    if not path.exists():
        raise ResultError(f"{path}: not found; want the results of a whole comparison")
    summary = json.loads(path.read_text())
    added = list(dict.fromkeys(arm for variants in tables.values() for records in variants.values() for arm in records))
    for title, variants in tables.items():
        for variant, records in variants.items():
            there = summary["tables"].get(title, {}).get(variant)
            if there is None:
                raise ResultError(f"{path}: found no table {title!r} of {variant}; want one to add to")
            if twice := sorted(set(records) & set(there)):
                raise ResultError(f"{path}: found results of {', '.join(twice)} in {title!r}, {variant}; want new arms")
            there |= summary_of(records, arms, chosen.get(variant, {}))
            for arm in set(there) - most_followed(there, chosen.get(variant, {})):
                there[arm].pop("curve", None)
    summary["search"] = {**summary["search"], **chosen}
    settings = summary["settings"]
    settings["arms"] = [arm for arm in arms if arm in {*settings["arms"], *added}]
    about = environment()
    labels = ", ".join(arms[arm].label for arm in added)
    line = f"\n\nAdded on {about['date'][:10]} (commit {about['commit']}): {labels}."
    if line not in settings["description"]:
        settings["description"] += line
    return _finished(folder, summary, tables, arms)


def _finished(
    folder: Path, summary: Mapping[str, Any], tables: Mapping[str, Mapping[str, Records]], arms: Mapping[str, Any]
) -> str:
    """Writes a summary and its page; the tables for the terminal."""
    write_json(folder / "summary.json", summary)
    text = ["# Sequential against unified fine-tuning", "", summary["settings"]["description"], ""]
    write_page(folder, "\n".join([*text, *comparison_text(summary, folder)]))
    return "\n".join(
        line
        for title, variants in tables.items()
        for variant, records in variants.items()
        for line in _in_terminal(f"{title}; preferences: {variant}", records, arms)
    )


def _in_terminal(title: str, records: Records, arms: Mapping[str, Any]) -> list[str]:
    rows = []
    for arm, runs in records.items():
        steps = np.mean([sum(stage.get("steps", 0) for stage in run["stages"]) for run in runs])
        flops = np.mean([run["compute"].get("flops", 0) for run in runs])
        measures = (str(mean_of(runs, name)) for name in IN_TERMINAL)
        rows.append([arms[arm].label, *measures, f"{steps:.0f}", f"{flops / 1e12:.2f}"])
    header = ["arm", *(COLUMNS[name] for name in IN_TERMINAL), "steps", "TFLOPs"]
    return [f"{title}; {max(map(len, records.values()))} seeds", "", terminal_table(header, rows), ""]


def main(words: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", type=Path, nargs="*", help="default: every folder of experiments/results")
    parser.add_argument("--output", type=Path, default=Path("runs/report"))
    arguments = parser.parse_args(words)
    folders = arguments.folders or sorted(path for path in RESULTS.iterdir() if path.is_dir())
    try:
        skipped = joint_report(folders, arguments.output)
    except ResultError as problem:
        print(f"error: {problem}", file=sys.stderr)
        return 1
    for folder in skipped:
        print(f"skipped {folder}: nothing that this report knows how to show", file=sys.stderr)
    print(f"{arguments.output}/report.html and report.md")
    return 0


if __name__ == "__main__":
    sys.exit(main())
