"""Does one joint stage forget less than supervised fine-tuning followed by preference training?

Arms      see experiments/arms.py: the base, likelihood alone, preference training after the supervised stage in six
          forms and with two kinds of replay, a reward model and reinforcement learning after it, the reverse order,
          adapters trained apart and added up, ten joint objectives, and the control that needs no preference method
          (likelihood on demonstrations and chosen answers)
Equal     base weights, seeds, data, trials; FLOPs within 2 % with reference passes, generation and rewards counted
          (first table; ALRIGHT, MAXRIGHT and reinforcement, whose cost is only expected beforehand, within 6 %),
          examples of each kind (second table, first form of preferences; SFT only has no use for them)
Unequal   optimiser steps, stated in both tables
Named     beforehand, and run on ten seeds: the best joint arm against the best sequential arm, and against likelihood
          on demonstrations and chosen answers; best by the search, which uses other base models and other prompts
Measured  by generating, after every stage: skills, refusals, facts, alignment; and held-out likelihood, KL
Run       make compare          main arms, three seeds, one form of preferences, minutes
          make compare-full     every arm, every form, ten seeds for the contrasts, the search included, hours
          --quick               a toy size that only shows that everything runs
Writes    runs/compare/{summary.json, report.md, report.html, *.png}
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from datetime import date
from itertools import product
from pathlib import Path
from typing import Any

from uft.record import write_json
from uft.reporting.page import keep

from .arms import ARMS, REPLAY, TRAINED
from .jobs import Job, code_fingerprint, file_of, run_jobs
from .lab.data import VARIANTS as LAB_VARIANTS
from .lab.training import LabStage, Plan, Scale, run_plan
from .lab.world import VALIDATION
from .report import add_arms, write_report
from .reporting.folders import ResultError
from .reporting.tables import LIKE_WITH_LIKE, named_contrasts
from .runs import SFT_STAGE, Runner, Settings, run_sharing
from .search import FINALISTS, TRIALS, retention, score, search

RESULTS = Path(__file__).parent / "results" / "sequential_vs_unified"
SEARCH = RESULTS / "search.json"
NORMAL = Scale(demonstrations=8192, preferences=4096, sft_draws=9600, preference_draws=3200, batch_size=32, points=4)
TOY = Scale(
    demonstrations=512, preferences=256, sft_draws=1536, preference_draws=512, per_operator=8, points=2, batch_size=64
)
# The search has base models of its own, which no table reports: one for all trials, two more for each arm's best.
SEARCH_SEEDS = (5, 6, 7)
SEEDS, CONTRAST_SEEDS = (0, 1, 2), (0, 1, 2, 3, 4, 8, 9, 10, 11, 12)
VARIANTS = ("hedged_pairs", "noisy_pairs")  # the first is what `make compare` shows
MAIN = ("base", "sft", "sft_chosen", "sft_dpo", "sft_dpo_replay", "sft_kto", "sft_una", "dpo_nll", "uft", "uft_nll")


def plan_of(arm: str, seed: int, variant: str, scale: Scale, equal: str, chosen: dict[str, Any]) -> Plan:
    """The run of an arm with the settings that the search chose for it."""
    spec, stages = ARMS[arm], []
    if spec.after_sft:
        share = 1.0 - REPLAY if equal == "examples" and arm == "sft_dpo_replay" else 1.0
        stages.append(LabStage("sft", "sft", chosen[SFT_STAGE]["learning_rate"], share))
    if spec.stages is not None:
        stages.extend(spec.stages(chosen[arm], equal))
    return Plan(tuple(stages), seed, variant, scale)


def search_settings(
    names: Sequence[str], variant: str, scale: Scale, run: Runner, store: Path | None = None,
    shared: dict[str, Any] | None = None,
) -> dict[str, Any]:  # fmt: skip
    """The same number of trials for every arm; the shared supervised stage first, for others begin with it.

    shared   what was found for that stage before, where it is not to be searched again
    """
    chosen: dict[str, Any] = {} if shared is None else {SFT_STAGE: shared}

    def trial(name: str, seed: int, settings: Settings) -> Plan:
        if name == SFT_STAGE:  # which sees no preferences, whatever their form
            return Plan((LabStage("sft", "sft", settings["learning_rate"], 1.0),), seed, VARIANTS[0], scale)
        return plan_of(name, seed, variant, scale, "flops", chosen | {name: settings})

    def judge(name: str, record: dict[str, Any]) -> float:
        # the supervised stage is there to teach and keep, so it is chosen by retention alone
        return (retention if name == SFT_STAGE else score)(record["measures"])

    first = {} if shared else {SFT_STAGE: ARMS["sft"].space}
    chosen |= search(first, SEARCH_SEEDS, trial, judge, run, "the supervised stage", store)
    rest = {name: ARMS[name].space_for(variant) for name in names if name in TRAINED}
    chosen |= search(rest, SEARCH_SEEDS, trial, judge, run, f"search {variant}", store)
    return chosen


def runner(cache: Path, workers: int, **options: Any) -> Runner:
    """Runs plans as jobs, results and finished stages kept in `cache`; `options` go to `run_plan`."""

    def run(plans: Sequence[tuple[str, Plan]], title: str, keep_last: bool) -> list[dict[str, Any]]:
        same = {"cache": str(cache), "keep_last": keep_last, **options}
        jobs = [Job(name, run_plan, {"plan": plan, **same}) for name, plan in plans]
        return run_jobs(jobs, cache, workers=workers, title=title)

    return run


def _of_arms_that_exist(found: dict[str, Any]) -> dict[str, Any]:
    return {name: settings for name, settings in found.items() if name in (SFT_STAGE, *TRAINED)}


def contrasted(names: Sequence[str], chosen: dict[str, Any]) -> list[str]:
    """The arms of the contrasts that were named beforehand."""
    families = {name: ARMS[name].family for name in names}
    return list(dict.fromkeys(name for pair in named_contrasts(families, chosen, names) for name in pair))


def compare(
    names: Sequence[str], variants: Sequence[str], scale: Scale, seeds: Sequence[int], more: Sequence[int],
    chosen: dict[str, Any], run: Runner, tables: Sequence[str],
) -> dict[str, dict[str, dict[str, list[dict[str, Any]]]]]:  # fmt: skip
    """title of the table -> variant -> arm -> one record per seed.  `more` are the seeds of contrasted arms and of
    those compared like with like, where they are other than `seeds`."""
    titles = {
        "flops": "Equal FLOPs (reference passes counted)",
        "examples": "Equal examples of each kind",
    }
    # the second table is shown for the first form of preferences
    shown = [(equal, v) for equal, v in product(tables, variants) if equal == "flops" or v == variants[0]]
    alike = {name for pair in LIKE_WITH_LIKE for name in pair}
    wanted = [
        (equal, variant, name, seed)
        for equal, variant in shown
        for name in names
        for seed in (more if equal == "flops" and name in {*contrasted(names, chosen[variant]), *alike} else seeds)
    ]
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
    parser.add_argument(
        "--full", action="store_true", help="every arm, all variants, ten seeds for the contrasts, with the search"
    )
    parser.add_argument("--quick", action="store_true", help="toy size: shows that everything runs, nothing else")
    parser.add_argument("--search", action="store_true", help="only the search; writes search.json to the results")
    parser.add_argument("--results", action="store_true", help="also copy what is written into experiments/results")
    parser.add_argument("--add", action="store_true", help="put the arms named by --arms into experiments/results")
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
    if arguments.add and (not arguments.arms or arguments.results or arguments.full or arguments.search):
        parser.error("--add wants --arms, and not --results, --full or --search")
    if arguments.quick and (arguments.search or arguments.full or arguments.results or arguments.add):
        parser.error("--quick is a toy: it does not go with --search, --full or --results, which keep what they find")
    start = time.monotonic()

    scale = TOY if arguments.quick else NORMAL
    variants = arguments.variants or (list(VARIANTS) if arguments.full else VARIANTS[:1])
    seeds = arguments.seeds or ([0] if arguments.quick else SEEDS)
    more = CONTRAST_SEEDS if arguments.full and not arguments.seeds else seeds
    names = arguments.arms or list(ARMS if arguments.full or arguments.search else MAIN)
    tables = arguments.tables or (["flops", "examples"] if arguments.full or arguments.quick else ["flops"])
    cache = arguments.output / "cache"
    if arguments.results or arguments.full:
        _check_whole(parser, names, variants, tables)

    if arguments.search or arguments.full:
        trials = runner(cache, arguments.workers, part=VALIDATION, curves=False)
        store = arguments.output / "search.journal"
        known = json.loads(SEARCH.read_text()) if SEARCH.exists() else {}
        # a search of some arms goes on from the shared stage that the others have
        shared = {variant: known.get(variant, {}).get(SFT_STAGE) if arguments.arms else None for variant in variants}
        chosen = {
            variant: search_settings(names, variant, scale, trials, store, shared[variant]) for variant in variants
        }
        made = {"code": code_fingerprint(file_of(run_plan)), "scale": vars(scale), "date": f"{date.today()}"}
        searched = [f"{variant}: {arm}" for variant in variants for arm in names] if arguments.arms else variants
        about = known.pop("made", {}) | dict.fromkeys(searched, made)
        there = {variant: _of_arms_that_exist(known.get(variant, {})) for variant in variants}
        chosen = {variant: there[variant] | found for variant, found in chosen.items()}
        known = known | chosen | {"made": about}
        write_json(SEARCH, known)
        if arguments.search:
            return 0
    else:
        known = json.loads(SEARCH.read_text())
        if missing := [variant for variant in variants if variant not in known]:
            parser.error(f"no settings were searched for {', '.join(missing)}; first: --search --variants ...")
        for variant in variants:
            wanted = [name for name in (SFT_STAGE, *names) if name == SFT_STAGE or name in TRAINED]
            if missing := [name for name in wanted if name not in known[variant]]:
                parser.error(
                    f"no settings were searched for {', '.join(missing)} ({variant}); first: --search --arms ..."
                )
        chosen = {variant: known[variant] for variant in variants}
    for variant in variants if arguments.sft_stage else ():
        chosen[variant][SFT_STAGE] |= {"learning_rate": arguments.sft_stage, "inside": None}
    found = compare(names, variants, scale, seeds, more, chosen, runner(cache, arguments.workers), tables)
    if arguments.add:
        try:
            print(add_arms(RESULTS, found, ARMS, chosen))
        except ResultError as problem:
            parser.error(str(problem))
        return 0
    settings = {
        "description": describe(scale, seeds, more, chosen, known.get("made", {})), "scale": vars(scale),
        "seeds": list(seeds), "contrast_seeds": list(more), "arms": names,
    }  # fmt: skip
    print(write_report(arguments.output, found, ARMS, chosen, settings))
    if arguments.results or arguments.full:
        keep(arguments.output, RESULTS)
    print(f"{arguments.output}/report.md, summary.json and figures; {(time.monotonic() - start) / 60:.1f} min")
    return 0


def _check_whole(
    parser: argparse.ArgumentParser, names: Sequence[str], variants: Sequence[str], tables: Sequence[str]
) -> None:
    """Results that are there are not written over by a part of them."""
    path = RESULTS / "summary.json"
    known = json.loads(path.read_text()) if path.exists() else {}
    titles = known.get("tables", {})
    there = {
        "arms": known.get("settings", {}).get("arms", []),
        "variants": sorted({variant for found in titles.values() for variant in found}),
        "tables": [name for name in ("flops", "examples") if any(name in title.lower() for title in titles)],
    }
    for what, asked in (("arms", names), ("variants", variants), ("tables", tables)):
        if missing := [name for name in there[what] if name not in asked]:
            parser.error(
                f"{RESULTS}: found results of {what} that this run lacks: {', '.join(missing)}; want all of them, or a "
                "run without --results"
            )


def describe(
    scale: Scale, seeds: Sequence[int], more: Sequence[int], chosen: dict[str, Any], made: dict[str, Any]
) -> str:
    edges = [
        f"{name} {ARMS[arm].label if arm in ARMS else 'the supervised stage'} ({variant})"
        for variant, arms in chosen.items()
        for arm, found in arms.items()
        for name, inside in (("learning rate of", found["inside"]), ("beta of", found.get("beta_inside")))
        if inside is False
    ]
    at_edge = f"At the edge of its range: {', '.join(edges)}." if edges else "Every choice lies inside its range."
    # of all arms of a form of preferences, or of one that was searched apart
    made = {name: found for name, found in made.items() if name.partition(": ")[0] in chosen}
    same = all(found["code"] == code_fingerprint(file_of(run_plan)) for found in made.values())
    searched = f"searched on {', '.join(sorted({found['date'] for found in made.values()}))}, " if made else ""
    searched += "with the training code of these runs" if same else "with other training code than that of these runs"
    ten = f", {len(more)} for the contrasts and what is compared like with like" if len(more) > len(seeds) else ""
    return (
        f"The lab's world; {len(seeds)} seeds{ten}. The sequential design draws {scale.sft_draws:,} demonstrations (of "
        f"{scale.demonstrations:,}) and then {scale.preference_draws:,} preferences (of {scale.preferences:,}), in "
        f"batches of {scale.batch_size}; what that costs with a reference is the compute of every arm in the first "
        "table. The arms that begin with a supervised stage share it, per seed. Every arm's settings, and those of the "
        f"shared stage, had {TRIALS} trials on seed {SEARCH_SEEDS[0]}, the best {FINALISTS} of which were tried again "
        f"on seeds {', '.join(map(str, SEARCH_SEEDS[1:]))}; the mean over all decided "
        f"({searched}). {at_edge}\n\n"
        "The search has base models of its own and is scored on other prompts and other facts than those reported; no "
        "string of a prompt was ever in a training row. Facts were, in pretraining; and arms that replay documents are "
        "trained on them again, those that are asked about among them. ALRIGHT and MAXRIGHT train one kind of feedback "
        "in each step: what they draw for the other one rests, so that they draw about twice of what they train on. "
        "The arms that end with reinforcement learning train a reward model on half of the design's draws of "
        "preferences (on all of them at equal examples); writing responses, rewards and the critic's passes are "
        "counted. "
        "MAXRIGHT takes 0 for the optimum of both losses, where its paper trains for each alone first. The best arms "
        "of the contrasts may differ in what they replay: read them beside the arms that replay the same. Seconds are "
        "of two workers on shared cores."
    )


if __name__ == "__main__":
    sys.exit(main())
