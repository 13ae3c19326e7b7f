"""Runs that differ in nothing but the seed, taken together; and what differs between one group and another."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from uft.comparison.statistics import Interval, interval
from uft.reporting.runs import Run, Stage

# fields of a configuration that say where a run writes, not what it does
WHERE = {"output_dir", "logging_dir", "run_name", "hub_token", "hub_model_id", "resume_from_checkpoint", "local_rank",
         "reference_cache", "data_cache", "disable_tqdm"}  # fmt: skip
SEEDS = {"seed", "data_seed"}
SEED_FOLDER = re.compile(r"seed[-_]?\d+")


@dataclass(frozen=True)
class Group:
    """Runs that differ only in seed, often one; `name` is what its runs have in common of theirs."""

    name: str
    runs: tuple[Run, ...]

    def values(self, of: Callable[[Run], float | None]) -> list[float]:
        return [value for run in self.runs if (value := of(run)) is not None]

    def mean(self, of: Callable[[Run], float | None]) -> Interval | None:
        """Over the runs that have it; None where none has."""
        values = self.values(of)
        return interval(values) if values else None

    def has(self, name: str) -> bool:
        return any(name in run.logged for run in self.runs)


def grouped(runs: Sequence[Run]) -> list[Group]:
    """In the order of the runs.  A seed that was run twice is in no group, nor is what is unfinished."""
    by_key: dict[str, list[Run]] = {}
    for run in runs:
        by_key.setdefault(_key(run), []).append(run)
    groups = []
    for same in by_key.values():
        seeds = [run.seed for run in same]
        together = len(same) > 1 and None not in seeds and len(set(seeds)) == len(seeds)
        if together:
            same = sorted(same, key=lambda run: run.seed)
            groups.append(Group(_common_name(same), tuple(same)))
        else:
            groups += [Group(run.name, (run,)) for run in same]
    order = {id(run): i for i, run in enumerate(runs)}
    groups.sort(key=lambda group: min(order[id(run)] for run in group.runs))
    return groups


def _key(run: Run) -> str:
    """The same for runs that differ only in seed.  Where data are drawn by the seed, folders seed0, seed1, ... of one
    parent say so."""
    if not run.stages or run.going or run.short:
        return str(run.folder)
    of_seed = SEED_FOLDER.fullmatch(run.folder.name) is not None
    parent = str(run.folder.resolve().parent) if of_seed else ""
    parts = [
        [stage.name, stage.record.get("objective"), stage.record.get("reference"), stage.steps,
         _sizes(stage) if of_seed else stage.record.get("data"), settings(stage, seeds=False)]
        for stage in run.stages
    ]  # fmt: skip
    return json.dumps([run.kind, parent, parts], sort_keys=True, default=str)


def _sizes(stage: Stage) -> Any:
    return {split: sorted(part.get("sizes", {})) for split, part in stage.record.get("data", {}).items()}


def settings(stage: Stage, *, seeds: bool = True) -> dict[str, Any]:
    """A stage's configuration without where it writes."""
    left_out = WHERE if seeds else WHERE | SEEDS
    return {name: value for name, value in stage.record.get("config", {}).items() if name not in left_out}


def _common_name(runs: Sequence[Run]) -> str:
    """unified of unified/seed0 and unified/seed1, or of unified-seed0 and unified-seed1."""
    names = {re.sub(r"[/_\-. ]*seed[-_]?\d+", "", run.name) for run in runs}
    if len(names) > 1:
        return f"{runs[0].name} and {len(runs) - 1} more"
    return names.pop() or runs[0].folder.resolve().parent.name


# ---- what differs ----


def facts(run: Run) -> dict[str, Any]:
    """Everything that may differ between runs, flat.  Of a run with stages, a value that stages do not share is given
    for each."""
    each = [(stage.name, _facts(stage)) for stage in run.stages]
    names = list(dict.fromkeys(name for _, found in each for name in found))
    joined: dict[str, Any] = {}
    for name in names:
        values = {stage: found[name] for stage, found in each if name in found}
        alike = len({json.dumps(v, sort_keys=True, default=str) for v in values.values()}) == 1
        if alike and (len(values) == len(each) or not name.startswith("config.")):
            joined[name] = next(iter(values.values()))
        else:
            joined[name] = "; ".join(f"{stage}: {shown(value)}" for stage, value in values.items())
    if run.staged:
        joined = {"stages": " → ".join(stage.name for stage in run.stages), **joined}
    for key in ("commit", "python", "versions", "hardware"):
        value = run.about(key)
        joined |= _flat(value, key) if isinstance(value, Mapping) else {key: value} if value is not None else {}
    return joined


def _facts(stage: Stage) -> dict[str, Any]:
    record = stage.record
    objective = record.get("objective") or {}
    found: dict[str, Any] = {"objective": objective["name"]} if "name" in objective else {}
    for term in stage.terms:
        found |= {f"term {term.get('name')}: {key}": v for key, v in term.items() if key != "name"}
    found |= {"balance": objective["balance"]} if objective.get("balance") else {}
    found |= {key: record[key] for key in ("reference", "prompts") if record.get(key) is not None}
    for split, part in record.get("data", {}).items():
        found |= {f"{split} data: {name} rows": size for name, size in part.get("sizes", {}).items()}
        if part.get("fingerprint"):
            found[f"{split} data: fingerprint"] = part["fingerprint"][:12]
    found |= _flat(record.get("model") or {}, "model")
    config = settings(stage)
    found["seed"] = config.pop("seed", record.get("seed"))
    return found | _flat(config, "config")


def _flat(value: Mapping[str, Any], prefix: str) -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, inner in value.items():
        name = f"{prefix}.{key}"
        flat |= _flat(inner, name) if isinstance(inner, Mapping) else {name: inner}
    return flat


def shown(value: Any) -> str:
    """A setting as text: 0.001 and not 1.000e-03, lists without brackets, – for what is not set."""
    if value is None or value == "None":
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.6g}"
    if isinstance(value, int):
        return f"{value:,}" if abs(value) >= 10_000 else str(value)
    if isinstance(value, (list, tuple)):
        return ", ".join(map(shown, value)) or "–"
    return str(value)


def of_group(group: Group, key: str, known: Mapping[str, Mapping[str, Any]]) -> str:
    """A fact of all its runs, or each of theirs.  known: name of a run -> its facts."""
    values = [shown(known[run.name].get(key)) for run in group.runs]
    return values[0] if len(set(values)) == 1 else ", ".join(values)


def differing(groups: Sequence[Group], known: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """The facts that are not the same in all groups."""
    names = sorted(dict.fromkeys(name for found in known.values() for name in found), key=lambda n: n != "stages")
    return [name for name in names if len({of_group(group, name, known) for group in groups}) > 1]
