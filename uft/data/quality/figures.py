"""Figures of a report, from its numbers alone."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.ticker import PercentFormatter

from uft.data.quality.scores import logit

# Okabe & Ito's colours, told apart by the colour-blind
BETTER, WORSE, OTHER, WHOLE = "#0072B2", "#C04F00", "#595959", "#CC79A7"
STYLE = {"font.size": 9, "axes.spines.top": False, "axes.spines.right": False, "figure.dpi": 130, "savefig.dpi": 130}
MOST = 14  # rows of a figure of terms


def draw(findings: Mapping[str, Any], folder: Path) -> dict[str, str]:
    """Writes a PNG for each section that has something to show; file names by section."""
    drawn = {}
    with plt.rc_context(STYLE):
        for name, figure in FIGURES.items():
            made = figure(findings)
            if made is not None:
                made.savefig(folder / f"{name}.png", bbox_inches="tight", pil_kwargs={"optimize": True})
                plt.close(made)
                drawn[name] = f"{name}.png"
    return drawn


def _lengths(findings):
    found = findings["lengths"]
    figure, axes = plt.subplots(1, 2, figsize=(9, 0.8 + 0.27 * len(found)), sharey=True)
    at = np.arange(len(found))[::-1]
    for axis, what in zip(axes, ("prompt_characters", "response_characters")):
        q = {k: np.maximum([f[what][k] for f in found.values()], 1) for k in ("0.05", "0.25", "0.5", "0.75", "0.95")}
        axis.hlines(at, q["0.05"], q["0.95"], color=OTHER, linewidth=1)
        axis.hlines(at, q["0.25"], q["0.75"], color=BETTER, linewidth=5)
        axis.plot(q["0.5"], at, "o", color="white", markeredgecolor=BETTER)
        axis.set(xscale="log", xlabel=f"characters of {what.split('_')[0]}s (median, 25–75 %, 5–95 %)")
    axes[0].set_yticks(at, list(found))
    figure.tight_layout()
    return figure


def _duplicates(findings):
    found, rows = findings["duplicates"], findings["rows"]["groups"]
    groups = found["groups"]
    size = 1.6 + 0.33 * len(groups)
    figure, axes = plt.subplots(1, 2, figsize=(2 * size, size), sharey=True, layout="constrained")
    n = np.array([rows[g]["rows"] for g in groups])[:, None]
    for axis, way, title in zip(axes, ("near_prompt", "near_row"), ("prompt", "prompt and responses")):
        share = np.array(found[way]["shared"]) / n
        axis.imshow(share, vmin=0, vmax=1, cmap="Blues")
        for i, j in zip(*np.nonzero(share)):
            text = f"{share[i, j]:.0%}" if share[i, j] >= 0.01 else "<1%"
            axis.text(j, i, text, ha="center", va="center", fontsize=6, color="white" if share[i, j] > 0.6 else "black")
        axis.set_title(f"{title}: share of rows (left) near one of (below)", fontsize=8)
        axis.set_xticks(range(len(groups)), groups, rotation=90)
        axis.spines[:].set_visible(False)
    axes[0].set_yticks(range(len(groups)), groups)
    return figure


def _contamination(findings):
    if not findings["contamination"]:
        return None
    files = findings["contamination"]["files"]
    figure, axis = plt.subplots(figsize=(6.5, 0.9 + 0.6 * len(files)))
    at = np.arange(len(files))[::-1]
    n = findings["settings"]["overlap"]["ngram"]
    ways = (
        ("exact", "same prompt", OTHER), ("near", "near prompt", BETTER), ("ngram", f"{n}-gram", WORSE),
        ("whole", "whole, taken for a template", WHOLE),
    )  # fmt: skip
    for k, (way, label, colour) in enumerate(ways):
        share = [f["prompts_found"][way] / f["prompts"] for f in files.values()]
        bars = axis.barh(at + 0.2 * (1.5 - k), share, 0.18, color=colour, label=label)
        axis.bar_label(bars, [f"{f['prompts_found'][way]:,}" for f in files.values()], padding=2, fontsize=7)
    axis.set_yticks(at, list(files))
    axis.set_xlabel("share of evaluation prompts found in training data")
    axis.legend(frameon=False, fontsize=8)
    axis.margins(x=0.1)
    axis.xaxis.set_major_formatter(PercentFormatter(1))
    return figure


def _length_bias(findings):
    found = findings["length_bias"]
    if not found:
        return None
    figure, axis = plt.subplots(figsize=(6.5, 0.9 + 0.35 * len(found)))
    at = np.arange(len(found))[::-1]
    shares = [f["chosen_longer"] for f in found.values()]
    for y, s in zip(at, shares):
        if s["share"] is not None:
            axis.plot([s["low"], s["high"]], [y, y], color=BETTER)
            axis.plot(s["share"], y, "o", color=BETTER)
    axis.axvline(0.5, color=OTHER, linewidth=0.8, linestyle=":")
    axis.set_yticks(at, [f"{g} ({f['pairs']:,})" for g, f in found.items()])
    axis.set(
        xlim=(0, 1),
        ylim=(-0.6, len(found) - 0.4),
        xlabel="share of pairs whose chosen response is longer (95 % interval)",
    )
    return figure


def _scores(findings):
    found = findings["scores"]
    if not found:
        return None
    figure, axes = plt.subplots(len(found), 1, figsize=(6.5, 2.2 * len(found)), squeeze=False)
    edges = np.linspace(0, 1, 21)
    for axis, (group, f) in zip(axes[:, 0], found.items()):
        counts = np.array(f["histogram"]) / f["responses"]
        colours = [WORSE if left < 0.5 else BETTER for left in edges[:-1]]
        axis.bar(edges[:-1], counts, 0.05, align="edge", color=colours, edgecolor="white", linewidth=0.5)
        axis.axvline(0.5, color=OTHER, linewidth=0.8, linestyle=":")
        above, below = f["share_above_half"], 1 - f["share_above_half"]
        axis.set(xlim=(0, 1), ylabel="share", title=f"{group}: {below:.0%} made less likely, {above:.0%} likelier")
        top = axis.secondary_xaxis("bottom")
        ticks = np.array([0.05, 0.25, 0.5, 0.75, 0.95])
        top.set_xticks(ticks, [f"{s:g}\n{r:+.0f}" for s, r in zip(ticks, logit(ticks) / f["beta"])])
        axis.set_xticks([])
    axes[-1, 0].set_xlabel(
        f"score, and below it UNA's target log-ratio in nats (β = {next(iter(found.values()))['beta']:g})", labelpad=28
    )
    figure.tight_layout()
    return figure


def _rates(name):
    def figure(findings):
        lines = [
            (f"{group}: {term}", f)
            for group, found in findings[name].items()
            for term, f in found["responses"].items()
            if f["better"]["of"] and f["worse"]["of"]
        ]
        lines = sorted(lines, key=lambda line: line[1]["p"])[:MOST]
        if not lines:
            return None
        drawn, axis = plt.subplots(figsize=(6.5, 0.9 + 0.28 * len(lines)))
        for y, (_, f) in zip(range(len(lines) - 1, -1, -1), lines):
            for side, colour, mark, shift in (("better", BETTER, "o", 0.12), ("worse", WORSE, "s", -0.12)):
                s = f[side]
                axis.plot([s["low"], s["high"]], [y + shift] * 2, color=colour, linewidth=1)
                label = f"{side} responses" if y == 0 else None
                axis.plot(s["share"], y + shift, mark, color=colour, markersize=4, label=label, clip_on=False)
        axis.set_yticks(range(len(lines) - 1, -1, -1), [label for label, _ in lines])
        axis.set_xlabel("share of responses that hold a term (95 % interval)")
        axis.set_xlim(left=0)
        axis.legend(frameon=False, fontsize=8, ncol=2, loc="lower left", bbox_to_anchor=(0, 1))
        return drawn

    return figure


FIGURES = {
    "lengths": _lengths, "duplicates": _duplicates, "contamination": _contamination, "length_bias": _length_bias,
    "scores": _scores, "terms": _rates("terms"), "unsafe": _rates("unsafe"),
}  # fmt: skip
