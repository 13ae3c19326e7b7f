"""Runs a sweep: a study per arm in optuna's journal, a trial of each arm in turn, each trial a run per seed.

What is tried next is a function of the trials before and of the number of the trial, so that a sweep that was killed
goes on as it would have; the trial that was under way is taken up again, from its newest checkpoint.
"""

from __future__ import annotations

import itertools
import json
import math
import time
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from transformers import AutoTokenizer, TrainerCallback

from uft.comparison.identity import decides, digest, of_evaluation
from uft.comparison.recipe import Arm
from uft.comparison.runs import Measuring, Run, Shelf, check_data, free_memory, measure_of
from uft.comparison.sweep_recipe import Parameter, Sweep, Swept
from uft.recipe import RecipeError
from uft.record import write_json

try:
    import optuna
except ImportError:
    raise ImportError("uft sweep needs optuna: pip install 'unified-finetuning[sweep]'") from None

JOURNAL, FILE = "sweep.journal", "study.json"
BEFORE_PRUNING = 4  # trials that are never ended early
SCALARS = (str, int, float, bool, type(None))
Complete, Pruned, Failed, Running = (
    getattr(optuna.trial.TrialState, s) for s in ("COMPLETE", "PRUNED", "FAIL", "RUNNING")
)


class SweepRun:
    """A sweep whose data have been read and found to be what its arms can use."""

    def __init__(self, plan: Sweep):
        self.plan = plan
        first = self.first(plan.arms[0]).plan
        self.tokenizer = AutoTokenizer.from_pretrained(first.tokenizer, trust_remote_code=first.args.trust_remote_code)
        self.shelf = Shelf(self.tokenizer)
        for arm in plan.arms:
            check_data(self.first(arm), self.shelf)
        self.measuring = None if plan.measure is None else Measuring.of(plan.measure, self.tokenizer)

    @staticmethod
    def first(arm: Swept) -> Arm:
        """The arm at the first values of its parameters."""
        return arm.with_values({parameter.key: parameter.some[0] for parameter in arm.space})

    def run(self) -> dict[str, list[dict[str, Any]]]:
        """Every trial, by arm.  Raises RecipeError where the folder holds another sweep."""
        plan = self.plan
        self._claim()
        if self.measuring is not None:
            first = self.first(plan.arms[0])
            facts = decides(
                {"model": first.values["model"]}, measured=plan.measured, measured_on=of_evaluation(self.measuring.data)
            )
            self.measuring.of_base(first.plan, plan.output_dir / "base", facts)
            free_memory()
        studies = {arm.name: _Study(arm, plan) for arm in plan.arms}
        start = time.monotonic()
        for _ in range(plan.trials):  # a trial of each arm in turn, so that what is stopped early is still fair
            for arm in plan.arms:
                study = studies[arm.name]
                if not study.done():
                    line = self._trial(study)
                    print(f"{line}; {(time.monotonic() - start) / 60:.1f} min", flush=True)
        return {name: study.trials() for name, study in studies.items()}

    def _claim(self) -> None:
        """The folder is this sweep's; more trials are still the same sweep."""
        path = self.plan.output_dir / FILE
        facts = {key: value for key, value in self.plan.values.items() if key not in ("trials", "output_dir")}
        if path.exists():
            there = json.loads(path.read_text())["recipe"]
            if digest(there) != digest(facts):
                differing = sorted(k for k in {*there, *facts} if digest(there.get(k)) != digest(facts.get(k)))
                other = f"holds another sweep, with other {', '.join(differing)}"
                raise RecipeError(f"{self.plan.output_dir}: {other}; want another output_dir")
        write_json(path, {"recipe": facts})

    def _trial(self, study: _Study) -> str:
        trial = study.ask()
        values = study.values(trial.params)
        name = "" if study.arm.changes is None else f"{study.arm.name}, "
        shown = ", ".join(f"{key} {_short(value)}" for key, value in values.items())
        line = f"{name}trial {trial.number + 1} of {study.wanted}: {shown}"
        if (twin := study.twin(trial)) is not None:
            study.finish(trial, twin.value, {**twin.user_attrs, "as_trial": twin.number + 1})
            return f"{line}: as trial {twin.number + 1}, {self.plan.metric} {twin.value:.5g}"
        arm, by_seed, costs, pruned = study.arm.with_values(values), {}, {"flops": 0.0, "seconds": 0.0}, False
        try:
            for seed in self.plan.seeds:
                watch = _Watch(trial, self.plan, arm) if self.plan.pruner == "median" and not by_seed else None
                record = self._run(arm, seed, study.folder(trial.number), watch).record()
                by_seed[str(seed)] = self._value(record)
                for cost in costs:
                    costs[cost] += sum(stage["compute"].get(cost, 0) for stage in record["stages"])
                if pruned := watch is not None and watch.pruned:
                    break
        except FloatingPointError as error:
            study.finish(trial, None, {"reason": str(error), **costs})
            return f"{line}: failed, {error}"
        value = float(np.mean(list(by_seed.values())))
        about = {"by_seed": by_seed, **costs}
        if not math.isfinite(value):
            study.finish(trial, None, {"reason": f"{self.plan.metric} is {value}", **costs})
            return f"{line}: failed, {self.plan.metric} is {value}"
        study.finish(trial, value, about, pruned)
        return f"{line}: {self.plan.metric} {value:.5g}{' (ended early)' if pruned else ''}"

    def _run(self, arm: Arm, seed: int, folder: Path, watch: TrainerCallback | None) -> Run:
        return Run(
            arm, seed, folder / f"seed{seed}", None, self.shelf, self.measuring, self.plan.measured or {},
            save_model=False, callbacks=[] if watch is None else [watch],
        )  # fmt: skip

    def _value(self, record: Mapping[str, Any]) -> float:
        measures = record["stages"][-1]["measures"]
        if self.plan.metric not in measures:
            known = ", ".join(name for name in measures if name != "epoch")
            raise RecipeError(f"metric is {self.plan.metric!r}, which is not measured; want one of {known}")
        return measure_of(record, self.plan.metric)


class _Watch(TrainerCallback):
    """Tells the trial what the evaluations of the last stage find, and ends a training that falls behind."""

    def __init__(self, trial: optuna.Trial, plan: Sweep, arm: Arm):
        self.trial, self.metric, self.last = trial, plan.metric, arm.stages[-1].name
        self.pruned = False
        self._told: set[int] = set(_frozen(trial).intermediate_values)

    def on_evaluate(self, args, state, control, metrics=None, **kwargs) -> None:
        value, step = (metrics or {}).get(self.metric), state.global_step
        if Path(args.output_dir).name != self.last or value is None or step in self._told:
            return
        self._told.add(step)
        self.trial.report(value, step)
        if step < state.max_steps and self.trial.should_prune():
            self.pruned = control.should_training_stop = True


def _frozen(trial: optuna.Trial) -> optuna.trial.FrozenTrial:
    return trial.study.get_trials(deepcopy=False)[trial.number]


class _Study:
    """One arm's trials."""

    def __init__(self, arm: Swept, plan: Sweep):
        self.arm, self.plan = arm, plan
        optuna.logging.set_verbosity(optuna.logging.ERROR)
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        backend = optuna.storages.journal.JournalFileBackend(str(plan.output_dir / JOURNAL))
        pruner = optuna.pruners.MedianPruner(BEFORE_PRUNING) if plan.pruner == "median" else optuna.pruners.NopPruner()
        self.study = optuna.create_study(
            storage=optuna.storages.JournalStorage(backend), study_name=arm.name, direction=plan.direction,
            pruner=pruner, load_if_exists=True,
        )  # fmt: skip
        self._taken_up = {t.number for t in self._all() if t.state == Running}

    @property
    def wanted(self) -> int:
        return min(self.plan.trials, len(list(self._grid()))) if self.plan.sampler == "grid" else self.plan.trials

    def _all(self) -> list[optuna.trial.FrozenTrial]:
        return self.study.get_trials(deepcopy=False)

    def done(self) -> bool:
        return sum(t.state.is_finished() for t in self._all()) >= self.wanted

    def folder(self, number: int) -> Path:
        folder = self.plan.output_dir / "trials"
        return (folder if self.arm.changes is None else folder / self.arm.name) / f"{number + 1:03d}"

    def ask(self) -> optuna.Trial:
        """The trial that was under way when an earlier sweep was ended, or the next one."""
        for trial in self._all():
            if trial.number in self._taken_up and trial.state == Running:
                self._taken_up.discard(trial.number)
                taken = optuna.Trial(self.study, trial._trial_id)
                for name, distribution in self._space().items():  # those that had been drawn stay
                    taken._suggest(name, distribution)
                return taken
        number = len(self._all())
        if self.plan.sampler == "grid":
            # what was put into the queue by a sweep that was ended is taken first
            if not any(t.state == optuna.trial.TrialState.WAITING for t in self._all()):
                self.study.enqueue_trial(next(itertools.islice(self._grid(), number, None)))
        else:
            self.study.sampler = self._sampler(number)
        return self.study.ask(self._space())

    def _sampler(self, number: int) -> optuna.samplers.BaseSampler:
        samplers = optuna.samplers
        startup = min(10, max(3, self.plan.trials // 3))
        if self.plan.sampler == "random":
            return samplers.RandomSampler(seed=number)
        if self.plan.sampler == "gp":
            return samplers.GPSampler(seed=number, n_startup_trials=startup, deterministic_objective=False)
        return samplers.TPESampler(seed=number, n_startup_trials=startup)

    def _space(self) -> dict[str, optuna.distributions.BaseDistribution]:
        return {parameter.key: _distribution(parameter) for parameter in self.arm.space}

    def _grid(self) -> Iterator[dict[str, Any]]:
        keys = [parameter.key for parameter in self.arm.space]
        for values in itertools.product(*(map(_as_choice, p.values or ()) for p in self.arm.space)):
            yield dict(zip(keys, values))

    def values(self, params: Mapping[str, Any]) -> dict[str, Any]:
        """What a trial sets the keys of the recipe to."""
        found = {}
        for parameter in self.arm.space:
            value = params[parameter.key]
            if parameter.values is not None:
                value = next(each for each in parameter.values if _as_choice(each) == value)
            found[parameter.key] = value
        return found

    def twin(self, trial: optuna.Trial) -> optuna.trial.FrozenTrial | None:
        """A finished trial of the same values, which would come out the same."""
        return next((t for t in self._all() if t.state == Complete and t.params == trial.params), None)

    def finish(self, trial: optuna.Trial, value: float | None, about: Mapping[str, Any], pruned: bool = False) -> None:
        for name, each in about.items():
            trial.set_user_attr(name, each)
        if value is None:
            self.study.tell(trial, state=Failed)
        elif pruned:
            trial.set_user_attr("value", value)
            self.study.tell(trial, state=Pruned)
        else:
            self.study.tell(trial, value)

    def trials(self) -> list[dict[str, Any]]:
        """What sweep.json holds of every trial."""
        return [
            {
                "number": t.number + 1,  # as its folder is called
                "state": {Complete: "finished", Pruned: "ended early", Failed: "failed"}[t.state],
                "value": t.value if t.state == Complete else t.user_attrs.get("value"),
                "params": self.values(t.params),
                **{name: each for name, each in t.user_attrs.items() if name != "value"},
            }
            for t in self._all()
            if t.state.is_finished()
        ]


def _as_choice(value: Any) -> Any:
    """A choice as optuna keeps it: what is no scalar as JSON."""
    return value if isinstance(value, SCALARS) else json.dumps(value, sort_keys=True)


def _distribution(parameter: Parameter) -> optuna.distributions.BaseDistribution:
    distributions = optuna.distributions
    if parameter.values is not None:
        return distributions.CategoricalDistribution([_as_choice(each) for each in parameter.values])
    if parameter.whole:
        return distributions.IntDistribution(int(parameter.low), int(parameter.high))
    return distributions.FloatDistribution(float(parameter.low), float(parameter.high), log=parameter.log)


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
