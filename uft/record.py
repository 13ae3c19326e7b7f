"""The record of a run: what was configured, on what, what was measured, and what it cost.  One JSON file."""

from __future__ import annotations

import contextlib
import json
import math
import os
import platform
import resource
import subprocess
import sys
from collections.abc import Mapping
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from torch import nn

from uft.licences import hub_id
from uft.models import is_peft, unwrapped

PACKAGES = ("unified-finetuning", "torch", "transformers", "accelerate", "peft", "datasets", "triton", "numpy")


def run_record(trainer: Any, counters: Mapping[str, float]) -> dict[str, Any]:
    """Everything another person needs to judge or repeat a run: configuration, data, metrics over time, compute."""
    model = unwrapped(trainer.model)
    bare = model.get_base_model() if is_peft(model) else model
    data = {"train": trainer.train_dataset, "eval": trainer.eval_dataset}
    return {
        "objective": {
            "name": trainer.objective.name,
            "terms": trainer.objective.describe(),
            "balance": repr(trainer.objective.balancer) if trainer.objective.balancer else None,
            "from": getattr(trainer, "objective_from", None),  # where it was not given
        },
        "reference": type(trainer.reference).__name__ if trainer.reference else trainer.args.reference,
        "data": {
            split: {
                "fingerprint": part.fingerprint,
                "sizes": dict(zip(part.sources, part.sizes)),
                "kinds": {source: sorted(kinds) for source, kinds in part.kinds().items()},
                "origins": dict(getattr(part, "origins", {})),
            }
            for split, part in data.items()
            if hasattr(part, "fingerprint")
        },
        "config": trainer.args.to_sanitized_dict(),
        "model": {
            "architecture": type(bare).__name__,
            "base": _hub_id(bare),
            "adapter": is_peft(model),
            "parameters": sum(p.numel() for p in model.parameters()),
            "trained_parameters": sum(p.numel() for p in model.parameters() if p.requires_grad),
        },
        "seed": trainer.args.seed,
        "steps": trainer.state.global_step,
        "planned_steps": trainer.state.max_steps,  # more, where a callback ended the run
        "idle_terms": trainer.idle_terms,
        "compute": {**counters, "peak_memory_bytes": peak_memory_bytes()},
        "metrics": trainer.state.log_history,
        **environment(),
    }


def _hub_id(model: nn.Module) -> str | None:
    """The hub id of the model that training began with; None for a folder or fresh weights.

    Decided while training, for `models/base` is a folder from one working directory only.
    """
    name = hub_id(getattr(model.config, "_name_or_path", ""))
    return name if name and not Path(name).exists() else None


def environment() -> dict[str, Any]:
    """Date, commit, versions and hardware."""
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": commit(),
        "python": platform.python_version(),
        "versions": {name: found for name in PACKAGES if (found := _version(name))},
        "hardware": hardware(),
    }


def hardware() -> dict[str, Any]:
    found: dict[str, Any] = {
        "cpu": _cpu_name(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": torch.get_num_threads(),
    }
    if torch.cuda.is_available():
        found["gpu"] = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return found


def commit() -> str | None:
    """The commit of the code that runs, with "+" where the working tree differs; None outside a checkout."""
    here = Path(__file__).resolve().parent
    try:
        head = _git(here, "rev-parse", "--short=12", "HEAD")
        return head + ("+" if _git(here, "status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.CalledProcessError):
        return None


def _git(folder: Path, *words: str) -> str:
    return subprocess.run(["git", "-C", str(folder), *words], capture_output=True, text=True, check=True).stdout.strip()


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def reset_peak_memory() -> None:
    """Peaks count from here on: a process may train one model after another."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    else:
        with contextlib.suppress(OSError):  # not Linux, or not allowed: the peak is then that of the process
            Path("/proc/self/clear_refs").write_text("5")


def peak_memory_bytes() -> int:
    """Peak memory since `reset_peak_memory`: on the GPU where there is one, resident otherwise."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    with contextlib.suppress(OSError, StopIteration):
        lines = Path("/proc/self/status").read_text().splitlines()
        return 1024 * int(next(line for line in lines if line.startswith("VmHWM:")).split()[1])
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def write_json(path: str | os.PathLike, data: Any) -> None:
    """Written aside and renamed.  What JSON cannot hold (NaN, objects) is written as null or as text."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    aside.write_text(json.dumps(plain(data), indent=1, allow_nan=False) + "\n")
    os.replace(aside, path)


def plain(value: Any) -> Any:
    """What JSON can hold of it."""
    if isinstance(value, dict):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(v) for v in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if value is None or isinstance(value, (str, int, bool)):
        return value
    if hasattr(value, "item") and getattr(value, "ndim", 1) == 0:
        return plain(value.item())
    return str(value)
