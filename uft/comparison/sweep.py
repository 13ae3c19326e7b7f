"""Runs a sweep: a study per arm in optuna's journal, a trial of each arm in turn, each trial a run per seed.

What is tried next is a function of the trials before and of the number of the trial, so that a sweep that was killed
goes on as it would have; the trial that was under way is taken up again, from its newest checkpoint.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoTokenizer, TrainerCallback

from uft.comparison.compare import OF_CHANGES
from uft.comparison.identity import DECIDES_NOTHING, OF_BEST, decides, digest, of_evaluation
from uft.comparison.recipe import Arm
from uft.comparison.runs import PREVIOUS, Measuring, Run, Shelf, check_data, free_memory, measure_of
from uft.comparison.sweep_recipe import NOT_OF_TRIALS, ONE, Sweep, Swept
from uft.comparison.sweep_study import MOST_TIMES, Study, Watch
from uft.evaluation.report import Report
from uft.recipe import RecipeError
from uft.record import write_json

FILE = "study.json"
DECIDES_WHAT_IS_READ = ("train_dataset", "eval_dataset", "max_length")
FACTS = {  # as they are named where they differ
    "version": "version of this package", "weights": "weights of the model", "imports": "content of what is imported",
    "data": "data", "measured": "measure", "measured_on": "measured data",
}  # fmt: skip


class SweepRun:
    """A sweep whose data have been read and found to be what its arms can use."""

    def __init__(self, plan: Sweep):
        self.plan = plan
        first = self.first(plan.arms[0]).plan
        if first.args.world_size > 1:
            raise ValueError("uft sweep was started on several ranks; want one process")
        self.tokenizer = AutoTokenizer.from_pretrained(first.tokenizer, trust_remote_code=first.args.trust_remote_code)
        self.shelf = Shelf(self.tokenizer)
        for arm in plan.arms:
            for each in self.variants(arm):
                try:
                    check_data(each, self.shelf)
                except RecipeError as error:
                    raise RecipeError(str(error).removeprefix(f"arms.{ONE}: ")) from None
        self.measuring = None if plan.measure is None else Measuring.of(plan.measure, self.tokenizer)

    @staticmethod
    def first(arm: Swept) -> Arm:
        """The arm at the first values of its parameters."""
        return arm.with_values({parameter.key: parameter.some[0] for parameter in arm.space})

    @staticmethod
    def variants(arm: Swept) -> list[Arm]:
        """The arm at every choice that decides what is read, or what it is used for; the others at their first."""
        first = {parameter.key: parameter.some[0] for parameter in arm.space}
        reading = [
            parameter
            for parameter in arm.space
            if (parameter.key.split(".")[0] in DECIDES_WHAT_IS_READ and not parameter.key.endswith(".weight"))
            or parameter.key == "objective"
        ]
        found = [arm.with_values(first | {p.key: value}) for p in reading for value in p.values or ()]
        return found or [arm.with_values(first)]

    def run(self) -> dict[str, list[dict[str, Any]]]:
        """Every trial, by arm.  Raises RecipeError where the folder holds another sweep."""
        plan, facts = self.plan, self.facts()
        self._want_same(facts)
        if self.measuring is not None:
            self._want_measured(self._base())
            free_memory()
        write_json(plan.output_dir / FILE, {"decided_by": facts})
        studies = {arm.name: Study(arm, plan) for arm in plan.arms}
        start = time.monotonic()
        # a trial of each arm in turn, so that what is stopped early is still fair
        for _ in range(max(study.wanted for study in studies.values())):
            for study in studies.values():
                if not study.done():
                    line = self._trial(study)
                    print(f"{line}; {(time.monotonic() - start) / 60:.1f} min", flush=True)
        return {name: study.trials() for name, study in studies.items()}

    # ---- whose the folder is ----

    def facts(self) -> dict[str, Any]:
        """All that decides what a trial finds; more trials are still the same sweep."""
        plan = self.plan
        said = {key: getattr(plan, key) for key in ("metric", "direction", "sampler", "pruner", "seeds")}
        left = {"trials", "measure", *NOT_OF_TRIALS} - {"sweep", "arms"}
        values = _deciding({key: value for key, value in plan.values.items() if key not in left})
        data = {arm.name: [self._fingerprints(each) for each in self.variants(arm)] for arm in plan.arms}
        on = None if self.measuring is None else of_evaluation(self.measuring.data)
        return decides(values | said, data=data, measured=plan.measured, measured_on=on)

    def _fingerprints(self, arm: Arm) -> list[str | None]:
        data = (self.shelf.of(each, arm.plan) for each in (arm.plan.train_dataset, arm.plan.eval_dataset))
        return [each and each.fingerprint for each in data]

    def _want_same(self, facts: Mapping[str, Any]) -> None:
        path = self.plan.output_dir / FILE
        there = json.loads(path.read_text()).get("decided_by", {}) if path.exists() else facts
        old, new = there.get("recipe", {}), facts["recipe"]
        differing = sorted(key for key in {*old, *new} if digest(old.get(key)) != digest(new.get(key)))
        differing += [name for key, name in FACTS.items() if digest(there.get(key)) != digest(facts.get(key))]
        if differing:
            other = f"holds another sweep, with other {', '.join(differing)}"
            raise RecipeError(f"{self.plan.output_dir}: {other}; want another output_dir")

    # ---- what is measured ----

    def _base(self) -> Report:
        first = self.first(self.plan.arms[0])
        values = {key: first.values.get(key) for key in ("model", "tokenizer", "dtype", "attn_implementation")}
        facts = decides(values, measured=self.plan.measured, measured_on=of_evaluation(self.measuring.data))
        return self.measuring.of_base(first.plan, self.plan.output_dir / "base", facts)

    def _want_measured(self, base: Report) -> None:
        """Before anything is trained; what the trainer evaluates is known after a training only."""
        changes = [f"{section}/{name}" for section in base.samples for name in OF_CHANGES]
        metric = self.plan.metric
        if not metric.startswith("eval_") and metric.removeprefix(PREVIOUS) not in (*base.metrics, *changes):
            raise RecipeError(f"metric is {metric!r}, which is not measured; want one of {', '.join(base.metrics)}")

    def _value(self, record: Mapping[str, Any]) -> float:
        measures = record["stages"][-1]["measures"]
        if self.plan.metric not in measures:
            known = ", ".join(name for name in measures if name != "epoch")
            want = f"one of {known}" if known else "an eval_dataset that bears the name of what the last stage is on"
            raise RecipeError(f"metric is {self.plan.metric!r}, which is not measured; want {want}")
        return measure_of(record, self.plan.metric)

    # ---- trials ----

    def _trial(self, study: Study) -> str:
        """Runs a trial; one that cannot be finished is kept as failed.  Returns a line about it."""
        trial = study.ask()
        values = study.values(trial.params)
        name = "" if study.arm.changes is None else f"{study.arm.name}, "
        shown = ", ".join(f"{key} {_short(value)}" for key, value in values.items())
        line = f"{name}trial {trial.number + 1} of {study.wanted}: {shown}"
        if (twin := study.twin(trial)) is not None:
            study.finish(trial, twin.value, {**twin.user_attrs, "as_trial": twin.number + 1})
            return f"{line}: as trial {twin.number + 1}, {self.plan.metric} {twin.value:.5g}"
        if study.stuck(trial):
            reason = f"it was begun {MOST_TIMES} times, and ended each time without getting further"
            study.finish(trial, None, {"reason": reason})
            return f"{line}: failed, {reason}"
        about, pruned, reason = {"by_seed": {}, "flops": 0.0, "seconds": 0.0}, False, None
        try:
            pruned = self._seeds(study, trial, study.arm.with_values(values), about)
        except (FloatingPointError, torch.OutOfMemoryError) as error:  # which other values may not end in
            reason = " ".join(str(error).split())
        except Exception as error:
            study.finish(trial, None, about | {"reason": f"{type(error).__name__}: {' '.join(str(error).split())}"})
            raise
        value = float(np.mean(list(about["by_seed"].values()))) if reason is None else math.nan
        if not math.isfinite(value):
            reason = reason or f"{self.plan.metric} is {value}"
            study.finish(trial, None, about | {"reason": reason})
            free_memory()
            return f"{line}: failed, {reason}"
        study.finish(trial, value, about, pruned)
        return f"{line}: {self.plan.metric} {value:.5g}{' (ended early)' if pruned else ''}"

    def _seeds(self, study: Study, trial: Any, arm: Arm, about: dict[str, Any]) -> bool:
        """A run per seed, what it found and cost put into `about`; returns whether the trial was ended early."""
        for seed in self.plan.seeds:
            watch = None
            if self.plan.pruner == "median" and not about["by_seed"]:
                watch = Watch(trial, self.plan, arm)
            record = self._run(arm, seed, study.folder(trial.number), watch).record()
            about["by_seed"][str(seed)] = self._value(record)
            for cost in ("flops", "seconds"):
                about[cost] += sum(stage["compute"].get(cost, 0) for stage in record["stages"])
            if watch is not None and watch.pruned:
                return True
        return False

    def _run(self, arm: Arm, seed: int, folder: Path, watch: TrainerCallback | None) -> Run:
        return Run(
            arm, seed, folder / f"seed{seed}", None, self.shelf, self.measuring, self.plan.measured or {},
            save_model=False, callbacks=[] if watch is None else [watch],
        )  # fmt: skip


def _deciding(values: Mapping[str, Any]) -> dict[str, Any]:
    """A recipe without what changes no number, in its arms and stages either."""
    found = {key: value for key, value in values.items() if key not in DECIDES_NOTHING - OF_BEST}
    if isinstance(found.get("arms"), Mapping):
        found["arms"] = {name: _deciding(arm or {}) for name, arm in found["arms"].items()}
    if isinstance(found.get("stages"), list):
        found["stages"] = [_deciding(stage) for stage in found["stages"]]
    return found


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
