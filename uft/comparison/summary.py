"""The numbers of a comparison, from the records of its runs alone: means, contrasts, what can be concluded."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from uft.comparison.compare import Runs
from uft.comparison.recipe import Comparison
from uft.comparison.runs import measure_of
from uft.comparison.statistics import Interval, holm, interval, paired_difference, sign_flip
from uft.comparison.tables import less_is_better
from uft.record import environment

LEVEL = 0.05
COMPUTE = ("flops", "tokens", "policy_forwards", "backwards", "reference_forwards", "seconds")


def summary_of(plan: Comparison, base: Mapping[str, float], runs: Runs) -> dict[str, Any]:
    """What summary.json holds."""
    contrasts = contrasts_of(plan, runs)
    return {
        "model": plan.arms[0].plan.model,
        "seeds": list(plan.seeds),
        "budget": {"unit": plan.unit, "decider": plan.decider, "total": plan.total and plan.total.amount},
        "kept": plan.kept,
        "gained": plan.gained,
        "base": dict(base),
        "arms": {arm.name: arm_of(runs[arm.name], of_decider(plan, runs)) for arm in plan.arms},
        "contrasts": contrasts,
        "conclusions": conclusions(contrasts, len(plan.seeds)),
        "recipe": dict(plan.values),
        **environment(),
    }


def of_decider(plan: Comparison, runs: Runs) -> Mapping[int, Mapping[str, Any]] | None:
    return runs[plan.decider] if plan.decider else None


def arm_of(records: Mapping[int, Mapping[str, Any]], decided: Mapping[int, Mapping[str, Any]] | None) -> dict[str, Any]:
    """One arm: measures after each stage by seed, and their means; what it cost, in all and by stage.

    decided   the deciding arm's records by seed; with them the cost relative to it
    """
    first = next(iter(records.values()))
    stages = []
    for k, stage in enumerate(first["stages"]):
        names = [n for n in stage["measures"] if all(n in r["stages"][k]["measures"] for r in records.values())]
        by_seed = {name: {seed: measure_of(r, name, k) for seed, r in records.items()} for name in names}
        stages.append(
            {
                "name": stage["stage"],
                "objective": stage["objective"]["name"],
                "measures": {n: _mean(each) | {"by_seed": each} for n, each in by_seed.items()},
                "compute": _compute([r["stages"][k] for r in records.values()]),
            }
        )
    found = {"stages": stages, "compute": _compute([_added(r["stages"]) for r in records.values()])}
    if decided is not None:
        ratios = {s: flops_of(r) / flops_of(decided[s]) for s, r in records.items() if flops_of(decided[s])}
        found["flops_relative_to_the_deciding_arm"] = ratios
    return found


def flops_of(record: Mapping[str, Any]) -> float:
    return sum(stage["compute"].get("flops", 0) for stage in record["stages"])


def _added(stages: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The stages of a run as if they were one."""
    names = {name for stage in stages for name in stage["compute"]}
    added = {n: sum(stage["compute"].get(n, 0) for stage in stages) for n in names - {"peak_memory_bytes"}}
    peak = max(stage["compute"].get("peak_memory_bytes", 0) for stage in stages)
    return {"steps": sum(stage["steps"] for stage in stages), "compute": added | {"peak_memory_bytes": peak}}


def _compute(records: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Means over runs, and the highest peak of memory."""
    n = len(records)
    names = [*COMPUTE, *sorted({k for r in records for k in r["compute"] if k.startswith("examples/")})]
    found = {name: sum(r["compute"].get(name, 0) for r in records) / n for name in names}
    peak = max(r["compute"].get("peak_memory_bytes", 0) for r in records)
    return {"steps": sum(r["steps"] for r in records) / n, **found, "peak_memory_bytes": peak}


def _mean(by_seed: Mapping[int, float]) -> dict[str, float]:
    return interval(list(by_seed.values()))._asdict()


def interval_of(found: Mapping[str, Any]) -> Interval:
    """What `_asdict` of an interval, perhaps read from JSON, stands for."""
    return Interval(*(math.nan if found[key] is None else found[key] for key in ("mean", "low", "high")), found["n"])


# ---- contrasts ----


def contrasts_of(plan: Comparison, runs: Runs) -> list[dict[str, Any]]:
    """a − b in every outcome, paired by seed; p-values of all of them together after Holm."""
    found = []
    for a, b in plan.contrasts:
        for metric in plan.outcomes:
            ours, theirs = ({s: measure_of(r, metric) for s, r in runs[name].items()} for name in (a, b))
            differences = {seed: ours[seed] - theirs[seed] for seed in sorted(set(ours) & set(theirs))}
            known = all(map(math.isfinite, differences.values()))
            found.append(
                {
                    "a": a,
                    "b": b,
                    "metric": metric,
                    **paired_difference(ours, theirs)._asdict(),
                    "p": sign_flip(list(differences.values())) if known else math.nan,
                    "by_seed": differences,
                }
            )
    adjusted = holm({str(k): each["p"] for k, each in enumerate(found) if math.isfinite(each["p"])})
    for k, each in enumerate(found):
        each["p_holm"] = adjusted.get(str(k), math.nan)
    return found


def seeds_needed(tests: int) -> int:
    """The fewest seeds with which the smallest p of a sign-flip test, 2^(1 - n), reaches LEVEL after Holm."""
    return math.ceil(1 + math.log2(tests / LEVEL))


def conclusions(contrasts: Sequence[Mapping[str, Any]], seeds: int) -> list[str]:
    """What can be concluded and what cannot, a sentence each."""
    tests, said = len(contrasts), []
    wanted = seeds_needed(tests)
    if seeds < wanted:
        smallest = min(1.0, 2.0 ** (1 - seeds))
        said.append(
            f"Nothing can be concluded from tests: with {seeds} seed{'s' if seeds > 1 else ''} the smallest p that an "
            f"exact sign-flip test can have is {smallest:.3g}"
            + (f", before Holm's correction for {tests} tests" if tests > 1 else "")
            + f"; {wanted} seeds are the fewest that can reach {LEVEL:g}."
        )
    for each in contrasts:
        a, b, metric, found = each["a"], each["b"], each["metric"], interval_of(each)
        if not math.isfinite(found.mean):
            said.append(f"{metric}: {a} and {b} have no number on every seed.")
            continue
        if not any(each["by_seed"].values()):
            said.append(f"{metric}: {a} and {b} are the same on every seed.")
            continue
        better = (found.mean < 0) == less_is_better(metric)
        word, size = "better" if better else "worse", f"{abs(found.mean):.3g}"
        if each["p_holm"] <= LEVEL:
            said.append(
                f"{metric}: {a} is {word} than {b} by {abs(found.mean):.3g} (p = {each['p_holm']:.2g} after Holm)."
            )
        elif found.n < 2:
            said.append(
                f"{metric}: {a} and {b} differ by {found.mean:+.3g} on the one seed; how much seeds differ is unknown."
            )
        elif found.low > 0 or found.high < 0:
            said.append(
                f"{metric}: {a} is {word} than {b} by {size} on average and the 95 % interval leaves out 0, "
                f"but a test does not confirm it (p = {each['p_holm']:.2g} after Holm)."
            )
        else:
            said.append(
                f"{metric}: {a} and {b} cannot be told apart; differences from {found.low:+.3g} to {found.high:+.3g} "
                "fit these runs."
            )
    return said
