"""Numbers of runs by arm and seed, and tables of them for Markdown and for the terminal."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from uft.comparison.statistics import Interval, interval, paired_difference
from uft.comparison.tables import signed

from ..search import retention, score

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


COMPUTE = {
    "flops": "TFLOPs",
    "tokens": "tokens",
    "steps": "optimiser steps",
    "examples/demonstrations": "demonstrations drawn",
    "examples/preferences": "preferences drawn",
    "policy_forwards": "policy forwards",
    "backwards": "backwards",
    "reference_forwards": "reference forwards",
    "seconds": "seconds",
    "peak_memory_bytes": "peak MiB",
}
COMPUTE_HEADER = ("arm", *COMPUTE.values())


def compute_row(label: str, compute: Sequence[Mapping[str, float]], steps: Sequence[float]) -> list[str]:
    """Means over runs; what a run does not count is 0."""
    mean = {name: np.mean([c.get(name, 0) for c in compute]) for name in COMPUTE} | {"steps": np.mean(steps)}
    shown = {"flops": f"{mean['flops'] / 1e12:.3f}", "tokens": f"{mean['tokens'] / 1e3:,.0f} k",
             "peak_memory_bytes": f"{mean['peak_memory_bytes'] / 2**20:,.0f}"}  # fmt: skip
    return [label, *(shown.get(name, f"{mean[name]:,.0f}") for name in COMPUTE)]


def compute_rows(records: Records, labels: Mapping[str, str]) -> list[list[str]]:
    return [
        compute_row(
            labels[arm],
            [run["compute"] for run in runs],
            [sum(stage.get("steps", 0) for stage in run["stages"]) for run in runs],
        )
        for arm, runs in records.items()
    ]


def best_of(family: str, families: Mapping[str, str], chosen: Mapping[str, Any], present: Iterable[str]) -> str | None:
    """The arm of a family with the best score in the search (not in what is reported)."""
    names = [arm for arm in present if families[arm] == family and arm in chosen]
    return max(names, key=lambda arm: chosen[arm]["score"], default=None)


# What replays the same: pairs that a reader compares, chosen after the first table had been seen.
LIKE_WITH_LIKE = (
    ("dpo_nll_documents", "sft_chosen_documents"),
    ("dpo_nll", "sft_una"),
    ("dpo_nll", "sft_rm_ppo"),
    ("sft_una", "sft_rm_ppo"),
    ("sft_rm_ppo", "sft_rm_rloo"),
)


def named_contrasts(
    families: Mapping[str, str], chosen: Mapping[str, Any], present: Iterable[str]
) -> list[tuple[str, str]]:
    """The two that were named beforehand: best unified against best sequential, and against likelihood alone."""
    present = list(present)
    unified, sequential = (best_of(family, families, chosen, present) for family in ("unified", "sequential"))
    found = []
    if unified and sequential:
        found.append((unified, sequential))
    if unified and "sft_chosen" in present:
        found.append((unified, "sft_chosen"))
    return found


def contrast_rows(
    records: Records, arms: Mapping[str, Any], chosen: Mapping[str, Any], names: Sequence[str] = CONTRASTED
) -> list[list[str]]:
    rows = []
    for a, b in named_contrasts({name: arm.family for name, arm in arms.items()}, chosen, records):
        found = (paired_difference(by_seed(records[a], name), by_seed(records[b], name)) for name in names)
        rows.append([f"{arms[a].label} − {arms[b].label}", *map(signed, found)])
    return rows


def lost_by_seed(
    records: Records, arms: Mapping[str, Any], abilities: Iterable[str] = tuple(ABILITIES)
) -> dict[str, dict[str, dict[int, float]]]:
    """Arm -> ability -> seed -> what the arm has, less what its seed's supervised stage had."""
    abilities = tuple(abilities)

    def supervised(runs: Sequence[Mapping[str, Any]]) -> dict[int, Mapping[str, float]]:
        return {run["seed"]: run["stages"][0]["measures"] for run in runs if run["stages"][0]["stage"] == "sft"}

    # the first sequential arm's stage stands for all; an arm that begins with another one is compared with its own
    shared = next((supervised(runs) for arm, runs in records.items() if arms[arm].after_sft), {})
    found = {}
    for arm, runs in records.items():
        own = supervised(runs) if len(runs[0]["stages"]) > 1 else {}
        before = own or shared
        compared = [run for run in runs if run["seed"] in before]
        if compared:
            found[arm] = {
                name: {run["seed"]: run["measures"][name] - before[run["seed"]][name] for run in compared}
                for name in abilities
            }
    return found


def lost_since_sft(
    records: Records, arms: Mapping[str, Any], abilities: Iterable[str] = tuple(ABILITIES)
) -> tuple[np.ndarray, list[str]]:
    """[arms, abilities], means over seeds, and the arms of the rows."""
    found = lost_by_seed(records, arms, abilities)
    return np.array([[np.mean(list(v.values())) for v in lost.values()] for lost in found.values()]), list(found)
