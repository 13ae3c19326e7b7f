"""Results that were never measured: planted numbers, to see that reports show them and that figures stay readable."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from experiments.reporting.tables import COLUMNS
from experiments.search import score

NAMED = {
    "base": ("base model", "control"),
    "sft": ("SFT only", "control"),
    "sft_chosen": ("SFT on demonstrations + chosen", "control"),
    "sft_dpo": ("SFT → DPO", "sequential"),
    "sft_dpo_replay": ("SFT → DPO + replay", "sequential"),
    "sft_dpo_documents": ("SFT → DPO + documents", "sequential"),
    "sft_ipo": ("SFT → IPO", "sequential"),
    "sft_kto": ("SFT → KTO", "sequential"),
    "sft_simpo": ("SFT → SimPO", "sequential"),
    "sft_una": ("SFT → UNA", "sequential"),
    "sft_orpo": ("SFT → ORPO", "sequential"),
    "dpo_sft": ("DPO → SFT (reverse)", "sequential"),
    "merged_linear": ("adapters merged (task arithmetic)", "sequential"),
    "merged_ties": ("adapters merged (TIES)", "sequential"),
    "unified_dpo_nll": ("unified DPO + NLL", "unified"),
    "unified_mpo": ("unified MPO", "unified"),
    "unified_cpo": ("unified CPO", "unified"),
    "unified_orpo": ("unified ORPO", "unified"),
    "unified_kto_nll": ("unified KTO + NLL", "unified"),
    "unified_uft": ("unified UFT (Wang et al.)", "unified"),
    "unified_uft_nll": ("unified UFT + NLL", "unified"),
    "unified_alright": ("unified ALRIGHT", "unified"),
    "unified_maxright": ("unified MAXRIGHT", "unified"),
}
KL = ("kl_base", "kl_from_base", "kl_base_prior", "kl_from_base_prior")


class PlantedArm(NamedTuple):
    label: str
    family: str
    after_sft: bool


def arms(count: int = len(NAMED)) -> dict[str, PlantedArm]:
    """The first `count` arms, a few of every family among any twelve."""
    order = sorted(NAMED, key=lambda name: list(NAMED).index(name) % 3) if count < len(NAMED) else list(NAMED)
    order = ["base", *(name for name in order if name != "base")][:count]
    return {
        name: PlantedArm(label, family, family == "sequential")
        for name, (label, family) in NAMED.items()
        if name in order
    }


def records(arms: dict[str, PlantedArm], seeds: int) -> dict[str, list[dict[str, Any]]]:
    """Most arms in one corner, some far from it, as it is in the lab."""
    found = {}
    for position, (name, arm) in enumerate(arms.items()):
        random = np.random.default_rng(position)
        corner = 0.0 if name in ("base", "sft", "unified_uft", "dpo_sft", "merged_ties") else 1.0
        skill, alignment = 0.78 + 0.17 * corner, 0.45 + 0.45 * corner
        facts = 0.3 + 0.25 * random.random()
        centre = dict(skill=skill + 0.03 * random.random(), alignment=alignment + 0.08 * random.random(), facts=facts)
        runs = []
        for seed in range(seeds):
            own = {k: float(np.clip(v + 0.04 * np.random.default_rng(seed).normal() + 0.02 * random.normal(), 0, 1))
                   for k, v in centre.items()}  # fmt: skip
            runs.append(_record(seed, arm, own, trained=name != "base"))
        found[name] = runs
    return found


def _record(seed: int, arm: PlantedArm, own: dict[str, float], trained: bool) -> dict[str, Any]:
    measures = dict.fromkeys(COLUMNS, own["skill"]) | {
        "skill": own["skill"], "refusal.": 0.95 * own["skill"], "fact_recall": own["facts"],
        "alignment": own["alignment"], "kl_base": 8.0 + seed,
        **{name: 3 * (1 - own["facts"]) for name in KL[1:]},
    }  # fmt: skip
    measures.pop("retention")
    if not trained:
        measures |= {"fact_recall": 1.0, "skill": 0.0, "refusal.": 0.0, "alignment": 0.0} | dict.fromkeys(KL, 0.0)
        return {"seed": seed, "measures": measures, "compute": {}, "stages": [{"stage": "base", "steps": 0}]}
    before = measures | {"fact_recall": 0.5, "alignment": 0.5}
    names = ["sft", "dpo"] if arm.after_sft else ["joint"]
    stages = [
        {"stage": name, "steps": 100 + 50 * len(arm.label) // 10, "compute": {"flops": 8e11 / len(names)},
         "measures": measures if name is names[-1] else before,
         "curve": [{"step": 10 * k, "of": 100, **{n: measures[n] * k / 10 for n in
                    ("skill", "alignment", "refusal.", "fact_recall")}} for k in (1, 4, 7)]}
        for name in names
    ]  # fmt: skip
    compute = {"flops": 8e11, "seconds": 25.0 + len(arm.label), "tokens": 4e5, "peak_memory_bytes": 8e8}
    return {"seed": seed, "measures": measures, "compute": compute, "stages": stages}


def chosen(found: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    scores = {name: float(np.mean([score(run["measures"]) for run in runs])) for name, runs in found.items()}
    settings = {"learning_rate": 1e-4, "trials": 12, "inside": True}
    return {name: settings | {"score": score} for name, score in scores.items() if name != "base"}


def write(
    folder, count: int = len(NAMED), seeds: int = 3, titles=("Equal FLOPs", "Equal examples of each kind")
) -> str:
    """A whole planted comparison, by the real `write_report`."""
    from experiments.report import write_report

    own = arms(count)
    tables = {title: {"hedged_pairs": records(own, seeds)} for title in titles}
    settings = {"description": "Planted numbers.", "seeds": list(range(seeds))}
    return write_report(folder, tables, own, {"hedged_pairs": chosen(records(own, seeds))}, settings)
