"""The path of a run through the plane of its losses: likelihood terms to the right, preference terms upward.

A point is a log.  x and y are each the sum of the losses, unweighted, that the journal's `plane` names.  A stage that
trains on one of the two alone measures no other: there the last value that is known is held, or the first that comes.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from uft.watching.lines import metrics_of


@dataclass(frozen=True)
class Point:
    """stage is a position among the stages; measured tells x and y that were logged from those that are held."""

    step: int
    x: float
    y: float
    stage: int = 0
    measured: tuple[bool, bool] = (True, True)


def path_of(
    stages: Sequence[Iterable[Mapping[str, Any]]], axes: Sequence[Sequence[str]], evaluated: bool
) -> list[Point]:
    """The points of training logs, or of evaluations, over the journals of the stages; empty where one of the two
    losses was never measured."""
    found: list[tuple[int, int, list[float | None]]] = []
    for i, entries in enumerate(stages):
        found += [(i, step, pair) for step, pair in _measured(entries, axes, evaluated)]
    for axis in (0, 1):
        if all(pair[axis] is None for _, _, pair in found):
            return []
    points, held = [], [next(pair[a] for _, _, pair in found if pair[a] is not None) for a in (0, 1)]
    for stage, step, pair in found:
        held = [known if value is None else value for value, known in zip(pair, held)]
        points.append(Point(step, *held, stage, tuple(value is not None for value in pair)))
    return points


def boundaries(points: Sequence[Point]) -> list[int]:
    """Positions in the path at which a new stage begins: its first point."""
    return [i for i in range(1, len(points)) if points[i].stage != points[i - 1].stage]


def thinned(points: Sequence[Point], limit: int) -> list[Point]:
    """At most about `limit` points: means over stretches that do not cross stages; the first and last stay."""
    if len(points) <= limit:
        return list(points)
    size, result = -(-len(points) // limit), [points[0]]
    i = 1
    while i < len(points) - 1:
        stretch = [p for p in points[i : min(i + size, len(points) - 1)] if p.stage == points[i].stage]
        n = len(stretch)
        result.append(replace(stretch[-1], x=sum(p.x for p in stretch) / n, y=sum(p.y for p in stretch) / n))
        i += n
    return [*result, points[-1]]


def _measured(
    entries: Iterable[Mapping[str, Any]], axes: Sequence[Sequence[str]], evaluated: bool
) -> list[tuple[int, list[float | None]]]:
    """(step, [x, y]) of a stage's logs; of an axis of which no metric is ever there, None."""
    logs: dict[int, dict[str, float]] = {}
    for entry in entries:
        metrics = metrics_of(entry)
        logs.setdefault(entry["step"], {}).update(_evaluation(metrics, axes) if evaluated else metrics)
    parts = [[name for name in axis if any(name in log for log in logs.values())] for axis in axes]
    found = []
    for step, log in sorted(logs.items()):
        # a term of which no row was drawn since the last log has no loss there, and the sum would jump
        pair = [sum(log[n] for n in names) if names and all(n in log for n in names) else None for names in parts]
        pair = [None if value is None or not math.isfinite(value) else value for value in pair]
        if all(value is not None or not names for value, names in zip(pair, parts)) and any(parts):
            found.append((step, pair))
    return found


def _evaluation(metrics: Mapping[str, Any], axes: Sequence[Sequence[str]]) -> dict[str, Any]:
    """What the axes are of, from an evaluation; of several data sets, whichever logs it."""
    found = {}
    for name in (name for axis in axes for name in axis):
        ends = [key for key in metrics if key == f"eval_{name}" or (key[:5] == "eval_" and key.endswith(f"_{name}"))]
        if ends:
            found[name] = metrics[min(ends, key=len)]
    return found
