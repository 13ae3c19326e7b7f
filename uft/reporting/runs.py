"""One run as its folder tells it: the records of its stages, what was logged, evaluations, guards, samples.

run.json          of `uft train` and `uft rl`; with stages it holds one record for each
progress.jsonl    what was logged so far, a JSON object per line, where a run (or a stage) is still going
samples.jsonl     answers on the way: step, source, prompt, answer, reference
guard.json        what a guard against reward hacking saw
reward.json       a trained reward model with its record; rewards.json is what it says on held-out data
evaluation.json   of `uft eval`
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from uft.watching.lines import PROGRESS, SAMPLES, parsed, read

RECORD = "run.json"
GUARD, REWARD, REWARDS, EVALUATION = "guard.json", "reward.json", "rewards.json", "evaluation.json"
KINDS = {"training": "training", "rl": "reinforcement", "reward": "reward model", "evaluation": "evaluation only"}


class ReportError(ValueError):
    """A file or folder that cannot be shown; the message names it and says what was found."""


@dataclass(frozen=True)
class Stage:
    """A part of a run with one objective and its own step count; `name` is empty where a run has no stages.

    `record` is empty while it is still going; `begun` is then what its journal said at the beginning.
    """

    name: str
    record: Mapping[str, Any]
    logs: Sequence[Mapping[str, Any]] = ()
    begun: Mapping[str, Any] = field(default_factory=dict)

    @property
    def finished(self) -> bool:
        return bool(self.record)

    @property
    def compute(self) -> Mapping[str, float]:
        known = {k: v for k, v in self.record.get("compute", {}).items() if is_number(v)}
        if known or not self.logs:
            return known
        tokens = [entry["num_tokens"] for entry in self.logs if is_number(entry.get("num_tokens"))]
        return {"tokens": tokens[-1]} if tokens else {}

    @property
    def steps(self) -> int:
        logged = [int(entry["step"]) for entry in self.logs if is_number(entry.get("step"))]
        return int(self.record.get("steps") or max(logged, default=0))

    @property
    def planned(self) -> int | None:
        """Steps that were meant; None where nothing says so."""
        found = self.record.get("planned_steps", self.begun.get("max_steps"))
        return int(found) if is_number(found) and found > 0 else None

    @property
    def terms(self) -> Sequence[Mapping[str, Any]]:
        return (self.record.get("objective") or {}).get("terms") or []


@dataclass(frozen=True)
class Run:
    """What one run has left in its folder.  `name` is how the report calls it."""

    folder: Path
    kind: str
    stages: tuple[Stage, ...] = ()
    evaluation: Mapping[str, Any] | None = None
    rewards: Mapping[str, Any] | None = None
    guard: Mapping[str, Any] | None = None
    samples: Sequence[Mapping[str, Any]] = ()
    name: str = ""
    notes: tuple[str, ...] = field(default=(), compare=False)

    @cached_property
    def compute(self) -> Mapping[str, float]:
        """Sums over stages; the peak of memory is the highest."""
        total: dict[str, float] = {}
        for stage in self.stages:
            for name, value in stage.compute.items():
                total[name] = max(total.get(name, 0), value) if "peak" in name else total.get(name, 0) + value
        return total

    @property
    def staged(self) -> bool:
        return any(stage.name for stage in self.stages)

    @property
    def steps(self) -> int:
        return sum(stage.steps for stage in self.stages)

    @property
    def going(self) -> bool:
        """Whether its last stage has no record yet: still training, or killed."""
        return any(not stage.finished for stage in self.stages)

    @property
    def short(self) -> bool:
        """Whether a finished run took fewer steps than were planned."""
        return not self.going and any(s.planned is not None and s.steps < s.planned for s in self.stages)

    @property
    def seed(self) -> int | None:
        found = [s.record.get("seed", s.record.get("config", {}).get("seed")) for s in self.stages if s.record]
        return found[-1] if found else None

    def about(self, key: str) -> Any:
        """What the last record (or the evaluation) says of date, commit, versions, hardware."""
        records = [stage.record for stage in self.stages] + [(self.evaluation or {}).get("info", {})]
        return next((record[key] for record in records[::-1] if record.get(key) is not None), None)

    def last(self, name: str) -> float | None:
        """The last value that was logged under a name, in the last stage that logs it."""
        stage = self.stage_of(name)
        return None if stage is None else next(e[name] for e in stage.logs[::-1] if is_number(e.get(name)))

    def ending(self, name: str) -> float | None:
        """The mean over the last tenth of a stage's logs of a name: one step's loss depends on what its batch held."""
        stage = self.stage_of(name)
        if stage is None:
            return None
        values = [entry[name] for entry in stage.logs if is_number(entry.get(name))]
        kept = values[-max(1, len(values) // 10) :]
        return sum(kept) / len(kept)

    def stage_of(self, name: str) -> Stage | None:
        """The last stage that logs a name."""
        return next((s for s in self.stages[::-1] if any(is_number(e.get(name)) for e in s.logs)), None)

    @cached_property
    def logged(self) -> list[str]:
        """Names of everything that was logged, in order of appearance."""
        names = (name for s in self.stages for entry in s.logs for name, v in entry.items() if is_number(v))
        return list(dict.fromkeys(names))


def is_number(value: Any) -> bool:
    """Of what is not finite nothing can be drawn or averaged: it counts as missing, as the null of a journal does."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


# ---- reading ----


def read_json(path: Path, *keys: str) -> dict[str, Any]:
    """An object that has these keys.  Raises ReportError."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except OSError as problem:
        raise ReportError(f"{path}: cannot be read ({problem.strerror})") from None
    except ValueError as problem:
        raise ReportError(f"{path}: not JSON ({problem})") from None
    if not isinstance(found, dict):
        raise ReportError(f"{path}: found a {type(found).__name__}; want an object")
    if missing := [key for key in keys if key not in found]:
        raise ReportError(f"{path}: lacks {', '.join(missing)}; found {', '.join(found) or 'nothing'}")
    return found


def read_run(folder: Path) -> Run | None:
    """The run of a folder, None where there is none.  Raises ReportError for a main file that cannot be used; a broken
    one beside it becomes a note."""
    notes: list[str] = []
    stages, kind = _stages(folder)
    if not stages and (folder / REWARD).is_file():
        record = read_json(folder / REWARD).get("training_record") or {}
        stages, kind = ((_reward_stage(record),) if record else ()), "reward"
    found = {name: _beside(folder / name, keys, notes) for name, keys in (
        (EVALUATION, ("metrics",)), (REWARDS, ("metrics",)), (GUARD, ()))}  # fmt: skip
    if not kind:
        kind = "evaluation" if found[EVALUATION] else "reward" if found[REWARDS] else ""
    if not kind:
        if notes:
            raise ReportError(notes[0])
        return None
    return Run(
        folder, kind, stages, found[EVALUATION], found[REWARDS], found[GUARD], _samples(folder, stages, notes),
        notes=tuple(notes),
    )  # fmt: skip


def _stages(folder: Path) -> tuple[tuple[Stage, ...], str]:
    """The stages of a training run and its kind; () and "" where there are none."""
    record = read_json(folder / RECORD) if (folder / RECORD).is_file() else None
    if record is None and (folder / PROGRESS).is_file():
        stage = _going(folder, "")
        return (stage,), "rl" if str(stage.begun.get("trainer", "")).startswith("RL") else "training"
    if record is None or "stages" in record:
        return _by_name(folder, record or {"stages": []})
    if "metrics" not in record and "compute" not in record:
        raise ReportError(f"{folder / RECORD}: lacks metrics and compute; found {', '.join(record) or 'nothing'}")
    return (_stage(record, "", folder / RECORD),), "training" if record.get("objective") else "rl"


def _by_name(folder: Path, record: Mapping[str, Any]) -> tuple[tuple[Stage, ...], str]:
    """Finished stages, as the run's record or their own says, and those to come, as the journals of the others say."""
    stages = record["stages"]
    if not isinstance(stages, list) or not all(isinstance(stage, dict) for stage in stages):
        raise ReportError(f"{folder / RECORD}: stages is no list of objects; want a record per stage")
    found = {
        name: _stage(each, name, folder / RECORD)
        for i, each in enumerate(stages, 1)
        if (name := str(each.get("stage", i)))
    }
    for path in folder.glob(f"*/{PROGRESS}"):
        begun = next((entry for entry in read(path) if entry.get("event") == "begin"), {})
        names = (begun.get("stages") or {}).get("names") or []
        if path.parent.name not in names or not set(found) <= set(names):
            continue
        for name in names:
            own = folder / name
            if name not in found and (own / RECORD).is_file():
                found[name] = _stage(read_json(own / RECORD), name, own / RECORD)
            elif name not in found:
                found[name] = _going(own, name)
        found = {name: found[name] for name in names}
    return tuple(found.values()), "training" if found else ""


def _going(folder: Path, name: str) -> Stage:
    """A stage without a record: what its journal holds, nothing where it has not begun."""
    entries = read(folder / PROGRESS)
    if not entries and (folder / PROGRESS).is_file() and (folder / PROGRESS).stat().st_size:
        raise ReportError(f"{folder / PROGRESS}: found no line with a step; want a JSON object per line")
    begun = next((entry for entry in entries if entry.get("event") == "begin"), {})
    return Stage(name, {}, [entry for entry in entries if entry.get("event", "log") == "log"], begun)


def _stage(record: Mapping[str, Any], name: str, path: Path) -> Stage:
    for key, of in (("metrics", list), ("compute", dict), ("config", dict), ("data", dict), ("objective", dict)):
        if record.get(key) is not None and not isinstance(record[key], of):
            raise ReportError(f"{path}: {key} is a {type(record[key]).__name__}; want {of.__name__}")
    return Stage(name, {k: v for k, v in record.items() if v is not None}, _logs(record.get("metrics") or []))


def _reward_stage(record: Mapping[str, Any]) -> Stage:
    """A reward model's record keeps its counters beside the rest, and only the training data."""
    counters = {name: value for name, value in record.items() if is_number(value) and name != "steps"}
    data = {"train": record["data"]} if isinstance(record.get("data"), dict) else {}
    return Stage("", {**record, "compute": counters, "data": data}, _logs(record.get("metrics") or []))


def _logs(entries: Iterable[Any]) -> list[Mapping[str, Any]]:
    return [entry for entry in entries if isinstance(entry, dict)]


def _beside(path: Path, keys: Sequence[str], notes: list[str]) -> Mapping[str, Any] | None:
    if not path.is_file():
        return None
    try:
        return read_json(path, *keys)
    except ReportError as problem:
        notes.append(str(problem))
        return None


def _samples(folder: Path, stages: Sequence[Stage], notes: list[str]) -> list[Mapping[str, Any]]:
    """The run's samples; those of a stage's folder count steps from the beginning of the run."""
    found, before = [], 0
    places = [(folder, 0)]
    for stage in stages:
        places += [(folder / stage.name, before)] if stage.name else []
        before += stage.steps
    for place, offset in places:
        if not (place / SAMPLES).is_file():
            continue
        lines = parsed((place / SAMPLES).read_bytes())
        if not lines and (place / SAMPLES).stat().st_size:
            notes.append(f"{place / SAMPLES}: found no line with a step; want a JSON object per line")
        for line in lines:
            if isinstance(line.get("prompt"), str) and isinstance(line.get("answer"), str):
                found.append({**line, "step": line["step"] + offset})
    return found
