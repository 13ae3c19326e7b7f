"""Places for names beside points, so that none lies on another name or on a point."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.patheffects import withStroke
from matplotlib.text import Text

ORDERS = 8  # in which names are placed one after the other; the best is kept
DISTANCES = (0, 4, 9, 15, 22, 30, 40, 52, 66, 82, 100)  # from a point's mark, in points (1/72 inch)
ANGLES = np.deg2rad(np.arange(0, 360, 15))
FREE = 1e3  # what an overlap costs: more than any distance


class Boxes(NamedTuple):
    """[n, 4]: left, bottom, right, top, in pixels."""

    edges: np.ndarray

    def overlap(self, box: np.ndarray, margin: float = 0.0) -> np.ndarray:
        """[n]: does each of these touch the box."""
        left, bottom, right, top = self.edges.T
        a, b, c, d = box
        return (left < c + margin) & (right > a - margin) & (bottom < d + margin) & (top > b - margin)


def spread_labels(positions: Sequence[float], gap: float) -> list[float]:
    """The positions, moved apart where two would overlap, in the same order."""
    order = np.argsort(positions)
    placed = np.array(positions, dtype=float)[order]
    for _ in range(200):
        moved = False
        for i in range(len(placed) - 1):
            overlap = gap - (placed[i + 1] - placed[i])
            if overlap > 1e-9:
                placed[i] -= overlap / 2
                placed[i + 1] += overlap / 2
                moved = True
        if not moved:
            break
    result = np.empty_like(placed)
    result[order] = placed
    return result.tolist()


def name_points(
    axes: Axes, points: Mapping[str, tuple[float, float]], names: Mapping[str, str], colours: Mapping[str, str], *,
    lines: Sequence[Sequence[tuple[float, float]]] = (), mark: float = 9.0, size: float = 8.0,
) -> list[Text]:  # fmt: skip
    """Writes each point's name near it, with a thin line where it had to go further away.

    The axes must not be moved or scaled afterwards.

    points   data coordinates; every one is kept free, whether it is named or not
    names    those that get a name
    lines    polylines (of intervals, say) that names rather do not cross
    mark     side of a point's mark and `size` of the letters, in 1/72 inch
    """
    if not names:
        return []
    figure = axes.get_figure()
    renderer, pixel = figure.canvas.get_renderer(), figure.dpi / 72
    centre = {k: axes.transData.transform(xy) for k, xy in points.items()}
    extents = {k: _extent(axes, text, size, renderer) for k, text in names.items()}
    half = mark * pixel / 2
    marks = Boxes(np.array([[x - half, y - half, x + half, y + half] for x, y in centre.values()]))
    avoided = _sampled([axes.transData.transform(np.array(line)) for line in lines])
    frame = axes.get_window_extent(renderer)
    candidates = {k: _candidates(centre[k], extents[k], half, pixel) for k in names}
    alone = {k: _cost_alone(boxes, marks, avoided, frame, pixel) for k, (boxes, _) in candidates.items()}

    best, least = None, np.inf
    random = np.random.default_rng(0)
    # the most crowded first, then orders by chance
    crowd = {
        k: min(np.hypot(*(centre[k] - centre[o])) for o in centre if o != k) if len(centre) > 1 else 0 for k in names
    }
    order = sorted(names, key=crowd.get)
    for _ in range(ORDERS):
        placed, cost = _place(order, candidates, alone, centre, pixel)
        if cost < least:
            best, least = placed, cost
        order = list(random.permutation(order))
    written = []
    inverse = axes.transData.inverted()
    for key, box in best.items():
        x, y = centre[key]
        near = np.clip([x, y], box[:2], box[2:])
        if np.hypot(*(near - centre[key])) > half + 8 * pixel:
            axes.plot(*inverse.transform([centre[key], near]).T, color=colours[key], lw=0.6, alpha=0.6, zorder=1.5)
        at = inverse.transform([box[0], (box[1] + box[3]) / 2])
        written.append(
            axes.text(
                *at,
                names[key],
                color=colours[key],
                fontsize=size,
                va="center",
                ha="left",
                clip_on=False,
                path_effects=[withStroke(linewidth=1.8, foreground="white")],
            )
        )
    return written


def _extent(axes: Axes, text: str, size: float, renderer: Any) -> np.ndarray:
    artist = axes.text(0, 0, text, fontsize=size)
    box = artist.get_window_extent(renderer)
    artist.remove()
    return np.array([box.width, box.height])


def _candidates(centre: np.ndarray, extent: np.ndarray, half: float, pixel: float) -> tuple[np.ndarray, np.ndarray]:
    """[n, 4] boxes around a mark, and [n] how far each is; a box touches its ring with the side that faces the mark."""
    boxes, costs = [], []
    for distance in DISTANCES:
        for angle in ANGLES:
            along = np.array([np.cos(angle), np.sin(angle)])
            # from the mark's edge outwards: the box's centre lies half an extent further on
            middle = centre + along * (half + (2 + distance) * pixel) + np.clip(along * 1.6, -1, 1) * extent / 2
            boxes.append([*(middle - extent / 2), *(middle + extent / 2)])
            costs.append(distance + 3 * (1 - abs(along[0])))  # beside a mark rather than above or below it
    return np.array(boxes), np.array(costs)


def _sampled(polylines: Sequence[np.ndarray], step: float = 4.0) -> np.ndarray:
    """[n, 2]: points along polylines, `step` pixels apart."""
    found = [np.empty((0, 2))]
    for line in polylines:
        for a, b in pairwise(line):
            count = max(2, int(np.hypot(*(b - a)) / step))
            found.append(a + (b - a) * np.linspace(0, 1, count)[:, None])
    return np.concatenate(found)


def _cost_alone(boxes: np.ndarray, marks: Boxes, avoided: np.ndarray, frame: Any, pixel: float) -> np.ndarray:
    """[n]: what a place costs whatever the other names do: marks and lines covered, and leaving the frame."""
    cost = np.zeros(len(boxes))
    for i, box in enumerate(boxes):
        cost[i] += FREE * marks.overlap(box, margin=1.0).sum()
        inside = ((avoided > box[:2]) & (avoided < box[2:])).all(1)
        cost[i] += 0.8 * inside.sum()
        if box[0] < frame.x0 or box[2] > frame.x1 or box[1] < frame.y0 or box[3] > frame.y1:
            cost[i] += FREE
    return cost


def _place(order, candidates, alone, centre, pixel: float) -> tuple[dict[str, np.ndarray], float]:
    """One name after the other, each where it costs least: no name is crossed by another or by the line to it."""
    placed: dict[str, np.ndarray] = {}
    leaders: list[np.ndarray] = []
    total = 0.0
    for key in order:
        boxes, distance = candidates[key]
        cost = alone[key] + distance
        others = np.array(list(placed.values())).reshape(-1, 4)
        for other in others:
            cost = cost + FREE * Boxes(boxes).overlap(other, margin=1.5 * pixel)
        if leaders:
            cost = cost + 60 * np.sum([_touched(boxes, leader) for leader in leaders], axis=0)
        for i in np.argsort(cost)[:30]:  # only these may win: their own line is looked at too
            cost[i] += 60 * _touched(others, _leader(centre[key], boxes[i])).sum()
        i = int(np.argmin(cost))
        placed[key] = boxes[i]
        leaders.append(_leader(centre[key], boxes[i]))
        total += float(cost[i])
    return placed, total


def _leader(point: np.ndarray, box: np.ndarray) -> np.ndarray:
    near = np.clip(point, box[:2], box[2:])
    return point + (near - point) * np.linspace(0, 1, 12)[:, None]


def _touched(boxes: np.ndarray, leader: np.ndarray) -> np.ndarray:
    """[n]: does the line enter the box."""
    return ((leader > boxes[:, None, :2]) & (leader < boxes[:, None, 2:])).all(-1).any(1)
