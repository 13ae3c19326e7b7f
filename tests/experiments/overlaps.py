"""Whether anything written in a figure lies on something else that is written."""

from __future__ import annotations

from itertools import combinations
from typing import Any, NamedTuple

from matplotlib.text import Text

from experiments import figures


class Drawn(NamedTuple):
    name: str
    panels: int
    texts: list[tuple[str, Any]]  # everything legible with its box in pixels
    legend_entries: int

    @property
    def overlapping(self) -> list[tuple[str, str]]:
        """Pairs of texts whose boxes share more than a pixel in both directions."""
        found = []
        for (a, box), (b, other) in combinations(self.texts, 2):
            across = min(box.x1, other.x1) - max(box.x0, other.x0)
            along = min(box.y1, other.y1) - max(box.y0, other.y0)
            if across > 1.0 and along > 1.0:
                found.append((a, b))
        return found


def caught(monkeypatch) -> list[Drawn]:
    """What is in figures that are saved from here on."""
    found, save = [], figures.save

    def look_and_save(figure, path):
        legends = [*figure.legends, *(a.get_legend() for a in figure.axes if a.get_legend())]
        entries = max((len(legend.get_texts()) for legend in legends), default=0)
        found.append(Drawn(path.name, len(figure.axes), written(figure), entries))
        save(figure, path)

    for module in ("experiments.figures", "experiments.study_figures", "experiments.kl_law"):
        monkeypatch.setattr(f"{module}.save", look_and_save)
    return found


def written(figure: Any) -> list[tuple[str, Any]]:
    figure.canvas.draw()
    renderer = figure.canvas.get_renderer()
    hidden = {id(t) for axes in figure.axes if not axes.get_visible() for t in axes.findobj(Text)}
    for axes in figure.axes:  # ticks outside the limits are kept but not drawn
        for axis in (axes.xaxis, axes.yaxis):
            shown = {id(text) for tick in axis._update_ticks() for text in (tick.label1, tick.label2)}
            ticks = [*axis.get_major_ticks(), *axis.get_minor_ticks()]
            hidden |= {id(t) for tick in ticks for t in (tick.label1, tick.label2)} - shown
    texts = [t for t in figure.findobj(Text) if t.get_visible() and t.get_text().strip() and id(t) not in hidden]
    return [(t.get_text(), t.get_window_extent(renderer)) for t in texts]
