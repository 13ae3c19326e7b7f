"""Runs of all experiments as points: how far each went from its base, and what it forgot."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from .comparison import family_of
from .folders import Result

KL = {
    "kl_base": "KL(π‖base), new task",
    "kl_from_base": "KL(base‖π), new task",
    "kl_base_prior": "KL(π‖base), prior task",
    "kl_from_base_prior": "KL(base‖π), prior task",
}
# names in the comparison on real data, whose new task is demonstrations and whose prior task is text
REAL_KL = {
    "kl_base": "kl/demonstrations",
    "kl_from_base": "kl_base_policy/demonstrations",
    "kl_base_prior": "kl/text",
    "kl_from_base_prior": "kl_base_policy/text",
}
LAB, REAL = "the lab", "real text"
OWN_BASES = ("scale",)  # experiments that pretrain base models of their own: what the others' bases kept is not theirs


class Run(NamedTuple):
    world: str
    experiment: str
    setting: str  # what is the same for all seeds of one point
    method: str
    family: str
    seed: int
    forgotten: float
    lost: float  # NaN where the base was not measured
    kl: Mapping[str, float]


def runs_of(results: Sequence[Result]) -> tuple[list[Run], dict[str, int]]:
    """All trained runs that have every KL, each once; and how many of each folder were left out for want of one."""
    found, lacking = [], Counter()
    bases = _bases(results)
    for result in results:
        own = {} if result.name in OWN_BASES else bases.get(_world(result), {})
        for run in _runs(result, own):
            if all(np.isfinite(value) for value in (*run.kl.values(), run.forgotten)):
                found.append(run)
            else:
                lacking[result.name] += 1
    # experiments share runs: the same plan is trained once and stands in the results of each, perhaps by another name
    once = {(r.world, r.seed, r.forgotten, *r.kl.values()): r for r in reversed(found)}
    return list(once.values())[::-1], dict(lacking)


def _runs(result: Result, base: Mapping[int, float]) -> Iterable[Run]:
    real = _world(result) == REAL
    names = REAL_KL if real else {name: name for name in KL}
    for setting, method, family, values in _groups(result):
        remembered = values.get("knowledge" if real else "fact_recall", {})
        for seed, share in remembered.items():
            kl = {name: float(values.get(own, {}).get(seed, np.nan)) for name, own in names.items()}
            if not abs(kl["kl_base"]) < 1e-9:  # else it is the base itself
                after = values.get("retention", {}).get(seed, np.nan)
                yield Run(
                    _world(result), result.name, f"{result.name}, {setting}", method, family, int(seed),
                    1.0 - share, base.get(int(seed), np.nan) - after, kl,
                )  # fmt: skip


def _world(result: Result) -> str:
    return REAL if result.name == "real_small" else LAB


def _groups(result: Result) -> Iterable[tuple[str, str, str, Mapping[str, Mapping[str, float]]]]:
    """(setting, method, family, measure -> seed -> value) of every arm or point."""
    summary = result.summary
    for title, variants in summary.get("tables", {}).items():
        for variant, arms in variants.items():
            for name, arm in arms.items():
                yield f"{title}, {variant}, {name}", arm["label"], family_of(name, arm), arm["per_seed"]
    for point in summary.get("points", []):
        yield f"{point['line']}, {point['x']}", point["line"], _family(point["line"]), point["per_seed"]
    if result.name == "real_small":
        for name, arm in summary["arms"].items():
            yield name, arm["label"], family_of(name, arm), arm["per_seed"]


def _family(label: str) -> str:
    """By its name: studies write no family down."""
    if label.startswith("unified"):
        return "unified"
    if "→" in label:
        return "sequential"
    return "control" if label.startswith("SFT") else "other"


def _bases(results: Sequence[Result]) -> dict[str, dict[int, float]]:
    """World -> seed -> retention of its base model, which all experiments of a world share."""
    found: dict[str, dict[int, float]] = {}
    for result in results:
        for _, method, _, values in _groups(result):
            if method == "base model":
                found.setdefault(_world(result), {}).update({int(s): v for s, v in values["retention"].items()})
    return found
