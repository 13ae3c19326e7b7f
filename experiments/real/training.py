"""Trains an arm on real data: stages from the base model of a seed, measured after every stage."""

from __future__ import annotations

import copy
import json
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cache as remembered
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaForCausalLM

from uft.collation import Collator
from uft.data.mixture import FeedbackDataset
from uft.stages import Budget

from .. import runs
from ..jobs import code_fingerprint
from ..runs import DEMONSTRATIONS, PREFERENCES
from .base import base_folder, load_base, load_tokenizer
from .data import RealData, load
from .files import Place, fingerprint, key_of
from .measures import judge_accuracy, kept, majority, measure
from .settings import Scale


@dataclass(frozen=True)
class RealStage:
    """One stage.

    objective      as `uft.presets.make_objective` takes it
    demonstrations, preferences   shares of the design's draws; their ratio is the mixture
    chosen_only    pairs become demonstrations of their chosen responses
    rest           train for what is left of the design's FLOPs; otherwise for the stage's draws
    """

    name: str
    objective: Any
    learning_rate: float
    demonstrations: float = 0.0
    preferences: float = 0.0
    chosen_only: bool = False
    rest: bool = False


@dataclass(frozen=True)
class Plan:
    """One training run.  Its key is the hash of its content and of the code; `data` is the files' fingerprint."""

    stages: tuple[RealStage, ...]
    seed: int
    scale: Scale
    data: str

    @property
    def key(self) -> str:
        return key_of([asdict(self), code_fingerprint(Path(__file__))])

    def prefix(self, stages: int) -> Plan:
        return Plan(self.stages[:stages], self.seed, self.scale, self.data)


def mixture(data: RealData, stage: RealStage, scale: Scale) -> FeedbackDataset:
    """The stage's data, in which one epoch is the design's draws times the stage's shares."""
    design, parts, weights = scale.design, {}, {}
    if stage.demonstrations:
        parts[DEMONSTRATIONS] = data.demonstrations["train"]
        weights[DEMONSTRATIONS] = stage.demonstrations * design.demonstrations / len(parts[DEMONSTRATIONS])
    if stage.preferences:
        parts[PREFERENCES] = data.chosen if stage.chosen_only else data.preferences["train"]
        weights[PREFERENCES] = stage.preferences * design.preferences / len(parts[PREFERENCES])
    return FeedbackDataset(parts, weights)


def design_flops(data: RealData, scale: Scale, model: LlamaForCausalLM) -> float:
    """What the sequential design costs, which every arm gets."""
    return runs.design_flops(model, mixture(data, RealStage("design", "dpo_nll", 0.0, 1.0, 1.0), scale))


def run_plan(plan: Plan, data: str, cache: str, keep_last: bool = False) -> dict[str, Any]:
    """Trains what is not cached yet; returns the record: per stage its configuration, compute, and measures.

    data, cache   folders: the real files; finished bases and stages
    keep_last     also keep the last stage's weights, for plans that go on from there
    """
    place, scale = Place(Path(data), Path(cache)), plan.scale
    if fingerprint(place.data) != plan.data:
        raise ValueError("the data files are not those that the plan was made for")
    rows = load(place, scale)
    base = _device(load_base(place, scale, plan.seed)).eval().requires_grad_(False)

    def train(stage: RealStage, model: LlamaForCausalLM, spent: float):
        return _train(plan, stage, model, base, spent, rows, place)

    def reload(folder: Path) -> LlamaForCausalLM:
        return _device(LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32))

    model = _device(load_base(place, scale, plan.seed))
    records = runs.run_stages(plan, model, place.made / "stages", keep_last, train, reload)
    if not plan.stages:
        records = [{"stage": "base", "compute": {}, **_measured(model, base, model, plan, rows, place)}]
    last = {part: records[-1][part] for part in ("measures", "validation")}
    return {"seed": plan.seed, "stages": records, "compute": runs.added_up(records), **last}


def _train(plan: Plan, stage: RealStage, model, base, spent: float, rows: RealData, place: Place):
    scale, design = plan.scale, plan.scale.design
    reference = copy.deepcopy(model).eval().requires_grad_(False)
    if stage.rest:
        budget = Budget(flops=design_flops(rows, scale, model) - spent)
    else:
        draws = stage.demonstrations * design.demonstrations + stage.preferences * design.preferences
        budget = Budget(examples=round(draws))
    start = time.perf_counter()
    trainer = runs.fit(
        model, stage.objective, mixture(rows, stage, scale), load_tokenizer(place, scale), budget,
        learning_rate=stage.learning_rate, batch_size=design.batch_size, micro_batch_size=design.micro_batch_size,
        seed=plan.seed,
    )  # fmt: skip
    seconds = time.perf_counter() - start
    return trainer.model, {
        "stage": stage.name,
        "learning_rate": stage.learning_rate,
        **runs.told(trainer),
        "wall_seconds": seconds,
        **_measured(trainer.model, base, reference, plan, rows, place),
    }


def _measured(model, base, reference, plan: Plan, rows: RealData, place: Place) -> dict[str, Any]:
    """ "measures" on the test part, "validation" on the other."""
    tokenizer, clock = load_tokenizer(place, plan.scale), time.perf_counter()
    start = start_of(place, plan.scale, plan.seed) if plan.stages else {}
    found = {
        name: measure(model, base, reference, rows, part, plan.scale, tokenizer, start.get(part))
        for name, part in (("measures", "test"), ("validation", "validation"))
    }
    return {**found, "measuring_seconds": time.perf_counter() - clock}


@remembered
def start_of(place: Place, scale: Scale, seed: int) -> dict[str, dict[str, float]]:
    """The base's bits per byte and NLL by part; what knowledge and demonstrations are relative to."""
    rows, collate = load(place, scale), Collator(load_tokenizer(place, scale).pad_token_id)
    base = _device(load_base(place, scale, seed)).eval()
    return {part: kept(base, rows, part, scale.sizes.demonstrations, collate, None) for part in rows.text}


def overview(place: Place, scale: Scale, seeds: Sequence[int]) -> dict[str, Any]:
    """What a report tells besides the arms: bases, what became of every row, and the lines to compare with."""
    rows, tokenizer = load(place, scale), load_tokenizer(place, scale)
    bases = [base_folder(place, scale, seed) / "record.json" for seed in seeds]
    return {
        "bases": [json.loads(path.read_text()) for path in bases],
        "report": rows.report,
        "judge": {part: judge_accuracy(rows, part, tokenizer) for part in rows.text},
        "majority": majority(rows, "test", scale, tokenizer),
    }


def _device(model: LlamaForCausalLM) -> LlamaForCausalLM:
    return model.to("cuda" if torch.cuda.is_available() else "cpu")
