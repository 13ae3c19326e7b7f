"""progress.jsonl and samples.jsonl as files: lines are only appended, each by one write, and read while that goes on.

A kill can tear the last line at most.  Readers pass over it, and who goes on writing begins a new line.

    {"event": "begin", "time": ..., "step": 0, "max_steps": 1000, "objective": ..., "plane": ..., "stages": ...}
    {"event": "log", "time": ..., "step": 10, "epoch": 0.1, "loss": ..., "loss/sft": ..., "eval_loss": ..., ...}
    {"event": "end", "time": ..., "step": 1000, "reason": "finished"}

Times are seconds since 1970.  A number that is not finite is written as null.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

PROGRESS, SAMPLES = "progress.jsonl", "samples.jsonl"
Entry = Mapping[str, Any]
_NO_METRICS = ("event", "time", "step", "epoch")


def append(path: Path, entry: Entry) -> None:
    """One line at the end of a file, by one write; behind a torn line it begins a new one."""
    finite = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in entry.items()}
    line = json.dumps(finite, ensure_ascii=False, allow_nan=False, default=str).encode(errors="replace") + b"\n"
    descriptor = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o644)
    try:
        size = os.fstat(descriptor).st_size
        if size and os.pread(descriptor, 1, size - 1) != b"\n":
            line = b"\n" + line
        os.write(descriptor, line)
    finally:
        os.close(descriptor)


def parsed(text: bytes) -> list[dict[str, Any]]:
    """The whole lines of a file of JSON objects; torn ones, and those that hold wrong types, are passed over."""
    found = []
    for line in text.split(b"\n"):
        with contextlib.suppress(ValueError):
            if is_entry(entry := json.loads(line)):
                found.append(entry)
    return found


def is_entry(value: Any) -> bool:
    """Whether a value is an object with a step, whose other keys that readers count on are of their types or absent."""
    return (
        isinstance(value, dict)
        and value.get("step") is not None
        and all(right(value[key]) for key, right in _TYPES.items() if value.get(key) is not None)
    )


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: Any) -> bool:
    return (isinstance(value, float) and math.isfinite(value)) or _is_whole(value)


def _are_names(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(name, str) for name in value)


def _is_plane(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 2 and all(map(_are_names, value))


def _are_stages(value: Any) -> bool:
    """{names: [...], position: their own, costs: a number for each or null}"""
    if not isinstance(value, dict) or not _are_names(value.get("names")):
        return False
    count, costs = len(value["names"]), value.get("costs")
    if not _is_whole(position := value.get("position", 0)) or not 0 <= position < count:
        return False
    return costs is None or (isinstance(costs, list) and len(costs) == count and all(map(_is_number, costs)))


_TYPES = {
    "step": _is_whole, "time": _is_number, "max_steps": _is_number, "place": _is_whole, "plane": _is_plane,
    "stages": _are_stages, "source": lambda value: isinstance(value, str),
}  # fmt: skip


def valid(entries: Iterable[Entry]) -> list[Entry]:
    """Of a journal, without what earlier attempts logged behind the step from which a later one went on."""
    kept: list[Entry] = []
    for entry in entries:
        if entry.get("event") == "begin":
            kept = [e for e in kept if e["step"] <= entry["step"] and e.get("event") != "end"] if entry["step"] else []
        kept.append(entry)
    return kept


def read(path: Path) -> list[Entry]:
    """The entries of a journal that count; of a file that is not there, none."""
    try:
        return valid(parsed(path.read_bytes()))
    except FileNotFoundError:
        return []


def metrics_of(entry: Entry) -> dict[str, float]:
    """What was logged in an entry; NaN where it was not finite."""
    if entry.get("event", "log") != "log":
        return {}
    own = {name: math.nan if value is None else value for name, value in entry.items() if name not in _NO_METRICS}
    return {n: float(v) for n, v in own.items() if isinstance(v, (int, float)) and not isinstance(v, bool)}
