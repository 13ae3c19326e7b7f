"""Figures of a comparison.  Readable in print and without colour: marks differ too, and names stand at the points."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np

# Okabe & Ito's colours, told apart by the colour-blind
COLOURS = {"control": "#666666", "sequential": "#D55E00", "unified": "#0072B2"}
MARKERS = "osD^vP*X<>"

plt.rcParams.update(
    {"font.size": 9, "axes.spines.top": False, "axes.spines.right": False, "figure.dpi": 150, "savefig.dpi": 150}
)


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


def retention_against_alignment(
    path: Path, points: Mapping[str, Sequence[tuple[float, float]]], labels: Mapping[str, str],
    families: Mapping[str, str], title: str, *,
    alignment: str = "alignment (mean utility of sampled answers; best policy 1)",
    retention: str = "retention (skills, taught refusals, facts)",
) -> None:  # fmt: skip
    """One small mark per seed (alignment, retention), a large one for the mean, names in a column at the right."""
    figure, axes = plt.subplots(figsize=(7.4, 4.4))
    means = {arm: np.mean(values, axis=0) for arm, values in points.items()}
    for marker, (arm, values) in zip(MARKERS, points.items()):
        colour = COLOURS[families[arm]]
        x, y = np.array(values).T
        axes.plot(x, y, marker, color=colour, alpha=0.35, markersize=4, linestyle="none")
        axes.plot(*means[arm], marker, color=colour, markersize=9, markeredgecolor="white")
    low, high = axes.get_ylim()
    left, right = axes.get_xlim()
    axes.set_xlim(left, right)
    heights = spread_labels([means[arm][1] for arm in points], (high - low) * 0.058)
    for arm, height in zip(points, heights):
        at = right + (right - left) * 0.06
        axes.annotate(
            labels[arm], xy=means[arm], xytext=(at, height), annotation_clip=False, va="center",
            color=COLOURS[families[arm]],
            arrowprops={"arrowstyle": "-", "color": COLOURS[families[arm]], "alpha": 0.35, "lw": 0.7},
        )  # fmt: skip
    axes.set_xlabel(alignment)
    axes.set_ylabel(retention)
    axes.set_title(title, loc="left")
    figure.savefig(path, bbox_inches="tight")
    plt.close(figure)


def curves(
    path: Path, arms: Mapping[str, Sequence[Mapping[str, Any]]], labels: Mapping[str, str],
    families: Mapping[str, str], quantities: Mapping[str, str],
) -> None:  # fmt: skip
    """Per arm a panel; x is compute so far, a dashed line is the boundary of stages.

    arms   per arm its runs; a run is a list of {flops, boundary, <quantity>...}, means over runs are drawn
    """
    columns = 3
    rows = -(-len(arms) // columns)
    figure, panels = plt.subplots(rows, columns, figsize=(8.4, 2.3 * rows), sharey=True, squeeze=False)
    styles = ["-", "--", ":", "-."]
    shades = ["#0072B2", "#D55E00", "#009E73", "#333333"]
    for panel, (arm, runs) in zip(panels.flat, arms.items()):
        x = np.mean([[point["flops"] for point in run] for run in runs], axis=0) / 1e12
        for (name, label), style, shade in zip(quantities.items(), styles, shades):
            y = np.array([[point[name] for point in run] for run in runs])
            panel.plot(x, y.mean(0), style, color=shade, label=label)
            if len(y) > 1:
                panel.fill_between(x, y.min(0), y.max(0), color=shade, alpha=0.12, lw=0)
        for k, point in enumerate(runs[0]):
            if point.get("boundary"):
                panel.axvline(x[k], color="#999999", lw=0.8, ls="--")
        panel.set_title(labels[arm], loc="left", color=COLOURS[families[arm]])
        panel.set_ylim(-0.03, 1.03)
    for panel in panels.flat[len(arms) :]:
        panel.set_visible(False)
    for panel in panels[-1]:
        panel.set_xlabel("TFLOPs so far")
    handles, names = panels.flat[0].get_legend_handles_labels()
    figure.legend(handles, names, loc="upper center", ncols=len(names), frameon=False, bbox_to_anchor=(0.5, 1.02))
    figure.tight_layout(rect=(0, 0, 1, 0.97))
    figure.savefig(path, bbox_inches="tight")
    plt.close(figure)


def matrix(
    path: Path, values: np.ndarray, rows: Sequence[str], columns: Sequence[str], title: str, *, limit: float = 1.0
) -> None:
    """A matrix of differences with its numbers in it: red is lost, blue is gained."""
    figure, axes = plt.subplots(figsize=(1.6 + 0.95 * len(columns), 0.8 + 0.36 * len(rows)))
    axes.imshow(values, cmap="RdBu", vmin=-limit, vmax=limit, aspect="auto")
    for i in range(len(rows)):
        for j in range(len(columns)):
            value = values[i, j]
            text = "" if np.isnan(value) else f"{value:+.2f}".replace("-", "−")
            axes.text(j, i, text, ha="center", va="center", color="white" if abs(value) > 0.6 * limit else "black")
    axes.set_xticks(range(len(columns)), columns)
    axes.set_yticks(range(len(rows)), rows)
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    axes.set_title(title, loc="left")
    figure.savefig(path, bbox_inches="tight")
    plt.close(figure)
