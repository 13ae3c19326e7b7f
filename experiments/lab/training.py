"""Trains an arm in the lab: stages from the base model of a seed, measured on the way and after every stage."""

from __future__ import annotations

import hashlib
import json
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaForCausalLM, TrainerCallback

from experiments import runs
from experiments.jobs import code_fingerprint
from experiments.lab.base import load_base
from experiments.lab.data import demonstrations, examples, preferences
from experiments.lab.measures import measure
from experiments.lab.tokenizer import lab_tokenizer
from experiments.lab.world import TEST, make_world
from experiments.runs import DEMONSTRATIONS, PREFERENCES
from uft.data.mixture import FeedbackDataset
from uft.stages import Budget


@dataclass(frozen=True)
class Scale:
    """How large the problem is.  The draws are those of the sequential design, supervised stage and then DPO; what
    they cost is the compute that every arm gets."""

    demonstrations: int
    preferences: int
    sft_draws: int
    preference_draws: int
    batch_size: int = 64
    per_operator: int = 64
    points: int = 6  # measurements along each stage, for the curves


@dataclass(frozen=True)
class LabStage:
    """One stage.

    objective      as `uft.presets.make_objective` takes it
    demonstrations, preferences   shares of the design's draws; their ratio is the mixture
    budget         "examples": these draws; "rest": what is left of the design's FLOPs
    """

    name: str
    objective: Any
    learning_rate: float
    demonstrations: float = 0.0
    preferences: float = 0.0
    budget: str = "examples"


@dataclass(frozen=True)
class Plan:
    """One training run.  Its key is the hash of its content and of the code."""

    stages: tuple[LabStage, ...]
    seed: int
    variant: str
    scale: Scale

    @property
    def key(self) -> str:
        content = [asdict(self), code_fingerprint(Path(__file__).parent)]
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:20]

    def prefix(self, stages: int) -> Plan:
        return Plan(self.stages[:stages], self.seed, self.variant, self.scale)


def lab_data(plan: Plan, stage: LabStage) -> FeedbackDataset:
    """The stage's mixture, in which one epoch is the design's draws times the stage's shares."""
    scale, world = plan.scale, make_world(plan.seed)
    parts, weights = {}, {}
    if stage.demonstrations:
        rows = demonstrations(world, scale.demonstrations, plan.seed)
        parts[DEMONSTRATIONS] = examples(rows, DEMONSTRATIONS)
        weights[DEMONSTRATIONS] = stage.demonstrations * scale.sft_draws / scale.demonstrations
    if stage.preferences:
        rows = preferences(world, plan.variant, scale.preferences, plan.seed)
        parts[PREFERENCES] = examples(rows, PREFERENCES)
        weights[PREFERENCES] = stage.preferences * scale.preference_draws / scale.preferences
    return FeedbackDataset(parts, weights)


def design_flops(plan: Plan, model: LlamaForCausalLM) -> float:
    """What the sequential design costs, which every arm gets."""
    return runs.design_flops(model, lab_data(plan, LabStage("design", "sft", 0.0, 1.0, 1.0)), "una")


def run_plan(
    plan: Plan, cache: str, *, part: str = TEST, curves: bool = True, keep_last: bool = False
) -> dict[str, Any]:
    """Trains what is not cached yet and returns the record: per stage its configuration, compute, curve and measures.

    part        of the prompts and facts that measure: VALIDATION or TEST
    keep_last   also keep the last stage's weights, for plans that go on from there
    """
    base = load_base(plan.seed)

    def train(stage: LabStage, model: LlamaForCausalLM, spent: float):
        return _train(plan, stage, model, base, spent, part, curves)

    def load(folder: Path) -> LlamaForCausalLM:
        return LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32)

    records = runs.run_stages(plan, load_base(plan.seed), Path(cache) / "stages" / part, keep_last, train, load)
    if not plan.stages:
        records = [{"stage": "base", "measures": _measure(base, base, base, plan, part), "compute": {}}]
    return {
        "seed": plan.seed,
        "variant": plan.variant,
        "stages": records,
        "compute": runs.added_up(records),
        "measures": records[-1]["measures"],
    }


def _train(plan: Plan, stage: LabStage, model, base, spent: float, part: str, curves: bool):
    scale, reference, start = plan.scale, _copy(model), time.perf_counter()
    if stage.budget == "rest":
        budget = Budget(flops=design_flops(plan, model) - spent)
    else:
        draws = stage.demonstrations * scale.sft_draws + stage.preferences * scale.preference_draws
        budget = Budget(examples=round(draws))
    curve = _Curve(plan, base, reference, part, scale.points if curves else 0)
    trainer = runs.fit(
        model, stage.objective, lab_data(plan, stage), lab_tokenizer(), budget, learning_rate=stage.learning_rate,
        batch_size=scale.batch_size, seed=plan.seed, reference=reference, callbacks=[curve],
    )  # fmt: skip
    told = runs.told(trainer)
    told["compute"]["seconds"] -= curve.seconds
    return trainer.model, {
        "stage": stage.name,
        "learning_rate": stage.learning_rate,
        **told,
        "wall_seconds": time.perf_counter() - start,
        "measuring_seconds": curve.seconds,
        "curve": curve.points,
        "measures": _measure(trainer.model, base, reference, plan, part),
    }


class _Curve(TrainerCallback):
    """Measures at a few evenly spaced steps, on an eighth of the prompts."""

    def __init__(self, plan: Plan, base, reference, part: str, points: int):
        self.plan, self.base, self.reference, self.part, self.wanted = plan, base, reference, part, points
        self.points: list[dict[str, Any]] = []
        self.seconds = 0.0  # spent here, not in training

    def on_train_begin(self, args, state, control, **kwargs):
        self.steps = {round(state.max_steps * k / self.wanted) for k in range(1, self.wanted)} if self.wanted else set()

    def on_step_end(self, args, state, control, model=None, **kwargs):
        if state.global_step in self.steps:
            start = time.perf_counter()
            few = max(4, self.plan.scale.per_operator // 8)
            found = _measure(model, self.base, self.reference, self.plan, self.part, per_operator=few)
            self.points.append({"step": state.global_step, "of": state.max_steps, **found})
            self.seconds += time.perf_counter() - start


def _measure(model, base, reference, plan: Plan, part: str, per_operator: int | None = None) -> dict[str, float]:
    world = make_world(plan.seed)
    count = per_operator or plan.scale.per_operator
    return measure(model, base, reference, world, plan.variant, part=part, per_operator=count)


def _copy(model: LlamaForCausalLM) -> LlamaForCausalLM:
    copy = LlamaForCausalLM(model.config)
    copy.load_state_dict(model.state_dict())
    return copy.eval().requires_grad_(False)
