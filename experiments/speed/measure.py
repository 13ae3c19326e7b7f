"""One case of the benchmark: checks, rounds and summaries of its rivals; and one joint stage against two."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import asdict, replace
from typing import Any

import torch

from uft.record import environment

from . import rivals
from .agreement import check, check_mean
from .apart import apart
from .designs import DESIGNS, run_design
from .rivals import OURS, OURS_PACKED, OURS_PADDED, TRL, TRL_COMPACT, Run, Setting

STAGES = "stages"


def rivals_of(case: str, device: str) -> list[str]:
    """Where all weights are trained and the reference is live, our other layouts show where the gain comes from."""
    layouts = [OURS_PACKED, OURS_PADDED] if case.endswith("full live") else []
    return [OURS, *layouts, TRL, *([TRL_COMPACT] if device == "cpu" else [])]


def runs_of(case: str, device: str, rounds: int) -> int:
    return rounds * len(DESIGNS) if case == STAGES else (rounds + 1) * len(rivals_of(case, device))


def measure(
    case: str, setting: Setting, rounds: int, start: str, tell: Callable[[str], Any], altered: dict | None = None
) -> dict[str, Any]:
    """A run of each rival that is checked and has its parts timed, then rounds of all of them.

    tell      is told of each run before it begins
    altered   rival -> fields of its setting that are changed, to see that the check notices

    Raises ValueError where rivals do not compute the same.
    """
    names = rivals_of(case, setting.device)
    absent = {name: why for name in names if (why := rivals.missing(name))}

    def once(name: str, what: str, **options: Any) -> Run | None:
        tell(f"{setting.shape} {case}: {name}, {what}")
        if name not in absent:
            try:
                return apart(start, rivals.run, name, replace(setting, **(altered or {}).get(name, {})), **options)
            except torch.OutOfMemoryError:
                absent[name] = "out of memory"
        return None

    first = {name: once(name, "check", profiled=True, log_every=1) for name in names}
    there = {name: run for name, run in first.items() if run}
    agreement = {name: check(there[OURS], run, setting.dtype) for name, run in there.items() if OURS in there}
    runs: dict[str, list[Run]] = {name: [] for name in names}
    for k in range(rounds):
        for name in names if k % 2 == 0 else names[::-1]:  # whatever drifts, drifts for all
            if found := once(name, f"round {k + 1}"):
                runs[name].append(found)
                check_mean(first[name], found, setting.dtype)
    return {
        "case": case, **_when(), "setting": setting.told(),
        "workload": setting.workload.statistics() | {"padding": setting.workload.padding(setting.batch_size)},
        "agreement": agreement,
        "rivals": {
            name: {"missing": absent[name]} if name in absent else summary(runs[name], first[name], setting.device)
            for name in names
        },
        "to_trl": compared(runs, TRL, setting.device),
        "to_short_head": compared(runs, TRL_COMPACT, setting.device),
    }  # fmt: skip


def _when() -> dict[str, Any]:
    found = environment()
    return {"date": found["date"], "commit": found["commit"]}


def spread(values: list[float]) -> dict[str, float]:
    return {"median": statistics.median(values), "low": min(values), "high": max(values)}


def memory(run: Run, device: str) -> int:
    """On a CPU what training takes beyond libraries and the loaded model, on a GPU all."""
    return run.peak - run.loaded if device == "cpu" else run.peak


def summary(runs: list[Run], profiled: Run, device: str) -> dict[str, Any]:
    return {
        "rate": spread([run.rate for run in runs]),
        "memory": spread([memory(run, device) for run in runs]),
        "tensors": profiled.tensors,
        "prepared": spread([run.prepared for run in runs]),
        "mean_loss": runs[0].mean_loss,
        "parts": profiled.parts,
        "rounds": [{k: v for k, v in asdict(run).items() if k not in ("log", "parts", "tensors")} for run in runs],
    }


def compared(runs: dict[str, list[Run]], to: str, device: str) -> dict[str, dict[str, Any]]:
    """Ratios to one rival: of medians, and the extremes of rounds, in which the two ran one after the other."""
    base = runs.get(to)
    return {name: _compared(found, base, device) for name, found in runs.items() if base and len(found) == len(base)}


def _compared(ours: list[Run], theirs: list[Run], device: str) -> dict[str, Any]:
    rate = statistics.median(r.rate for r in ours) / statistics.median(r.rate for r in theirs)
    rounds = [a.rate / b.rate for a, b in zip(ours, theirs)]
    cpu = statistics.median(r.cpu_seconds for r in ours) / statistics.median(r.cpu_seconds for r in theirs)
    held = [statistics.median(memory(r, device) for r in runs) for runs in (ours, theirs)]
    spread_of = {"median": rate, "low": min(rounds), "high": max(rounds)}
    return {"rate": spread_of, "cpu_seconds": cpu, "memory": held[0] / held[1] if held[1] > 0 else None}


# ---- one stage against two ----


def measure_designs(setting: Setting, rounds: int, start: str, tell: Callable[[str], Any]) -> dict[str, Any]:
    found: dict[str, list[dict]] = {design: [] for design in DESIGNS}
    for k in range(rounds):
        for design in DESIGNS if k % 2 == 0 else DESIGNS[::-1]:
            tell(f"{setting.shape} {STAGES}: {design}, round {k + 1}")
            found[design].append(apart(start, run_design, design, setting))
    two, one = (found[design] for design in DESIGNS)
    rounds_of = [b["seconds"] / a["seconds"] for a, b in zip(two, one)]

    def ratio(name: str) -> float:
        return statistics.median(run[name] for run in one) / statistics.median(run[name] for run in two)

    return {
        "case": STAGES, **_when(), "setting": setting.told(), "workload": setting.workload.statistics(),
        "designs": found,
        "unified_to_sequential": {
            "seconds": {"median": ratio("seconds"), "low": min(rounds_of), "high": max(rounds_of)},
            **{n: ratio(n) for n in ("whole_seconds", "flops", "tokens", "reference_forwards", "steps")},
        },
    }  # fmt: skip
