"""Which loss of the implicit reward?  Every one at its best setting; pairwise against pointwise, MSE against BCE.

Arms      all losses of uft.losses on pairs (pointwise ones on the two sides of each), as the second stage after the
          shared supervised one, with replay of demonstrations; pairwise and pointwise are the two lines
Equal     base weights, seeds, data, FLOPs, eight trials of learning rate and beta on a base model of their own
Unequal   ranges of beta differ, since the losses mean different things by it
Run       python -m experiments.loss_zoo [--quick]        184 trials and 69 runs
Writes    runs/loss_zoo/{report.md, summary.json, loss_zoo.png}
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from uft.losses import PAIRWISE, POINTWISE

from .arms import AFTER_SFT, REPLAY
from .lab.training import LabStage, Plan, Scale
from .runs import Runner, Settings
from .search import score, search
from .sequential_vs_unified import SEARCH_SEEDS, TOY, VARIANTS
from .study import Point, Study, at, main, supervised

TRIALS = 8
MARGIN = (0.2, 20.0)  # of losses of the margin, or of single rewards
# of losses whose beta is the inverse of a margin to be reached, or of rewards per token
BETAS = {
    "ipo": (0.02, 2.0), "sppo": (0.02, 2.0), "cal_dpo": (0.02, 2.0), "simpo": (0.5, 40.0), "dpo_norm": (0.5, 40.0),
    "cpo": (0.1, 10.0), "orpo": (0.05, 10.0), "una_mse": (0.1, 10.0), "una_bce": (0.1, 10.0),
}  # fmt: skip
LOSSES = {"pairwise": tuple(PAIRWISE), "pointwise": tuple(POINTWISE)}


def stages(loss: str, settings: Settings, chosen: Mapping[str, Any]) -> tuple[LabStage, ...]:
    # the weight of the odds ratio is what ORPO has for a beta
    beta = {"weight" if loss == "orpo" else "beta": settings["beta"]}
    terms = {"sft": {"loss": "nll", "on": "demonstrations"}, "preference": {"loss": loss, **beta}}
    return supervised(chosen), LabStage(loss, terms, settings["learning_rate"], REPLAY, 1.0, "rest")


def tune(chosen: Mapping[str, Any], scale: Scale, run: Runner) -> dict[str, Any]:
    losses = [loss for names in LOSSES.values() for loss in names]
    spaces = {loss: {"learning_rate": AFTER_SFT, "beta": BETAS.get(loss, MARGIN)} for loss in losses}

    def plan_of(loss: str, seed: int, settings: Settings) -> Plan:
        return Plan(stages(loss, settings, chosen), seed, VARIANTS[0], scale)

    trials = 1 if scale == TOY else TRIALS
    found = search(
        spaces, SEARCH_SEEDS[:1], plan_of, lambda _, record: score(record["measures"]), run, "losses", trials=trials
    )
    return {f"loss/{loss}": settings for loss, settings in found.items()}


def points(chosen: Mapping[str, Any], scale: Scale) -> list[Point]:
    return [
        at(line, loss, stages(loss, chosen[f"loss/{loss}"], chosen), scale)
        for line, names in LOSSES.items()
        for loss in names
    ]


STUDY = Study(
    name="loss_zoo",
    question="Which loss of the implicit reward?",
    points=points,
    axis="loss",
    kind="dots",
    equal=f"base weights, seeds, data, FLOPs within 2 %, {TRIALS} trials of learning rate and beta",
    note="Second stage after supervised training, with a quarter of the demonstrations replayed.",
    baseline=("pairwise", "dpo"),
    tune=tune,
)

if __name__ == "__main__":
    raise SystemExit(main(STUDY, description=__doc__))
