"""Should the weights of likelihood and preferences change over a joint stage?

Arms      joint DPO + likelihood whose weights (likelihood, preferences) go from (1, 0) to (0, 1): not at all (both one
          half), along a line, along half a cosine, in one step; the step against the policy at that moment instead of
          the base, which is sequential training but for the optimiser's memory and the learning rate's schedule; and
          the line and the step the other way round
          beside them the sequence SFT → DPO itself, at the joint stage's rate and beta, and at its own
Equal     base weights, seeds, data, FLOPs as expected beforehand (the first and last tenth of a line train one term
          more than the others; what was spent is in the table)
Unequal   learning rate and beta are those tuned for constant weights.  While one term rests its rows are drawn and left
          out, so that a step trains on 24 demonstrations or 8 preferences where the sequence trains on 32
Run       python -m experiments.weight_schedule [--quick]        27 runs
Writes    runs/weight_schedule/{report.md, summary.json, weight_schedule.png}

That the step schedule is sequential training to the bit, where data and learning rate are the same, is a test
(tests/test_balance.py).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from .lab.training import LabStage, Scale
from .study import Point, Study, at, last_stage, main, stages_of, supervised

SWITCH = (
    0.5  # of the joint stage's steps: as many demonstrations and preferences are then trained on as in the sequence
)


def points(chosen: Mapping[str, Any], scale: Scale) -> list[Point]:
    def joint(name: str, first: Mapping[str, Any], last: Mapping[str, Any], reference: str = "start") -> Point:
        stage = last_stage("dpo_nll", chosen, reference=reference)
        weights = {"sft_weight": first, "preference_weight": last}
        objective = {**stage.objective, **weights}
        return _point("joint stage", name, (replace(stage, objective=objective),), scale)

    down, up = ({"schedule": "linear", "start": a, "end": 1.0 - a} for a in (1.0, 0.0))
    slow_down, slow_up = ({"schedule": "cosine", "start": a, "end": 1.0 - a} for a in (1.0, 0.0))
    first, then = ({"schedule": "step", "at": SWITCH, "before": a, "after": 1.0 - a} for a in (1.0, 0.0))
    same, two = chosen["dpo_nll"], "two stages"
    untuned = {**chosen, "sft_dpo": same, "sft_stage": {**chosen["sft_stage"], "learning_rate": same["learning_rate"]}}
    return [
        joint("constant", 0.5, 0.5),
        joint("linear", down, up),
        joint("cosine", slow_down, slow_up),
        joint("step", first, then),
        joint("step, reference taken anew", first, then, f"anew@{SWITCH}"),
        joint("linear, preferences first", up, down),
        joint("step, preferences first", then, first),
        _point(two, "SFT → DPO, same rate and beta", (supervised(untuned), last_stage("sft_dpo", untuned)), scale),
        _point(two, "SFT → DPO, tuned", stages_of("sft_dpo", chosen), scale),
    ]


def _point(line: str, name: str, stages: tuple[LabStage, ...], scale: Scale) -> Point:
    return at(line, name, stages, scale)


STUDY = Study(
    name="weight_schedule",
    question="Should the weights of likelihood and preferences change over a joint stage?",
    points=points,
    axis="weights",
    kind="dots",
    equal="base weights, seeds, data, FLOPs as expected beforehand",
    note="Learning rate and beta were tuned for constant weights.",
    baseline=("joint stage", "constant"),
)

if __name__ == "__main__":
    raise SystemExit(main(STUDY, description=__doc__))
