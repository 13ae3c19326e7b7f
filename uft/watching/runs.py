"""Runs as their folders tell of them, also while they train: found below a folder, with the stages of one run together.

progress.jsonl    is followed as it grows
run.json          of runs that have no progress.jsonl, which are over
samples.jsonl     beside either
"""

from __future__ import annotations

import itertools
import json
import os
import socket
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from uft.watching.lines import PROGRESS, SAMPLES, Entry, is_entry, metrics_of, parsed, valid
from uft.watching.path import Point, path_of
from uft.watching.rates import time_left

RECORD = "run.json"
QUIET = 120.0  # seconds without a line, at least, before one may ask what a run does
_SKIPPED = ("checkpoint-", ".", "partial")


@dataclass(frozen=True)
class Part:
    """A folder in which something was trained: a run, or a stage of one."""

    folder: Path
    entries: Sequence[Entry]
    samples: Sequence[Entry] = ()

    @cached_property
    def begun(self) -> Entry:
        return next((e for e in reversed(self.entries) if e.get("event") == "begin"), {"step": 0, "time": 0.0})

    @cached_property
    def ended(self) -> Entry | None:
        return next((e for e in reversed(self.entries) if e.get("event") == "end"), None)

    @property
    def last_time(self) -> float:
        return max((e.get("time") or 0.0 for e in self.entries), default=0.0)

    @property
    def step(self) -> int:
        return max((e["step"] for e in self.entries), default=0)

    @property
    def total(self) -> int:
        return int(self.begun.get("max_steps") or 0)

    @cached_property
    def series(self) -> dict[str, list[tuple[int, float]]]:
        """Metric -> (step, value), in order."""
        found: dict[str, list[tuple[int, float]]] = {}
        for entry in self.entries:
            for name, value in metrics_of(entry).items():
                found.setdefault(name, []).append((entry["step"], value))
        return found

    def quiet_limit(self) -> float:
        """Seconds without a line after which a run is not what it should be."""
        times = [e["time"] for e in self.entries[-50:] if e.get("time")]
        gaps = [b - a for a, b in itertools.pairwise(times) if b > a]
        return max(QUIET, 10 * statistics.median(gaps)) if gaps else 5 * QUIET

    def left(self, now: float) -> tuple[float | None, float | None]:
        """Seconds until the end of this stage, and of the run; see `time_left`."""
        if not self.begun.get("time"):
            return None, None
        stages = self.begun.get("stages") or {}
        costs = (stages.get("costs"), stages.get("position", 0))
        spent, steps = self.last_time - self.begun["time"], self.step - self.begun["step"]
        since = max(0.0, now - self.last_time)
        left = time_left(spent, steps, self.total - self.step, self.total, *costs)
        return tuple(None if each is None else max(0.0, each - since) for each in left)


@dataclass(frozen=True)
class Run:
    """One run: a part, or one for each stage that has begun, in order."""

    name: str
    parts: tuple[Part, ...]
    stages: tuple[str, ...] = ()

    @property
    def now(self) -> Part:
        return self.parts[-1]

    @property
    def last_time(self) -> float:
        return max(part.last_time for part in self.parts)

    @property
    def position(self) -> int:
        """Of the stage it is in, among the stages."""
        return len(self.parts) - 1

    @property
    def stage(self) -> str | None:
        """The name of the stage it is in."""
        return self.stages[self.position] if self.stages else None

    @property
    def more_to_come(self) -> bool:
        return self.position + 1 < len(self.stages)

    def state(self, now: float) -> str:
        """running, finished, ended early, stopped, died, or quiet for N min."""
        part = self.now
        if part.ended is not None and not (self.more_to_come and part.ended.get("reason") == "finished"):
            return str(part.ended.get("reason"))
        alive = _is_alive(part.begun)
        if alive is False:
            return "died"
        quiet = now - part.last_time
        return f"quiet for {quiet / 60:.0f} min" if quiet > part.quiet_limit() else "running"

    @property
    def axes(self) -> Sequence[Sequence[str]]:
        return next((part.begun["plane"] for part in self.parts if part.begun.get("plane")), ((), ()))

    def path(self) -> list[Point]:
        """In the plane of losses: of evaluations where there are three or more, else of training."""
        if not all(self.axes):
            return []
        journals = [part.entries for part in self.parts]
        held_out = path_of(journals, self.axes, evaluated=True)
        return held_out if len(held_out) >= 3 else path_of(journals, self.axes, evaluated=False)

    def samples(self) -> list[Entry]:
        """The newest answers."""
        found = next((part.samples for part in reversed(self.parts) if part.samples), ())
        step = max((e["step"] for e in found), default=0)
        newest = {e.get("place", i): e for i, e in enumerate(found) if e["step"] == step}
        return [newest[place] for place in sorted(newest)]


def _is_alive(begun: Entry) -> bool | None:
    """Whether the process that began still runs; None on another machine."""
    if begun.get("host") != socket.gethostname() or not isinstance(begun.get("pid"), int):
        return None
    try:
        os.kill(begun["pid"], 0)
    except ProcessLookupError:
        return False
    except (OSError, OverflowError):  # somebody else's process; no process at all
        pass
    try:  # what has ended and nobody has waited for is there as well
        return Path(f"/proc/{begun['pid']}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (OSError, IndexError):
        return True


# ---- files that grow ----


@dataclass
class Lines:
    """A file of lines, of which only what is new is read."""

    path: Path
    entries: list[Entry] = field(default_factory=list)
    _offset: int = 0
    _inode: int = 0

    def fresh(self) -> list[Entry]:
        try:
            with self.path.open("rb") as file:
                found = os.fstat(file.fileno())
                if found.st_ino != self._inode or found.st_size < self._offset:
                    self.entries, self._offset, self._inode = [], 0, found.st_ino
                file.seek(self._offset)
                text = file.read()
        except OSError:
            self.entries, self._offset = [], 0
            return []
        whole = text[: text.rfind(b"\n") + 1]  # what is behind may be written right now
        self._offset += len(whole)
        self.entries = valid([*self.entries, *parsed(whole)]) if whole else self.entries
        return self.entries


class Watcher:
    """The runs of some folders, as often as one asks."""

    def __init__(self, folders: Sequence[Path]):
        self.folders = folders
        self._lines: dict[Path, Lines] = {}
        self._records: dict[Path, tuple[int, dict[str, Any]]] = {}

    def runs(self) -> list[Run]:
        """Those that logged last come first."""
        found: dict[Path, Part] = {}
        tops: dict[Path, Path] = {}
        stages: dict[Path, list[str]] = {}
        for top in self.folders:
            for folder in _folders(top):
                if folder in found:
                    continue
                record = self._record(folder / RECORD)
                if isinstance(record.get("stages"), list):
                    stages[folder] = [str(each.get("stage")) for each in record["stages"] if isinstance(each, dict)]
                if (part := self._part(folder, record)) is not None:
                    found[folder], tops[folder] = part, top
        for folder, part in found.items():
            if of := part.begun.get("stages"):
                stages[folder.parent] = list(of["names"])
        return sorted(_grouped(found, tops, stages), key=lambda run: -run.last_time)

    def _part(self, folder: Path, record: dict[str, Any]) -> Part | None:
        entries = self._fresh(folder / PROGRESS) or _of_record(record, folder / RECORD)
        return Part(folder, entries, self._fresh(folder / SAMPLES)) if entries else None

    def _fresh(self, path: Path) -> list[Entry]:
        return list(self._lines.setdefault(path, Lines(path)).fresh())

    def _record(self, path: Path) -> dict[str, Any]:
        try:
            changed = path.stat().st_mtime_ns
            if path not in self._records or self._records[path][0] != changed:
                found = json.loads(path.read_bytes())
                self._records[path] = changed, found if isinstance(found, dict) else {}
        except (OSError, ValueError):
            return {}
        return self._records[path][1]


def _folders(top: Path) -> Iterator[Path]:
    for folder, inside, files in os.walk(top):
        inside[:] = sorted(name for name in inside if not name.startswith(_SKIPPED))
        if PROGRESS in files or RECORD in files:
            yield Path(folder)


def _named(folder: Path, top: Path) -> str:
    """As it was asked for, or by its place below what was asked for."""
    return str(folder.relative_to(top)) if top in folder.parents else str(top)


def _grouped(found: dict[Path, Part], tops: dict[Path, Path], stages: dict[Path, list[str]]) -> Iterator[Run]:
    """Stages that were found without those before them, because one alone was asked for, are runs by themselves."""
    of_stages: set[Path] = set()
    for parent, order in stages.items():
        begun = list(itertools.takewhile(found.__contains__, (parent / name for name in order)))
        if begun:
            of_stages |= set(begun)
            yield Run(_named(parent, tops[begun[0]]), tuple(found[folder] for folder in begun), tuple(order))
    for folder, part in found.items():
        if folder not in of_stages:
            yield Run(_named(folder, tops[folder]), (part,))


def _of_record(record: dict[str, Any], path: Path) -> list[Entry]:
    """What a journal would have said."""
    if not isinstance(logs := record.get("metrics"), list):
        return []
    objective, steps, ended = record.get("objective"), int(record.get("steps") or 0), path.stat().st_mtime
    planned = int(record.get("planned_steps") or steps)
    begin = {"event": "begin", "step": 0, "time": 0.0, "max_steps": planned}
    if isinstance(objective, dict):
        terms = [term for term in objective.get("terms", []) if isinstance(term, dict)]
        kinds = (("Likelihood",), ("Pairwise", "Pointwise"))
        begin |= {
            "objective": objective.get("name"),
            "plane": [[f"loss/{t.get('name')}" for t in terms if t.get("type") in kind] for kind in kinds],
        }
    reason = "finished" if steps >= planned else "ended early"
    own = [{**log, "event": "log"} for log in logs if is_entry(log)]
    return [begin, *own, {"event": "end", "step": steps, "time": ended, "reason": reason}]
