"""The rows of the summary: a quantity of each group of runs, how it is written, and whether more of it is better."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from uft.comparison.statistics import Interval
from uft.reporting.groups import Group, facts, shown
from uft.reporting.runs import KINDS, Run, is_number

EQUAL = 0.02  # share by which compute may differ and still count as equal
LESS = re.compile(r"(^|[/_ ])(nll|nll_change|loss.*|F|F_true|worse|ece|brier|false_refusal.*|perplexity)$")
MORE = re.compile(r"(^|[/_ ])(accurac\w+|accuracy.*|BT|BT_true|win_rate|correct|pass@\d+|f1|safe)$")
UNITS = ((1e18, "EFLOPs"), (1e15, "PFLOPs"), (1e12, "TFLOPs"), (1e9, "GFLOPs"), (1e6, "MFLOPs"), (1.0, "FLOPs"))


def better(name: str) -> int:
    """1 where more is better, -1 where less is, 0 where neither can be said (rewards, lengths, divergences)."""
    return -1 if LESS.search(name) else 1 if MORE.search(name) else 0


@dataclass(frozen=True)
class Row:
    """cells: text of each group; best: the positions that are marked."""

    label: str
    cells: tuple[str, ...]
    best: frozenset[int] = frozenset()


def number(value: float | None) -> str:
    """Four digits; more of a whole number."""
    if value is None or not np.isfinite(value):
        return "–"
    if float(value).is_integer() and abs(value) < 1e15 and (isinstance(value, int) or abs(value) >= 1e4):
        return f"{int(value):,}"
    if value and not 1e-3 <= abs(value) < 1e6:
        return f"{value:.2e}"
    return f"{value:.4f}" if abs(value) < 10 else f"{value:,.2f}" if abs(value) < 1e4 else f"{value:,.0f}"


def whole(value: float | None) -> str:
    return "–" if value is None else f"{value:,.0f}"


def flops(value: float | None) -> str:
    if not value:
        return "–"
    size, unit = next((each for each in UNITS if value >= each[0]), UNITS[-1])
    return f"{value / size:.3g} {unit}"


def seconds(value: float | None) -> str:
    if value is None:
        return "–"
    if value < 60:
        return f"{value:.2g} s" if value < 1 else f"{value:.1f} s"
    minutes, rest = divmod(round(value), 60)
    return f"{minutes} min {rest:02d} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"


def memory(value: float | None) -> str:
    if value is None:
        return "–"
    return f"{value / 2**30:.2f} GiB" if value >= 2**30 else f"{value / 2**20:.0f} MiB"


def spread(found: Interval | None, write: Callable[[float], str] = number) -> str:
    """A mean with half its 95 % interval; of one run the value."""
    if found is None:
        return "–"
    if found.n < 2 or not np.isfinite(found.low):
        return write(found.mean)
    mean, half = write(found.mean), write((found.high - found.low) / 2)
    if half in ("–", write(0.0)):
        return mean
    unit = half.rpartition(" ")[2]
    return f"{mean.removesuffix(f' {unit}')} ± {half}"


def measured(
    label: str, groups: Sequence[Group], of: Callable[[Run], float | None], *,
    write: Callable[[float], str] = number, sign: int = 0, within: float = 0.0,
    said: Callable[[Group], str] = lambda group: "",
) -> Row | None:  # fmt: skip
    """A row of means; None where no run has the quantity.  The best are marked where they are not all the same.

    within   share of the best by which another may be off and still count as equal to it
    said     what is written behind a value
    """
    means = [group.mean(of) for group in groups]
    if not any(means):
        return None
    texts = [spread(mean, write) for mean in means]
    known = {i: sign * mean.mean for i, mean in enumerate(means) if mean is not None and np.isfinite(mean.mean)}
    best: frozenset[int] = frozenset()
    if sign and len(known) > 1:
        top = max(known.values())
        winner = next(texts[i] for i in known if known[i] == top)
        alike = {i for i in known if texts[i] == winner or top - known[i] <= within * abs(top)}
        best = frozenset(alike) if len(alike) < len(known) else best
    cells = (text if mean is None else text + said(group) for text, mean, group in zip(texts, means, groups))
    return Row(label, tuple(cells), best)


def worded(label: str, groups: Sequence[Group], of: Callable[[Run], str]) -> Row | None:
    """A row of words, each once per group."""
    cells = tuple(", ".join(dict.fromkeys(word for run in group.runs if (word := of(run)))) for group in groups)
    return Row(label, tuple(cell or "–" for cell in cells)) if any(cells) else None


# ---- the summary ----


def summary(groups: Sequence[Group]) -> list[Row]:
    """What was trained on what, what it cost, and where it ended."""
    rows = [
        worded("kind", groups, lambda run: KINDS[run.kind])
        if len({r.kind for g in groups for r in g.runs}) > 1
        else None,
        worded("objective", groups, objective_of),
        worded("model", groups, model_of),
        worded("data (rows)", groups, data_of),
        worded("seeds", groups, lambda run: "" if run.seed is None else str(run.seed)),
        worded("state", groups, state_of),
        *_costs(groups),
        *_ends(groups),
        *_measures(groups),
    ]
    return [row for row in rows if row is not None]


def objective_of(run: Run) -> str:
    said = [_objective(stage.record) or str(stage.begun.get("objective") or "") for stage in run.stages]
    return " → ".join(word or stage.name or "?" for word, stage in zip(said, run.stages)) if any(said) else ""


def _objective(record: Mapping[str, Any]) -> str:
    if "objective" not in record:
        return str(record.get("config", {}).get("advantage", ""))
    name, terms = record["objective"].get("name"), record["objective"].get("terms") or []
    parts = [_term(term) for term in terms]
    return f"{name} ({' + '.join(parts)})" if parts and parts != [name] else str(name or "")


def _term(term: Mapping[str, Any]) -> str:
    weight = term.get("weight", 1)
    times = "" if weight in (1, 1.0) else f"{shown(weight)} · "
    beta = f", β {shown(term['beta'])}" if "beta" in term else ""
    return f"{times}{term.get('name')}: {term.get('loss', term.get('type', ''))}{beta}"


def model_of(run: Run) -> str:
    found = next((s.record["model"] for s in run.stages if s.record.get("model")), None)
    if found is None:
        return str((run.evaluation or {}).get("info", {}).get("model", "")) if not run.stages else ""
    trained, of = found.get("trained_parameters"), found.get("parameters")
    weights = f" ({whole(of)} weights" + (f", {whole(trained)} of them trained" if trained != of else "") + ")"
    return f"{found.get('base') or found.get('architecture') or 'model'}{weights if of else ''}"


def data_of(run: Run) -> str:
    sizes: dict[str, int] = {}
    for stage in run.stages:
        sizes |= stage.record.get("data", {}).get("train", {}).get("sizes", {})
        sizes |= {"prompts": stage.record["prompts"]} if is_number(stage.record.get("prompts")) else {}
    return ", ".join(f"{name} ({whole(size)})" for name, size in sizes.items())


def state_of(run: Run) -> str:
    if run.kind == "evaluation" or not run.stages:
        return ""
    if run.going:
        at = next(stage for stage in run.stages if not stage.finished)
        where = f"stage {at.name}, " if at.name else ""
        return f"not finished: {where}step {whole(at.steps)}" + (f" of {whole(at.planned)}" if at.planned else "")
    if run.short:
        planned = sum(stage.planned or stage.steps for stage in run.stages)
        return f"stopped at step {whole(run.steps)} of {whole(planned)}"
    return "finished"


def of_compute(name: str) -> Callable[[Run], float | None]:
    return lambda run: run.compute.get(name)


def _costs(groups: Sequence[Group]) -> list[Row | None]:
    sign = -1 if one_machine(groups) else 0
    drawn = dict.fromkeys(n for g in groups for r in g.runs for n in r.compute if n.startswith("examples/"))
    return [
        measured("optimiser steps", groups, lambda run: run.steps or None, write=whole),
        measured("tokens", groups, of_compute("tokens"), write=whole),
        *(measured(f"drawn: {n.partition('/')[2]}", groups, of_compute(n), write=whole) for n in drawn),
        measured("FLOPs (reference passes included)", groups, of_compute("flops"), write=flops),
        measured("reference forwards", groups, of_compute("reference_forwards"), write=whole),
        measured("time", groups, of_compute("seconds"), write=seconds, sign=sign * equal_flops(groups), within=EQUAL),
        measured("peak memory", groups, of_compute("peak_memory_bytes"), write=memory, sign=sign, within=EQUAL),
    ]  # fmt: skip


def equal_flops(groups: Sequence[Group], within: float = EQUAL) -> bool:
    means = [mean.mean for group in groups if (mean := group.mean(of_compute("flops"))) is not None]
    return len(means) == len(groups) and min(means) > 0 and max(means) <= (1 + within) * min(means)


def one_machine(groups: Sequence[Group]) -> bool:
    return len({json.dumps(run.about("hardware"), sort_keys=True) for g in groups for run in g.runs}) == 1


def _ends(groups: Sequence[Group]) -> list[Row | None]:
    """The last value of each loss, in training and in evaluation, and of the rewards."""
    names = list(dict.fromkeys(n for g in groups for r in g.runs for n in r.logged))
    wanted = [n for n in names if re.fullmatch(r"loss(/.+)?|rewards/(accuracies|margins)|reward|kl_sequence", n)]
    wanted.sort(key=lambda n: (not n.startswith("loss"), n))
    rows = [measured(f"train: {n}", groups, lambda run, n=n: run.ending(n), said=_stage_said(n)) for n in wanted]
    held_out = [n for n in names if re.fullmatch(r"eval_(loss(/.+)?|rewards/(accuracies|margins))", n)]
    held_out.sort(key=lambda n: (not n.startswith("eval_loss"), n))
    for name in held_out:
        sign = better(name) if comparable(groups, name.removeprefix("eval_")) else 0
        label, of = f"eval: {name.removeprefix('eval_')}", lambda run, n=name: run.last(n)
        rows.append(measured(label, groups, of, sign=sign, said=_stage_said(name)))
    return rows


def _stage_said(name: str) -> Callable[[Group], str]:
    """After which stage a value was logged last, where that is not the last stage: later ones may have changed it."""

    def said(group: Group) -> str:
        run = group.runs[0]
        stage = run.stage_of(name)
        return "" if stage is None or stage is run.stages[-1] else f" after {stage.name}"

    return said


def comparable(groups: Sequence[Group], name: str) -> bool:
    """Whether a value of evaluation means the same in all groups that have it: of the same data, by the same terms.

    A loss of several terms with weights is that of its objective.
    """
    said = set()
    for group in groups:
        for run in group.runs:
            stage = run.stage_of(f"eval_{name}")
            if stage is None:
                continue
            if stage is not run.stages[-1]:  # what a later stage made of it is not known
                return False
            terms = [t for t in stage.terms if name in ("loss", f"loss/{t.get('name')}") or name.startswith("rewards/")]
            kept = [{k: v for k, v in t.items() if k != "weight" or name == "loss"} for t in terms]
            of = stage.record.get("data", {}).get("eval", {}).get("fingerprint")
            # rewards of a later stage are relative to what the stage before left
            base = stage.name if any("beta" in t for t in terms) and stage is not run.stages[0] else ""
            said.add(json.dumps([kept, of, base], sort_keys=True, default=str))
    return len(said) == 1


# ---- evaluation.json ----


def evaluated(name: str) -> Callable[[Run], float | None]:
    def of(run: Run) -> float | None:
        value = (run.evaluation or {}).get("metrics", {}).get(name)
        return value if is_number(value) else None

    return of


def measures_of(groups: Sequence[Group]) -> list[str]:
    found = (name for g in groups for r in g.runs for name in (r.evaluation or {}).get("metrics", {}))
    return list(dict.fromkeys(found))


def same_samples(groups: Sequence[Group]) -> bool:
    """Whether all evaluations are of the same samples, by section and id."""
    said = {
        json.dumps({s: columns.get("id") for s, columns in r.evaluation.get("samples", {}).items()}, sort_keys=True)
        for g in groups for r in g.runs if r.evaluation
    }  # fmt: skip
    return len(said) <= 1


def _measures(groups: Sequence[Group]) -> list[Row | None]:
    """Of an evaluation the few that say what was lost and kept; all of them stand in a section of their own."""
    pattern = re.compile(r".*(/F_true|/BT_true|/nll_change|/nll|/accuracy|/correct|/win_rate)$")
    signed = same_samples(groups)
    names = [name for name in measures_of(groups) if pattern.match(name)][:14]
    return [measured(f"measured: {n}", groups, evaluated(n), sign=better(n) if signed else 0) for n in names]


def every_fact(groups: Sequence[Group]) -> dict[str, dict[str, Any]]:
    return {run.name: facts(run) for group in groups for run in group.runs}
