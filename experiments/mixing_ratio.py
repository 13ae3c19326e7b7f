"""How many demonstrations to a preference?  The question of Tables 4 to 6 of Wang et al. 2024, at equal compute.

Arms      joint stages (DPO + likelihood, UFT) and the sequence (supervised stage, then DPO with replay) whose draws are
          mixed in the paper's ratios, 16k to 260k demonstrations for 20k preferences; of the sequence's demonstrations
          a quarter is drawn by the second stage, as replay, and counts in the ratio
Equal     base weights, seeds, data, FLOPs; so more demonstrations mean fewer preferences, where the paper trained
          longer
Unequal   learning rates and betas are those tuned at a ratio of 3, and were not tuned again
Run       python -m experiments.mixing_ratio [--quick]        45 runs, half an hour on two cores
Writes    runs/mixing_ratio/{report.md, summary.json, mixing_ratio.png}
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .arms import REPLAY
from .lab.training import LabStage, Scale
from .study import Point, Study, at, last_stage, main, supervised

RATIOS = (0.8, 1.6, 3.0, 6.5, 13.0)  # demonstrations drawn for each preference drawn
COST = 2.7  # FLOPs of a preference with its reference, in those of a demonstration


def points(chosen: Mapping[str, Any], scale: Scale) -> list[Point]:
    found = []
    for ratio in RATIOS:
        share = ratio * scale.preference_draws / scale.sft_draws  # of the design's demonstrations
        stages = {
            "unified DPO + NLL": (last_stage("dpo_nll", chosen, demonstrations=share),),
            "unified UFT": (last_stage("uft", chosen, demonstrations=share),),
            "SFT → DPO + replay": _sequence(chosen, ratio, scale),
        }
        found += [at(line, ratio, each, scale) for line, each in stages.items()]
    return found


def _sequence(chosen: Mapping[str, Any], ratio: float, scale: Scale) -> tuple[LabStage, LabStage]:
    """All demonstrations of the ratio, for what the design costs, less those that the second stage replays."""
    whole = scale.sft_draws + COST * scale.preference_draws
    preferences = whole / (ratio + COST)
    replayed = REPLAY * ratio * scale.preference_draws / scale.sft_draws  # to all of the design's preferences
    first = (1 - REPLAY) * ratio * preferences / scale.sft_draws
    return supervised(chosen, first), last_stage("sft_dpo_replay", chosen, demonstrations=replayed)


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
