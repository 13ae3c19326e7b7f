"""Checkpoints that are whole or absent, and finding the newest whole one."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path

_NAME = re.compile(r"checkpoint-(\d+)")
ASIDE = "partial"  # a checkpoint is written in this folder, flushed to disk, and renamed


def publish(aside: Path, final: Path) -> None:
    """Makes a directory written aside visible under its final name, in one step, after flushing it to disk."""
    for path in [*(p for p in aside.rglob("*") if p.is_file()), aside]:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    os.rename(aside, final)
    descriptor = os.open(final.parent, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def is_whole(path: Path) -> bool:
    """Whether everything that resuming reads is there and the state parses."""
    state = path / "trainer_state.json"
    weights = [*path.glob("*.safetensors"), *path.glob("*.safetensors.index.json")]
    try:
        return bool(weights) and "global_step" in json.loads(state.read_text())
    except (OSError, ValueError):
        return False


def last_checkpoint(output_dir: str | os.PathLike) -> str | None:
    """The newest whole checkpoint of a run, or None.  Torn ones are passed over."""
    folder = Path(output_dir)
    if not folder.is_dir():
        return None
    found = [(int(m.group(1)), p) for p in folder.iterdir() if (m := _NAME.fullmatch(p.name)) and p.is_dir()]
    return next((str(path) for _, path in sorted(found, reverse=True) if is_whole(path)), None)
