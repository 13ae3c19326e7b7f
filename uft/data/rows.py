"""One record of a source, and the errors that say what is wrong with one, or with all of them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from numbers import Real
from typing import Any, NamedTuple

Messages = list[dict[str, Any]]


class DataError(ValueError):
    """Data that cannot be used.  The message says where, what was found, and what was wanted."""


class BadRow(DataError):
    """One row that cannot be used; `reason` is the short name under which such rows are counted."""

    def __init__(self, reason, found, wanted, column=None, where="", row=None, line=None):
        super().__init__(reason, found, wanted, column, where, row, line)
        self.reason, self.found, self.wanted, self.column = reason, found, wanted, column
        self.where, self.row, self.line = where, row, line

    def at(self, where: str, row: int, line: int | None, columns: Mapping[str, str]) -> BadRow:
        """The same, knowing its place; the column gets the name that it has in the file."""
        theirs = columns.get(self.column, self.column)
        return BadRow(self.reason, self.found, self.wanted, theirs, where, row, line)

    def __str__(self):
        place = [self.where] if self.where else []
        if self.row is not None:
            place.append(f"row {self.row}" + (f" (line {self.line})" if self.line is not None else ""))
        if self.column is not None:
            place.append(f"column {self.column!r}")
        return f"{', '.join(place) or 'row'}: {self.reason}: found {self.found}; want {self.wanted}"


def shown(value: Any, width: int = 60) -> str:
    """A value as error messages show it: on one line, shortened, with its type unless it is a string or None."""
    text = repr(value)
    text = text if len(text) <= width else f"{text[: width - 1]}…"
    return text if value is None or isinstance(value, str) else f"{text} ({type(value).__name__})"


def is_number(value: Any) -> bool:
    """`1` is one; `"1"`, true, nan and what no float can hold are none."""
    try:
        return isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value)
    except OverflowError:
        return False


class Row(NamedTuple):
    """One record: its 0-based number, its values by our column names, its line in a text file; or what is wrong."""

    number: int
    values: dict[str, Any]
    line: int | None = None
    problem: BadRow | None = None


def record(number: int, values: Any, line: int | None = None) -> Row:
    wanted = "a mapping from column to value"
    if not isinstance(values, Mapping):
        return Row(number, {}, line, BadRow("not an object", shown(values), wanted))
    if not values:
        return Row(number, {}, line, BadRow("empty row", "no column", wanted))
    if other := [key for key in values if not isinstance(key, str)]:
        return Row(number, {}, line, BadRow("wrong type", f"column {shown(other[0])}", "names that are strings"))
    return Row(number, dict(values), line)


def bad_utf8(error: UnicodeDecodeError) -> BadRow:
    found = f"byte 0x{error.object[error.start]:02x} at position {error.start}"
    return BadRow("invalid UTF-8", found, "UTF-8")
