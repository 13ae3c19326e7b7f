"""Runs a comparison: the base model measured, then arm by arm and seed by seed, each run once."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from typing import Any

import torch
from transformers import AutoTokenizer

from uft.command_line import import_all
from uft.comparison.budget import Total, spent
from uft.comparison.identity import decides, of_evaluation
from uft.comparison.recipe import Arm, Comparison
from uft.comparison.runs import Measuring, Run, Shelf, check_data, endless
from uft.evaluation.forgetting import SampleForgetting
from uft.evaluation.report import Report
from uft.recipe import RecipeError

OF_CHANGES = ("nll_change", "worse", *SampleForgetting._fields)  # what only a comparison with an earlier model has

Runs = dict[str, dict[int, dict[str, Any]]]
"""arm -> seed -> the record of its run; with `diverged` or `not_run`, the reason, where it has no end"""


@dataclass
class Prepared:
    """A comparison whose data have been read, and found to be what its arms can use."""

    plan: Comparison
    shelf: Shelf
    measuring: Measuring

    @classmethod
    def of(cls, plan: Comparison, arms: tuple[Arm, ...] | None = None) -> Prepared:
        """`arms` are those whose data are checked, by default all.  Raises RecipeError, `DataError` and `BadRow`."""
        first = plan.arms[0].plan
        tokenizer = AutoTokenizer.from_pretrained(first.tokenizer, trust_remote_code=first.args.trust_remote_code)
        shelf = Shelf(tokenizer)
        for arm in plan.arms if arms is None else arms:
            check_data(arm, shelf)
        return cls(plan, shelf, Measuring.of(plan.measure, tokenizer))

    def base(self) -> Report:
        """The base model's evaluation.  Raises RecipeError for an outcome that it does not have."""
        plan, first = self.plan, self.plan.arms[0]
        values = {key: first.values.get(key) for key in ("model", "tokenizer", "dtype", "attn_implementation")}
        facts = decides(values, measured=plan.measured, measured_on=of_evaluation(self.measuring.data))
        report = self.measuring.of_base(first.plan, plan.output_dir / "base", facts)
        known = [*report.metrics, *(f"{section}/{name}" for section in report.samples for name in OF_CHANGES)]
        for key, name in (("kept", plan.kept), ("gained", plan.gained)):
            if name and name not in known:
                section = name.partition("/")[0]
                there = [each for each in report.metrics if each.startswith(f"{section}/")]
                raise RecipeError(f"{key} is {name!r}, which is not measured; want one of {', '.join(there)}")
        return report

    def run(self, arm: Arm, seed: int, total: Total | None) -> Run:
        plan = self.plan
        return Run(
            arm, seed, plan.output_dir / arm.name / f"seed{seed}", total, self.shelf, self.measuring, plan.measured,
            plan.save_models,
        )  # fmt: skip


def total_for(plan: Comparison, arm: Arm, decided: Mapping[str, Any] | None) -> Total | None:
    """What an arm may spend on a seed.

    decided   the record of the deciding arm's run on that seed, where there is such an arm
    """
    if arm.total is not None:
        return arm.total
    if plan.decider is None:
        return plan.total
    if arm.name == plan.decider or decided is None or endless(decided):
        return None
    return Total(plan.unit, sum(spent(plan.unit, stage) for stage in decided["stages"]))


def _without_budget(plan: Comparison, arm: Arm, decided: Mapping[str, Any] | None) -> str | None:
    """Why an arm cannot be run on a seed: its budget is the cost of a run that has none."""
    if arm.total is not None or arm.name == plan.decider or decided is None or not endless(decided):
        return None
    return f"{plan.decider}, whose cost is the budget, diverged on this seed"


def run(prepared: Prepared) -> Runs:
    """All runs, those that are finished read back.  One that diverges is kept as such, and the others go on."""
    plan, found = prepared.plan, {arm.name: {} for arm in prepared.plan.arms}
    total, done, start = len(plan.arms) * len(plan.seeds), 0, time.monotonic()

    def told(arm: Arm, seed: int, record: dict[str, Any], again: bool) -> None:
        nonlocal done
        done += 1
        found[arm.name][seed] = record
        line = endless(record) or ", ".join(
            f"{name} {record['stages'][-1]['measures'].get(name)}" for name in plan.outcomes
        )
        how = "found finished" if again else f"{(time.monotonic() - start) / 60:.1f} min"
        there = prepared.run(arm, seed, None)
        if again and plan.save_models and not endless(record) and not there.keeps_model:
            how += f" without its model (save_models was false); to have it, remove {there.folder} and run again"
        print(f"run {done} of {total}: {arm.name}, seed {seed}; {line}; {how}", flush=True)

    # the deciding arm on every seed before the others, whose budgets it sets
    for group in ([a for a in plan.order if a.name == plan.decider], [a for a in plan.order if a.name != plan.decider]):
        jobs = [
            (arm, seed, total_for(plan, arm, found.get(plan.decider, {}).get(seed)))
            for arm in group
            for seed in plan.seeds
        ]
        left = []
        for arm, seed, budget in jobs:
            if budget is None and (gone := _without_budget(plan, arm, found.get(plan.decider, {}).get(seed))):
                told(arm, seed, {"arm": arm.name, "seed": seed, "stages": [], "not_run": gone}, False)
                continue
            record = prepared.run(arm, seed, budget).finished()
            if record is not None:
                told(arm, seed, record, True)
            elif plan.workers == 1:
                told(arm, seed, prepared.run(arm, seed, budget).record_or_divergence(), False)
            else:
                left.append((arm, seed, budget))
        if left:
            with ProcessPoolExecutor(
                plan.workers, mp_context=get_context("spawn"), initializer=_share_cores, initargs=(plan.workers,)
            ) as pool:
                futures = [pool.submit(_in_worker, dict(plan.values), a.name, s, budget) for a, s, budget in left]
                try:
                    for (arm, seed, _), future in zip(left, futures):
                        told(arm, seed, future.result(), False)
                except BaseException:
                    pool.shutdown(wait=False, cancel_futures=True)
                    raise
    return {arm.name: dict(sorted(found[arm.name].items())) for arm in plan.arms}


def _share_cores(workers: int) -> None:
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // workers))


def _in_worker(values: Mapping[str, Any], arm: str, seed: int, total: Total | None) -> dict[str, Any]:
    import_all(values.get("import"))  # losses are registered in each process
    plan = Comparison.of(values)
    prepared = Prepared.of(plan, (plan.arm(arm),))
    prepared.base()
    return prepared.run(plan.arm(arm), seed, total).record_or_divergence()
