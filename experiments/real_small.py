"""Sequential against unified fine-tuning on real text, instructions and preferences, small enough for two CPU cores.

Arms      see ARMS: likelihood alone, likelihood on demonstrations and chosen answers (the control that needs no
          preference method), SFT then DPO without and with replay, one unified stage
Equal     base, tokenizer, rows, FLOPs within 2 % with reference passes counted, four trials each; beta is fixed
Unequal   optimiser steps and rows seen, stated
Measured  after every stage, on rows held out by content: experiments/real/measures.py says what and why
Chosen    learning rates on the validation part, with the score defined there; reported on the test part
Seeds     a base model of its own each (initial weights, sample of the text), the order of the data; the split is one
Run       python -m experiments.real_small --data DIR           about 1.3 M parameters
          ... --recipe experiments/recipes/real_gpu.yaml        about 17 M parameters, on a GPU
          ... --quick                                           a toy size that only shows that everything runs
Writes    runs/<recipe>/{summary.json, report.md, *.png}; with --results also experiments/results/<recipe>/
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any

from .jobs import Job, run_jobs
from .real.files import Place, fingerprint, missing
from .real.report import write_report
from .real.settings import RECIPES, Design, Scale, Settings, read_settings
from .real.training import Plan, RealStage, overview, run_plan
from .runs import SFT_STAGE, Runner, run_sharing
from .search import grid_search

RESULTS = Path(__file__).parent / "results"


@dataclass(frozen=True)
class Arm:
    """What is compared.  `last` is the stage that is tuned; `after_sft` puts the shared supervised stage before it."""

    label: str
    last: Callable[[float, Design], RealStage] | None
    after_sft: bool = False
    family: str = "sequential"
    main: bool = True


def supervised(learning_rate: float, design: Design) -> RealStage:
    return RealStage("sft", "sft", learning_rate, 1.0, rest=True)


def with_chosen(learning_rate: float, design: Design) -> RealStage:
    # the rejected responses are left out, not masked: their forward pass would cost and teach nothing
    return RealStage("sft_chosen", "sft", learning_rate, 1.0, 1.0, chosen_only=True, rest=True)


def preference(preset: str, demonstrations: Callable[[Design], float] = lambda design: 0.0):
    """A last stage on pairs, with a share of the demonstrations mixed in."""

    def stage(learning_rate: float, design: Design) -> RealStage:
        objective = {"preset": preset, "beta": design.beta}
        return RealStage(preset, objective, learning_rate, demonstrations(design), 1.0, rest=True)

    return stage


ARMS: dict[str, Arm] = {
    "base": Arm("base model", None, family="control"),
    "sft": Arm("SFT only", supervised, family="control"),
    "sft_chosen": Arm("SFT on demonstrations + chosen", with_chosen, family="control"),
    "sft_dpo": Arm("SFT → DPO", preference("dpo"), True),
    "sft_dpo_replay": Arm("SFT → DPO + replay", preference("dpo_nll", lambda design: design.replay), True),
    "unified_dpo_nll": Arm("unified DPO + NLL", preference("dpo_nll", lambda design: 1.0), False, "unified"),
    "sft_una": Arm("SFT → UNA", preference("una"), True, main=False),
    "unified_uft": Arm("unified UFT (Wang et al.)", preference("uft", lambda design: 1.0), False, "unified", False),
}


def runner(place: Place, workers: int) -> Runner:
    """Runs plans as jobs; results, bases and finished stages are kept in `place.made`."""

    def run(plans: Sequence[tuple[str, Plan]], title: str, keep_last: bool) -> list[dict[str, Any]]:
        same = {"data": str(place.data), "cache": str(place.made), "keep_last": keep_last}
        jobs = [Job(name, run_plan, {"plan": plan, **same}) for name, plan in plans]
        return run_jobs(jobs, place.made, workers=workers, title=title)

    return run


def plan_of(arm: str, seed: int, scale: Scale, data: str, chosen: dict[str, Any]) -> Plan:
    """The run of an arm with the learning rates that the search chose."""
    spec, stages = ARMS[arm], []
    if spec.after_sft:
        stages.append(RealStage("sft", "sft", chosen[SFT_STAGE]["learning_rate"], 1.0))
    if spec.last is not None:
        stages.append(spec.last(chosen[arm]["learning_rate"], scale.design))
    return Plan(tuple(stages), seed, scale, data)


def search_rates(names: Sequence[str], settings: Settings, data: str, run: Runner) -> dict[str, Any]:
    """For every arm the same number of trials; the shared supervised stage first, for others begin with it."""
    chosen: dict[str, Any] = {}

    def trial(name: str, seed: int, found: dict[str, float]) -> Plan:
        if name == SFT_STAGE:
            return Plan((RealStage("sft", "sft", found["learning_rate"], 1.0),), seed, settings.scale, data)
        return plan_of(name, seed, settings.scale, data, chosen | {name: found})

    def judge(name: str, record: dict[str, Any]) -> float:
        # the supervised stage is there to teach and keep, so it is chosen by retention alone
        return record["validation"]["retention" if name == SFT_STAGE else "score"]

    trained = [name for name in names if ARMS[name].last is not None]
    shared = [SFT_STAGE] * any(ARMS[name].after_sft for name in trained)
    for group in (shared, trained):
        grids = {name: [{"learning_rate": rate} for rate in settings.learning_rates[name]] for name in group}
        chosen |= grid_search(grids, settings.search_seeds, trial, judge, run)
    return chosen


def compare(names: Sequence[str], settings: Settings, data: str, chosen: dict[str, Any], run: Runner):
    """arm -> one record per seed."""
    wanted = list(product(names, settings.seeds))
    plans = [
        (f"{ARMS[name].label}, seed {seed}", plan_of(name, seed, settings.scale, data, chosen)) for name, seed in wanted
    ]
    results = run_sharing(plans, run, "compare")
    return {name: [r for (arm, _), r in zip(wanted, results) if arm == name] for name in names}


def toy(settings: Settings) -> Settings:
    """Everything as small as it can be."""
    scale = settings.scale
    base = replace(
        scale.base, vocabulary=512, tokenizer_characters=200_000, hidden_size=32, intermediate_size=64, layers=2,
        heads=2, tokens=16_384, batch_tokens=2048,
    )  # fmt: skip
    design = replace(scale.design, demonstrations=96, preferences=48, batch_size=2, micro_batch_size=2)
    sizes = replace(
        scale.sizes, demonstrations=16, answers_per_task=2, answer_tokens=4, heldout_tasks=8, text_tokens=1500,
        generations=4, new_tokens=8,
    )  # fmt: skip
    scale = replace(
        scale, base=base, design=design, sizes=sizes, rows=replace(scale.rows, min_source=1), name=f"{scale.name}, toy"
    )
    rates = {arm: grid[:2] for arm, grid in settings.learning_rates.items()}
    return replace(settings, scale=scale, learning_rates=rates, search_seeds=(0,), seeds=(0,))


def main(words: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=os.environ.get("UFT_DATA"), help="folder of the real files")
    parser.add_argument("--recipe", type=Path, default=RECIPES / "real_small.yaml")
    parser.add_argument("--quick", action="store_true", help="toy size: shows that everything runs, nothing else")
    parser.add_argument("--more", action="store_true", help="also the arms that are not main ones")
    parser.add_argument("--arms", nargs="+", choices=tuple(ARMS))
    parser.add_argument("--seeds", type=int, nargs="+")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--output", type=Path)
    parser.add_argument("--results", action="store_true", help="copy report, summary and figures to the results")
    arguments = parser.parse_args(words)
    start = time.monotonic()

    if arguments.data is None:
        print("skipped: no data; give the folder of the real files by --data DIR or UFT_DATA")
        return 0
    if absent := missing(Path(arguments.data)):
        print(f"skipped: {arguments.data} lacks {', '.join(absent)}")
        return 0
    keep_freed_memory()
    settings, name = read_settings(arguments.recipe), arguments.recipe.stem
    if arguments.quick:
        settings, name = toy(settings), f"{name}_quick"
    if arguments.seeds:
        settings = replace(settings, seeds=tuple(arguments.seeds))
    names = arguments.arms or [arm for arm in ARMS if ARMS[arm].main or arguments.more]
    output = arguments.output or Path("runs") / name
    place = Place(Path(arguments.data), output / "cache")
    run, data = runner(place, arguments.workers), fingerprint(place.data)

    seeds = sorted({*settings.search_seeds, *settings.seeds})
    plans = [(f"base model, seed {seed}", Plan((), seed, settings.scale, data)) for seed in seeds]
    run(plans, "pretraining", False)
    chosen = search_rates(names, settings, data, run)
    found = compare(names, settings, data, chosen, run)
    facts = overview(place, settings.scale, settings.seeds)
    print(write_report(output, found, ARMS, chosen, {"settings": asdict(settings), "data": data, **facts}))
    if arguments.results:
        publish(output, RESULTS / name)
    print(f"{output}/report.md, summary.json and figures; {(time.monotonic() - start) / 60:.1f} min")
    return 0


def keep_freed_memory() -> None:
    """Asks glibc, in the workers, to reuse large buffers: mapping them anew cost a quarter of a small model's step."""
    for name in ("MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_"):
        os.environ.setdefault(name, str(2**32))


def publish(output: Path, results: Path) -> None:
    results.mkdir(parents=True, exist_ok=True)
    for path in (output / "report.md", output / "summary.json", *output.glob("*.png")):
        shutil.copy(path, results / path.name)


if __name__ == "__main__":
    sys.exit(main())
