"""The numbers of a comparison, from the records of its runs alone: means, contrasts, what can be concluded."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from uft.comparison.compare import Runs
from uft.comparison.recipe import Comparison
from uft.comparison.runs import endless, measure_of
from uft.comparison.statistics import Interval, holm, interval, paired_difference, sign_flip
from uft.comparison.tables import less_is_better
from uft.record import environment

LEVEL = 0.05
COMPUTE = ("flops", "tokens", "policy_forwards", "backwards", "reference_forwards", "seconds")


def summary_of(plan: Comparison, base: Mapping[str, float], runs: Runs) -> dict[str, Any]:
    """What summary.json holds."""
    contrasts = contrasts_of(plan, runs)
    gone = {name: {s: said for s, r in records.items() if (said := endless(r))} for name, records in runs.items()}
    return {
        "model": plan.arms[0].plan.model,
        "seeds": list(plan.seeds),
        "budget": {"unit": plan.unit, "decider": plan.decider, "total": plan.total and plan.total.amount},
        "kept": plan.kept,
        "gained": plan.gained,
        "base": dict(base),
        "arms": {
            arm.name: arm_of(_ended(runs[arm.name]), of_decider(plan, runs), [each.name for each in arm.stages])
            | {"without_end": gone[arm.name]}
            for arm in plan.arms
        },
        "contrasts": contrasts,
        "conclusions": conclusions(contrasts, len(plan.seeds), gone, unequal(plan)),
        "recipe": dict(plan.values),
        **environment(),
    }


def of_decider(plan: Comparison, runs: Runs) -> Mapping[int, Mapping[str, Any]] | None:
    return _ended(runs[plan.decider]) if plan.decider else None


def _ended(records: Mapping[int, Mapping[str, Any]]) -> dict[int, Mapping[str, Any]]:
    return {seed: record for seed, record in records.items() if not endless(record)}


def unequal(plan: Comparison) -> list[str]:
    """Arms with a budget of their own, where the others' are made equal."""
    if plan.unit is None:
        return []
    return [arm.name for arm in plan.arms if arm.total is not None and arm.name != plan.decider]


def arm_of(
    records: Mapping[int, Mapping[str, Any]],
    decided: Mapping[int, Mapping[str, Any]] | None,
    names_of_stages: Sequence[str],
) -> dict[str, Any]:
    """One arm: measures after each stage by seed, and their means; what it cost, in all and by stage.

    records   of the runs that came to their end
    decided   the deciding arm's; with them the cost relative to it
    """
    if not records:
        none = {"measures": {}, "compute": _compute([])}
        return {"stages": [{"name": name, **none} for name in names_of_stages], "compute": _compute([])}
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
        ratios = {s: flops_of(r) / flops_of(decided[s]) for s, r in records.items() if s in decided}
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
    """Means over runs, and the highest peak of memory; 0 where there is no run."""
    n = max(1, len(records))
    names = [*COMPUTE, *sorted({k for r in records for k in r["compute"] if k.startswith("examples/")})]
    found = {name: sum(r["compute"].get(name, 0) for r in records) / n for name in names}
    peak = max((r["compute"].get("peak_memory_bytes", 0) for r in records), default=0)
    return {"steps": sum(r["steps"] for r in records) / n, **found, "peak_memory_bytes": peak}


def _mean(by_seed: Mapping[int, float]) -> dict[str, float]:
    return interval(list(by_seed.values()))._asdict()


def interval_of(found: Mapping[str, Any]) -> Interval:
    """What `_asdict` of an interval, perhaps read from JSON, stands for."""
    return Interval(*(math.nan if found[key] is None else found[key] for key in ("mean", "low", "high")), found["n"])


# ---- contrasts ----


def contrasts_of(plan: Comparison, runs: Runs) -> list[dict[str, Any]]:
    """a − b in every outcome, paired by the seeds on which both came to their end; p-values of all of them together
    after Holm, for which one that is missing counts as 1: the test was planned."""
    found = []
    for a, b in plan.contrasts:
        for metric in plan.outcomes:
            ours, theirs = ({s: measure_of(r, metric) for s, r in _ended(runs[name]).items()} for name in (a, b))
            differences = {seed: ours[seed] - theirs[seed] for seed in sorted(set(ours) & set(theirs))}
            known = bool(differences) and all(map(math.isfinite, differences.values()))
            mean = paired_difference(ours, theirs) if differences else Interval(math.nan, math.nan, math.nan, 0)
            found.append(
                {
                    "a": a,
                    "b": b,
                    "metric": metric,
                    **mean._asdict(),
                    "p": sign_flip(list(differences.values())) if known else math.nan,
                    "by_seed": differences,
                }
            )
    adjusted = holm({str(k): each["p"] if math.isfinite(each["p"]) else 1.0 for k, each in enumerate(found)})
    for k, each in enumerate(found):
        each["p_holm"] = adjusted[str(k)]
    return found


def seeds_needed(tests: int) -> int:
    """The fewest seeds with which the smallest p of a sign-flip test, 2^(1 - n), reaches LEVEL after Holm."""
    return math.ceil(1 + math.log2(tests / LEVEL))


def conclusions(
    contrasts: Sequence[Mapping[str, Any]],
    seeds: int,
    without_end: Mapping[str, Mapping[int, str]] | None = None,
    unequal: Sequence[str] = (),
) -> list[str]:
    """What can be concluded and what cannot, a sentence each.

    without_end   by arm and seed what became of runs that did not come to their end
    unequal       arms that were not given the cost of the others
    """
    tests, said = len(contrasts), [*_gone(without_end or {}, seeds), *_apart(unequal)]
    wanted = seeds_needed(tests)
    seeds = min(seeds, max((each["n"] for each in contrasts), default=0))
    if 0 < seeds < wanted:
        smallest = min(1.0, 2.0 ** (1 - seeds))
        said.append(
            f"Nothing can be concluded from tests: with {seeds} seed{'s' if seeds > 1 else ''} the smallest p that an "
            f"exact sign-flip test can have is {smallest:.3g}"
            + (f", before Holm's correction for {tests} tests" if tests > 1 else "")
            + f"; {wanted} seeds are the fewest that can reach {LEVEL:g}."
        )
    for each in contrasts:
        a, b, metric, found = each["a"], each["b"], each["metric"], interval_of(each)
        at = "".join(f" ({name} not at equal cost)" for name in (a, b) if name in unequal)
        what = f"{metric}{at}"
        if found.n == 0:
            said.append(f"{what}: there is no seed on which both {a} and {b} came to their end.")
            continue
        if not math.isfinite(found.mean):
            said.append(f"{what}: {a} and {b} have no number on every seed.")
            continue
        if not any(each["by_seed"].values()):
            said.append(f"{what}: {a} and {b} are the same on every seed.")
            continue
        better = (found.mean < 0) == less_is_better(metric)
        word, size = "better" if better else "worse", f"{abs(found.mean):.3g}"
        if each["p_holm"] <= LEVEL:
            said.append(
                f"{what}: {a} is {word} than {b} by {abs(found.mean):.3g} (p = {each['p_holm']:.2g} after Holm)."
            )
        elif found.n < 2:
            said.append(
                f"{what}: {a} and {b} differ by {found.mean:+.3g} on the one seed; how much seeds differ is unknown."
            )
        elif found.low > 0 or found.high < 0:
            said.append(
                f"{what}: {a} is {word} than {b} by {size} on average and the 95 % interval leaves out 0, "
                f"but a test does not confirm it (p = {each['p_holm']:.2g} after Holm)."
            )
        else:
            said.append(
                f"{what}: {a} and {b} cannot be told apart; differences from {found.low:+.3g} to {found.high:+.3g} "
                "fit these runs."
            )
    return said


def _gone(without_end: Mapping[str, Mapping[int, str]], of: int) -> list[str]:
    """A sentence for each arm of which some of so many seeds are missing."""
    said = []
    for arm, found in without_end.items():
        for how, word in (("diverged", "diverged"), ("not run", "was not run")):
            seeds = [str(seed) for seed, reason in found.items() if reason.startswith(how)]
            if not seeds:
                continue
            on, them = (f"seeds {', '.join(seeds)}", "them") if len(seeds) > 1 else (f"seed {seeds[0]}", "it")
            # an arm that is left with its good seeds looks better than it is
            bias = ", which favours this arm" if how == "diverged" and len(seeds) < of else ""
            said.append(
                f"{arm} {word} on {on}: its means and contrasts have no number there and leave {them} out{bias}."
            )
    return said


def _apart(unequal: Sequence[str]) -> list[str]:
    return [f"{arm} has a budget of its own: differences from it are not at equal cost." for arm in unequal]
