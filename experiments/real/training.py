"""Trains an arm on real data: stages from the base model of a seed, measured after every stage.

A plan is data and fully says what is run.  A finished stage's weights are kept under the content of everything that
led to them, so that arms which begin alike share that beginning.
"""

from __future__ import annotations

import copy
import json
import shutil
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cache as remembered
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaForCausalLM, PrinterCallback

from experiments.real.base import base_folder, keep, load_base, load_tokenizer
from experiments.real.data import DEMONSTRATIONS, PREFERENCES, RealData, load
from experiments.real.files import Place, fingerprint, key_of
from experiments.real.measures import judge_accuracy, kept, majority, measure
from experiments.real.settings import Scale
from uft.compute import Meter
from uft.config import UnifiedConfig
from uft.data.mixture import FeedbackDataset
from uft.feedback import Collator
from uft.presets import make_objective
from uft.stages import Budget
from uft.trainer import UnifiedTrainer


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
    """One training run.  Its key is the hash of its content; `data` is the files' fingerprint."""

    stages: tuple[RealStage, ...]
    seed: int
    scale: Scale
    data: str

    @property
    def key(self) -> str:
        return key_of(asdict(self))

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
    """What the sequential design costs: its demonstrations by likelihood, then its pairs by DPO with a reference."""
    whole = mixture(data, RealStage("design", "dpo_nll", 0.0, 1.0, 1.0), scale)
    total = 0.0
    for name, objective in ((DEMONSTRATIONS, "sft"), (PREFERENCES, "dpo")):
        meter = Meter(model, make_objective(objective), reference_runs=True)
        weight = whole.weights[whole.sources.index(name)]
        total += weight * meter.of_examples(whole.examples[name]).flops
    return total


def fit(
    model: LlamaForCausalLM, objective: Any, data: FeedbackDataset, tokenizer: Any, budget: Budget,
    learning_rate: float, batch: int, micro_batch: int, seed: int, decay: float = 0.0,
) -> UnifiedTrainer:  # fmt: skip
    """The one way in which anything here is trained.  The reference is the model as it is now."""
    gpu = torch.cuda.is_available()
    trainer = UnifiedTrainer(
        model=model,
        objective=objective,
        args=UnifiedConfig(
            output_dir=tempfile.mkdtemp(prefix="real-"),
            use_cpu=not gpu,
            bf16=gpu,
            learning_rate=learning_rate,
            lr_scheduler_type="cosine",
            warmup_steps=0.05,
            per_device_train_batch_size=micro_batch,
            gradient_accumulation_steps=max(1, batch // micro_batch),
            max_grad_norm=1.0,
            adam_beta2=0.95,
            weight_decay=decay,
            logging_steps=20,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            seed=seed,
        ),
        train_dataset=data,
        processing_class=tokenizer,
    )
    trainer.remove_callback(PrinterCallback)
    budget.apply(trainer)
    trainer.train()
    trainer.model.eval()
    shutil.rmtree(trainer.args.output_dir)
    return trainer


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
    model, records, spent = _device(load_base(place, scale, plan.seed)), [], 0
    for position, stage in enumerate(plan.stages):
        reusable = keep_last or position < len(plan.stages) - 1
        at = place.made / "stages" / plan.prefix(position + 1).key
        if reusable and (at / "record.json").exists():
            model = _device(LlamaForCausalLM.from_pretrained(at, dtype=torch.float32))
            records.append(json.loads((at / "record.json").read_text()))
        else:
            model, record = _train(plan, stage, model, base, spent, rows, place)
            if reusable:
                _keep_stage(at, model, record)
            records.append(record)
        spent += records[-1]["compute"]["flops"]
    if not plan.stages:
        records.append({"stage": "base", "compute": {}, **_measured(model, base, model, plan, rows, place)})
    totals: dict[str, float] = {}
    for record in records:
        for name, amount in record["compute"].items():
            totals[name] = max(totals.get(name, 0), amount) if "peak" in name else totals.get(name, 0) + amount
    last = {part: records[-1][part] for part in ("measures", "validation")}
    return {"seed": plan.seed, "stages": records, "compute": totals, **last}


def _train(plan: Plan, stage: RealStage, model, base, spent: float, rows: RealData, place: Place):
    scale, design = plan.scale, plan.scale.design
    reference = copy.deepcopy(model).eval().requires_grad_(False)
    if stage.rest:
        budget = Budget(flops=design_flops(rows, scale, model) - spent)
    else:
        draws = stage.demonstrations * design.demonstrations + stage.preferences * design.preferences
        budget = Budget(examples=round(draws))
    start = time.perf_counter()
    trainer = fit(
        model, stage.objective, mixture(rows, stage, scale), load_tokenizer(place, scale), budget,
        stage.learning_rate, design.batch_size, design.micro_batch_size, plan.seed,
    )  # fmt: skip
    seconds = time.perf_counter() - start
    record = trainer.record()
    return trainer.model, {
        "stage": stage.name,
        "objective": record["objective"],
        "learning_rate": stage.learning_rate,
        "steps": record["steps"],
        "compute": record["compute"],
        "wall_seconds": seconds,
        "training": [
            {k: v for k, v in entry.items() if k.startswith(("loss", "rewards", "logps")) or k == "step"}
            for entry in record["metrics"]
        ],
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


def _keep_stage(folder: Path, model: LlamaForCausalLM, record: dict[str, Any]) -> None:
    def save(aside: Path) -> None:
        model.save_pretrained(aside)
        (aside / "record.json").write_text(json.dumps(record))

    keep(folder, save)
