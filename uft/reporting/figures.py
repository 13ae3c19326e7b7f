"""Figures of runs side by side, told apart by colour, line and mark, also by the colour-blind and in print."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import EngFormatter, MaxNLocator

from uft.reporting.groups import Group
from uft.reporting.series import AXES, Curve, boundaries, group_curve, joined_axes, pieces, plane, smoothed
from uft.watching.path import Point

# Okabe & Ito's colours, darker where letters would be too pale to read on white
COLOURS = ("#0072B2", "#C04F00", "#00785A", "#A8487F", "#8F6A00", "#3A8FC4", "#333333")
LINES = ("-", "--", "-.", ":")
SHARE = re.compile(r"accurac|(^|/)ended$")  # between 0 and 1
MARKERS = "oDs^vP*X<>"
LOOK = {"font.size": 8, "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True, "grid.alpha": 0.25,
        "text.parse_math": False}  # fmt: skip
ACROSS = 3  # panels beside each other
WIDTH = 9.3  # inches of a whole figure, which at 130 dots are as wide as the page


class Style(NamedTuple):
    colour: str
    line: str
    marker: str


def styles(groups: Sequence[Group]) -> dict[str, Style]:
    n = len(COLOURS)
    return {
        g.name: Style(COLOURS[i % n], LINES[i // n % len(LINES)], MARKERS[i % len(MARKERS)])
        for i, g in enumerate(groups)
    }


def curves(path: Path, groups: Sequence[Group], names: Sequence[str], axis: str = "steps") -> bool:
    """A panel per metric: what was logged in training as a line, in evaluation as marks on a line.

    Whether something was drawn; nothing is written otherwise.
    """
    found = [(name, drawn) for name in names if (drawn := _both(groups, name, axis))]
    if not found:
        return False
    with matplotlib.rc_context(LOOK):
        columns = min(ACROSS, len(found))
        rows = -(-len(found) // columns)
        figure, panels = _panels(rows, columns, width=WIDTH / max(2, columns), height=2.1 if columns > 1 else 2.8)
        style = styles(groups)
        for panel, (name, drawn) in zip(panels.flat, found):
            for group, train, held_out in drawn:
                _draw(panel, style[group.name], train, held_out, boundaries(group, axis))
            _stage_ends(panel, groups, style, axis)
            _limits(panel, name, drawn)
            panel.set_title(name, loc="left", fontsize=8.5)
            _ticks(panel, axis)
        for i, panel in enumerate(panels.flat):
            panel.set_visible(i < len(found))
            if i + columns >= len(found):
                panel.set_xlabel(AXES[axis])
        has_eval = any(held_out is not None for _, drawn in found for _, _, held_out in drawn)
        has_train = any(train is not None for _, drawn in found for _, train, _ in drawn)
        _names(figure, groups, style, evaluation=has_eval and has_train)
        _save(figure, path)
    return True


def _both(groups: Sequence[Group], name: str, axis: str) -> list[tuple[Group, Curve | None, Curve | None]]:
    drawn = [(g, group_curve(g, name, axis), group_curve(g, f"eval_{name}", axis)) for g in groups]
    return [each for each in drawn if each[1] is not None or each[2] is not None]


def _draw(panel: Any, style: Style, train: Curve | None, held_out: Curve | None, ends: Sequence[float]) -> None:
    for piece in pieces(train, ends) if train is not None else ():
        smooth = smoothed(piece)
        if smooth is not piece:
            panel.plot(piece.x, piece.y, style.line, color=style.colour, lw=0.6, alpha=0.25)
        alone = len(piece.x) == 1
        panel.plot(smooth.x, smooth.y, "." if alone else style.line, color=style.colour, lw=1.5)
        if smooth.low is not None:
            panel.fill_between(smooth.x, smooth.low, smooth.high, color=style.colour, alpha=0.14, lw=0)
    for piece in pieces(held_out, ends) if held_out is not None else ():
        every = max(1, len(piece.x) // 12)
        panel.plot(
            piece.x, piece.y, style.line, color=style.colour, lw=1.0, marker=style.marker, markersize=5,
            markeredgecolor="white", markevery=every,
        )  # fmt: skip
        if piece.low is not None:
            panel.vlines(piece.x, piece.low, piece.high, color=style.colour, lw=0.9, alpha=0.5)


def _stage_ends(panel: Any, groups: Sequence[Group], style: Mapping[str, Style], axis: str) -> None:
    for group in groups:
        for end in boundaries(group, axis):
            panel.axvline(end, color=style[group.name].colour, lw=0.9, ls=(0, (1, 2)), zorder=0)


def _limits(panel: Any, name: str, drawn: Sequence[tuple[Group, Curve | None, Curve | None]]) -> None:
    """Intervals of few seeds may be far wider than what they are of: they are cut where lines would be squeezed."""
    found = [each for _, *both in drawn for each in both if each is not None]
    ends = np.concatenate([each.y for each in found])
    low, high = ends.min(), ends.max()
    room = 0.3 * (high - low) or 0.05 * abs(high) or 0.05
    bands = [side for each in found if each.low is not None for side in (each.low, each.high)]
    reach = np.concatenate([ends, *bands])
    low, high = max(low - room, np.nanmin(reach)), min(high + room, np.nanmax(reach))
    if SHARE.search(name):
        low, high = max(low, 0.0), min(high, 1.0)
    margin = 0.05 * (high - low) or room
    panel.set_ylim(low - margin, high + margin)


def _ticks(panel: Any, axis: str) -> None:
    panel.xaxis.set_major_locator(MaxNLocator(5, integer=axis == "steps"))
    if axis != "steps":
        panel.xaxis.set_major_formatter(EngFormatter(sep=" "))


def losses_plane(path: Path, groups: Sequence[Group], *, evaluated: bool) -> bool:
    """The path of every run from its first point (small) to its last (large), dotted where one of the two losses was
    not measured and is held.  Whether something was drawn."""
    found = {g.name: [points for run in g.runs if len(points := plane(run, evaluated=evaluated)) > 1] for g in groups}
    drawn = [group for group in groups if found[group.name]]
    if not drawn:
        return False
    with matplotlib.rc_context(LOOK):
        figure, panels = _panels(1, 1, width=0.62 * WIDTH, height=4.4)
        panel, style = panels[0, 0], styles(groups)
        for group in drawn:
            for points in found[group.name]:
                _path(panel, points, style[group.name])
        axes = joined_axes([run for group in drawn for run in group.runs])
        for names, put in zip(axes, (panel.set_xlabel, panel.set_ylabel)):
            put(" + ".join(names))
        _names(figure, drawn, style, marks=True)
        _save(figure, path)
    return True


def _path(panel: Any, points: Sequence[Point], style: Style) -> None:
    for one, other in pairwise(points):
        line = style.line if all(other.measured) else (0, (1, 1.5))
        panel.plot([one.x, other.x], [one.y, other.y], ls=line, color=style.colour, lw=1.3, alpha=0.85)
    panel.plot(points[0].x, points[0].y, ".", color=style.colour, markersize=6)
    panel.plot(
        points[-1].x, points[-1].y, style.marker, color=style.colour, markersize=9, markeredgecolor="white", zorder=3
    )


def bars(
    path: Path, groups: Sequence[Group], quantities: Mapping[str, tuple[str, Callable[[float], str]]]
) -> bool:  # fmt: skip
    """A row per group and a panel per quantity of compute: the mean, cut where stages end, its value at its end.

    quantities   name of a counter -> (title, how its value is written)
    """
    known = {name: said for name, said in quantities.items() if any(g.mean(_of(name)) for g in groups)}
    if not known:
        return False
    with matplotlib.rc_context(LOOK | {"axes.grid": False}):
        columns = min(ACROSS, len(known))
        rows = -(-len(known) // columns)
        figure, panels = _panels(
            rows, columns, width=WIDTH / max(2, columns), height=0.5 + 0.25 * len(groups), sharey=True
        )
        style = styles(groups)
        for panel, (name, (title, write)) in zip(panels.flat, known.items()):
            longest = 0.0
            for row, group in enumerate(groups):
                left = 0.0
                for share in _by_stage(group, name):
                    panel.barh(row, share, left=left, height=0.62, color=style[group.name].colour, edgecolor="white")
                    left += share
                panel.annotate(write(left) if left else "–", (left, row), (4, 0), textcoords="offset points",
                               va="center", fontsize=7.5)  # fmt: skip
                longest = max(longest, left)
            panel.set_xlim(0, 1.45 * longest or 1)
            panel.set_xticks([])
            panel.spines["bottom"].set_visible(False)
            panel.tick_params(axis="y", length=0)
            panel.set_title(title, loc="left", fontsize=8.5)
        panels[0, 0].set_yticks(range(len(groups)), [shortened(group.name) for group in groups])
        panels[0, 0].set_ylim(len(groups) - 0.4, -0.6)
        for panel in panels.flat[len(known) :]:
            panel.set_visible(False)
        _save(figure, path)
    return True


def _of(name: str) -> Callable[[Any], float | None]:
    return lambda run: run.compute.get(name)


def _by_stage(group: Group, name: str) -> list[float]:
    """Means over the runs of each stage's share; what does not add up over stages is one bar."""
    if "peak" in name or len({len(run.stages) for run in group.runs}) > 1:
        mean = group.mean(_of(name))
        return [mean.mean] if mean else []
    columns = zip(*([stage.compute.get(name, 0) for stage in run.stages] for run in group.runs))
    return [float(np.mean(column)) for column in columns]


# ---- what all share ----


def _panels(rows: int, columns: int, *, width: float, height: float, **shared: Any) -> tuple[Figure, np.ndarray]:
    figure = Figure(figsize=(width * columns, height * rows + 0.5), dpi=130, layout="constrained")
    return figure, figure.subplots(rows, columns, squeeze=False, **shared)


def _names(
    figure: Figure,
    groups: Sequence[Group],
    style: Mapping[str, Style],
    *,
    evaluation: bool = False,
    marks: bool = False,
) -> None:
    """Who is who, above the panels; and what marks mean, where there are some."""
    handles = [
        Line2D([], [], color=style[g.name].colour, ls=style[g.name].line, marker=style[g.name].marker if marks or
               evaluation else "", markeredgecolor="white", lw=1.6, label=_labelled(g))
        for g in groups
    ]  # fmt: skip
    if evaluation:
        handles.append(Line2D([], [], color="#555555", lw=1.5, label="line: training"))
        handles.append(
            Line2D([], [], color="#555555", lw=1.0, marker="o", markeredgecolor="white", label="marks: evaluation")
        )
    if any(run.staged for group in groups for run in group.runs) and not marks:
        handles.append(Line2D([], [], color="#555555", lw=0.9, ls=(0, (1, 2)), label="end of a stage"))
    longest = max(len(handle.get_label()) for handle in handles)
    fit = max(1, int(figure.get_size_inches()[0] * 14 / (longest + 8)))
    figure.legend(
        handles=handles, loc="outside upper left", ncols=min(len(handles), fit), frameon=False, columnspacing=1.4
    )


def _labelled(group: Group) -> str:
    return shortened(group.name) + (f" ({len(group.runs)} seeds)" if len(group.runs) > 1 else "")


def shortened(name: str, width: int = 34) -> str:
    """The end of a path says more than its beginning."""
    return name if len(name) <= width else f"…{name[-width + 1 :]}"


def _save(figure: Figure, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=figure.dpi, pil_kwargs={"optimize": True})  # else whatever rcParams says
