"""Markdown of what others have written: names, settings, answers of models."""

from __future__ import annotations

import re
from collections.abc import Sequence

from uft.reporting.values import Row

_SPECIAL = re.compile(r"[\\`*\[\]<>&|$~#!]|(?<![A-Za-z0-9])_|_(?![A-Za-z0-9])")


def plain(text: str) -> str:
    """Text that reads in Markdown as it is, on one line."""
    text = _SPECIAL.sub(lambda found: f"&#{ord(found[0])};", " ".join(text.split()))
    # an address would become a link, which a page that opens offline need not have
    return re.sub(r"(https?):", r"\1&#58;", text)


def lines(text: str, at_most: int = 700) -> str:
    """An answer for a cell of a table: its lines kept, and cut where it is long."""
    text = text.strip("\n")
    left_out = len(text) - at_most
    if left_out > 0:
        text = text[:at_most]
    # blank lines and control characters would end the table
    kept = [plain(re.sub(r"[\x00-\x08\x0b-\x1f\x7f\u0085\u2028\u2029]", " ", line)) for line in text.split("\n")]
    said = "<br>".join(kept) or "*nothing*"
    return f"{said} … *({left_out:,} more characters)*" if left_out > 0 else said


def table(header: Sequence[str], rows: Sequence[Sequence[str]], *, prose: bool = False) -> str:
    """Cells are Markdown.  The first column to the left; the others to the right, or, of prose, to the left."""

    def line(cells: Sequence[str]) -> str:
        return f"| {' | '.join(cell or ' ' for cell in cells)} |"

    side = ":--|" if prose else "--:|"
    return "\n".join([line(header), f"|:--|{side * (len(header) - 1)}", *map(line, rows)])


def rows_table(rows: Sequence[Row], names: Sequence[str], *, across: int) -> str:
    """A column per run, or, of more than `across` runs, a row per run.  The best are bold."""
    cells = [[f"**{plain(c)}**" if i in row.best else plain(c) for i, c in enumerate(row.cells)] for row in rows]
    labels, names = [plain(row.label) for row in rows], [plain(name) for name in names]
    if len(names) <= across:
        return table(["", *names], [[label, *each] for label, each in zip(labels, cells)])
    return table(["run", *labels], [[name, *(each[i] for each in cells)] for i, name in enumerate(names)])
