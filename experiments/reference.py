"""What should the reference of the preference loss be?

Arms      SFT → DPO with replay, and joint DPO + likelihood, each against: the model before the stage (the usual);
          the base model; a reference that moves towards the policy (TR-DPO, arXiv:2404.09656, soft update 0.6 every
          32 steps); none (CPO's loss with the same beta, arXiv:2401.08417)
Equal     base weights, seeds, data, FLOPs; so an arm without a reference takes more steps
Unequal   learning rate and beta are those tuned for the usual reference
          For a joint stage the model before it is the base model
Run       python -m experiments.reference [--quick]        21 runs
Writes    runs/reference/{report.md, summary.json, reference.png}
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from .arms import ARMS
from .lab.training import LabStage, Scale
from .study import Point, Study, at, main, stages_of

COMPARED = ("sft_dpo_replay", "dpo_nll")
REFERENCES = {"start": "before the stage", "base": "base model", "moving": "moving (TR-DPO)", "none": "none (CPO)"}


def points(chosen: Mapping[str, Any], scale: Scale) -> list[Point]:
    found = []
    for arm in COMPARED:
        *before, last = stages_of(arm, chosen)
        for name, label in REFERENCES.items():
            if name == "base" and not before:
                continue  # it is the model before the stage
            found.append(at(ARMS[arm].label, label, (*before, _against(last, name)), scale))
    return found


def _against(stage: LabStage, reference: str) -> LabStage:
    if reference != "none":
        return replace(stage, reference=reference)
    terms = {"sft": {"loss": "nll"}, "preference": {"loss": "cpo", "beta": stage.objective["beta"]}}
    return replace(stage, objective=terms)


STUDY = Study(
    name="reference",
    question="What should the reference of the preference loss be?",
    points=points,
    axis="reference",
    kind="dots",
    note="Learning rate and beta were tuned for the usual reference.",
)

if __name__ == "__main__":
    raise SystemExit(main(STUDY, description=__doc__))
