"""Draws the figures of docs/concepts.md: python docs/figures/draw.py"""

from pathlib import Path

import matplotlib
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch

HERE = Path(__file__).parent
DEMONSTRATIONS, PREFERENCES, BOTH, GREY = "#4c72b0", "#dd8452", "#8172b3", "#555555"


def box(
    ax: Axes, x: float, y: float, width: float, height: float, text: str, colour: str, *, full: bool = True
) -> None:
    """A rounded box with its lower left corner at (x, y)."""
    face, ink = (colour, "white") if full else ("white", colour)
    style = "round,pad=0,rounding_size=0.12"
    ax.add_patch(FancyBboxPatch((x, y), width, height, boxstyle=style, facecolor=face, edgecolor=colour, linewidth=1.4))
    ax.text(x + width / 2, y + height / 2, text, ha="center", va="center", color=ink, fontsize=10)


def arrow(ax: Axes, start: tuple[float, float], end: tuple[float, float], *, dashed: bool = False) -> None:
    line = "--" if dashed else "-"
    ax.add_patch(
        FancyArrowPatch(start, end, arrowstyle="-|>", mutation_scale=11, color=GREY, linewidth=1.1, linestyle=line)
    )


def canvas(width: float, height: float) -> Axes:
    """Axes whose units are those of the boxes, without a frame."""
    figure, ax = plt.subplots(figsize=(width * 0.8, height * 0.8))
    ax.set(xlim=(0, width), ylim=(0, height), aspect="equal")
    ax.axis("off")
    figure.subplots_adjust(0, 0, 1, 1)
    return ax


def step() -> None:
    """One optimiser step: rows, the terms that are on them, what they are divided by, the loss."""
    ax = canvas(13.2, 5.2)
    headings = {1.5: "rows of the step", 5.35: "terms on them", 9.1: "over the whole step", 12.2: "loss"}
    for x, heading in headings.items():
        ax.text(x, 4.85, heading, ha="center", va="center", color=GREY, fontsize=10)
    rows = (
        ("demonstrations", "Σ −log π(token)", "÷ T tokens", DEMONSTRATIONS),
        ("pairs", "Σ pairwise(rewards)", "÷ P pairs", PREFERENCES),
        ("labels, scores", "Σ pointwise(reward, target)", "÷ S responses", PREFERENCES),
        ("any rows", "Σ KL(π ‖ π_ref)", "÷ T' tokens", BOTH),
    )
    for k, (rows_of, term, count, colour) in enumerate(rows):
        y = 3.55 - 1.1 * k
        box(ax, 0.1, y, 2.8, 0.8, rows_of, colour)
        box(ax, 3.6, y, 3.5, 0.8, term, colour, full=False)
        box(ax, 7.8, y, 2.6, 0.8, count, colour, full=False)
        arrow(ax, (2.95, y + 0.4), (3.55, y + 0.4))
        arrow(ax, (7.15, y + 0.4), (7.75, y + 0.4))
        arrow(ax, (10.45, y + 0.4), (11.4, 2.3 + (y + 0.4 - 2.3) * 0.2))
    box(ax, 11.45, 1.85, 1.6, 0.9, "weighted\nsum", GREY)
    save(ax, "step")


def stages() -> None:
    """Sequential and unified training along time, each with its reference."""
    ax = canvas(13.2, 5.0)
    ax.text(0.1, 4.65, "sequential: two stages", color=GREY, fontsize=11, va="center")
    ax.text(0.1, 2.05, "unified: one stage", color=GREY, fontsize=11, va="center")
    box(ax, 0.1, 3.2, 1.7, 0.9, "base", GREY)
    box(ax, 2.6, 3.2, 3.6, 0.9, "likelihood of\ndemonstrations", DEMONSTRATIONS)
    box(ax, 7.0, 3.2, 3.6, 0.9, "pairs, labels, scores", PREFERENCES)
    box(ax, 11.4, 3.2, 1.7, 0.9, "policy", GREY)
    for start, end in ((1.85, 2.55), (6.25, 6.95), (10.65, 11.35)):
        arrow(ax, (start, 3.65), (end, 3.65))
    ax.text(6.6, 2.6, "reference: the policy as it is here", ha="center", va="center", color=GREY, fontsize=9)
    arrow(ax, (6.6, 2.75), (6.6, 3.55), dashed=True)
    box(ax, 0.1, 0.6, 1.7, 0.9, "base", GREY)
    box(ax, 2.6, 0.6, 8.0, 0.9, "both in every step, one objective", BOTH)
    box(ax, 11.4, 0.6, 1.7, 0.9, "policy", GREY)
    arrow(ax, (1.85, 1.05), (2.55, 1.05))
    arrow(ax, (10.65, 1.05), (11.35, 1.05))
    ax.text(2.2, 0.15, "reference: the policy as it is here", ha="left", va="center", color=GREY, fontsize=9)
    arrow(ax, (2.1, 0.2), (2.1, 0.95), dashed=True)
    save(ax, "stages")


def save(ax: Axes, name: str) -> None:
    # the same file whenever it is drawn; white, so that it can be read on a dark page too
    metadata = {"Date": None}
    ax.figure.savefig(HERE / f"{name}.svg", metadata=metadata, facecolor="white")
    plt.close(ax.figure)


if __name__ == "__main__":
    matplotlib.use("Agg")
    plt.rcParams |= {"svg.hashsalt": "unified-finetuning", "font.family": "DejaVu Sans"}
    step()
    stages()
