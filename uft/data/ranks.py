"""Several processes: what the first one of a machine does for the others on it."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import torch.distributed

from uft.data.rows import DataError

T = TypeVar("T")
POLL = 0.2  # seconds between looks for what another process writes


def _together() -> bool:
    return torch.distributed.is_available() and torch.distributed.is_initialized()


def is_first() -> bool:
    """Whether this process is the first one of its machine; the only one, where no process group was set up."""
    if not _together():
        return True
    from accelerate import PartialState

    return PartialState().is_local_main_process


def told_by_first(decide: Callable[[], T]) -> T:
    """What the first process of this machine decides, on every process; its error too.  To be called by all."""
    if not _together():
        return decide()
    from accelerate import PartialState
    from accelerate.utils import gather_object

    value = error = None
    if is_first():
        try:
            value = decide()
        except Exception as problem:
            error = problem if isinstance(problem, DataError) else DataError(f"{type(problem).__name__}: {problem}")
    state = PartialState()
    value, error = gather_object([(value, error)])[state.process_index - state.local_process_index]
    if error is not None:
        raise error
    return value


def made_by_first(path: Path, make: Callable[[], None]) -> None:
    """Returns when `path` is there, which the first process of this machine makes and the others wait for.

    They look for the file instead of meeting in a barrier, since hours of tokenising outlast the patience of those.
    """
    failure = path.with_name(f".{path.name}.failed")
    if is_first():
        try:
            if not path.exists():
                make()
        except BaseException as error:
            if _together():
                failure.write_text(str(error) or type(error).__name__)
            raise
        return
    while not path.exists():
        if failure.exists():
            raise DataError(f"the first process of this machine could not make {path}: {failure.read_text()}")
        time.sleep(POLL)


def forget_failure(path: Path) -> None:
    """To be called by the first process, before the others are told to wait for `path`."""
    path.with_name(f".{path.name}.failed").unlink(missing_ok=True)
