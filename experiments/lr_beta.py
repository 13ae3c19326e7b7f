"""How do learning rate and beta decide what is kept and what is gained?  The question of Wang et al. 2024, Tables 7-10.

Arms      joint DPO + likelihood and SFT → DPO with replay, on a grid of three learning rates and three betas around
          the values that the search chose
Equal     base weights, seeds, data, FLOPs
Run       python -m experiments.lr_beta [--quick]        54 runs
Writes    runs/lr_beta/{report.md, summary.json, lr_beta.png}
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import product
from typing import Any

from .arms import ARMS
from .lab.training import Scale
from .study import Point, Study, at, main, stages_of

COMPARED = ("dpo_nll", "sft_dpo_replay")
FACTORS = (0.25, 1.0, 4.0)  # times what the search chose


def points(chosen: Mapping[str, Any], scale: Scale) -> list[Point]:
    found = []
    for arm, by_rate, by_beta in product(COMPARED, FACTORS, FACTORS):
        rate, beta = chosen[arm]["learning_rate"] * by_rate, chosen[arm]["beta"] * by_beta
        changed = {**chosen, arm: {**chosen[arm], "learning_rate": rate, "beta": beta}}
        found.append(at(ARMS[arm].label, f"{rate:g}|{beta:g}", stages_of(arm, changed), scale))
    return found


STUDY = Study(
    name="lr_beta",
    question="How do learning rate and beta decide what is kept and what is gained?",
    points=points,
    axis="learning rate|beta",
    kind="heat",
)

if __name__ == "__main__":
    raise SystemExit(main(STUDY, description=__doc__))
