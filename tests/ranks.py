"""A function in every rank of a group, waited for; what went wrong in a rank is told, and where it hangs."""

from __future__ import annotations

import faulthandler
import os
import traceback
from collections.abc import Callable
from pathlib import Path

import torch
from processes import start_ranks

STUCK = 60  # seconds


def run(function: Callable, folder: Path, ranks: int, *args, seconds: float = 1.5 * STUCK) -> None:
    """function(folder, *args) in `ranks` processes.  Raises RuntimeError with what the ranks that failed have told."""
    children = start_ranks(_told, function, folder, *args, world=ranks)
    for child in children:
        child.join(seconds)
        if child.is_alive() or child.exitcode:  # the others wait for it
            for each in children:
                each.kill()
                each.join()
    told = [path.read_text() for path in sorted(folder.glob("rank*.*"))]
    if any(told) or any(child.exitcode for child in children):
        raise RuntimeError("\n".join(told) or f"exit statuses {[child.exitcode for child in children]}")


def _told(function: Callable, folder: Path, *args) -> None:
    rank = int(os.environ.get("RANK", 0))
    faulthandler.dump_traceback_later(STUCK, file=open(folder / f"rank{rank}.stuck", "w"))  # noqa: SIM115
    try:
        function(folder, *args)
    except BaseException:
        (folder / f"rank{rank}.error").write_text(f"rank {rank}:\n{traceback.format_exc()}")
        raise
    finally:
        faulthandler.cancel_dump_traceback_later()
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
