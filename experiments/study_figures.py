"""Figures of a study: what is kept and what is gained, along one axis, over words, or over a grid."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import cycle
from pathlib import Path
from typing import Any

import numpy as np

from .figures import LINES, MARKERS, plt, save
from .reporting.labels import spread_labels
from .reporting.tables import by_seed

PANELS = {"retention": "retention (skills, taught refusals, facts)", "alignment": "alignment (mean utility)"}

Records = Sequence[Sequence[Mapping[str, Any]]]


def draw(folder: Path, study: Any, points: Sequence[Any], records: Records) -> list[str]:
    """Writes the figures of a study and returns their names."""
    return [{"lines": _lines, "dots": _dots, "heat": _heat}[study.kind](folder, study, points, records)]


def _values(runs: Sequence[Mapping[str, Any]], name: str) -> np.ndarray:
    return np.array(list(by_seed(runs, name).values()))


def _lines(folder: Path, study: Any, points: Sequence[Any], records: Records) -> str:
    lines = list(dict.fromkeys(point.line for point in points))
    figure, panels = plt.subplots(1, len(PANELS), figsize=(9.2, 3.6))
    for panel, (name, label) in zip(panels, PANELS.items()):
        ends = []
        for line, colour, marker in zip(lines, cycle(LINES), cycle(MARKERS)):
            own = sorted(((p.x, runs) for p, runs in zip(points, records) if p.line == line), key=lambda pair: pair[0])
            x, values = [x for x, _ in own], [_values(runs, name) for _, runs in own]
            means = [v.mean() for v in values]
            panel.plot(x, means, marker=marker, color=colour, markersize=5)
            panel.fill_between(x, [v.min() for v in values], [v.max() for v in values], color=colour, alpha=0.12, lw=0)
            ends.append((x[-1], means[-1], line, colour))
        if study.logarithmic:
            panel.set_xscale("log")
            places = sorted({point.x for point in points})
            panel.set_xticks(places, [f"{x:g}" for x in places])
            panel.set_xticks([], minor=True)
        panel.set_xlabel(study.axis)
        panel.set_title(label, loc="left")
        if panel is panels[-1]:
            low, high = panel.get_ylim()
            heights = spread_labels([y for _, y, _, _ in ends], (high - low) * 0.07)
            for (x, y, line, colour), height in zip(ends, heights):
                panel.annotate(
                    line, xy=(x, y), xytext=(1.03, height), textcoords=("axes fraction", "data"), va="center",
                    color=colour, annotation_clip=False,
                )  # fmt: skip
    figure.tight_layout()
    return _saved(figure, folder, study)


def _dots(folder: Path, study: Any, points: Sequence[Any], records: Records) -> str:
    """A row per point, ordered as given; a small mark per seed and a large one for the mean."""
    names = [point.name if len({p.line for p in points}) > 1 else str(point.x) for point in points]
    figure, panels = plt.subplots(1, len(PANELS), figsize=(9.2, 0.9 + 0.27 * len(points)), sharey=True)
    lines = list(dict.fromkeys(point.line for point in points))
    for panel, (name, label) in zip(panels, PANELS.items()):
        for row, (point, runs) in enumerate(zip(points, records)):
            colour = LINES[lines.index(point.line) % len(LINES)]
            values = _values(runs, name)
            panel.plot(values, [row] * len(values), "o", color=colour, alpha=0.35, markersize=4)
            panel.plot(values.mean(), row, "D", color=colour, markeredgecolor="white", markersize=7)
        panel.set_title(label, loc="left")
        panel.grid(axis="x", alpha=0.25)
    panels[0].set_yticks(range(len(points)), names)
    panels[0].invert_yaxis()
    figure.tight_layout()
    return _saved(figure, folder, study)


def _heat(folder: Path, study: Any, points: Sequence[Any], records: Records) -> str:
    """x is "row|column"; a block of panels per line."""
    lines = list(dict.fromkeys(point.line for point in points))
    figure, panels = plt.subplots(len(lines), len(PANELS), figsize=(9.2, 2.9 * len(lines)), squeeze=False)
    for row_of_panels, line in zip(panels, lines):
        own = {point.x: runs for point, runs in zip(points, records) if point.line == line}
        rows = sorted({x.split("|")[0] for x in own}, key=float)
        columns = sorted({x.split("|")[1] for x in own}, key=float)
        for panel, (name, label) in zip(row_of_panels, PANELS.items()):
            grid = np.array([[_values(own[f"{r}|{c}"], name).mean() for c in columns] for r in rows])
            panel.imshow(grid, cmap="cividis", vmin=0, vmax=1, aspect="auto")
            for i, j in np.ndindex(grid.shape):
                panel.text(j, i, f"{grid[i, j]:.2f}", ha="center", va="center",
                           color="white" if grid[i, j] < 0.55 else "black")  # fmt: skip
            panel.set_xticks(range(len(columns)), columns)
            panel.set_yticks(range(len(rows)), rows)
            panel.set_title(f"{line}: {label.split(' (')[0]}", loc="left")
            of_rows, _, of_columns = study.axis.partition("|")
            panel.set_ylabel(of_rows)
            panel.set_xlabel(of_columns)
            panel.spines[:].set_visible(False)
            panel.tick_params(length=0)
    figure.tight_layout()
    return _saved(figure, folder, study)


def _saved(figure: Any, folder: Path, study: Any) -> str:
    name = f"{study.name}.png"
    save(figure, folder / name)
    return name
