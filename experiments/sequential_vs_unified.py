"""Does one joint stage forget less than supervised fine-tuning followed by preference training?

Arms      see ARMS: the base, likelihood alone, four sequential arms, two unified arms, and the control that needs no
          preference method at all (likelihood on demonstrations and chosen answers)
Equal     base weights, seeds, data, trials for the last stage; FLOPs within 2 % with reference passes counted (first
          table), examples of each kind (second table, first form of preferences; SFT only has no use for them)
Unequal   optimiser steps, stated in both tables
Measured  by generating, after every stage: skills, refusals, facts, alignment; and held-out likelihood, KL
Run       make compare          main arms, three seeds, one form of preferences, minutes
          make compare-full     every arm, five seeds, every form, the search included, hours
          --quick               a toy size that only shows that everything runs
Writes    runs/compare/{summary.json, report.md, *.png}
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import date
from itertools import product
from pathlib import Path
from typing import Any

from experiments.jobs import Job, code_fingerprint, folder_of, run_jobs
from experiments.lab.data import VARIANTS as LAB_VARIANTS
from experiments.lab.training import LabStage, Plan, Scale, run_plan
from experiments.lab.world import VALIDATION
from experiments.report import write_report
from experiments.runs import SFT_STAGE, Runner, Settings, run_sharing, search
from experiments.search import retention, score
from uft.record import write_json

RESULTS = Path(__file__).parent / "results" / "sequential_vs_unified"
SEARCH = RESULTS / "search.json"
NORMAL = Scale(demonstrations=8192, preferences=4096, sft_draws=19_200, preference_draws=6400)
TOY = Scale(
    demonstrations=512, preferences=256, sft_draws=1536, preference_draws=512, per_operator=8, points=2, batch_size=64
)


@dataclass(frozen=True)
class Arm:
    """What is compared.

    last        makes the stage that is tuned, from learning rate, beta and the kind of equality; None: untrained
    rates       the learning rates of the search; `betas` the values of beta, (None,) where there is none
    noisy       other rates and betas for noisy preferences, where more than a few nats of margin mean believing noise
    after_sft   the shared supervised stage comes before it
    family      control, sequential or unified
    """

    label: str
    last: Callable[[float, float | None, str], LabStage] | None
    rates: tuple[float, ...] = ()
    betas: tuple[float | None, ...] = (None,)
    after_sft: bool = False
    family: str = "sequential"
    noisy: tuple[tuple[float, ...], tuple[float | None, ...]] | None = None


def preference_stage(preset: str, demonstrations: float = 0.0, **options: Any):
    """A last stage on preferences, with `demonstrations` as the share of demonstrations mixed in."""

    def stage(learning_rate: float, beta: float | None, equal: str) -> LabStage:
        objective = {"preset": preset, **options} | ({} if beta is None else {"beta": beta})
        return LabStage(
            preset, objective, learning_rate, demonstrations, 1.0, "rest" if equal == "flops" else "examples"
        )

    return stage


def likelihood_only(learning_rate: float, beta: None, equal: str) -> LabStage:
    return LabStage("sft", "sft", learning_rate, 1.0, 0.0, "rest" if equal == "flops" else "examples")


REPLAY = 0.25  # share of the demonstrations that the second stage draws again
# Twelve trials for every arm: four learning rates and three betas, or twelve learning rates where there is no beta.
FROM_BASE = (1e-4, 2e-4, 4e-4, 8e-4)
AFTER_SFT = (1e-5, 3e-5, 1e-4, 3e-4)
AFTER_SFT_HIGHER = (3e-5, 1e-4, 3e-4, 1e-3)
TRIALS = 12
BETAS, NOISY_BETAS = (0.5, 2.0, 8.0), (0.01, 0.03, 0.1)
# The search has base models of its own, which no table reports. Four arms hang on the rate of the supervised stage that
# they share, so it is chosen on three.
SEARCH_SEEDS, SFT_STAGE_SEEDS = (5,), (5, 6, 7)
VARIANTS = ("hedged_pairs", "noisy_pairs")  # the first is what `make compare` shows

ARMS: dict[str, Arm] = {
    "base": Arm("base model", None, family="control"),
    "sft": Arm("SFT only", likelihood_only, FROM_BASE, family="control"),
    "sft_chosen": Arm(
        "SFT on demonstrations + chosen", preference_stage("sft_chosen", 1.0), FROM_BASE, family="control"
    ),
    "sft_dpo": Arm(
        "SFT → DPO", preference_stage("dpo"), AFTER_SFT, (2.0, 8.0, 32.0), True, noisy=(AFTER_SFT, (0.1, 0.3, 1.0))
    ),
    "sft_dpo_replay": Arm(
        "SFT → DPO + replay",
        preference_stage("dpo_nll", REPLAY),
        AFTER_SFT_HIGHER,
        BETAS,
        True,
        noisy=(AFTER_SFT_HIGHER, NOISY_BETAS),
    ),
    "sft_kto": Arm(
        "SFT → KTO",
        preference_stage("kto"),
        AFTER_SFT,
        (0.5, 1.5, 5.0),
        True,
        noisy=(AFTER_SFT_HIGHER, (0.5, 1.5, 5.0)),
    ),
    "sft_una": Arm(
        "SFT → UNA",
        preference_stage("una"),
        AFTER_SFT_HIGHER,
        (0.3, 1.0, 3.0),
        True,
        noisy=(AFTER_SFT_HIGHER, (0.1, 0.3, 1.0)),
    ),
    "unified_dpo_nll": Arm(
        "unified DPO + NLL",
        preference_stage("dpo_nll", 1.0),
        FROM_BASE,
        BETAS,
        family="unified",
        noisy=(FROM_BASE, (0.003, 0.01, 0.03)),
    ),
    # its gradient per response is at most 0.3 beta and vanishes with the margin: it wants small betas and large rates
    "unified_uft": Arm(
        "unified UFT (Wang et al.)",
        preference_stage("uft", 1.0),
        (4e-4, 8e-4, 1.6e-3, 3.2e-3),
        (0.01, 0.03, 0.1),
        family="unified",
        noisy=((2e-4, 4e-4, 8e-4, 1.6e-3), (0.0003, 0.001, 0.003)),
    ),
}


def plan_of(arm: str, seed: int, variant: str, scale: Scale, equal: str, chosen: dict[str, Any]) -> Plan:
    """The run of an arm with the settings that the search chose for it."""
    spec, stages = ARMS[arm], []
    if spec.after_sft:
        share = 1.0 - REPLAY if equal == "examples" and "replay" in arm else 1.0
        stages.append(LabStage("sft", "sft", chosen[SFT_STAGE]["learning_rate"], share))
    if spec.last is not None:
        stages.append(spec.last(chosen[arm]["learning_rate"], chosen[arm].get("beta"), equal))
    return Plan(tuple(stages), seed, variant, scale)


def search_settings(names: Sequence[str], variant: str, scale: Scale, run: Runner) -> dict[str, Any]:
    """The same number of trials for every arm; the shared supervised stage first, for others begin with it."""
    chosen: dict[str, Any] = {}

    def trial(name: str, seed: int, settings: Settings) -> Plan:
        if name == SFT_STAGE:  # which sees no preferences, whatever their form
            return Plan((LabStage("sft", "sft", settings["learning_rate"], 1.0),), seed, VARIANTS[0], scale)
        return plan_of(name, seed, variant, scale, "flops", chosen | {name: settings})

    def judge(name: str, record: dict[str, Any]) -> float:
        # the supervised stage is there to teach and keep, so it is chosen by retention alone
        return (retention if name == SFT_STAGE else score)(record["measures"])

    trained = [name for name in names if ARMS[name].last is not None]
    first = {SFT_STAGE: grid(ARMS["sft"], variant)}
    chosen |= search(first, SFT_STAGE_SEEDS, trial, judge, run, "search the supervised stage")
    rest = {name: grid(ARMS[name], variant) for name in trained}
    chosen |= search(rest, SEARCH_SEEDS, trial, judge, run, f"search {variant}")
    return chosen


def grid(arm: Arm, variant: str) -> list[dict[str, float]]:
    """TRIALS settings: learning rates times betas, or finer learning rates where there is no beta."""
    rates, betas = arm.noisy if arm.noisy and variant.startswith("noisy") else (arm.rates, arm.betas)
    if betas == (None,):
        step = (rates[-1] / rates[0]) ** (1 / (TRIALS - 3))  # two more lie above the last
        return [{"learning_rate": float(f"{rates[0] * step**k:.2g}")} for k in range(TRIALS)]
    settings = [{"learning_rate": rate, "beta": beta} for rate, beta in product(rates, betas)]
    assert len(settings) == TRIALS
    return settings


def runner(cache: Path, workers: int, **options: Any) -> Runner:
    """Runs plans as jobs, results and finished stages kept in `cache`; `options` go to `run_plan`."""

    def run(plans: Sequence[tuple[str, Plan]], title: str, keep_last: bool) -> list[dict[str, Any]]:
        same = {"cache": str(cache), "keep_last": keep_last, **options}
        jobs = [Job(name, run_plan, {"plan": plan, **same}) for name, plan in plans]
        return run_jobs(jobs, cache, workers=workers, title=title)

    return run


def compare(
    names: Sequence[str], variants: Sequence[str], scale: Scale, seeds: Sequence[int], chosen: dict[str, Any],
    run: Runner, tables: Sequence[str],
) -> dict[str, dict[str, dict[str, list[dict[str, Any]]]]]:  # fmt: skip
    """title of the table -> variant -> arm -> one record per seed."""
    titles = {
        "flops": "Equal FLOPs (reference passes counted)",
        "examples": "Equal examples of each kind",
    }
    # the second table is shown for the first form of preferences
    shown = [(equal, v) for equal, v in product(tables, variants) if equal == "flops" or v == variants[0]]
    wanted = [(*first, name, seed) for first, name, seed in product(shown, names, seeds)]
    plans = [
        (f"{ARMS[name].label}, {variant}, seed {seed}", plan_of(name, seed, variant, scale, equal, chosen[variant]))
        for equal, variant, name, seed in wanted
    ]
    found: dict[str, Any] = {}
    for (equal, variant, name, _), result in zip(wanted, run_sharing(plans, run, "compare")):
        found.setdefault(titles[equal], {}).setdefault(variant, {}).setdefault(name, []).append(result)
    return found


def main(words: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--full", action="store_true", help="every arm, five seeds, all variants, with the search")
    parser.add_argument("--quick", action="store_true", help="toy size: shows that everything runs, nothing else")
    parser.add_argument("--search", action="store_true", help="only the search; writes search.json to the results")
    parser.add_argument("--results", action="store_true", help="also copy what is written into experiments/results")
    parser.add_argument("--seeds", type=int, nargs="+")
    parser.add_argument("--variants", nargs="+", choices=tuple(LAB_VARIANTS))
    parser.add_argument("--tables", nargs="+", choices=("flops", "examples"))
    parser.add_argument("--arms", nargs="+", choices=tuple(ARMS))
    parser.add_argument(
        "--sft_stage", type=float, help="learning rate of the shared supervised stage, not the searched"
    )
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--output", type=Path, default=Path("runs/compare"))
    arguments = parser.parse_args(words)
    if arguments.quick and (arguments.search or arguments.full or arguments.results):
        parser.error("--quick is a toy: it does not go with --search, --full or --results, which keep what they find")
    start = time.monotonic()

    scale = TOY if arguments.quick else NORMAL
    variants = arguments.variants or (list(VARIANTS) if arguments.full else VARIANTS[:1])
    seeds = arguments.seeds or ([0, 1, 2, 3, 4] if arguments.full else [0] if arguments.quick else [0, 1, 2])
    names = arguments.arms or list(ARMS)
    tables = arguments.tables or (["flops", "examples"] if arguments.full or arguments.quick else ["flops"])
    cache = arguments.output / "cache"

    if arguments.search or arguments.full:
        trials = runner(cache, arguments.workers, part=VALIDATION, curves=False)
        chosen = {variant: search_settings(list(ARMS), variant, scale, trials) for variant in variants}
        known = json.loads(SEARCH.read_text()) if SEARCH.exists() else {}
        made = {"code": code_fingerprint(folder_of(run_plan)), "scale": vars(scale), "date": f"{date.today()}"}
        about = known.pop("made", {}) | dict.fromkeys(variants, made)
        write_json(SEARCH, known | chosen | {"made": about})
        if arguments.search:
            return 0
    else:
        known = json.loads(SEARCH.read_text())
        if missing := [variant for variant in variants if variant not in known]:
            parser.error(f"no settings were searched for {', '.join(missing)}; first: --search --variants ...")
        chosen = {variant: known[variant] for variant in variants}
    for variant in variants if arguments.sft_stage else ():
        chosen[variant][SFT_STAGE] |= {"learning_rate": arguments.sft_stage, "inside": None}
    found = compare(names, variants, scale, seeds, chosen, runner(cache, arguments.workers), tables)
    settings = {"description": describe(scale, seeds, chosen), "scale": vars(scale), "seeds": seeds, "arms": names}
    print(write_report(arguments.output, found, ARMS, chosen, settings))
    if arguments.results or arguments.full:
        for path in (p for p in arguments.output.iterdir() if p.suffix in (".md", ".json", ".png")):
            shutil.copy(path, RESULTS / path.name)
    print(f"{arguments.output}/report.md, summary.json and figures; {(time.monotonic() - start) / 60:.1f} min")
    return 0


def describe(scale: Scale, seeds: Sequence[int], chosen: dict[str, Any]) -> str:
    edges = [
        f"{name} {arm} ({variant})"
        for variant, arms in chosen.items()
        for arm, found in arms.items()
        for name, inside in (("learning rate of", found["inside"]), ("beta of", found.get("beta_inside")))
        if inside is False
    ]
    trials = " or ".join(map(str, sorted({found["trials"] for arms in chosen.values() for found in arms.values()})))
    at_edge = f"At the edge of its grid: {', '.join(edges)}." if edges else "Every choice lies inside its grid."
    return (
        f"The lab's world; {len(seeds)} seeds. The sequential design draws {scale.sft_draws:,} demonstrations (of "
        f"{scale.demonstrations:,}) and then {scale.preference_draws:,} preferences (of {scale.preferences:,}); what "
        "that costs with DPO is the compute of every arm in the first table. The arms that begin with a supervised "
        f"stage share it, per seed. Each arm's last stage had {trials} trials on seed {SEARCH_SEEDS[0]}, the shared "
        f"supervised stage as many of its own on each of the seeds {', '.join(map(str, SFT_STAGE_SEEDS))}, whose mean "
        f"decided. {at_edge} Grids were moved where a choice lay at an edge, so an arm "
        "whose first grid was wrong has had more trials than are shown.\n\n"
        "The search has base models of its own and is scored on other prompts and other facts than those reported; "
        "no string of either was ever in a training row. Intervals are not corrected for the number of comparisons."
    )


if __name__ == "__main__":
    sys.exit(main())
