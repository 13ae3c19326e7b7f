"""Does forgetting grow or shrink with the model, and with the data?

Arms      SFT only; SFT → DPO with replay; joint DPO + likelihood
Model     0.09, 0.34 and 1.3 million weights (width 48, 96, 192; three layers), each with base models of its own
Data      1/8, 1/2, 1 and 4 times the distinct demonstrations and preferences, drawn as often in all
Equal     base weights, seeds; FLOPs between the arms at each size; draws between sizes, so that larger models cost more
Unequal   learning rates and betas are those tuned at width 96; a wider or narrower model gets the rate times 96 / width
Run       python -m experiments.scale [--quick]        54 runs, and three base models of each new width
Writes    runs/scale/{report.md, summary.json, scale.png} and the same in runs/data_size
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from .arms import ARMS
from .lab.base import WIDTH
from .lab.training import Scale
from .study import Point, Study, at, main, stages_of

COMPARED = ("sft", "sft_dpo_replay", "dpo_nll")
WEIGHTS = {48: 0.09, 96: 0.34, 192: 1.3}  # width -> millions of weights
DATA = (1 / 8, 1 / 2, 1, 4)


def by_model(chosen: Mapping[str, Any], scale: Scale) -> list[Point]:
    found = []
    for width, millions in WEIGHTS.items():
        wider = replace(scale, width=width)
        for arm in COMPARED:
            stages = tuple(replace(s, learning_rate=s.learning_rate * WIDTH / width) for s in stages_of(arm, chosen))
            found.append(at(ARMS[arm].label, millions, stages, wider))
    return found


def by_data(chosen: Mapping[str, Any], scale: Scale) -> list[Point]:
    found = []
    for factor in DATA:
        demonstrations, preferences = round(scale.demonstrations * factor), round(scale.preferences * factor)
        larger = replace(scale, demonstrations=demonstrations, preferences=preferences)
        for arm in COMPARED:
            found.append(at(ARMS[arm].label, demonstrations, stages_of(arm, chosen), larger))
    return found


MODEL = Study(
    name="scale",
    question="Does forgetting grow or shrink with the model?",
    points=by_model,
    axis="millions of weights",
    logarithmic=True,
    equal="seeds, data and draws; base weights and FLOPs between the arms at each size",
    note="Learning rates were tuned at 0.34 million weights and divided by the width.",
)
DATA_SIZE = Study(
    name="data_size",
    question="Does forgetting grow or shrink with the data?",
    points=by_data,
    axis="distinct demonstrations (half as many preferences)",
    logarithmic=True,
    equal="base weights, seeds, draws; FLOPs within 2 % (reference passes counted)",
    note="As many draws of each size, so that small data are seen again and again.",
)
STUDIES = (MODEL, DATA_SIZE)


def run(words: Sequence[str] | None = None) -> int:
    return max(main(study, words, __doc__, several=True) for study in STUDIES)


if __name__ == "__main__":
    raise SystemExit(run())
