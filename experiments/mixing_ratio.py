"""How many demonstrations to a preference?  The question of Tables 4 to 6 of Wang et al. 2024, at equal compute.

Arms      joint stages (DPO + likelihood, UFT) and the sequence (supervised stage, then DPO with replay) whose draws are
          mixed in the paper's ratios, 16k to 260k demonstrations for 20k preferences
Equal     base weights, seeds, data, FLOPs; so more demonstrations mean fewer preferences, where the paper trained
          longer
Unequal   learning rates and betas are those tuned at a ratio of 3, and were not tuned again
Run       python -m experiments.mixing_ratio [--quick]        45 runs, half an hour on two cores
Writes    runs/mixing_ratio/{report.md, summary.json, mixing_ratio.png}
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

from experiments.lab.training import LabStage, Plan, Scale
from experiments.sequential_vs_unified import VARIANTS
from experiments.study import Point, Study, last_stage, main, supervised

RATIOS = (0.8, 1.6, 3.0, 6.5, 13.0)  # demonstrations drawn for each preference drawn


def points(chosen: Mapping[str, Any], scale: Scale) -> list[Point]:
    found = []
    for ratio in RATIOS:
        share = ratio * scale.preference_draws / scale.sft_draws  # of the design's demonstrations
        stages = {
            "unified DPO + NLL": (last_stage("dpo_nll", chosen, demonstrations=share),),
            "unified UFT": (last_stage("uft", chosen, demonstrations=share),),
            "SFT → DPO + replay": _sequence(chosen, ratio, scale),
        }
        found += [Point(line, ratio, partial(_plan, each, scale)) for line, each in stages.items()]
    return found


def _sequence(chosen: Mapping[str, Any], ratio: float, scale: Scale) -> tuple[LabStage, LabStage]:
    """The supervised stage takes the share of compute that its draws cost: a preference costs about three of them."""
    cost = 3.1
    whole = scale.sft_draws + cost * scale.preference_draws
    draws = whole * ratio / (ratio + cost)
    return supervised(chosen, draws / scale.sft_draws), last_stage("sft_dpo_replay", chosen)


def _plan(stages: tuple[LabStage, ...], scale: Scale, seed: int) -> Plan:
    return Plan(stages, seed, VARIANTS[0], scale)


STUDY = Study(
    name="mixing_ratio",
    question="How many demonstrations to a preference?",
    points=points,
    axis="demonstrations drawn per preference",
    logarithmic=True,
    note="Learning rates and betas were tuned at a ratio of 3 only.",
    baseline=("unified DPO + NLL", 3.0),
)

if __name__ == "__main__":
    raise SystemExit(main(STUDY, description=__doc__))
