"""Trains an arm in the lab: stages from the base model of a seed, measured on the way and after every stage.

A plan is data and fully says what is run.  A finished stage's weights are kept under the content of everything that
led to them, so that arms which begin alike share that beginning.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaForCausalLM, PrinterCallback, TrainerCallback

from experiments.jobs import code_fingerprint
from experiments.lab.base import load_base
from experiments.lab.data import demonstrations, examples, preferences
from experiments.lab.measures import measure
from experiments.lab.tokenizer import lab_tokenizer
from experiments.lab.world import make_world
from uft.compute import Meter
from uft.config import UnifiedConfig
from uft.data.mixture import FeedbackDataset
from uft.presets import make_objective
from uft.stages import Budget
from uft.trainer import UnifiedTrainer

DEMONSTRATIONS, PREFERENCES = "demonstrations", "preferences"
# seeds of the prompts that measure: choices are made on the first, reports on the second
VALIDATION, TEST = 1_000, 2_000


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
    """What the sequential design costs: its demonstrations by likelihood, then its preferences with a reference."""
    whole = lab_data(plan, LabStage("design", "sft", 0.0, 1.0, 1.0))
    total = 0.0
    for name, objective in ((DEMONSTRATIONS, "sft"), (PREFERENCES, "una")):
        meter = Meter(model, make_objective(objective), reference_runs=True)
        weight = whole.weights[whole.sources.index(name)]
        total += weight * meter.of_examples(whole.examples[name]).flops
    return total


def run_plan(plan: Plan, cache: str, *, prompts: int = TEST, curves: bool = True, keep: bool = False) -> dict[str, Any]:
    """Trains what is not cached yet and returns the record: per stage its configuration, compute, curve and measures.

    prompts   seed of the prompts that measure, VALIDATION or TEST
    keep      also keep the last stage's weights, for plans that go on from there
    """
    records: list[dict[str, Any]] = []
    base = load_base(plan.seed)
    model, spent = load_base(plan.seed), 0
    for position, stage in enumerate(plan.stages):
        reusable = keep or position < len(plan.stages) - 1
        folder = Path(cache) / "stages" / plan.prefix(position + 1).key
        if reusable and (folder / "record.json").exists():
            model = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32)
            records.append(json.loads((folder / "record.json").read_text()))
        else:
            model, record = _train(plan, stage, model, base, spent, prompts, curves)
            if reusable:
                _keep(folder, model, record)
            records.append(record)
        spent += records[-1]["compute"]["flops"]
    if not plan.stages:
        records.append({"stage": "base", "measures": _measure(model, base, base, plan, prompts), "compute": {}})
    totals: dict[str, float] = {}
    for record in records:
        for name, amount in record["compute"].items():
            totals[name] = max(totals.get(name, 0), amount) if "peak" in name else totals.get(name, 0) + amount
    return {
        "seed": plan.seed,
        "variant": plan.variant,
        "stages": records,
        "compute": totals,
        "measures": records[-1]["measures"],
    }


def _train(plan: Plan, stage: LabStage, model, base, spent: float, prompts: int, curves: bool):
    data, scale = lab_data(plan, stage), plan.scale
    reference = _copy(model)
    start = time.perf_counter()
    trainer = UnifiedTrainer(
        model=model,
        objective=stage.objective,
        args=UnifiedConfig(
            output_dir=tempfile.mkdtemp(prefix="lab-"),
            use_cpu=True,
            learning_rate=stage.learning_rate,
            lr_scheduler_type="cosine",
            warmup_steps=0.05,
            per_device_train_batch_size=scale.batch_size,
            max_grad_norm=1.0,
            adam_beta2=0.95,
            logging_steps=20,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            seed=plan.seed,
        ),
        train_dataset=data,
        processing_class=lab_tokenizer(),
        reference=reference,
    )
    trainer.remove_callback(PrinterCallback)
    if stage.budget == "rest":
        budget = Budget(flops=design_flops(plan, model) - spent)
    else:
        draws = stage.demonstrations * scale.sft_draws + stage.preferences * scale.preference_draws
        budget = Budget(examples=round(draws))
    budget.apply(trainer)
    curve = _Curve(plan, base, reference, prompts, scale.points if curves else 0)
    trainer.add_callback(curve)
    trainer.train()
    trainer.model.eval()
    record = trainer.record()
    shutil.rmtree(trainer.args.output_dir)
    return trainer.model, {
        "stage": stage.name,
        "objective": record["objective"],
        "learning_rate": stage.learning_rate,
        "steps": record["steps"],
        "compute": record["compute"],
        "wall_seconds": time.perf_counter() - start,
        "training": [
            {k: v for k, v in entry.items() if k.startswith(("loss", "rewards", "logps", "kl")) or k == "step"}
            for entry in record["metrics"]
        ],
        "curve": curve.points,
        "measures": _measure(trainer.model, base, reference, plan, prompts),
    }


class _Curve(TrainerCallback):
    """Measures at a few evenly spaced steps, on an eighth of the prompts."""

    def __init__(self, plan: Plan, base, reference, prompts: int, points: int):
        self.plan, self.base, self.reference, self.prompts, self.wanted = plan, base, reference, prompts, points
        self.points: list[dict[str, Any]] = []

    def on_train_begin(self, args, state, control, **kwargs):
        self.steps = {round(state.max_steps * k / self.wanted) for k in range(1, self.wanted)} if self.wanted else set()

    def on_step_end(self, args, state, control, model=None, **kwargs):
        if state.global_step in self.steps:
            few = max(4, self.plan.scale.per_operator // 8)
            found = _measure(model, self.base, self.reference, self.plan, self.prompts, per_operator=few)
            self.points.append({"step": state.global_step, "of": state.max_steps, **found})


def _measure(model, base, reference, plan: Plan, prompts: int, per_operator: int | None = None) -> dict[str, float]:
    world = make_world(plan.seed)
    count = per_operator or plan.scale.per_operator
    return measure(model, base, reference, world, plan.variant, seed=prompts, per_operator=count)


def _copy(model: LlamaForCausalLM) -> LlamaForCausalLM:
    copy = LlamaForCausalLM(model.config)
    copy.load_state_dict(model.state_dict())
    return copy.eval().requires_grad_(False)


def _keep(folder: Path, model: LlamaForCausalLM, record: dict[str, Any]) -> None:
    """Written aside and renamed; when two runs arrive at once the later finds it there."""
    aside = folder.with_name(f".{folder.name}.{os.getpid()}")
    model.save_pretrained(aside)
    (aside / "record.json").write_text(json.dumps(record))
    try:
        aside.rename(folder)
    except OSError:
        if not (folder / "record.json").exists():
            raise
