"""Figures of a comparison.  Readable in print and without colour: marks differ too, and names stand at the points."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np

from uft.comparison.statistics import Interval, interval

from .reporting.labels import name_points, spread_labels

__all__ = ["COLOURS", "LINES", "MARKERS", "costs", "curves", "differences", "matrix", "plt", "save", "spread_labels"]

# Okabe & Ito's colours, told apart by the colour-blind, darker where letters would be too pale to read on white
COLOURS = {"control": "#595959", "sequential": "#C04F00", "unified": "#0072B2"}
LINES = ("#0072B2", "#C04F00", "#00785A", "#A8487F", "#8F6A00", "#3A8FC4", "#333333")
MARKERS = "osD^vP*X<>"
FAMILY_MARKERS = {"control": "s", "sequential": "o", "unified": "D"}
OTHERS = tuple(zip(LINES[2:], "^vPX*"))  # for families that have no colour above
CROWDED = 9  # arms, from which on a second panel may show the crowd alone
FEW = 3  # seeds, up to which each is shown

plt.rcParams.update(
    {"font.size": 9, "axes.spines.top": False, "axes.spines.right": False, "figure.dpi": 150, "savefig.dpi": 150}
)


class Style(NamedTuple):
    colour: str
    marker: str


def family_styles(families: Mapping[str, str]) -> dict[str, Style]:
    """Family -> its colour and mark, in the order in which a reader meets them."""
    names = [f for f in COLOURS if f in families.values()]
    styles = {f: Style(COLOURS[f], FAMILY_MARKERS[f]) for f in names}
    others = dict.fromkeys(f for f in families.values() if f not in COLOURS)
    return styles | {f: Style(*OTHERS[k % len(OTHERS)]) for k, f in enumerate(others)}


def save(figure: Any, path: Path) -> None:
    figure.savefig(path, bbox_inches="tight", pil_kwargs={"optimize": True})
    plt.close(figure)


def retention_against_alignment(
    path: Path, points: Mapping[str, Sequence[tuple[float, float]]], labels: Mapping[str, str],
    families: Mapping[str, str], title: str, *,
    alignment: str = "alignment (mean utility of sampled answers; best policy 1)",
    retention: str = "retention (skills, taught refusals, facts)",
) -> None:  # fmt: skip
    """A mark at each arm's mean, its 95 % t-intervals as a cross, its name beside it; a small mark per seed if few.

    Where many arms lie in one corner, a second panel shows that corner, and names them.
    """
    arms = {arm: np.array(values, dtype=float) for arm, values in points.items()}
    means = {arm: values.mean(0) for arm, values in arms.items()}
    crosses = {arm: (interval(v[:, 0]), interval(v[:, 1])) for arm, v in arms.items()}
    corner = crowded_corner(np.array(list(means.values()))) if len(arms) >= CROWDED else None
    width = 7.4 if corner is None else 11.4
    figure, panels = plt.subplots(1, 1 if corner is None else 2, figsize=(width, 5.0), squeeze=False)
    styles = family_styles({arm: families[arm] for arm in arms})
    inside = set() if corner is None else {a for a, m in means.items() if (m >= corner[0]).all()}
    views = [(panels[0, 0], *_view(means, arms, crosses), arms.keys() - inside)]
    if corner is not None:
        crowd = [{a: found[a] for a in arms if a in inside} for found in (means, arms, crosses)]
        views.append((panels[0, 1], *_view(*crowd), inside))
        panels[0, 1].set_title(f"the corner: {len(inside)} arms", loc="left", fontsize=9)
    for panel, low, high, _ in views:
        for arm, values in arms.items():
            _cross(panel, means[arm], crosses[arm], values, styles[families[arm]])
        panel.set_xlim(low[0], high[0])
        panel.set_ylim(low[1], high[1])
        panel.set_xlabel(alignment if corner is None else alignment.split(" (")[0])
        panel.set_ylabel(retention if panel is panels[0, 0] else "")
    if corner is not None:
        _, low, high, _ = views[1]
        panels[0, 0].add_patch(plt.Rectangle(low, *(high - low), fill=False, ec="#999999", lw=0.8, ls="--", zorder=1))
        for spine in ("top", "right"):
            panels[0, 1].spines[spine].set_visible(True)
        for spine in panels[0, 1].spines.values():
            spine.set(color="#999999", linestyle="--")
    figure.tight_layout(rect=(0, 0, 1, 0.92))
    family_names(figure, panels[0, 0], title, styles)
    for panel, low, high, named in views:
        here = {a: tuple(m) for a, m in means.items() if (m >= low).all() and (m <= high).all()}
        name_points(
            panel, here, {a: labels[a] for a in here if a in named},
            {a: styles[families[a]].colour for a in here}, lines=[line for a in here for line in _lines(crosses[a])],
        )  # fmt: skip
    save(figure, path)


def crowded_corner(means: np.ndarray) -> tuple[np.ndarray, np.ndarray] | None:
    """Of all boxes up to the top right corner, the one with most more arms than its share of the area; or None."""
    low, high = means.min(0), means.max(0)
    area = np.prod(high - low)
    best, found = 0.3, None  # a corner with fewer in excess is no crowd
    for x in means[:, 0]:
        for y in means[:, 1]:
            count = ((means >= (x, y)).all(1)).sum()
            if not area or not 4 <= count < len(means):
                continue
            excess = count / len(means) - (high[0] - x) * (high[1] - y) / area
            if excess > best + 1e-9:
                best, found = excess, (np.array([x, y]), high)
    return found


def _view(means, arms, crosses) -> tuple[np.ndarray, np.ndarray]:
    """Limits that hold all means, and intervals as far as these do not squeeze the means together."""
    middle = np.array(list(means.values()))
    size = np.maximum(np.ptp(middle, axis=0), 0.02)
    ends = np.array([[[x.low, y.low], [x.high, y.high]] for x, y in crosses.values()])
    shown = [middle, *(values for values in arms.values() if len(values) <= FEW)]
    ends = np.concatenate([*shown, ends[np.isfinite(ends).all((1, 2))].reshape(-1, 2)])
    low = np.maximum(ends.min(0), middle.min(0) - 0.3 * size) - 0.06 * size
    high = np.minimum(ends.max(0), middle.max(0) + 0.3 * size) + 0.06 * size
    return low, high


def _lines(cross: tuple[Interval, Interval]) -> list[list[tuple[float, float]]]:
    x, y = cross
    if x.n < 2:
        return []
    return [[(x.low, y.mean), (x.high, y.mean)], [(x.mean, y.low), (x.mean, y.high)]]


def _cross(panel: Any, mean: np.ndarray, cross: tuple[Interval, Interval], values: np.ndarray, style: Style) -> None:
    if len(values) <= FEW:
        panel.plot(*values.T, style.marker, color=style.colour, alpha=0.3, markersize=3, linestyle="none", mew=0)
    for line in _lines(cross):
        panel.plot(*np.array(line).T, color=style.colour, lw=0.8, alpha=0.4, zorder=2)
    panel.plot(*mean, style.marker, color=style.colour, markersize=7.5, markeredgecolor="white", zorder=3)


def family_names(figure: Any, axes: Any, title: str, styles: Mapping[str, Style]) -> None:
    """A title, and under it the families in their own colour with their mark."""
    left = axes.get_position().x0
    high = figure.get_size_inches()[1]
    figure.text(left, 1 - 0.05 / high, title, fontsize=10.5, va="top")
    marks = [
        plt.Line2D([], [], color=s.colour, marker=s.marker, ls="none", markersize=6, label=family)
        for family, s in styles.items()
    ]
    legend = figure.legend(
        handles=marks, loc="upper left", bbox_to_anchor=(left - 0.01, 1 - 0.23 / high), ncols=len(marks),
        frameon=False, handletextpad=0.1, columnspacing=1.2,
    )  # fmt: skip
    for text, style in zip(legend.get_texts(), styles.values()):
        text.set_color(style.colour)


def differences(
    path: Path, found: Mapping[str, Mapping[str, Interval]], labels: Mapping[str, str], families: Mapping[str, str],
    title: str,
) -> None:  # fmt: skip
    """A row per arm, best first, and a panel per quantity: the difference to one arm, paired by seed, and its interval.

    found   arm -> quantity -> interval of the differences; rows are ordered by the first quantity
    """
    quantities = list(next(iter(found.values())))
    order = sorted(found, key=lambda arm: -found[arm][quantities[0]].mean)
    figure, panels = plt.subplots(
        1, len(quantities), figsize=(3.0 + 2.4 * len(quantities), 1.2 + 0.235 * len(order)), sharey=True, squeeze=False
    )
    styles = family_styles({arm: families[arm] for arm in order})
    for panel, name in zip(panels[0], quantities):
        panel.axvline(0, color="#444444", lw=0.8)
        means = np.array([found[arm][name].mean for arm in order])
        size = max(np.ptp(np.append(means, 0.0)), 0.02)
        limits = min(means.min(), 0) - 0.35 * size, max(means.max(), 0) + 0.35 * size
        for row, arm in enumerate(order):
            style, value = styles[families[arm]], found[arm][name]
            if np.isfinite(value.low):
                panel.plot([value.low, value.high], [row, row], color=style.colour, lw=1.4, alpha=0.75)
            panel.plot(value.mean, row, style.marker, color=style.colour, markersize=5, markeredgecolor="white")
        panel.set_xlim(*limits)  # a longer line is cut at the edge
        panel.xaxis.set_major_locator(plt.MaxNLocator(4, steps=[1, 2, 2.5, 5, 10]))
        panel.set_title(name, loc="left", fontsize=9)
        panel.grid(axis="x", alpha=0.25)
        panel.tick_params(axis="y", length=0)
        panel.spines["left"].set_visible(False)
    _row_names(panels[0, 0], order, labels, families, styles)
    panels[0, 0].set_ylim(len(order) - 0.4, -0.6)
    high = figure.get_size_inches()[1]
    figure.tight_layout(rect=(0, 0, 1, 1 - 0.45 / high))
    family_names(figure, panels[0, 0], title, styles)
    save(figure, path)


def _row_names(panel: Any, order: Sequence[str], labels, families, styles: Mapping[str, Style]) -> None:
    panel.set_yticks(range(len(order)), [labels[arm] for arm in order])
    for text, arm in zip(panel.get_yticklabels(), order):
        text.set_color(styles[families[arm]].colour)


def costs(
    path: Path, found: Mapping[str, Mapping[str, float]], labels: Mapping[str, str], families: Mapping[str, str],
    title: str,
) -> None:  # fmt: skip
    """A row per arm and a panel per quantity: a bar from zero with its value at its end."""
    quantities, order = list(next(iter(found.values()))), list(found)
    figure, panels = plt.subplots(
        1, len(quantities), figsize=(3.0 + 2.0 * len(quantities), 0.9 + 0.235 * len(order)), sharey=True, squeeze=False
    )
    styles = family_styles({arm: families[arm] for arm in order})
    for panel, name in zip(panels[0], quantities):
        values = np.array([found[arm][name] for arm in order])
        panel.barh(range(len(order)), values, color=[styles[families[arm]].colour for arm in order], height=0.62)
        for row, value in enumerate(values):
            shown = f"{value:,.0f}" if values.max() >= 100 else f"{value:.3g}"
            panel.annotate(shown, (value, row), (3, 0), textcoords="offset points", va="center", fontsize=7.5)
        panel.set_xlim(0, 1.28 * (values.max() or 1))
        panel.set_xticks([])
        panel.spines["bottom"].set_visible(False)
        panel.tick_params(axis="y", length=0)
        panel.set_title(name, loc="left", fontsize=9)
    _row_names(panels[0, 0], order, labels, families, styles)
    panels[0, 0].set_ylim(len(order) - 0.4, -0.6)
    high = figure.get_size_inches()[1]
    figure.tight_layout(rect=(0, 0, 1, 1 - 0.45 / high))
    family_names(figure, panels[0, 0], title, styles)
    save(figure, path)


def curves(
    path: Path, arms: Mapping[str, Sequence[Mapping[str, Any]]], labels: Mapping[str, str],
    families: Mapping[str, str], quantities: Mapping[str, str],
) -> None:  # fmt: skip
    """Per arm a panel; x is compute so far, a dashed line is the boundary of stages.

    arms   per arm its points along the way: {flops, boundary, <quantity>: (mean, low, high) over seeds}
    """
    columns = min(3, len(arms))
    rows = -(-len(arms) // columns)
    figure, panels = plt.subplots(
        rows, columns, figsize=(0.6 + 2.7 * columns, 0.5 + 2.2 * rows), sharey=True, squeeze=False
    )
    styles, shades = ["-", "--", ":", "-."], ["#0072B2", "#C04F00", "#00785A", "#333333"]
    for panel, (arm, points) in zip(panels.flat, arms.items()):
        x = np.array([point["flops"] for point in points]) / 1e12
        for (name, label), style, shade in zip(quantities.items(), styles, shades):
            mean, low, high = np.array([point[name] for point in points]).T
            panel.plot(x, mean, style, color=shade, label=label, lw=1.5)
            panel.fill_between(x, low, high, color=shade, alpha=0.12, lw=0)
        for at, point in zip(x, points):
            if point.get("boundary"):
                panel.axvline(at, color="#999999", lw=0.8, ls="--")
        name = textwrap.fill(labels[arm], 30)  # no wider than the panel
        panel.set_title(name, loc="left", color=family_styles(families)[families[arm]].colour, fontsize=9)
        panel.set_ylim(-0.03, 1.03)
    for position, panel in enumerate(panels.flat):
        panel.set_visible(position < len(arms))
        if position + columns >= len(arms):
            panel.set_xlabel("TFLOPs so far")
    high = figure.get_size_inches()[1]
    figure.tight_layout(rect=(0, 0, 1, 1 - 0.3 / high))
    handles, names = panels.flat[0].get_legend_handles_labels()
    left = panels[0, 0].get_position().x0
    legend = figure.legend(
        handles, names, loc="upper left", ncols=len(names) if columns > 1 else 2, frameon=False,
        bbox_to_anchor=(left - 0.01, 1.0), columnspacing=1.4,
    )  # fmt: skip
    for text, shade in zip(legend.get_texts(), shades):
        text.set_color(shade)
    save(figure, path)


def matrix(
    path: Path, values: np.ndarray, rows: Sequence[str], columns: Sequence[str], title: str, *, limit: float = 1.0,
    families: Sequence[str] | None = None,
) -> None:  # fmt: skip
    """A matrix of differences with its numbers in it: red is lost, blue is gained.

    families   of the rows: names get their colour, and a line stands where the next family begins
    """
    figure, axes = plt.subplots(figsize=(2.2 + 0.92 * len(columns), 0.9 + 0.27 * len(rows)))
    axes.imshow(values, cmap="RdBu", vmin=-limit, vmax=limit, aspect="auto")
    for i, j in np.ndindex(values.shape):
        value = values[i, j]
        text = "" if np.isnan(value) else f"{value:+.2f}".replace("-", "−")
        axes.text(
            j, i, text, ha="center", va="center", fontsize=8, color="white" if abs(value) > 0.6 * limit else "black"
        )
    axes.set_xticks(range(len(columns)), columns, fontsize=8)
    axes.xaxis.tick_top()
    axes.set_yticks(range(len(rows)), rows)
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    if families is not None:
        styles = family_styles(dict(enumerate(families)))
        for text, family in zip(axes.get_yticklabels(), families):
            text.set_color(styles[family].colour)
        for row in range(1, len(rows)):
            if families[row] != families[row - 1]:
                axes.axhline(row - 0.5, color="black", lw=1.2)
    axes.set_title(title, loc="left", pad=10, fontsize=10)
    figure.tight_layout()
    save(figure, path)
