"""Turns the records of a comparison into `summary.json`, `report.md` and figures."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from experiments import figures
from experiments.search import RETENTION, retention, score
from experiments.statistics import Interval, interval, paired_difference
from uft.record import environment, write_json

Records = Mapping[str, Sequence[Mapping[str, Any]]]  # arm -> one record per seed

SHARED = "shared supervised stage (by retention)"
DERIVED = {"retention": retention, "score": score}
ABILITIES = {
    "skill_covered": "skill,\ncovered",
    "skill_uncovered": "skill,\nuncovered",
    "refusal.": "refuses “.”\n(taught)",
    "fact_recall": "facts",
    "refusal!_covered": "refuses “!”\ncovered",
    "refusal!_uncovered": "refuses “!”\nuncovered",
    "alignment": "alignment",
}
COLUMNS = {
    "retention": "retention",
    "alignment": "alignment",
    "skill_covered": "skill (covered)",
    "skill_uncovered": "skill (uncovered)",
    "refusal!_covered": "refuses “!” (cov.)",
    "refusal!_uncovered": "refuses “!” (unc.)",
    "refusal.": "refuses “.”",
    "false_refusal": "false refusals",
    "fact_recall": "facts",
    "skill_nll": "held-out NLL",
    "kl_base": "KL(π‖base)",
    "accuracy_logp": "pair acc. (logp)",
    "accuracy_reward": "pair acc. (reward)",
    "logps/chosen": "logp chosen",
    "length": "length",
    "ended": "ends with EOS",
}
CONTRASTED = ("score", "retention", "alignment", "skill", "refusal.", "fact_recall")


def by_seed(records: Sequence[Mapping[str, Any]], name: str) -> dict[int, float]:
    def value(measures: Mapping[str, float]) -> float:
        return measures[name] if name in measures else DERIVED[name](measures)

    return {record["seed"]: value(record["measures"]) for record in records}


def mean_of(records: Sequence[Mapping[str, Any]], name: str) -> Interval:
    return interval(list(by_seed(records, name).values()))


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """First column to the left, the others to the right."""
    lines = ["| " + " | ".join(header) + " |", "|---|" + "--:|" * (len(header) - 1)]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in rows)])


def terminal_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    widths = [max(len(row[k]) for row in [header, *rows]) for k in range(len(header))]

    def line(row):  # fmt: skip
        return "  ".join(cell.ljust(w) if k == 0 else cell.rjust(w) for k, (cell, w) in enumerate(zip(row, widths)))

    return "\n".join([line(header), "  ".join("─" * w for w in widths), *map(line, rows)])


def compute_rows(records: Records, labels: Mapping[str, str]) -> list[list[str]]:
    rows = []
    for arm, runs in records.items():
        compute = [run["compute"] for run in runs]
        mean = lambda name: np.mean([c.get(name, 0) for c in compute])  # noqa: B023
        steps = np.mean([sum(s.get("steps", 0) for s in run["stages"]) for run in runs])
        rows.append(
            [
                labels[arm],
                f"{mean('flops') / 1e12:.3f}",
                f"{mean('tokens') / 1e3:,.0f} k",
                f"{steps:,.0f}",
                f"{mean('examples/demonstrations'):,.0f}",
                f"{mean('examples/preferences'):,.0f}",
                f"{mean('policy_forwards'):,.0f}",
                f"{mean('backwards'):,.0f}",
                f"{mean('reference_forwards'):,.0f}",
                f"{mean('seconds'):.0f}",
                f"{mean('peak_memory_bytes') / 2**20:,.0f}",
            ]
        )
    return rows


COMPUTE_HEADER = (
    "arm", "TFLOPs", "tokens", "optimiser steps", "demonstrations drawn", "preferences drawn", "policy forwards",
    "backwards", "reference forwards", "seconds", "peak MiB",
)  # fmt: skip


def best_of(family: str, arms: Mapping[str, Any], chosen: Mapping[str, Any], present: Records) -> str | None:
    """The arm of a family with the best score in the search (not in what is reported)."""
    names = [a for a in present if arms[a].family == family and a in chosen]
    return max(names, key=lambda a: chosen[a]["score"], default=None)


def contrasts(records: Records, arms: Mapping[str, Any], chosen: Mapping[str, Any]) -> list[tuple[str, str]]:
    """The two that were named beforehand: best unified against best sequential, and against likelihood alone."""
    unified, sequential = (best_of(family, arms, chosen, records) for family in ("unified", "sequential"))
    found = []
    if unified and sequential:
        found.append((unified, sequential))
    if unified and "sft_chosen" in records:
        found.append((unified, "sft_chosen"))
    return found


def contrast_rows(
    records: Records, arms: Mapping[str, Any], chosen: Mapping[str, Any], names: Sequence[str] = CONTRASTED
) -> list[list[str]]:
    rows = []
    for a, b in contrasts(records, arms, chosen):
        row = [f"{arms[a].label} − {arms[b].label}"]
        for name in names:
            difference = paired_difference(by_seed(records[a], name), by_seed(records[b], name))
            row.append(_signed(difference))
        rows.append(row)
    return rows


def _signed(found: Interval) -> str:
    if found.n < 2:
        return f"{found.mean:+.3f}"
    return f"{found.mean:+.3f} [{found.low:+.3f}, {found.high:+.3f}]"


def lost_since_sft(
    records: Records, arms: Mapping[str, Any], abilities: Iterable[str] = tuple(ABILITIES)
) -> tuple[np.ndarray, list[str]]:
    """[arms, abilities]: what each arm has, less what its seed's supervised stage had; mean over seeds."""

    def supervised(runs: Sequence[Mapping[str, Any]]) -> dict[int, Mapping[str, float]]:
        return {run["seed"]: run["stages"][0]["measures"] for run in runs if run["stages"][0]["stage"] == "sft"}

    # the first sequential arm's stage stands for all; an arm that begins with another one is compared with its own
    shared = next((supervised(runs) for arm, runs in records.items() if arms[arm].after_sft), {})
    rows, names = [], []
    for arm, runs in records.items():
        before = supervised(runs) if arms[arm].after_sft else shared
        differences = [
            [run["measures"][ability] - before[run["seed"]][ability] for ability in abilities]
            for run in runs
            if run["seed"] in before
        ]
        if differences:
            rows.append(np.mean(differences, axis=0))
            names.append(arm)
    return np.array(rows), names


def curve_of(run: Mapping[str, Any], names: Sequence[str]) -> list[dict[str, Any]]:
    """The points of a run along its compute, stage boundaries marked."""
    points, before = [], 0.0
    for position, stage in enumerate(run["stages"]):
        cost = stage["compute"].get("flops", 0)
        for point in stage.get("curve", []):
            values = {name: point[name] for name in names}
            points.append({"flops": before + cost * point["step"] / point["of"], **values})
        before += cost
        end = {name: stage["measures"][name] for name in names}
        points.append({"flops": before, "boundary": position + 1 < len(run["stages"]), **end})
    return points


def write_report(
    folder: Path,
    tables: Mapping[str, Mapping[str, Records]],
    arms: Mapping[str, Any],
    chosen: Mapping[str, Mapping[str, Any]],
    settings: Mapping[str, Any],
) -> str:
    """Writes everything into `folder` and returns the table for the terminal.

    tables   title of the table -> variant of the preferences -> arm -> records
    """
    folder.mkdir(parents=True, exist_ok=True)
    labels = {name: arm.label for name, arm in arms.items()}
    families = {name: arm.family for name, arm in arms.items()}
    text = ["# Sequential against unified fine-tuning", "", settings["description"], ""]
    summary: dict[str, Any] = {"settings": settings, "search": chosen, "tables": {}, **environment()}
    terminal = []
    for title, variants in tables.items():
        text += [f"## {title}", ""]
        for variant, records in variants.items():
            slug = f"{'flops' if 'FLOPs' in title else 'examples'}-{variant}"
            seeds = max(len(runs) for runs in records.values())
            text += [f"### Preferences: {variant}", ""]
            rows = [[labels[a], *(str(mean_of(runs, c)) for c in COLUMNS)] for a, runs in records.items()]
            text += [markdown_table(["arm", *COLUMNS.values()], rows), ""]
            text += [f"Mean over {seeds} seeds ± half the 95 % t-interval.", ""]
            compared = contrast_rows(records, arms, chosen.get(variant, {}))
            if compared:
                header = ["difference, paired by seed [95 % interval]", "score", "retention", "alignment", "skill",
                          "refuses “.”", "facts"]  # fmt: skip
                text += [markdown_table(header, compared), ""]
            text += [markdown_table(COMPUTE_HEADER, compute_rows(records, labels)), ""]
            trained = {a: runs for a, runs in records.items() if runs[0]["compute"]}
            flops = [r["compute"]["flops"] for runs in trained.values() for r in runs]
            if "FLOPs" in title and flops:
                spread = (max(flops) - min(flops)) / np.mean(flops)
                text += [f"Largest difference in FLOPs between any two runs: {100 * spread:.2f} %.", ""]
            text += _figures(folder, slug, records, trained, arms, labels, families)
            summary["tables"].setdefault(title, {})[variant] = {
                arm: {
                    "label": labels[arm],
                    "measures": {c: mean_of(runs, c)._asdict() for c in (*COLUMNS, "score", "skill")},
                    "per_seed": {c: by_seed(runs, c) for c in (*COLUMNS, "score", "skill")},
                    "compute": [run["compute"] for run in runs],
                    "steps": [[s.get("steps", 0) for s in run["stages"]] for run in runs],
                }
                for arm, runs in records.items()
            }
            shown = ["retention", "alignment", "skill_covered", "skill_uncovered", "refusal!_covered", "refusal.",
                     "fact_recall"]  # fmt: skip
            steps = {
                a: np.mean([sum(s.get("steps", 0) for s in r["stages"]) for r in runs]) for a, runs in records.items()
            }
            short = [
                [labels[a], *(str(mean_of(runs, c)) for c in shown), f"{steps[a]:.0f}",
                 f"{np.mean([r['compute'].get('flops', 0) for r in runs]) / 1e12:.2f}"]
                for a, runs in records.items()
            ]  # fmt: skip
            header = ["arm", *(COLUMNS[c] for c in shown), "steps", "TFLOPs"]
            terminal += [f"{title}; preferences: {variant}; {seeds} seeds", "", terminal_table(header, short), ""]
    text += ["## Search", "", *_search_text(chosen, labels)]
    (folder / "report.md").write_text("\n".join(text) + "\n")
    write_json(folder / "summary.json", summary)
    return "\n".join(terminal)


def _figures(folder, slug, records, trained, arms, labels, families) -> list[str]:
    if not trained:
        return []
    points = {
        arm: list(zip(by_seed(runs, "alignment").values(), by_seed(runs, "retention").values()))
        for arm, runs in trained.items()  # the base would squeeze the others together
    }
    variant = slug.split("-", 1)[1]
    figures.retention_against_alignment(
        folder / f"tradeoff-{slug}.png", points, labels, families, f"What is kept, against what is gained ({variant})"
    )
    names = {"skill": "skill", "alignment": "alignment", "refusal.": "refuses “.”", "fact_recall": "facts"}
    runs = {arm: [curve_of(run, list(names)) for run in group] for arm, group in trained.items()}
    figures.curves(folder / f"curves-{slug}.png", runs, labels, families, names)
    lost, rows = lost_since_sft(trained, arms)
    written = [f"![retention against alignment](tradeoff-{slug}.png)", "", f"![curves](curves-{slug}.png)", ""]
    if len(rows):
        figures.matrix(
            folder / f"forgetting-{slug}.png", lost, [labels[r] for r in rows], list(ABILITIES.values()),
            "Difference to the supervised stage",
        )  # fmt: skip
        written += [f"![forgetting](forgetting-{slug}.png)", ""]
    return written


def _search_text(chosen: Mapping[str, Mapping[str, Any]], labels: Mapping[str, str]) -> list[str]:
    text = [f"Score = (retention + alignment) / 2 on other prompts; retention = mean of {', '.join(RETENTION)}.", ""]
    for variant, found in chosen.items():
        rows = [
            [labels.get(arm, SHARED), f"{s['learning_rate']:g}", f"{s.get('beta', '–')}", f"{s.get('score', 0):.3f}",
             str(s.get("trials", "–")), *("–" if s.get(k) is None else "yes" if s[k] else "no"
                                          for k in ("inside", "beta_inside"))]
            for arm, s in found.items()
        ]  # fmt: skip
        header = ["arm", "learning rate", "beta", "score", "trials", "rate inside its grid", "beta inside its grid"]
        text += [f"Preferences: {variant}", "", markdown_table(header, rows), ""]
    return text
