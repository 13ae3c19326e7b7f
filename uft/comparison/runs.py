"""One run: a recipe, a seed and a budget, in a folder of its own, measured after every stage, and run once.

FOLDER/identity.json            what decides the run; one of anything else is put aside
FOLDER/STAGE/evaluation.json    what was measured after a stage
FOLDER/run.json                 the records of all stages; with `digest` once the run is finished, and with `diverged`,
                                the reason, where its weights or losses stopped being numbers
"""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import json
import math
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from uft.checkpoint import ASIDE, RECORD
from uft.comparison.budget import Ledger, Total
from uft.comparison.identity import claim, decides, digest, loads_best, of_evaluation
from uft.comparison.recipe import Arm
from uft.data.mixture import FeedbackDataset, load_feedback
from uft.data.sources import Source
from uft.evaluation.config import EvaluationConfig
from uft.evaluation.data import EvaluationData, read_data
from uft.evaluation.report import NAME, Report, changes
from uft.evaluation.suite import evaluate
from uft.head import is_peft
from uft.loading import load_for_use, usable
from uft.model_card import write_model_card
from uft.models import FrozenReference
from uft.presets import make_objective
from uft.recipe import Recipe, RecipeError
from uft.record import write_json
from uft.stages import Stage, part_of, run_stages, save_after_stages

PREVIOUS = "previous/"  # before a metric: against the stage before, not against the base
WITH_REFERENCE = ("pairs", "harmlessness", "divergence")
NO_MEASURES = ("eval_runtime", "eval_samples_per_second", "eval_steps_per_second")


class Shelf:
    """Data sets in tokens, each read once however many runs train on it."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase):
        self.tokenizer = tokenizer
        self._read: dict[str, FeedbackDataset] = {}
        self._told: set[str] = set()

    def of(self, sources: Mapping[str, Source] | None, plan: Recipe) -> FeedbackDataset | None:
        if sources is None:
            return None
        args = plan.args
        told = [dataclasses.asdict(source) for source in sources.values()]
        key = json.dumps([told, args.max_length, args.on_bad_row, args.data_cache], default=str)
        if key not in self._read:
            found, report = load_feedback(
                sources, self.tokenizer, args.max_length, on_bad_row=args.on_bad_row, cache=args.data_cache
            )
            if str(report) not in self._told:  # a sweep of weights reads the same rows again
                print(report)
                self._told.add(str(report))
            self._read[key] = found
        return self._read[key]


@dataclass
class Measuring:
    """What every model is measured with; `base` is there once the base model has been."""

    config: EvaluationConfig
    data: EvaluationData
    tokenizer: PreTrainedTokenizerBase
    base: Report | None = None

    @classmethod
    def of(cls, config: EvaluationConfig, tokenizer: PreTrainedTokenizerBase) -> Measuring:
        return cls(config, read_data(config, tokenizer), tokenizer)

    @property
    def wants_reference(self) -> bool:
        return any(getattr(self.config, section) for section in WITH_REFERENCE)

    def of_base(self, plan: Recipe, folder: Path, facts: Mapping[str, Any]) -> Report:
        """That of the model before any training, kept in a folder; its implicit rewards and divergences are 0."""
        said = claim(folder, facts)
        if said:
            print(said)
        if (folder / f"{NAME}.json").exists():
            self.base = Report.of(folder)
            return self.base
        model = _base_model(plan)
        reference = FrozenReference(model) if self.wants_reference else None
        self.base = evaluate(model, self.tokenizer, self.config, reference, data=self.data)
        self.base.info["model"] = plan.model
        self.base.write(folder)
        return self.base

    def after(self, model: nn.Module, plan: Recipe, first: bool, folder: Path) -> Report:
        """That of a stage's model, compared with the base; read back where it is there.

        first   whether it is the first stage, before which an adapter stands on the base model's own weights
        """
        if (folder / f"{NAME}.json").exists():
            return Report.of(folder)
        reference = None
        if self.wants_reference and not (first and is_peft(model)):
            reference = _base_model(plan)
        report = evaluate(model, self.tokenizer, self.config, reference, self.base, data=self.data)
        report.info["model"] = str(folder)
        report.write(folder)
        return report


def _base_model(plan: Recipe) -> nn.Module:
    args = plan.args
    return load_for_use(
        plan.model, dtype=args.dtype, device=str(args.device), attn_implementation=args.attn_implementation,
        trust_remote_code=args.trust_remote_code,
    )  # fmt: skip


@dataclass
class Run:
    """A run that may have been begun, or finished, before.

    measuring     None: only what the trainer itself evaluates on eval_dataset
    save_model    keep the model of the last stage; checkpoints go once a run is finished
    callbacks     of every stage's trainer
    """

    arm: Arm
    seed: int
    folder: Path
    total: Total | None
    shelf: Shelf
    measuring: Measuring | None = None
    measured: Mapping[str, Any] = field(default_factory=dict)
    save_model: bool = True
    callbacks: Sequence[Any] = ()

    def facts(self) -> dict[str, Any]:
        plan = self.arm.plan
        data = [self.shelf.of(sources, plan) for sources in (plan.train_dataset, plan.eval_dataset)]
        return decides(
            self.arm.values,
            seed=self.seed,
            total=None if self.total is None else dataclasses.asdict(self.total),
            data=[each and each.fingerprint for each in data],
            measured=self.measured,
            measured_on=None if self.measuring is None else of_evaluation(self.measuring.data),
        )

    def finished(self) -> dict[str, Any] | None:
        """The record of a run that these facts decide and that has come to its end."""
        try:
            record = json.loads((self.folder / RECORD).read_text())
        except (OSError, ValueError):
            return None
        return record if record.get("digest") == digest(self.facts()) else None

    def record(self) -> dict[str, Any]:
        """Runs what has not been run yet, from the newest whole checkpoint on."""
        facts = self.facts()
        said = claim(self.folder, facts)
        if said:
            print(said)
        if (found := self.finished()) is not None:
            return found
        plan = self.arm.plan
        args = dataclasses.replace(plan.args, seed=self.seed, output_dir=str(self.folder))
        if args.save_total_limit is None and not loads_best(self.arm.values):
            args.save_total_limit = 1  # more than that is for the best checkpoint, which may be an early one
        ledger = Ledger(self.arm.name, self.total)
        stages = ledger.stages(self.arm.stages)
        data, held_out = (self.shelf.of(sources, plan) for sources in (plan.train_dataset, plan.eval_dataset))
        reports: list[Report] = []

        def after(stage: Stage, model: nn.Module) -> dict[str, float]:
            ledger.book()
            return self._measures(stage, model, ledger.trainer, reports)

        model, records = run_stages(
            plan.model, stages, data, args, self.shelf.tokenizer, eval_data=held_out, after=after, resume=True,
            callbacks=list(self.callbacks),
        )  # fmt: skip
        if self.save_model:
            save_after_stages(model, stages, str(self.folder))
            self.shelf.tokenizer.save_pretrained(self.folder)
            # from a folder of the recipe the model loads by this name; other folders are not named
            name = self.folder.as_posix() if not self.folder.is_absolute() else f"{self.arm.name}-seed{self.seed}"
            write_model_card(self.folder, records, name)
        record = {"arm": self.arm.name, "seed": self.seed, "total": facts["total"], "stages": records}
        write_json(self.folder / RECORD, record | {"digest": digest(facts)})
        self._remove_checkpoints()
        del model
        free_memory()
        return json.loads((self.folder / RECORD).read_text())

    def record_or_divergence(self) -> dict[str, Any]:
        """As `record`; one that ends with a FloatingPointError is kept as diverged, with the stages before, and is
        finished by that."""
        try:
            return self.record()
        except FloatingPointError as error:
            reason = " ".join(str(error).split())
        stages = []
        with contextlib.suppress(OSError, ValueError):
            stages = json.loads((self.folder / RECORD).read_text())["stages"]
        record = {"arm": self.arm.name, "seed": self.seed, "stages": stages, "diverged": reason}
        write_json(self.folder / RECORD, record | {"digest": digest(self.facts())})
        self._remove_checkpoints()
        free_memory()
        return json.loads((self.folder / RECORD).read_text())

    @property
    def keeps_model(self) -> bool:
        return any(self.folder.glob("*.safetensors"))

    def _remove_checkpoints(self) -> None:
        for stage in self.arm.stages:
            for checkpoint in [*(self.folder / stage.name).glob("checkpoint-*"), self.folder / stage.name / ASIDE]:
                shutil.rmtree(checkpoint, ignore_errors=True)

    def _measures(self, stage: Stage, model: nn.Module, trainer: Any, reports: list[Report]) -> dict[str, float]:
        measures: dict[str, float] = {}
        if trainer.eval_dataset is not None:
            found = trainer.evaluate()
            measures |= {k: v for k, v in found.items() if isinstance(v, (int, float)) and k not in NO_MEASURES}
        if self.measuring is not None:
            folder = self.folder / stage.name
            reports.append(self.measuring.after(model, self.arm.plan, not reports, folder))
            measures |= reports[-1].metrics
            if len(reports) > 1:
                since = changes(reports[-1].samples, reports[-2])
                measures |= {f"{PREVIOUS}{name}": value for name, value in since.items()}
        return measures


def check_data(arm: Arm, shelf: Shelf) -> None:
    """Reads the arm's data.  Raises RecipeError, with the arm's name, where they or a stage would be refused."""
    plan, where = arm.plan, f"arms.{arm.name}"
    bos = shelf.tokenizer.bos_token_id
    try:
        data, held_out = (shelf.of(sources, plan) for sources in (plan.train_dataset, plan.eval_dataset))
        for stage in arm.stages:
            if len(arm.stages) > 1:
                where = f"arms.{arm.name}, stage {stage.name!r}"
            objective, length = make_objective(stage.objective), plan.args.max_length
            usable(part_of(data, stage.on), objective, length, bos)
            if held_out is not None:
                names = [n for n in held_out.sources if not stage.on or n in stage.on or n not in data.sources]
                if names:
                    usable(part_of(held_out, tuple(names)), objective, length, bos)
    except (ValueError, OSError) as error:
        raise RecipeError(f"{where}: {error}") from error


def free_memory() -> None:
    """Trainers hold each other in circles, and with them the model that was trained."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def measure_of(record: Mapping[str, Any], name: str, stage: int = -1) -> float:
    """A measure after a stage of a run; NaN where there is none."""
    value = record["stages"][stage].get("measures", {}).get(name)
    return math.nan if value is None else float(value)


def endless(record: Mapping[str, Any]) -> str | None:
    """What became of a run that has no end, and so no measures of one; None for a run that has."""
    for how in ("diverged", "not_run"):
        if how in record:
            return f"{how.replace('_', ' ')}: {record[how]}"
    return None
