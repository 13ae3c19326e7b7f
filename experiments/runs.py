"""What the comparisons share: one way to train a stage, arms that begin alike share that beginning, equal trials.

A plan is data and fully says what is run: `stages`, a `key` (the hash of everything that leads to its result), and
`prefix(n)`, the plan of its first n stages.  The lab and the comparison on real data have a Plan of their own.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from transformers import PreTrainedModel, PrinterCallback, TrainerCallback

from uft.compute import Meter
from uft.config import UnifiedConfig
from uft.data.mixture import FeedbackDataset
from uft.presets import make_objective
from uft.stages import Budget
from uft.trainer import UnifiedTrainer

DEMONSTRATIONS, PREFERENCES, DOCUMENTS = "demonstrations", "preferences", "documents"
# a supervised stage that sequential arms share has a search of its own, at its own length: settings that are best for
# a longer supervised run leave a shorter one half trained, and every arm that goes on from it handicapped
SFT_STAGE = "sft_stage"

Record = dict[str, Any]
Settings = dict[str, float]


class Plan(Protocol):
    stages: tuple[Any, ...]
    seed: int

    @property
    def key(self) -> str: ...
    def prefix(self, stages: int) -> Plan: ...


Runner = Callable[[Sequence[tuple[str, Any]], str, bool], list[Record]]
"""(name, plan) of each run, a title, whether to keep the last stage's weights -> records in the same order."""


def fit(
    model: PreTrainedModel, objective: Any, data: FeedbackDataset, tokenizer: Any, budget: Budget, *,
    learning_rate: float, batch_size: int, micro_batch_size: int | None = None, seed: int, weight_decay: float = 0.0,
    reference: PreTrainedModel | None = None, callbacks: Sequence[TrainerCallback] = (), lora: int = 0,
    eval_data: Any = None,
) -> UnifiedTrainer:  # fmt: skip
    """The one way in which any arm is trained: AdamW, cosine to zero after 5 % warm-up, clipping at 1; the GPU in
    bfloat16 where there is one.  The reference is the model as it is now, unless one is given.  `lora` is the rank of
    an adapter that is trained instead of the weights, 0 for none; `eval_data` is what the objective's balancer measures
    on."""
    gpu, micro_batch_size = torch.cuda.is_available(), micro_batch_size or batch_size
    trainer = UnifiedTrainer(
        model=model,
        objective=objective,
        args=UnifiedConfig(
            output_dir=tempfile.mkdtemp(prefix="arm-"),
            use_cpu=not gpu,
            bf16=gpu,
            learning_rate=learning_rate,
            lr_scheduler_type="cosine",
            warmup_steps=0.05,
            per_device_train_batch_size=micro_batch_size,
            gradient_accumulation_steps=max(1, batch_size // micro_batch_size),
            max_grad_norm=1.0,
            adam_beta2=0.95,
            weight_decay=weight_decay,
            logging_steps=20,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            seed=seed,
            use_peft=lora > 0,
            lora_r=max(lora, 1),
            lora_alpha=2 * max(lora, 1),
        ),
        train_dataset=data,
        eval_dataset=eval_data,
        processing_class=tokenizer,
        reference=reference,
    )
    trainer.remove_callback(PrinterCallback)
    for callback in callbacks:
        trainer.add_callback(callback)
    budget.apply(trainer)
    trainer.train()
    trainer.model.eval()
    shutil.rmtree(trainer.args.output_dir)
    return trainer


def told(trainer: UnifiedTrainer) -> Record:
    """What a stage's record keeps of its training."""
    record = trainer.record()
    kept = ("loss", "rewards", "logps", "kl", "step", "weight", "balance")
    return {
        "objective": record["objective"],
        "steps": record["steps"],
        "compute": record["compute"],
        "training": [{k: v for k, v in entry.items() if k.startswith(kept)} for entry in record["metrics"]],
    }


def design_flops(model: PreTrainedModel, whole: FeedbackDataset, preference: str = "dpo") -> float:
    """What the sequential design costs: its demonstrations by likelihood, then its preferences with a reference.

    whole   the mixture in which one epoch is the design's draws
    """
    total = 0.0
    for name, objective in ((DEMONSTRATIONS, "sft"), (PREFERENCES, preference)):
        meter = Meter(model, make_objective(objective), reference_runs=True)
        weight = whole.weights[whole.sources.index(name)]
        total += weight * meter.of_examples(whole.examples[name]).flops
    return total


def run_stages(
    plan: Plan, model: PreTrainedModel, folder: Path, keep_last: bool,
    train: Callable[[Any, PreTrainedModel, float], tuple[PreTrainedModel, Record]],
    load: Callable[[Path], PreTrainedModel],
) -> list[Record]:  # fmt: skip
    """Trains one stage after another, each finished one but the last kept under its key; a record per stage.

    train   (stage, model, FLOPs spent so far) -> the trained model and its record, with "compute"
    load    reads back a model that was kept
    """
    records: list[Record] = []
    for position, stage in enumerate(plan.stages):
        at = folder / plan.prefix(position + 1).key
        if (at / "record.json").exists():
            model = load(at)
            records.append(json.loads((at / "record.json").read_text()))
            continue
        spent = sum(record["compute"]["flops"] for record in records)
        model, record = train(stage, model, spent)
        records.append(record)
        if keep_last or position < len(plan.stages) - 1:
            keep(at, model, record)
    return records


def keep(folder: Path, model: PreTrainedModel, record: Record) -> None:
    """Written aside and renamed; when two runs arrive at once the later finds it there."""
    aside = folder.with_name(f".{folder.name}.{os.getpid()}")
    model.save_pretrained(aside)
    (aside / "record.json").write_text(json.dumps(record))
    try:
        aside.rename(folder)
    except OSError:
        if not (folder / "record.json").exists():
            raise
        shutil.rmtree(aside)


def added_up(records: Iterable[Record]) -> dict[str, float]:
    """The compute of all stages: sums, and for peaks the highest."""
    totals: dict[str, float] = {}
    for record in records:
        for name, amount in record["compute"].items():
            totals[name] = max(totals.get(name, 0), amount) if "peak" in name else totals.get(name, 0) + amount
    return totals


def run_sharing(plans: Sequence[tuple[str, Plan]], run: Runner, title: str) -> list[Record]:
    """Runs plans side by side, after the stages that several of them begin with, each of which is trained once."""
    beginnings = {plan.prefix(1).key: plan.prefix(1) for _, plan in plans if len(plan.stages) > 1}
    run([(f"supervised stage, seed {plan.seed}", plan) for plan in beginnings.values()], "shared beginnings", True)
    return run(plans, title, False)
