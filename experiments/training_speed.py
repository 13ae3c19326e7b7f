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
import sys
from itertools import product
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm

from uft.record import environment, write_json

from .speed import workloads
from .speed.apart import STARTS
from .speed.measure import STAGES, measure, measure_designs, runs_of
from .speed.report import draw, goals_of, table
from .speed.rivals import Setting
from .speed.shapes import SHAPES

RESULTS = Path(__file__).parent / "results" / "training_speed"
CASES = [" ".join(words) for words in product(("long", "short"), ("full", "lora"), ("live", "cached"))]
QUICK = ["long full live", "short lora cached", STAGES]
# pairs per step and the longest row in tokens
SIZES = {"toy": (4, 160), "small": (6, 384), "0.5b": (16, 1024), "1.5b": (16, 1024), "8b": (8, 1024)}


def settings_of(case: str, shape: str, rows: workloads.Rows, arguments: argparse.Namespace) -> Setting:
    gpu = torch.cuda.is_available()
    size, longest = SIZES[shape]
    size, longest = arguments.batch_size or size, arguments.max_length or longest
    name, *words = case.split()
    tuning, reference = words or ("full", "live")
    warmup = 3 if gpu else 1
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
    parser.add_argument("--cases", nargs="+", choices=(*CASES, STAGES), help="default: all")
    parser.add_argument("--rounds", type=int, help="default 3")
    parser.add_argument("--steps", type=int, help="timed steps of a run; default 5, on a GPU 12")
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
    arguments.steps = arguments.steps or (2 if arguments.quick else 12 if gpu else 5)
    arguments.cases = arguments.cases or (QUICK if arguments.quick else [*CASES, STAGES])
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
    total = sum(runs_of(case, "cuda" if gpu else "cpu", rounds) for _, case in planned)
    with tqdm(total=total, unit="run", disable=None) as bar:

        def tell(what: str) -> None:
            bar.set_description(what)
            bar.update()

        for shape, case in planned:
            setting = settings_of("short" if case == STAGES else case, shape, rows, arguments)
            if case == STAGES:
                found = measure_designs(setting, rounds, start, tell)
            else:
                found = measure(case, setting, rounds, start, tell, altered)
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
