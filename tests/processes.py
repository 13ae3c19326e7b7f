"""Training in other processes, so that it can be killed: forked, which needs no second import of torch.

Several ranks are forked off a process that has never trained: after backward passes in the parent, those of DDP in its
children may wait for ever.  What they run must therefore be a function of a module.
"""

import json
import multiprocessing
import os
import signal
import socket
import time
from pathlib import Path

import pytest
import torch
import transformers
from accelerate.state import AcceleratorState, GradientState, PartialState
from mixed import parameters

# transformers up to some 5.22 cannot read an optimiser's state on a CPU with several ranks
ranks_resume = pytest.mark.skipif(
    tuple(int(part) for part in transformers.__version__.split(".")[:2]) < (5, 23), reason="transformers is too old"
)
# imported once and not in every rank: what they run, and what that imports when it is first called
PRELOADED = ["mixed", "test_distributed", "test_sharded", "test_faults", "test_signals", "torch.distributed.fsdp"]
TIMING = ("runtime", "per_second", "seconds", "peak_memory")


def start(run, *args, rank: int = 0, world: int = 1, port: int = 0, stderr: Path | None = None, **options):
    """A process that calls run(*args, **options); with several ranks, as a launcher would have started it."""
    target = (run, args, options, rank, world, port, stderr)
    context = multiprocessing.get_context("fork" if world == 1 else "forkserver")
    if world > 1:
        context.set_forkserver_preload(PRELOADED)
    child = context.Process(target=_child, args=target)
    child.start()
    return child


def start_ranks(run, *args, world: int = 2, **options) -> list:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    return [start(run, *args, rank=rank, world=world, port=port, **options) for rank in range(world)]


def _child(run, args, options, rank: int, world: int, port: int, stderr: Path | None) -> None:
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    if stderr is not None:
        os.dup2(os.open(stderr, os.O_WRONLY | os.O_CREAT | os.O_APPEND), 2)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    torch.set_num_threads(1)
    if world > 1:
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world)}
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        for state in (AcceleratorState, PartialState, GradientState):  # what an earlier test has left
            state._reset_state()
    try:
        run(*args, **options)
    except BaseException as error:  # pytest has taken sys.stderr, which is where it would be shown
        os.write(2, f"{type(error).__name__}: {error}\n".encode())
        raise


def join(children: list, seconds: float = 120) -> list[int]:
    """Their exit statuses, negative for a signal; whoever has not ended by then is killed."""
    end = time.monotonic() + seconds
    for child in children:
        child.join(max(0.0, end - time.monotonic()))
    late = [child for child in children if child.is_alive()]
    for child in late:
        child.kill()
        child.join()
    assert not late, f"{len(late)} of {len(children)} processes did not end"
    return [child.exitcode for child in children]


def wait_for(condition, seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.002)


def write_end(run, folder: str) -> None:
    """What must be the same whatever happened on the way: weights, history without times, counters."""
    history = [
        {name: value for name, value in entry.items() if not any(word in name for word in TIMING)}
        for entry in run.state.log_history
        if "train_runtime" not in entry  # the summary is missing where the run was killed after its last checkpoint
    ]
    counters = {name: value for name, value in run.counters().items() if name != "seconds"}
    if run.args.process_index == 0:
        torch.save(parameters(run.model), f"{folder}/final.pt")
        Path(folder, "final.json").write_text(json.dumps([history, counters]))


def assert_same_end(folder: Path, expected: Path) -> None:
    assert torch.equal(torch.load(folder / "final.pt"), torch.load(expected / "final.pt"))
    found, want = (json.loads((f / "final.json").read_text()) for f in (folder, expected))
    assert found[1] == want[1]
    assert found[0] == want[0]
