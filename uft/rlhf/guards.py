"""Guards against reward hacking: a callback that watches what a run logs, warns, and stops it.

    trainer.add_callback(HackingGuard(Limits(kl=10.0, spread=2.0)))

Where a policy is trained against a proxy of what is wanted, the proxy keeps rising after the gold reward has begun to
fall, further from the reference the more (over-optimisation, arXiv:2210.10760).  The gold reward is not there to be
watched; these are:

    kl            nats per response from the reference: the budget
    spread        an ensemble's disagreement about the policy's responses, over that at the beginning (arXiv:2310.02743)
    length        mean length over that at the beginning, in either direction
    correlation   of length and reward among the responses of a rollout (arXiv:2310.03716)
    distinct      distinct 2-grams over those at the beginning
    ended         share of responses that end by themselves

It reads logs, so it works with every trainer that logs these names, `RLTrainer` and online unified training among them.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from transformers import TrainerCallback
from transformers.trainer_callback import ExportableState
from transformers.utils import logging

from uft.data.rows import is_number
from uft.record import write_json

logger = logging.get_logger(__name__)

# what is watched, by the names under which trainers log it
LOGGED = {
    "kl": ("kl_sequence", "online/kl"),
    "spread": ("reward/spread", "online/spread"),
    "length": ("length", "online/length"),
    "correlation": ("length_reward_correlation", "online/length_reward_correlation"),
    "distinct": ("distinct_2", "online/distinct_2"),
    "ended": ("ended", "online/ended"),
    "reward": ("reward", "online/reward"),
}


@dataclass(frozen=True)
class Limits:
    """What is still allowed; None is not watched.

    kl            at most, nats per response
    spread        at most, times that at the beginning
    length        at most, times that at the beginning, and at least one over it
    correlation   at most, in absolute value
    distinct      at least, times that at the beginning
    ended         at least, a share
    """

    kl: float | None = None
    spread: float | None = None
    length: float | None = None
    correlation: float | None = None
    distinct: float | None = None
    ended: float | None = None

    def __post_init__(self):
        for name, value in vars(self).items():
            if value is not None and not (is_number(value) and value > 0):
                raise ValueError(f"limit {name} is {value!r}; want a number > 0, or None")
        if self.length is not None and self.length <= 1:
            raise ValueError(f"limit length is {self.length}; want a factor above 1")


@dataclass(frozen=True)
class Alarm:
    """A limit that was passed at a step: what was found and what was allowed, in the units of `Limits`."""

    step: int
    name: str
    found: float
    allowed: float

    def __str__(self) -> str:
        return f"step {self.step}: {self.name} is {self.found:.3g}, allowed {self.allowed:.3g}"


def passed(now: Mapping[str, float], first: Mapping[str, float], limits: Limits, step: int) -> list[Alarm]:
    """The limits that are passed.  `now` and `first` hold what was logged, by the names of `Limits`."""
    found: dict[str, tuple[float, bool]] = {}
    for name, allowed in vars(limits).items():
        if allowed is None or name not in now:
            continue
        value = now[name]
        if name in ("spread", "length", "distinct"):
            if not first.get(name):
                continue
            value = value / first[name]
        if name == "length":
            found[name] = (value, value > allowed or value < 1 / allowed)
        elif name == "correlation":
            found[name] = (value, abs(value) > allowed)
        elif name in ("distinct", "ended"):
            found[name] = (value, value < allowed)
        else:
            found[name] = (value, value > allowed)
    return [Alarm(step, name, value, getattr(limits, name)) for name, (value, bad) in found.items() if bad]


@dataclass
class HackingGuard(TrainerCallback, ExportableState):
    """Warns of passed limits, and stops the run where `action` is "stop", after `patience` logs in a row.

    What it saw is written to guard.json of the run's folder, and goes on where a run is resumed.

    Raises ValueError where the run does not log what a limit is of, and where a run is resumed that it has stopped.
    """

    limits: Limits
    action: str = "stop"
    patience: int = 2
    alarms: list[Alarm] = field(default_factory=list)
    stopped: str | None = None

    def __post_init__(self):
        if self.action not in ("stop", "warn"):
            raise ValueError(f"action is {self.action!r}; want stop or warn")
        if not isinstance(self.patience, int) or self.patience < 1:
            raise ValueError(f"patience is {self.patience!r}; want a whole number of at least 1")
        self._first: dict[str, float] = {}
        self._in_a_row: dict[str, int] = {}

    # ---- what a resumed run must not lose ----

    def state(self) -> dict[str, Any]:
        kept = {"first": self._first, "in_a_row": self._in_a_row, "stopped": self.stopped,
                "alarms": [vars(alarm) for alarm in self.alarms]}  # fmt: skip
        return {"args": {}, "attributes": {"kept": copy.deepcopy(kept)}}

    def on_train_begin(self, args, state, control, **kwargs) -> None:
        # transformers restores callbacks only where it is asked to
        saved = state.stateful_callbacks.get(type(self).__name__)
        if not (state.global_step and isinstance(saved, dict)):
            return
        kept = copy.deepcopy(saved["attributes"]["kept"])
        self._first, self._in_a_row = kept["first"], kept["in_a_row"]
        self.alarms, self.stopped = [Alarm(**alarm) for alarm in kept["alarms"]], kept["stopped"]
        if self.stopped and self.action == "stop":
            raise ValueError(f"this run was stopped by its guard ({self.stopped}); want other limits in a new run")

    # ---- a log ----

    def on_log(self, args, state, control, logs: Mapping[str, Any] | None = None, **kwargs) -> None:
        logs = logs or {}
        now = {name: float(logs[key]) for name, keys in LOGGED.items() for key in keys if key in logs}
        if not now:
            return
        if not self._first and (missing := [n for n, limit in vars(self.limits).items() if limit and n not in now]):
            keys = " or ".join(LOGGED[missing[0]])
            raise ValueError(
                f"the guard has a limit for {missing[0]}, and this run logs no {keys}: want a reference for kl, an "
                "ensemble for spread, or no such limit"
            )
        self._first = {**now, **self._first}  # what was logged first stays
        alarms = passed(now, self._first, self.limits, state.global_step)
        warned = {alarm.name for alarm in self.alarms}
        self.alarms += alarms
        self._in_a_row = {alarm.name: self._in_a_row.get(alarm.name, 0) + 1 for alarm in alarms}
        for alarm in alarms:
            if alarm.name not in warned:
                logger.warning(f"the reward may be hacked: {alarm}")
            if self.action == "stop" and self._in_a_row[alarm.name] >= self.patience and self.stopped is None:
                self.stopped = f"{alarm}" + (f", {self.patience} logs in a row" if self.patience > 1 else "")
                control.should_training_stop = True
                logger.warning(f"training stops: {self.stopped}")

    def on_train_end(self, args, state, control, **kwargs) -> None:
        if not self._first:
            logger.warning("the guard saw nothing: this run logged none of what it watches")
        if args.should_save:
            write_json(
                Path(args.output_dir) / "guard.json",
                {
                    "limits": vars(self.limits), "action": self.action, "patience": self.patience,
                    "stopped": self.stopped, "alarms": [vars(alarm) for alarm in self.alarms],
                },
            )  # fmt: skip
