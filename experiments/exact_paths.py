"""How far from the true Pareto front does each method end, and which way does it go there?

In a world that can be listed whole (`experiments/lab/enumerable`) the best trade-offs between likelihood of
demonstrations and preferences are known, so every policy on the way of a training run has an exact distance to them.

Arms      see ARMS: likelihood alone, DPO alone, the control that needs no preference method (likelihood of
          demonstrations and chosen answers), both orders of the two, joint DPO + likelihood at four weights, ALRIGHT,
          MAXRIGHT, and pointwise losses; beside them the joint objective descended by its exact gradient, which is
          what the transformer can reach without the noise of samples
Equal     base weights, optimiser steps, examples drawn (half of each kind where an arm uses both), none of them twice
Unequal   FLOPs, stated; ALRIGHT and MAXRIGHT leave the examples of the resting term unused
Tuned     the learning rate, three trials for every arm on a seed of its own, by ideal distance at the end (SFT and DPO
          alone by their own loss); the joint arms share that of weight 0.5, which ALRIGHT and MAXRIGHT take over
Run       python -m experiments.exact_paths [--quick]        about ten minutes of one core
Writes    runs/exact_paths/{report.md, summary.json, *.png}
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

from uft.reporting.page import keep

from .exact_limit import RATE, STEPS, run_limit
from .exact_report import About, Truth, judged, write_report
from .jobs import Job, run_jobs
from .lab.enumerable.paths import PathStage, Plan, Scale, run_base, run_plan
from .lab.enumerable.world import World
from .runs import Runner, run_sharing
from .search import grid_search

RESULTS = Path(__file__).parent / "results" / "exact_paths"
NORMAL = Scale(steps=160, base_steps=400, batch_size=32, points=8)
TOY = Scale(steps=6, base_steps=4, batch_size=8, points=3, width=16)
# a second stage wants smaller steps, so as not to leave at once what the first has reached
RATES, SECOND_RATES, DEFAULT_RATE = (1e-3, 3e-3, 9e-3), (1e-4, 3e-4, 1e-3), 1e-3
SEARCH_SEED = 5
# the joint objective at equal weights against both orders, and against the control
CONTRASTS = (("joint_50", "sft_dpo"), ("joint_50", "sft_dpo_base"), ("joint_50", "dpo_sft"), ("joint_50", "sft_chosen"))


class Chosen(NamedTuple):
    """What stages are made of: tuned learning rates by arm, beta, and the least that each loss can be."""

    rates: Mapping[str, float]
    beta: float
    ideal: tuple[float, float]


Stages = Callable[[float, Chosen], tuple[PathStage, ...]]


@dataclass(frozen=True)
class Arm:
    """stages   from a learning rate (of the last stage) and what is known
    family   control, sequential, joint or other
    judged   by what its learning rate is chosen
    like     the arm whose learning rate it takes over instead
    rates    of the search
    """

    label: str
    family: str
    stages: Stages
    judged: str = "ideal"
    like: str | None = None
    rates: tuple[float, ...] = RATES


def alone(name: str, preset: str, demonstrations: float, preferences: float, share: float = 1.0, **more: Any) -> Stages:
    def stages(rate: float, chosen: Chosen) -> tuple[PathStage, ...]:
        options = {"beta": chosen.beta} if preferences and preset != "sft_chosen" else {}
        return (PathStage(name, {"preset": preset, **options}, rate, share, demonstrations, preferences, **more),)

    return stages


def in_turn(first: str, then: Stages) -> Stages:
    """Half of the steps as arm `first`, at its learning rate, and half as `then`."""

    def stages(rate: float, chosen: Chosen) -> tuple[PathStage, ...]:
        before = {"sft": alone("sft", "sft", 1.0, 0.0, 0.5), "dpo": alone("dpo", "dpo", 0.0, 1.0, 0.5)}[first]
        return before(chosen.rates[first], chosen) + then(rate, chosen)

    return stages


def joint(weight: float, balance: str | None = None, preset: str = "dpo_nll", **options: Any) -> Stages:
    """(1 - weight) likelihood + weight preferences, both in every step."""

    def stages(rate: float, chosen: Chosen) -> tuple[PathStage, ...]:
        weights = {"sft_weight": 1 - weight, "preference_weight": weight}
        objective = {"preset": preset, "beta": chosen.beta, **weights, **options}
        if balance == "maxright":
            objective["balance"] = {"method": balance, "optimum": dict(zip(("sft", "preference"), chosen.ideal))}
        elif balance:
            objective["balance"] = balance
        return (PathStage("joint", objective, rate, 1.0, 0.5, 0.5),)

    return stages


ARMS: dict[str, Arm] = {
    "sft": Arm("SFT", "control", alone("sft", "sft", 1.0, 0.0), "sft"),
    "dpo": Arm("DPO", "control", alone("dpo", "dpo", 0.0, 1.0), "dpo"),
    "sft_chosen": Arm("SFT on demonstrations + chosen", "control", alone("sft", "sft_chosen", 0.5, 0.5)),
    "sft_dpo": Arm(
        "SFT → DPO", "sequential", in_turn("sft", alone("dpo", "dpo", 0.0, 1.0, 0.5, reference="start")),
        rates=SECOND_RATES,
    ),
    "sft_dpo_base": Arm(
        "SFT → DPO, reference: base", "sequential", in_turn("sft", alone("dpo", "dpo", 0.0, 1.0, 0.5)),
        rates=SECOND_RATES,
    ),
    "dpo_sft": Arm(
        "DPO → SFT", "sequential", in_turn("dpo", alone("sft", "sft", 1.0, 0.0, 0.5)), rates=SECOND_RATES
    ),
    "joint_25": Arm("DPO + NLL, weight 0.25", "joint", joint(0.25), like="joint_50"),
    "joint_50": Arm("DPO + NLL, weight 0.5", "joint", joint(0.5)),
    "joint_75": Arm("DPO + NLL, weight 0.75", "joint", joint(0.75), like="joint_50"),
    "joint_90": Arm("DPO + NLL, weight 0.9", "joint", joint(0.9), like="joint_50"),
    "alright": Arm("ALRIGHT, 0.5", "other", joint(0.5, "alright"), like="joint_50"),
    "maxright": Arm("MAXRIGHT, 0.5", "other", joint(0.5, "maxright"), like="joint_50"),
    "uft": Arm("UFT (Wang et al.)", "other", alone("uft", "uft", 0.5, 0.5)),
    "una_nll": Arm("UNA + NLL, weight 0.5", "other", joint(0.5, preset="uft_nll", loss="una_mse")),
    "kto_nll": Arm("KTO + NLL, weight 0.5", "other", joint(0.5, preset="uft_nll", loss="kto")),
}  # fmt: skip


LIMIT = Arm("weight 0.5, exact gradient", "limit", joint(0.5), like="joint_50")  # its learning rate is fixed


def tuned(
    names: Sequence[str], plan_of: Callable[[str, int, float, Mapping], Plan], truth: Truth, run: Runner
) -> dict[str, Any]:
    """Arm -> its learning rate, with every trial.  The first stages of sequences are tuned before what follows them."""
    found: dict[str, Any] = {}

    def judge(name: str, record: Mapping[str, Any]) -> float:
        return -(record["measures"] | judged(truth, record["measures"]))[ARMS[name].judged]

    def trial(name: str, seed: int, settings: Mapping[str, float]) -> Plan:
        return plan_of(name, seed, settings["learning_rate"], found)

    wanted = dict.fromkeys(ARMS[name].like or name for name in names)
    for group in (("sft", "dpo"), [name for name in wanted if name not in ("sft", "dpo")]):
        grids = {name: [{"learning_rate": rate} for rate in ARMS[name].rates] for name in group}
        found |= grid_search(grids, (SEARCH_SEED,), trial, judge, run, "learning rates")
    return found | {name: found[ARMS[name].like] for name in names if ARMS[name].like}


def runner(cache: Path, workers: int) -> Runner:
    def run(plans: Sequence[tuple[str, Plan]], title: str, keep_last: bool) -> list[dict[str, Any]]:
        same = {"cache": str(cache), "keep_last": keep_last}
        return run_jobs([Job(name, run_plan, {"plan": plan, **same}) for name, plan in plans], cache, workers=workers,
                        title=title)  # fmt: skip

    return run


def main(words: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="toy size: shows that everything runs, nothing else")
    parser.add_argument("--results", action="store_true", help="also copy what is written into experiments/results")
    parser.add_argument("--seeds", type=int, nargs="+", help="default 0 1 2")
    parser.add_argument("--arms", nargs="+", choices=tuple(ARMS))
    parser.add_argument("--steps", type=int, help="of every arm; also how many examples there are")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--output", type=Path, default=Path("runs/exact_paths"))
    parser.add_argument("--cache", type=Path, help="default <output>/cache")
    arguments = parser.parse_args(words)
    if arguments.quick and arguments.results:
        parser.error("--quick is a toy: it does not go with --results")
    start, world, scale = time.monotonic(), World(), TOY if arguments.quick else NORMAL
    scale = replace(scale, steps=arguments.steps or scale.steps)
    cache = arguments.cache or arguments.output / "cache"
    seeds, names = arguments.seeds or ([0] if arguments.quick else [0, 1, 2]), arguments.arms or list(ARMS)

    (base,) = run_jobs([Job("base policy", run_base, {"world": world, "scale": scale, "cache": str(cache)})], cache,
                       workers=1, title="base")  # fmt: skip
    truth = Truth.of(world, scale, cache)

    def plan_of(name: str, seed: int, rate: float, found: Mapping[str, Any]) -> Plan:
        rates = {arm: found[arm]["learning_rate"] for arm in ("sft", "dpo") if arm in found}
        return Plan(ARMS[name].stages(rate, Chosen(rates, scale.beta, truth.losses.ideal)), seed, scale, world)

    run = runner(cache, arguments.workers)
    if arguments.quick:
        found = {name: {"learning_rate": DEFAULT_RATE} for name in ARMS}
    else:
        found = tuned(names, plan_of, truth, run)
    plans = [
        (f"{ARMS[name].label}, seed {seed}", plan_of(name, seed, found[name]["learning_rate"], found))
        for name in names
        for seed in seeds
    ]
    results = iter(run_sharing(plans, run, "paths"))
    records = {name: [next(results) for _ in seeds] for name in names}
    if "joint_50" in names:
        limit = {"world": world, "scale": scale, "cache": str(cache), "weight": 0.5}
        job = Job("exact gradient", run_limit, limit | {"steps": 3 if arguments.quick else STEPS})
        records["limit"] = run_jobs([job], cache, workers=1, title="what the transformer can reach")
        found["limit"] = {"learning_rate": RATE}
    about = About(world, scale, base, ARMS | {"limit": LIMIT}, CONTRASTS, found, SEARCH_SEED)
    print(write_report(arguments.output, about, truth, records))
    if arguments.results:
        keep(arguments.output, RESULTS)
    minutes = (time.monotonic() - start) / 60
    print(f"{arguments.output}/report.md, summary.json and figures; {minutes:.1f} min", file=sys.stderr)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
