"""Several processes on one machine, talking through gloo, as torchrun would start them."""

from __future__ import annotations

import faulthandler
import multiprocessing
import os
import socket
import traceback
from collections.abc import Callable
from pathlib import Path

import torch

STUCK = 60  # seconds


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def start(function: Callable, folder: Path, ranks: int, *args) -> list[multiprocessing.Process]:
    """function(folder, *args) in `ranks` processes of one group.  Forked, so that torch is not imported again."""
    port = free_port()
    fork = multiprocessing.get_context("fork")
    children = [fork.Process(target=_child, args=(function, folder, r, ranks, port, args)) for r in range(ranks)]
    for child in children:
        child.start()
    return children


def run(function: Callable, folder: Path, ranks: int, *args, seconds: float = 1.5 * STUCK) -> None:
    """As `start`, and waits.  Raises RuntimeError with the first traceback of a rank that failed."""
    children = start(function, folder, ranks, *args)
    for child in children:
        child.join(seconds)
        if child.is_alive() or child.exitcode:  # the others wait for it
            for each in children:
                each.kill()
    failed = [path for path in sorted(folder.glob("rank*.*")) if path.read_text()]
    if failed or any(child.exitcode for child in children):
        raise RuntimeError("\n".join(path.read_text() for path in failed) or f"exit {[c.exitcode for c in children]}")


def _child(function: Callable, folder: Path, rank: int, ranks: int, port: int, args: tuple) -> None:
    os.environ |= dict(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(ranks), LOCAL_WORLD_SIZE=str(ranks),
        MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), ACCELERATE_USE_CPU="true",
    )  # fmt: skip
    torch.set_num_threads(1)
    # a rank that waits for another for good says where it stands
    faulthandler.dump_traceback_later(STUCK, file=open(folder / f"rank{rank}.stuck", "w"))  # noqa: SIM115
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    try:
        function(folder, *args)
    except BaseException:
        Path(folder, f"rank{rank}.error").write_text(f"rank {rank}:\n{traceback.format_exc()}")
        os._exit(1)
    finally:
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
