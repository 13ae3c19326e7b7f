"""loss_plane.png: where a run is between the losses of its likelihood and of its preference terms, while it trains."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from transformers import TrainerCallback

from uft.watching.facts import Axes, axes_of
from uft.watching.lines import PROGRESS, read
from uft.watching.path import Point, boundaries, path_of, thinned
from uft.watching.writers import tensorboard_of

PICTURE = "loss_plane.png"
SECONDS = 5.0  # between two drawings at least
SHARE = 0.01  # of the time that drawing may take


class LossPlane(TrainerCallback):
    """Draws when something was logged, when training ends, and never so often that it takes 1 % of the time."""

    def __init__(self, trainer: Any):
        self.trainer = trainer
        self._next = 0.0
        self._drawn: int | None = None  # points of the last picture

    def on_train_begin(self, args, state, control, **kwargs) -> None:
        self._next, self._drawn = time.monotonic() + SECONDS, None

    def on_log(self, args, state, control, **kwargs) -> None:
        if self.trainer.is_in_train and time.monotonic() >= self._next:
            self._draw(args, state)

    def on_train_end(self, args, state, control, **kwargs) -> None:
        self._draw(args, state)

    def _draw(self, args: Any, state: Any) -> None:
        if not state.is_world_process_zero:
            return
        began, place, folder = time.monotonic(), self.trainer.watched.place, Path(args.output_dir)
        axes = place.axes if place else axes_of(getattr(self.trainer, "objective", None), self.trainer.train_dataset)
        if not all(axes):
            return
        names, out = (None, folder) if place is None else (place.names[: place.position + 1], folder.parent)
        journals = [read(path / PROGRESS) for path in ([folder] if names is None else [out / name for name in names])]
        paths = [path_of(journals, axes, evaluated) for evaluated in (False, True)]
        points = sum(map(len, paths))
        if max(map(len, paths)) >= 2 and points != self._drawn:
            with contextlib.suppress(OSError):
                pixels = draw(*paths, axes, out / PICTURE, names)
                if (writer := tensorboard_of(self.trainer)) is not None:
                    writer.add_image("loss_plane", pixels, state.global_step, dataformats="HWC")
            self._drawn = points
        cost = time.monotonic() - began
        self._next = time.monotonic() + max(SECONDS, cost / SHARE)


def draw(
    trained: Sequence[Point], evaluated: Sequence[Point], axes: Axes, file: Path, stages: Sequence[str] | None = None
) -> np.ndarray:
    """Writes the picture, aside and then under its name; returns its pixels, uint8 [height, width, 3].

    The path of training is thin, that of evaluation strong; both are broken where a coordinate is held.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 4.8), dpi=110, layout="constrained")
    canvas = FigureCanvasAgg(figure)
    ax = figure.subplots()
    for points, color, width, name in ((trained, "#8fa8c8", 1.2, "training"), (evaluated, "#c2410c", 2.0, "held out")):
        if len(points) < 2:
            continue
        points = thinned(points, 400)
        for a, b in _pieces(points):
            style = ":" if not all(points[b - 1].measured) else "-"
            piece = points[max(a - 1, 0) : b]
            ax.plot([p.x for p in piece], [p.y for p in piece], style, color=color, lw=width)
        few = len(points) <= 40
        ax.plot([p.x for p in points], [p.y for p in points], "." if few else "", color=color, ms=4)
        ax.plot(points[0].x, points[0].y, "o", mfc="white", color=color, ms=7)
        ax.plot([], [], color=color, lw=width, label=name)
        ax.plot(points[-1].x, points[-1].y, "o", color=color, ms=7)
        for i in boundaries(points):
            ax.plot(points[i].x, points[i].y, "D", mfc="white", color=color, ms=7)
            if stages:
                ax.annotate(
                    f"{stages[points[i].stage]} begins", (points[i].x, points[i].y), (8, -14), fontsize=8,
                    textcoords="offset points", color=color,
                )  # fmt: skip
    if not all(all(p.measured) for p in (*trained, *evaluated)):
        ax.plot([], [], ":", color="#555555", label="dotted: only one is measured")
    ax.set_xlabel(f"{' + '.join(axes[0])} (nats)")
    ax.set_ylabel(" + ".join(axes[1]))
    last = (evaluated or trained)[-1]
    where = f", {stages[last.stage]}" if stages else ""
    ax.set_title(f"step {max(p[-1].step for p in (trained, evaluated) if p):,}{where}: ○ begin, ● now", fontsize=10)
    ax.legend(fontsize=8, frameon=False)
    ax.grid(alpha=0.25)
    canvas.draw()
    pixels = np.asarray(canvas.buffer_rgba())[..., :3].copy()
    aside = file.with_name(f".{file.name}.{os.getpid()}")
    figure.savefig(aside, format="png", dpi=figure.dpi)  # else whatever rcParams says
    os.replace(aside, file)
    return pixels


def _pieces(points: Sequence[Point]) -> list[tuple[int, int]]:
    """Stretches [a, b) of points that are measured alike."""
    ends = [i for i in range(1, len(points)) if points[i].measured != points[i - 1].measured]
    return list(zip([0, *ends], [*ends, len(points)]))
