"""One arm's trials in optuna's journal: what is tried next, and what became of it."""

from __future__ import annotations

import itertools
import json
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from uft.comparison.recipe import Arm
from uft.comparison.sweep_recipe import Sweep, Swept
from uft.comparison.sweep_space import Parameter

try:
    import optuna
except ImportError:
    raise ImportError("uft sweep needs optuna: pip install 'unified-finetuning[sweep]'") from None

JOURNAL = "sweep.journal"
STARTUP = 6  # trials at random before tpe and gp look at what was found; of every sweep, however long it is to be
BEFORE_PRUNING = 4  # trials that are never ended early
LOCK_SECONDS = 10  # after which a lock counts as left behind
MOST_TIMES = 3  # that a trial is begun without getting further
OF_STUDY = ("value", "begun")  # notes that are none of the trial's results
SCALARS = (str, int, float, bool, type(None))
Complete, Pruned, Failed, Running = (
    getattr(optuna.trial.TrialState, s) for s in ("COMPLETE", "PRUNED", "FAIL", "RUNNING")
)


class Watch(TrainerCallback):
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


class Study:
    """One arm's trials."""

    def __init__(self, arm: Swept, plan: Sweep):
        self.arm, self.plan = arm, plan
        optuna.logging.set_verbosity(optuna.logging.ERROR)
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        backend = journal_at(plan.output_dir / JOURNAL)
        pruner = optuna.pruners.MedianPruner(BEFORE_PRUNING) if plan.pruner == "median" else optuna.pruners.NopPruner()
        self.study = optuna.create_study(
            storage=optuna.storages.JournalStorage(backend), study_name=arm.name, direction=plan.direction,
            pruner=pruner, load_if_exists=True,
        )  # fmt: skip
        self._taken_up = {t.number for t in self._all() if t.state == Running}

    @property
    def wanted(self) -> int:
        return self.plan.wanted(self.arm)

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
                if self.plan.sampler != "grid":
                    self.study.sampler = self._sampler(trial.number)
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
        if self.plan.sampler == "random":
            return samplers.RandomSampler(seed=number)
        if self.plan.sampler == "gp":
            return samplers.GPSampler(seed=number, n_startup_trials=STARTUP, deterministic_objective=False)
        return samplers.TPESampler(seed=number, n_startup_trials=STARTUP)

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

    def stuck(self, trial: optuna.Trial) -> bool:
        """Whether a trial has been begun again and again, and each time ended (by a lack of memory, for one) where it
        was before; to be asked once each time that it is begun."""
        folder = self.folder(trial.number)
        kept = [path for name in ("checkpoint-*", "run.json", "evaluation.json") for path in folder.rglob(name)]
        place = sorted(str(path.relative_to(folder)) for path in kept)
        before = _frozen(trial).user_attrs.get("begun", {})
        times = before["times"] + 1 if before.get("place") == place else 1
        trial.set_user_attr("begun", {"place": place, "times": times})
        return times > MOST_TIMES

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
                **{name: each for name, each in t.user_attrs.items() if name not in OF_STUDY},
            }
            for t in self._all()
            if t.state.is_finished()
        ]


def journal_at(path: Path) -> optuna.storages.journal.JournalFileBackend:
    """The journal, without what a process that was killed has left of a line, and whatever lock it held."""
    if path.exists():
        with path.open("r+b") as file:
            content = file.read()
            file.truncate(content.rfind(b"\n") + 1)
    absolute = str(path.resolve())  # the lock is a link to it, whose age is not found where the path is relative
    lock = optuna.storages.journal.JournalFileSymlinkLock(absolute, grace_period=LOCK_SECONDS)
    return optuna.storages.journal.JournalFileBackend(absolute, lock)


def _as_choice(value: Any) -> Any:
    """A choice as optuna keeps it: what is no scalar as JSON."""
    return value if isinstance(value, SCALARS) else json.dumps(value, sort_keys=True)


def _distribution(parameter: Parameter) -> optuna.distributions.BaseDistribution:
    distributions = optuna.distributions
    if parameter.values is not None:
        return distributions.CategoricalDistribution([_as_choice(each) for each in parameter.values])
    if parameter.whole:
        return distributions.IntDistribution(int(parameter.low), int(parameter.high), log=parameter.log)
    return distributions.FloatDistribution(parameter.low, parameter.high, log=parameter.log)
