"""Time, memory and error of a call, on a GPU or on the CPU."""

from __future__ import annotations

import gc
import os
import platform
import re
import statistics
import time
from collections.abc import Callable, Mapping
from datetime import date
from typing import Any

import torch
from torch import Tensor

os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler tells of each start and stop otherwise
Run = Callable[[], Any]


def times(runs: Mapping[str, Run], device: torch.device, rounds: int, warmup: int = 2) -> dict[str, list[float]]:
    """Milliseconds per call and round.  All are called once in each round, so that they share clocks and weather."""
    for run in runs.values():
        for _ in range(warmup):
            run()
    # what lies in the second-level cache from the call before is somebody else's
    flush = torch.empty(2**28 if device.type == "cuda" else 1, dtype=torch.int8, device=device)
    found: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds):
        for name, run in runs.items():
            flush.zero_()
            found[name].append(_once(run, device))
    return found


def _once(run: Run, device: torch.device) -> float:
    if device.type != "cuda":
        start = time.perf_counter()
        run()
        return 1000 * (time.perf_counter() - start)
    before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    before.record()
    run()
    after.record()
    after.synchronize()
    return before.elapsed_time(after)


def median_and_spread(values: list[float]) -> dict[str, float]:
    """Median and the quartiles around it."""
    low, middle, high = statistics.quantiles(values, n=4) if len(values) > 1 else values * 3
    return {"median": middle, "low": low, "high": high, "n": len(values)}


def peak_bytes(run: Run, device: torch.device) -> int:
    """The most that is allocated at any time during the call, beyond what was there before it."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        run()
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak


def worst_error(found: Tensor, gold: Tensor) -> float:
    """Of vectors the largest absolute difference (nats), of matrices the largest relative error of a row."""
    difference = found.double() - gold
    if gold.ndim == 1:
        return float(difference.abs().max())
    return float((difference.norm(dim=-1) / gold.norm(dim=-1).clamp(min=1e-30)).max())


def environment(device: torch.device) -> dict[str, Any]:
    try:
        import triton

        triton_version = triton.__version__
    except ImportError:
        triton_version = None
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        hardware = f"{properties.name}, {properties.total_memory / 2**30:.0f} GiB"
    else:
        hardware = f"CPU {_processor()}, {torch.get_num_threads()} threads"
    return {
        "hardware": hardware,
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "triton": triton_version,
        "python": platform.python_version(),
        "date": str(date.today()),
    }


def machine_name(about: dict[str, Any], device: torch.device) -> str:
    """For the names of files: cpu, h200, ..."""
    if device.type == "cpu":
        return "cpu"
    return re.sub(r"[^a-z0-9]+", "-", about["hardware"].lower().split(",")[0].removeprefix("nvidia ")).strip("-")


def _processor() -> str:
    try:
        with open("/proc/cpuinfo") as lines:
            return next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()
