"""What was logged along a run as curves, over steps, tokens or FLOPs, which go on from stage to stage."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from uft.comparison.statistics import interval
from uft.reporting.groups import Group
from uft.reporting.runs import Run, Stage, is_number
from uft.watching.path import Point, path_of, thinned

AXES = {"steps": "optimiser steps", "tokens": "tokens trained on", "flops": "FLOPs, reference passes included"}
POINTS = 40  # windows of a curve that is smoothed
STRETCHES = 16  # of a path, whose noise would make a tangle of more


class Curve(NamedTuple):
    """A metric along one run or, with an interval, as the mean of seeds.  Each float64 [points]."""

    x: np.ndarray
    y: np.ndarray
    low: np.ndarray | None = None
    high: np.ndarray | None = None


def curve(run: Run, name: str, axis: str = "steps") -> Curve | None:
    """None where nothing was logged under this name, or the run does not know the axis."""
    points = [(x, entry[name]) for x, entry in _entries(run, axis) if is_number(entry.get(name))]
    if not points:
        return None
    return Curve(*np.array(sorted(dict(points).items()), dtype=np.float64).T)


def group_curve(group: Group, name: str, axis: str = "steps") -> Curve | None:
    """Of several seeds the mean and its 95 % interval where all have a value.

    Over tokens and FLOPs, which differ a little by seed, points are matched by step and drawn at their mean.
    """
    curves = [found for run in group.runs if (found := curve(run, name)) is not None]
    if len(curves) < len(group.runs) or not curves:
        return None
    steps = sorted(set.intersection(*(set(each.x) for each in curves)))
    if not steps:
        return None
    if len(curves) == 1:
        return curve(group.runs[0], name, axis)
    x = [curve(run, name, axis) for run in group.runs]
    if any(each is None or len(each.x) != len(found.x) for each, found in zip(x, curves)):
        return None
    rows = np.array([[dict(zip(each.x, each.y))[step] for step in steps] for each in curves])
    places = np.array([[dict(zip(found.x, each.x))[step] for step in steps] for each, found in zip(x, curves)])
    spans = [interval(column) for column in rows.T]
    low, high = (np.array([getattr(span, side) for span in spans]) for side in ("low", "high"))
    return Curve(places.mean(0), rows.mean(0), low, high)


def smoothed(found: Curve) -> Curve:
    """A running mean over a fortieth of the points, those at the ends over fewer."""
    width = len(found.x) // POINTS
    if width < 2:
        return found
    kernel = np.ones(2 * (width // 2) + 1)
    weight = np.convolve(np.ones(len(found.x)), kernel, "same")
    return Curve(found.x, *(None if v is None else np.convolve(v, kernel, "same") / weight for v in found[1:]))


def boundaries(group: Group, axis: str = "steps") -> list[float]:
    """Where one stage ends and the next begins, the mean over seeds."""
    ends = [np.cumsum([_extent(stage, axis) for stage in run.stages[:-1]]) for run in group.runs]
    return np.mean(ends, axis=0).tolist() if len({len(each) for each in ends}) == 1 else []


def pieces(found: Curve, ends: Sequence[float]) -> list[Curve]:
    """A curve cut where stages end: what is logged under one name may be of another loss in the next."""
    # the log of a stage's last step is its own, up to rounding
    place = np.searchsorted(np.array(ends) * (1 + 1e-9), found.x)
    parts = [np.flatnonzero(place == stage) for stage in range(len(ends) + 1)]
    return [Curve(*(None if v is None else v[part] for v in found)) for part in parts if len(part)]


def knows(run: Run, axis: str) -> bool:
    return all(_extent(stage, axis) > 0 for stage in run.stages if stage.steps) and run.steps > 0


def plane(run: Run, *, evaluated: bool) -> list[Point]:
    """The path through the plane of likelihood and preference losses; of many logs, means over stretches."""
    axes = joined_axes([run])
    journals = [[entry for entry in stage.logs if is_number(entry.get("step"))] for stage in run.stages]
    return thinned(path_of(journals, axes, evaluated), STRETCHES) if all(axes) else []


def joined_axes(runs: Sequence[Run]) -> tuple[list[str], list[str]]:
    """Names of the losses whose sums are x and y: of likelihood terms, or where there are none the likelihood of the
    data sets of demonstrations, and of preference terms."""
    x: dict[str, None] = {}
    y: dict[str, None] = {}
    for stage in (stage for run in runs for stage in run.stages):
        for axis, own, kinds in ((x, 0, ("Likelihood",)), (y, 1, ("Pairwise", "Pointwise"))):
            axis |= dict.fromkeys(stage.begun["plane"][own] if stage.begun.get("plane") else ())
            axis |= dict.fromkeys(f"loss/{term.get('name')}" for term in stage.terms if term.get("type") in kinds)
    if not x:
        kinds = {n: k for run in runs for s in run.stages for n, k in _train(s).get("kinds", {}).items()}
        x = {f"{name}/nll": None for name, found in kinds.items() if {"demonstration", "document"} & set(found)}
    return list(x), list(y)


def _train(stage: Stage) -> Mapping:
    return stage.record.get("data", {}).get("train", {})


def _extent(stage: Stage, axis: str) -> float:
    return float(stage.steps if axis == "steps" else stage.compute.get(axis, 0))


def _entries(run: Run, axis: str) -> list[tuple[float, Mapping[str, float]]]:
    """Every log of the run with its place on the axis, counted from the beginning of the run."""
    found, before = [], 0.0
    for stage in run.stages:
        extent = _extent(stage, axis)
        if axis == "steps":
            found += [(before + e["step"], e) for e in stage.logs if is_number(e.get("step"))]
        elif extent > 0:
            found += [(before + extent * share, e) for share, e in _shares(stage)]
        before += extent
    return found


def _shares(stage: Stage) -> list[tuple[float, Mapping[str, float]]]:
    """Every log with the share of the stage's tokens that was trained on by then.

    FLOPs are not logged on the way: they are taken to be spent as tokens are.
    """
    known = {
        e["step"]: e["num_tokens"] for e in stage.logs if is_number(e.get("num_tokens")) and is_number(e.get("step"))
    }
    total = stage.compute.get("tokens", 0)
    if not known or not total:
        return []
    steps, tokens = [0, *sorted(known)], [0, *(known[step] for step in sorted(known))]
    entries = [entry for entry in stage.logs if is_number(entry.get("step"))]
    return [(float(np.interp(entry["step"], steps, tokens)) / total, entry) for entry in entries]


def all_logged(groups: Sequence[Group]) -> list[str]:
    return list(dict.fromkeys(name for group in groups for run in group.runs for name in run.logged))
