"""Numbers as text: durations, rates, sparklines, and a path in the plane drawn with characters."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

BARS = "▁▂▃▄▅▆▇█"


def duration(seconds: float | None) -> str:
    """3:20, 1:02:03, 2 d 3:04:05; "?" for None."""
    if seconds is None or not math.isfinite(seconds):
        return "?"
    minutes, s = divmod(max(0, round(seconds)), 60)
    hours, m = divmod(minutes, 60)
    days, h = divmod(hours, 24)
    clock = f"{h}:{m:02}:{s:02}" if hours else f"{m}:{s:02}"
    return f"{days} d {clock}" if days else clock


def short(value: float | None) -> str:
    """Four digits at most, as people read them: 1.234, 0.0123, 12.3k, 4.5M."""
    if value is None:
        return ""
    if not math.isfinite(value):
        return str(value)
    size = abs(value)
    for factor, letter in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e4, "k")):
        if size >= factor:
            unit = 1e3 if letter == "k" else factor
            return f"{value / unit:.3g}{letter}" if size / unit < 999.5 else f"{value / unit:.0f}{letter}"
    if float(value).is_integer():
        return f"{value:.0f}"
    return f"{value:.4g}" if size >= 1e-3 else f"{value:.2e}"


def sparkline(values: Sequence[float], width: int = 24) -> str:
    """The course of a metric: means over stretches of equal length, from lowest to highest; gaps where not finite."""
    values = list(values)
    if not values:
        return ""
    n = min(width, len(values))
    cells: list[float | None] = []
    for i in range(n):
        stretch = [v for v in values[i * len(values) // n : (i + 1) * len(values) // n] if math.isfinite(v)]
        cells.append(sum(stretch) / len(stretch) if stretch else None)
    known = [v for v in cells if v is not None]
    low, high = (min(known), max(known)) if known else (0.0, 0.0)
    scale = (len(BARS) - 1) / (high - low) if high > low else 0.0
    return "".join(" " if v is None else BARS[round((v - low) * scale)] for v in cells)


def plane(
    path: Sequence[tuple[float, float]], marks: Sequence[int] = (), width: int = 48, height: int = 12
) -> list[str]:
    """Lines of a picture of a path: o its begin, • on the way, + at marked positions in it, ● its end.

    Empty for a path that goes nowhere.
    """
    if len(path) < 2:
        return []
    (x0, x1), (y0, y1) = ((min(v), max(v)) for v in zip(*path))

    def cell(x: float, y: float) -> tuple[int, int]:
        column = round((x - x0) / (x1 - x0) * (width - 1)) if x1 > x0 else width // 2
        row = round((y1 - y) / (y1 - y0) * (height - 1)) if y1 > y0 else height // 2
        return row, column

    grid = [[" "] * width for _ in range(height)]
    for (xa, ya), (xb, yb) in itertools.pairwise(path):
        (ra, ca), (rb, cb) = cell(xa, ya), cell(xb, yb)
        n = max(abs(rb - ra), abs(cb - ca), 1)
        for k in range(n + 1):
            grid[ra + round((rb - ra) * k / n)][ca + round((cb - ca) * k / n)] = "·"
    for i, point in enumerate(path):
        row, column = cell(*point)
        grid[row][column] = "o" if i == 0 else "+" if i in marks else "•" if grid[row][column] not in "o+" else "o"
    for i, letter in ((0, "o"), *((m, "+") for m in marks), (len(path) - 1, "●")):
        row, column = cell(*path[i])
        grid[row][column] = letter
    labels = [short(y1), *[""] * (height - 2), short(y0)]
    margin = max(map(len, labels))
    lines = [f"{label:>{margin}} ┤{''.join(row).rstrip()}" for label, row in zip(labels, grid)]
    right = short(x1)
    lines.append(" " * margin + " └" + "─" * width)
    lines.append(" " * (margin + 2) + short(x0).ljust(width - len(right)) + right)
    return lines
