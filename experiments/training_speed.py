"""How fast is a training step, beside TRL's on the same model, data, order and objective, and what makes it so?

    make bench-training DATA=...          everything that this machine can show, on the files of a data folder
    make bench-training                   the same on random tokens of the lengths in experiments/speed/lengths.json
    python -m experiments.training_speed --help

Objective   DPO + likelihood of the chosen answer per token, which TRL 1.16 has as loss_type=["sigmoid", "sft"]
Same        weights, token ids, batches and their order, AdamW, clipping, precision, no dropout, no recomputation
First       losses, norms of gradients and log-probabilities of each step must agree, or nothing is timed
Then        rounds of all rivals in turn, each run in a process of its own; a profiled run of each apart from them
Cases       long prompts (at least 4 x the responses) and short ones; full and LoRA; the reference in every step (live)
            or computed before the first (cached, timed apart)
Also        one joint stage against two for the same demonstrations and pairs
Writes      experiments/results/training_speed/<machine>.{json,md,png}
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
from dataclasses import asdict, replace
from itertools import product
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm

from experiments.speed import rivals, workloads
from experiments.speed.apart import STARTS, apart
from experiments.speed.designs import DESIGNS, run_design
from experiments.speed.report import draw, goals_of, table
from experiments.speed.rivals import OURS, OURS_PACKED, OURS_PADDED, TRL, TRL_COMPACT, Run, Setting
from experiments.speed.shapes import SHAPES
from uft.record import environment, write_json

RESULTS = Path(__file__).parent / "results" / "training_speed"
STAGES = "stages"
CASES = [" ".join(words) for words in product(("long", "short"), ("full", "lora"), ("live", "cached"))]
# pairs per step and the longest row in tokens
SIZES = {"toy": (4, 160), "small": (8, 384), "0.5b": (16, 1024), "1.5b": (16, 1024), "8b": (8, 1024)}


def rivals_of(case: str, device: str) -> list[str]:
    """Where the gain comes from is shown where everything is trained and the reference is live."""
    if not case.endswith("full live"):
        return [OURS, TRL]
    return [OURS, OURS_PACKED, OURS_PADDED, TRL, *([TRL_COMPACT] if device == "cpu" else [])]


def settings_of(case: str, shape: str, rows: workloads.Rows, arguments: argparse.Namespace) -> Setting:
    gpu = torch.cuda.is_available()
    size, longest = SIZES[shape]
    size, longest = arguments.batch_size or size, arguments.max_length or longest
    name, *words = case.split()
    tuning, reference = words or ("full", "live")
    warmup = 1 if arguments.quick else 2
    return Setting(
        shape=shape,
        workload=workloads.make_workload(name, rows, size * (warmup + arguments.steps), longest),
        tuning=tuning,
        reference=reference,
        batch_size=size,
        max_length=longest,
        warmup=warmup,
        device="cuda" if gpu else "cpu",
        dtype="bfloat16" if gpu else "float32",
        checkpointing=arguments.checkpointing,
        learning_rate=1e-5 if gpu else 1e-4,
    )


# ---- a case ----


def measure(case: str, setting: Setting, rounds: int, start: str, bar: Any, altered: dict | None = None) -> dict:
    """One case of the table: checks, rounds and profiled runs of its rivals.

    altered   rival -> fields of its setting that are changed, to see that the check notices

    Raises ValueError where rivals do not compute the same.
    """
    names = rivals_of(case, setting.device)
    absent = {name: why for name in names if (why := rivals.missing(name))}

    def once(name: str, of: Setting, told: str, **options: Any) -> Run | None:
        bar.set_description(f"{setting.shape} {case}: {name}, {told}")
        bar.update()
        if name in absent:
            return None
        try:
            return apart(start, rivals.run, name, replace(of, **(altered or {}).get(name, {})), **options)
        except torch.OutOfMemoryError:
            absent[name] = "out of memory"

    few = replace(setting, warmup=0, workload=_first(setting.workload, min(5, setting.steps) * setting.batch_size))
    checked = {name: once(name, few, "check", log_every=1) for name in names}
    agreement = {
        name: rivals.check(checked[OURS], found, setting.dtype)
        for name, found in checked.items()
        if name != OURS and found and checked[OURS]
    }
    runs: dict[str, list[Run]] = {name: [] for name in names}
    for k in range(rounds):
        for name in names if k % 2 == 0 else names[::-1]:  # whatever drifts, drifts for all
            if found := once(name, setting, f"round {k + 1}"):
                runs[name].append(found)
    for name in names:
        if runs[name] and runs[OURS] and abs(runs[name][0].mean_loss / runs[OURS][0].mean_loss - 1) > 0.05:
            raise ValueError(f"{name}: mean loss {runs[name][0].mean_loss}, ours {runs[OURS][0].mean_loss}")
    profiled = {name: once(name, setting, "parts", profiled=True) for name in names}
    return {
        "case": case, "date": environment()["date"], "commit": environment()["commit"], "setting": setting.told(),
        "workload": setting.workload.statistics() | {"padding": setting.workload.padding(setting.batch_size)},
        "agreement": agreement,
        "rivals": {
            name: {"missing": absent[name]} if name in absent else summary(runs[name], profiled[name], setting.device)
            for name in names
        },
        "to_trl": {name: compared(runs[name], runs[TRL], setting.device) for name in names if runs[name] and runs[TRL]},
    }  # fmt: skip


def _first(workload: workloads.Workload, n: int) -> workloads.Workload:
    return replace(workload, pairs=workload.pairs[:n])


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


def compared(ours: list[Run], theirs: list[Run], device: str) -> dict[str, Any]:
    """Ratios: of medians, and the extremes of rounds, in which the two ran one after the other."""
    rate = statistics.median(r.rate for r in ours) / statistics.median(r.rate for r in theirs)
    rounds = [a.rate / b.rate for a, b in zip(ours, theirs)]
    cpu = statistics.median(r.cpu_seconds for r in theirs) / statistics.median(r.cpu_seconds for r in ours)
    held = [statistics.median(memory(r, device) for r in runs) for runs in (ours, theirs)]
    return {"rate": {"median": rate, "low": min(rounds), "high": max(rounds)}, "cpu_seconds": cpu,
            "memory": held[0] / held[1]}  # fmt: skip


# ---- one stage against two ----


def measure_designs(setting: Setting, rounds: int, start: str, bar: Any) -> dict:
    found: dict[str, list[dict]] = {design: [] for design in DESIGNS}
    for k in range(rounds):
        for design in DESIGNS if k % 2 == 0 else DESIGNS[::-1]:
            bar.set_description(f"{setting.shape} {STAGES}: {design}, round {k + 1}")
            found[design].append(apart(start, run_design, design, setting))
            bar.update()
    two, one = (found[design] for design in DESIGNS)
    rounds_of = [b["seconds"] / a["seconds"] for a, b in zip(two, one)]
    return {
        "case": STAGES, "date": environment()["date"], "commit": environment()["commit"], "setting": setting.told(),
        "workload": setting.workload.statistics(), "designs": found,
        "unified_to_sequential": {
            "seconds": {"median": statistics.median(r["seconds"] for r in one)
                        / statistics.median(r["seconds"] for r in two), "low": min(rounds_of), "high": max(rounds_of)},
            "whole_seconds": statistics.median(r["whole_seconds"] for r in one)
            / statistics.median(r["whole_seconds"] for r in two),
            **{name: one[0][name] / two[0][name] for name in ("flops", "tokens", "reference_forwards", "steps")},
        },
    }  # fmt: skip


# ---- all of it ----


def versions() -> dict[str, Any]:
    from importlib.metadata import PackageNotFoundError, version

    found = environment()
    with_trl = dict(found["versions"])
    try:
        with_trl["trl"] = version("trl")
    except PackageNotFoundError:
        with_trl["trl"] = None
    return {"hardware": found["hardware"], "python": found["python"], "versions": with_trl}


def machine_name(about: dict[str, Any]) -> str:
    names = about["hardware"].get("gpu")
    return "-".join(names[0].lower().removeprefix("nvidia ").split()) if names else "cpu"


def earlier(path: Path, about: dict[str, Any]) -> list[dict]:
    """Cases of the same machine and versions, which a run in parts goes on with."""
    found = json.loads(path.read_text()) if path.exists() else {}
    return found["cases"] if all(found.get(name) == value for name, value in about.items()) else []


def main(words: list[str] | None = None, altered: dict | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="folder with pairs, demonstrations and pretrain (.parquet)")
    parser.add_argument("--shapes", nargs="+", choices=tuple(SHAPES), help="default: small, or on a GPU 1.5b")
    parser.add_argument("--cases", nargs="+", choices=(*CASES, STAGES), default=[*CASES, STAGES])
    parser.add_argument("--rounds", type=int, help="default 3")
    parser.add_argument("--steps", type=int, help="timed steps of a run; default 8, on a GPU 12")
    parser.add_argument("--batch-size", type=int, help="pairs per step; default by shape")
    parser.add_argument("--max-length", type=int, help="of prompt and response in tokens; default by shape")
    parser.add_argument("--checkpointing", action="store_true", help="recompute layers in the backward, of all rivals")
    parser.add_argument("--start", choices=STARTS, help="how processes begin; default forkserver, on a GPU spawn")
    parser.add_argument("--quick", action="store_true", help="a toy size that only shows that everything runs")
    parser.add_argument("--write-lengths", action="store_true", help="only write lengths.json from the data folder")
    parser.add_argument("--output", type=Path, default=RESULTS)
    arguments = parser.parse_args(words)
    gpu = torch.cuda.is_available()
    start = arguments.start or ("spawn" if gpu else "forkserver")
    shapes = arguments.shapes or ["toy" if arguments.quick else "1.5b" if gpu else "small"]
    rounds = arguments.rounds or (1 if arguments.quick else 3)
    arguments.steps = arguments.steps or (2 if arguments.quick else 12 if gpu else 8)
    if arguments.quick and arguments.output == RESULTS:
        arguments.output = Path("runs") / "training_speed"

    rows = workloads.real_rows(arguments.data) if arguments.data else workloads.random_rows()
    if arguments.write_lengths:
        workloads.write_lengths(rows)
        return 0
    about = versions()
    path = arguments.output / f"{machine_name(about)}.json"
    cases = earlier(path, about)
    planned = list(product(shapes, arguments.cases))
    runs_of = {case: 2 * rounds if case == STAGES else (rounds + 2) * len(rivals_of(case, "cuda" if gpu else "cpu"))
               for case in arguments.cases}  # fmt: skip
    with tqdm(total=sum(runs_of[case] for _, case in planned), unit="run", disable=None) as bar:
        for shape, case in planned:
            setting = settings_of("short" if case == STAGES else case, shape, rows, arguments)
            if case == STAGES:
                found = measure_designs(setting, rounds, start, bar)
            else:
                found = measure(case, setting, rounds, start, bar, altered)
                tqdm.write(f"{shape} {case}: " + told(found))
            found["rows"] = "real" if arguments.data else "random tokens of real lengths"
            cases = [c for c in cases if (c["setting"]["shape"], c["case"]) != (shape, case)] + [found]
            # after each case: a run that is cut off keeps what it has
            record = {**about, "date": found["date"], "commit": found["commit"], "start": start,
                      "load": os.getloadavg(), "goals": goals_of(cases), "cases": cases}  # fmt: skip
            write_json(path, record)
            path.with_suffix(".md").write_text(table(record))
            draw(record, path.with_suffix(".png"))
    print(table(record))
    print(f"{path}, .md and .png")
    return 0


def told(found: dict[str, Any]) -> str:
    return ", ".join(
        f"{name} {r['missing']}" if "missing" in r else f"{name} {r['rate']['median']:.0f}/s"
        for name, r in found["rivals"].items()
    )


if __name__ == "__main__":
    sys.exit(main())
