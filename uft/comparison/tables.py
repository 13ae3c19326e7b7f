"""Tables for Markdown and for the terminal, and numbers as they stand in them."""

from __future__ import annotations

import math
from collections.abc import Sequence

from uft.comparison.statistics import Interval

# endings of metrics of which less is better
LESS_IS_BETTER = (
    "loss", "nll", "nll_sequence", "perplexity", "kl", "kl_sequence", "reverse_kl", "reverse_kl_sequence", "F",
    "F_true", "nll_change", "worse", "displaced", "gap", "rejected",
)  # fmt: skip


def less_is_better(metric: str) -> bool:
    """By the metric's own name, whichever source or group it is of; gaps between groups count as they are."""
    parts = metric.removeprefix("eval_").split("/")
    if "group" in parts:
        parts = parts[: parts.index("group")]
    return parts[0] == "loss" or "false_refusal" in parts or parts[-1] in LESS_IS_BETTER


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """First column to the left, the others to the right."""

    def line(cells: Sequence[str]) -> str:
        return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"

    return "\n".join([line(header), "|---|" + "--:|" * (len(header) - 1), *map(line, rows)])


def terminal_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    widths = [max(len(row[k]) for row in [header, *rows]) for k in range(len(header))]

    def line(row: Sequence[str]) -> str:
        cells = (cell.ljust(w) if k == 0 else cell.rjust(w) for k, (cell, w) in enumerate(zip(row, widths)))
        return "  ".join(cells).rstrip()

    return "\n".join([line(header), "  ".join("─" * w for w in widths), *map(line, rows)])


def shown(found: Interval) -> str:
    """A mean, ± half of its 95 % t-interval where there are several seeds."""
    if not math.isfinite(found.mean):
        return "–"
    # three digits behind the point are too many for a log-probability of a response
    digits = 3 if abs(found.mean) < 100 else 1
    half = (found.high - found.low) / 2
    return f"{found.mean:.{digits}f}" + (f" ± {half:.{digits}f}" if math.isfinite(half) else "")


def signed(found: Interval) -> str:
    """A difference with its 95 % t-interval."""
    if not math.isfinite(found.mean):
        return "–"
    known = math.isfinite(found.low)
    return f"{found.mean:+.3f}" + (f" [{found.low:+.3f}, {found.high:+.3f}]" if known else "")
