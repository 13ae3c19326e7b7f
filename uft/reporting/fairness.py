"""What a reader should know before comparing runs: one sentence for each thing that is not equal."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from uft.reporting.groups import Group
from uft.reporting.runs import Run
from uft.reporting.values import EQUAL, flops, of_compute, same_samples, state_of, whole


def warnings(groups: Sequence[Group]) -> list[str]:
    """Of unfinished runs always; the others where there are at least two groups of trained runs."""
    found = [*_unfinished(groups), *_guarded(groups)]
    trained = [group for group in groups if any(run.stages for run in group.runs)]
    if len(trained) > 1:
        found += [*_data(trained), *_compute(trained), *_code(trained), *_seeds(trained), *_hardware(trained)]
    measured = [group for group in groups if any(run.evaluation for run in group.runs)]
    if len(measured) > 1 and not same_samples(groups):
        found.append("**Different evaluation samples**: what `uft eval` measured is not of the same rows in all runs.")
    return found


def _unfinished(groups: Sequence[Group]) -> list[str]:
    runs = [run for group in groups for run in group.runs]
    going = [run for run in runs if run.going]
    short = [run for run in runs if run.short]
    found = []
    if going:
        found.append(
            f"**Not finished**: {_listed([f'{_name(r.name)} ({state_of(r)})' for r in going])}. Numbers are as far as "
            "they were logged."
        )
    if short:
        said = _listed([f"{_name(r.name)} ({state_of(r)})" for r in short])
        found.append(f"**Fewer steps than planned**: {said}; the learning rate's schedule did not reach its end.")
    return found


def _guarded(groups: Sequence[Group]) -> list[str]:
    stopped = [(run, run.guard["stopped"]) for g in groups for run in g.runs if run.guard and run.guard.get("stopped")]
    return [f"**Stopped by its guard**: {_name(run.name)} ({why})." for run, why in stopped]


def _data(groups: Sequence[Group]) -> list[str]:
    sizes = _by(groups, lambda run: ", ".join(f"{name} ({whole(n)})" for name, n in sorted(_sizes(run).items())))
    if len(sizes) > 1:
        return [f"**Different data**: {_each(sizes)}."]
    whole_sets = _by([g for g in groups if not _split(g)], _fingerprint)
    if len(whole_sets) > 1:
        return [
            f"**Different data**: of the same names and sizes, but other rows, tokens or targets: {_each(whole_sets)}."
        ]
    parts, joint = [g for g in groups if _split(g)], [g for g in groups if not _split(g)]
    if parts and joint:
        return [
            "**Same data by name and size only**: runs with stages fingerprint each stage's share, so that their "
            "records cannot tell whether the rows are the same."
        ]
    stages = _by(parts, _fingerprint)
    return [f"**Different data**: same names and sizes, other contents or shares of stages: {_each(stages)}."] * (
        len(stages) > 1
    )


def _split(group: Group) -> bool:
    """Whether stages train on different parts."""
    return any(len({tuple(sorted(_train(stage).get("sizes", {}))) for stage in run.stages}) > 1 for run in group.runs)


def _train(stage) -> dict:
    return stage.record.get("data", {}).get("train", {})


def _sizes(run: Run) -> dict[str, int]:
    return {name: size for stage in run.stages for name, size in _train(stage).get("sizes", {}).items()}


def _fingerprint(run: Run) -> str:
    prints = dict.fromkeys(
        _train(stage)["fingerprint"][:12] for stage in run.stages if _train(stage).get("fingerprint")
    )
    return " → ".join(prints)


def _compute(groups: Sequence[Group]) -> list[str]:
    known = {g.name: m.mean for g in groups if (m := g.mean(of_compute("flops"))) is not None and m.mean > 0}
    if len(known) < 2:
        return []
    low, high = min(known, key=known.get), max(known, key=known.get)
    if known[high] <= (1 + EQUAL) * known[low]:
        return []
    excess = known[high] / known[low] - 1
    more = f"{100 * excess:.0f} % more than" if excess < 1 else f"{1 + excess:.1f} times as much as"
    return [
        f"**Different compute**: {_name(high)} spent {flops(known[high])}, {more} {_name(low)} "
        f"({flops(known[low])}); up to {100 * EQUAL:.0f} % count as equal."
    ]


def _code(groups: Sequence[Group]) -> list[str]:
    commits = _by(groups, lambda run: str(run.about("commit") or ""))
    found = [f"**Different code**: {_each(commits)}."] if len(commits) > 1 else []
    changed = [commit for commit in commits if commit.endswith("+")]
    if changed and len(commits) == 1:
        found.append(
            f"**Uncommitted changes**: all ran at commit {changed[0]}, a working tree with changes of its own, which "
            "may not have been the same in each."
        )
    return found


def _seeds(groups: Sequence[Group]) -> list[str]:
    single = [group.name for group in groups if len(group.runs) == 1]
    if not single:
        return []
    if len(single) == len(groups):
        return ["**A single seed each**: differences between runs may be chance; three seeds give an interval."]
    return [f"**A single seed**: {_listed(list(map(_name, single)))}, so that there is no interval."]


def _hardware(groups: Sequence[Group]) -> list[str]:
    def machine(run: Run) -> str:
        found = run.about("hardware") or {}
        of = ", ".join(map(str, found["gpu"])) if found.get("gpu") else str(found.get("cpu", ""))
        return f"{of}, {found['threads']} threads" if found.get("threads") and not found.get("gpu") else of

    machines = _by(groups, machine)
    return [f"**Different hardware**: {_each(machines)}; times and memory cannot be compared."] * (len(machines) > 1)


def _by(groups: Sequence[Group], of: Callable[[Run], str]) -> dict[str, list[str]]:
    """What the groups have -> which have it; a group whose runs differ counts with all that they have."""
    found: dict[str, list[str]] = {}
    for group in groups:
        said = ", ".join(sorted({value for run in group.runs if (value := of(run))}))
        if said:
            found.setdefault(said, []).append(group.name)
    return found


def _each(found: dict[str, list[str]]) -> str:
    """What each has; of the most common value it is said once."""
    lines = [f"{_listed(list(map(_name, names)))}: {value}" for value, names in found.items()]
    return "; ".join(lines)


def _name(name: str) -> str:
    return f"`{name}`"


def _listed(names: Sequence[str], at_most: int = 6) -> str:
    more = len(names) - at_most
    return ", ".join(names) if more <= 0 else f"{', '.join(names[:at_most])} and {more} more"
