"""The UFT paper's comparison on published models: its arms, evaluated with lm-eval, in its tables.

Arms      Wang et al. 2024, arXiv:2410.21438, by group: experiments/paper/arms.py holds them as data, and what the paper
          does not state
Equal     model, data, LoRA, batches, schedule; sequential arms share one supervised stage per seed
Unequal   steps and FLOPs, as in the paper, stated per arm
Measured  twelve tasks of lm-eval: experiments/paper/tasks.py is the table of names, shots and metrics
Seeds     initial adapters and order of the data; the base model has none
Run       python -m experiments.paper_uft --plan                    what it would be, before anything is loaded
          python -m experiments.paper_uft --dry-run                 all of it on a toy, offline, within a minute
          python -m experiments.paper_uft                           the seven arms of Tables 1 to 3, three seeds
          ... --groups main ratio --model Qwen/Qwen2.5-7B --seeds 0 --per_device_train_batch_size 4
          what is not an option below goes over every recipe, as on the command line of `uft train`
Writes    runs/paper_uft/{report.md, summary.json, paper_uft.png}; models and scores in cache/
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

from uft.recipe import parse

from .paper import dry
from .paper.arms import ABOUT, ARMS, GROUPS
from .paper.plan import plan_text
from .paper.report import write_report
from .paper.running import Setting, finished, run
from .paper.tasks import MISSING, TASKS, lm_eval

# what two of lm-eval's tasks import when they are loaded, which would be after training
OF_TASKS = {
    "leaderboard_ifeval": ("immutabledict", "langdetect", "nltk", "pkg_resources"),
    "leaderboard_math_hard": ("math_verify", "antlr4", "sympy"),
}


def check(setting: Setting, arms: Sequence[str]) -> None:
    """Raises in one sentence what would otherwise stop the run after days of training."""
    lm_eval()
    for arm in arms:
        for recipe in setting.recipes(arm, seed=0):
            parse(recipe | {"output_dir": "unused"})
    for task in setting.tasks:
        if task.name not in setting.manager.task_index:
            raise ValueError(f"lm-eval has no task {task.name!r}")
        if absent := [name for name in OF_TASKS.get(task.name, ()) if find_spec(name) is None]:
            raise ImportError(f"{task.name} needs {', '.join(absent)}; {MISSING.partition('; ')[2]}")


def run_all(setting: Setting, arms: Sequence[str], seeds: Sequence[int]) -> None:
    """Seed by seed, so that a table of all arms is there as early as possible."""
    wanted = [(arm, seed) for seed in seeds for arm in arms if ARMS[arm].recipe is not None or seed == seeds[0]]
    start = time.monotonic()
    for k, (arm, seed) in enumerate(wanted, start=1):

        def say(what: str, k: int = k, arm: str = arm, seed: int = seed) -> None:
            minutes = (time.monotonic() - start) / 60
            print(f"[{k}/{len(wanted)}, {minutes:.0f} min] {ARMS[arm].label}, seed {seed}: {what}", flush=True)

        run(setting, arm, seed, say)


def arguments_of(words: Sequence[str] | None) -> tuple[argparse.Namespace, list[str]]:
    groups = "\n".join(f"  {name:<8}{about} ({len(GROUPS[name])} arms)" for name, about in ABOUT.items())
    parser = argparse.ArgumentParser(
        description=f"{__doc__}\ngroups of arms:\n{groups}", formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )  # fmt: skip
    parser.add_argument("--model", default="mistralai/Mistral-7B-v0.1", help="hub id or folder")
    parser.add_argument("--groups", nargs="+", choices=tuple(GROUPS))
    parser.add_argument("--arms", nargs="+", choices=tuple(ARMS), metavar="ARM", help=f"of {', '.join(ARMS)}")
    parser.add_argument("--seeds", type=int, nargs="+")
    parser.add_argument(
        "--tasks", nargs="+", choices=[t.column for t in TASKS], metavar="COLUMN", help="by default all"
    )
    parser.add_argument("--data", nargs="+", default=[], metavar="ID=FILE", help="files instead of the hub's data sets")
    parser.add_argument("--batch-size", type=int, default=8, help="of the evaluation")
    parser.add_argument("--limit", type=float, help="documents per task, for trying out; the report says so")
    parser.add_argument("--chat", action="store_true", help="put prompts of the evaluation into the chat template")
    parser.add_argument("--plan", action="store_true", help="print what would be run, and stop")
    parser.add_argument("--report", action="store_true", help="run nothing; the report of what is there")
    parser.add_argument("--dry-run", action="store_true", help="toy model, local data, local tasks: all arms, one seed")
    parser.add_argument("--output", type=Path)
    arguments, words = parser.parse_known_args(words)
    if wrong := [pair for pair in arguments.data if "=" not in pair]:
        parser.error(f"--data {wrong[0]}: want ID=FILE, such as nvidia/HelpSteer2=helpsteer2.jsonl")
    return arguments, words


def main(words: Sequence[str] | None = None) -> int:
    arguments, words = arguments_of(words)
    try:
        return compare(arguments, words)
    except KeyboardInterrupt:
        print("paper_uft: interrupted; the same command goes on", file=sys.stderr)
        return 130
    except (ValueError, OSError, ImportError, FloatingPointError) as error:
        if os.environ.get("UFT_TRACEBACK"):
            raise
        print(f"paper_uft: {' '.join(str(error).split())}", file=sys.stderr)
        return 1


def compare(arguments: argparse.Namespace, words: Sequence[str]) -> int:
    start, is_dry = time.monotonic(), arguments.dry_run
    output = arguments.output or Path("runs") / ("paper_uft_dry" if is_dry else "paper_uft")
    groups = arguments.groups or (tuple(GROUPS) if is_dry else ("main",))
    arms = arguments.arms or [arm for group in groups for arm in GROUPS[group]]
    seeds = arguments.seeds or ([0] if is_dry else [0, 1, 2])
    tasks = tuple(t for t in (dry.dry_tasks() if is_dry else TASKS) if t.column in (arguments.tasks or [t.column]))
    model, local, tasks_in = arguments.model, dict(pair.split("=", 1) for pair in arguments.data), None
    if is_dry and not arguments.plan:
        model, local = dry.build(output / "toy")
        words, tasks_in = (*dry.WORDS, *words), str(dry.TASK_FILES)
    how = {"batch_size": arguments.batch_size, "limit": arguments.limit, "chat": arguments.chat}
    setting = Setting(model, output / "cache", tasks, tuple(words), local, tasks_in=tasks_in, **how)
    if arguments.plan:
        print(plan_text(setting, arms, seeds))
        return 0
    if not arguments.report:
        check(setting, arms)
        run_all(setting, arms, seeds)
    found = {arm: [finished(setting, arm, s) for s in (seeds if ARMS[arm].recipe else seeds[:1])] for arm in arms}
    if not any(record["scores"] for records in found.values() for record in records):
        raise ValueError(f"no score of these arms and seeds in {setting.cache}; want them run first, without --report")
    about = {"model": model, "seeds": seeds, "limit": arguments.limit, "chat": arguments.chat, "words": words}
    write_report(output, found, tasks, **about, dry=is_dry)
    print(f"{output}/report.md, summary.json and paper_uft.png; {(time.monotonic() - start) / 60:.1f} min")
    return 0


if __name__ == "__main__":
    sys.exit(main())
