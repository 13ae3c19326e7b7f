"""How much noise in feedback does each way of training stand?

Arms      on pairs: likelihood of demonstrations and chosen answers; SFT → DPO with replay; joint DPO + likelihood;
          joint UFT.  On scores: SFT → UNA; joint UNA + likelihood
Noise     0 to 40 % of the judgements turned round: which of the world's hedged pairs is chosen; s becomes 1 − s
Equal     base weights, seeds, prompts; FLOPs among the arms on pairs, and among those on scores
Unequal   learning rates and betas are those tuned without noise: what is seen is robustness of a setting, not of a
          method that is tuned for noise (the main comparison tunes for 25 %)
          Those for scores were tuned on pairs
Run       python -m experiments.feedback_noise [--quick]        78 runs
Writes    runs/feedback_noise/{report.md, summary.json, feedback_noise.png}
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .arms import ARMS
from .lab.training import Scale
from .sequential_vs_unified import VARIANTS
from .study import Point, Study, at, main, stages_of

FLIPPED = (0.0, 0.1, 0.2, 0.3, 0.4)
COMPARED = ("sft_chosen", "sft_dpo_replay", "dpo_nll", "uft")
SCORED, SCORES_FLIPPED = ("sft_una", "uft_nll"), (0.0, 0.2, 0.4)


def points(chosen: Mapping[str, Any], scale: Scale) -> list[Point]:
    def point(arm: str, flip: float, variant: str, label: str) -> Point:
        return at(label, 100 * flip, stages_of(arm, chosen), scale, f"{variant}~{flip}")

    pairs = [point(arm, flip, VARIANTS[0], ARMS[arm].label) for arm in COMPARED for flip in FLIPPED]
    scores = [
        point(arm, flip, "hedged_scores", f"{ARMS[arm].label}, scores") for arm in SCORED for flip in SCORES_FLIPPED
    ]
    return pairs + scores


STUDY = Study(
    name="feedback_noise",
    question="How much noise in feedback does each way of training stand?",
    points=points,
    axis="judgements turned round (%)",
    equal="base weights, seeds, prompts; FLOPs within 2 % among the arms on pairs and among those on scores, which "
    "judge one answer where a pair has two",
    note="Learning rates and betas were tuned without noise.",
)

if __name__ == "__main__":
    raise SystemExit(main(STUDY, description=__doc__))
