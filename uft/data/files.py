"""The formats of files: JSON lines, a JSON list, CSV and parquet, each as columns and numbered rows.

Row numbers are 0-based everywhere and count records: blank lines between JSON lines are no records, the header of a
CSV is none either.  In text files the line (1-based) is named beside the row.
"""

from __future__ import annotations

import csv
import json
import re
from collections import Counter
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

from uft.data.rows import BadRow, DataError, Row, bad_utf8, record, shown

SUFFIXES = (".json", ".jsonl", ".parquet", ".csv")


class Records(NamedTuple):
    """The columns and the number of rows, None where only reading tells; the rows, from the first on with each call."""

    columns: tuple[str, ...] | None
    total: int | None
    rows: Callable[[], Iterator[Row]]


def open_file(path: Path, where: str, whole: bool = True) -> Records:
    """Raises `DataError`, calling the file `where`, if it cannot be read as what its suffix says.

    `whole` says whether it may be read whole, as a JSON list is; all other formats are read as they go.
    """
    if path.suffix not in SUFFIXES:
        raise DataError(f"{where}: found a file ending in {path.suffix!r}; want {', '.join(SUFFIXES)}")
    try:
        with open(path, "rb") as file:
            start = file.read(4096)
    except OSError as error:
        raise DataError(f"{where}: cannot be read: {error}") from None
    if not start:
        raise DataError(f"{where}: found an empty file; want rows")
    if path.suffix == ".parquet":
        return _parquet(path, where)
    if path.suffix == ".csv":
        return _csv(path, where)
    first_line = start.removeprefix(b"\xef\xbb\xbf").lstrip().split(b"\n")[0].strip()
    if path.suffix == ".json" and first_line.startswith(b"["):
        if not whole:
            raise DataError(f"{where}: found a JSON list, which is read whole; want one object per line for streaming")
        return _json_list(path, where)
    if first_line == b"{":
        raise DataError(f"{where}: found a JSON object over several lines; want one object per line, or a list of them")
    return Records(None, None, lambda: _json_lines(path))


# ---- parquet ----


def _parquet(path: Path, where: str) -> Records:
    import pyarrow
    import pyarrow.parquet

    broken = (pyarrow.ArrowException, OSError)
    try:
        # otherwise a row group is read whole, and some files are one row group
        file = pyarrow.parquet.ParquetFile(path, buffer_size=1 << 20, pre_buffer=False)
    except broken as error:
        raise DataError(f"{where}: found a corrupt parquet file: {error}") from error

    def rows():
        number = 0
        try:
            for batch in file.iter_batches(batch_size=1024):
                for values in _dicts(batch):
                    bad = isinstance(values, UnicodeDecodeError)
                    yield Row(number, {}, None, bad_utf8(values)) if bad else record(number, values)
                    number += 1
        except broken as error:
            raise DataError(f"{where}: found a corrupt parquet file behind row {number}: {error}") from error

    return Records(tuple(file.schema_arrow.names), file.metadata.num_rows, rows)


def _dicts(batch: Any) -> list[dict | UnicodeDecodeError]:
    try:
        return batch.to_pylist()
    except UnicodeDecodeError as error:
        return [error] if len(batch) == 1 else [each for i in range(len(batch)) for each in _dicts(batch.slice(i, 1))]


# ---- JSON ----


class DuplicateKey(ValueError):
    """A key that stands twice in one object, of which Python's reader would keep the last."""

    def as_bad_row(self) -> BadRow:
        return BadRow("duplicate key", f"{shown(self.args[0])} twice in one object", "each key once")


def _each_key_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        raise DuplicateKey(Counter(key for key, _ in pairs).most_common(1)[0][0])
    return values


_decoder = json.JSONDecoder(object_pairs_hook=_each_key_once)


def _json_list(path: Path, where: str) -> Records:
    try:
        text = path.read_bytes().decode("utf-8-sig")
        try:
            values = _decoder.decode(text)
        except DuplicateKey:
            json.loads(text)  # what is broken as well is that first
            values = list(_elements(text))
    except UnicodeDecodeError as error:
        bad = bad_utf8(error)
        raise DataError(f"{where}: {bad.reason}: found {bad.found}; want {bad.wanted}") from None
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where}: found broken JSON: {error}; want a list of objects") from None

    def rows():
        for number, value in enumerate(values):
            bad = isinstance(value, DuplicateKey)
            yield Row(number, {}, None, value.as_bad_row()) if bad else record(number, value)

    return Records(None, len(values), rows)


def _elements(text: str) -> Iterator[Any]:
    """The elements of a list in valid JSON, with a `DuplicateKey` in place of each that has one."""
    between, skim = re.compile(r"[\s,]*"), json.JSONDecoder()
    at = between.match(text, text.index("[") + 1).end()
    while text[at] != "]":
        try:
            value, end = _decoder.raw_decode(text, at)
        except DuplicateKey as twice:
            value, end = twice, skim.raw_decode(text, at)[1]
        yield value
        at = between.match(text, end).end()


def _json_lines(path: Path) -> Iterator[Row]:
    number = 0
    with open(path, "rb") as file:
        for line, content in enumerate(file, start=1):
            if line == 1:
                content = content.removeprefix(b"\xef\xbb\xbf")
            if not content.strip():
                continue
            yield _json_line(number, content, line)
            number += 1


def _json_line(number: int, content: bytes, line: int) -> Row:
    try:
        return record(number, _decoder.decode(content.decode("utf-8")), line)
    except UnicodeDecodeError as error:
        bad = bad_utf8(error)
    except DuplicateKey as twice:
        bad = twice.as_bad_row()
    except (ValueError, RecursionError) as error:
        text = content.decode("utf-8").strip()
        bad = BadRow("broken JSON", f"{shown(text)} ({error})", "one JSON object per line")
    return Row(number, {}, line, bad)


# ---- CSV ----


def _csv(path: Path, where: str) -> Records:
    csv.field_size_limit(2**31 - 1)

    def lines():
        # surrogateescape keeps bytes that are no UTF-8, so that the row they stand in can be named
        with open(path, encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
            reader = csv.reader(file, strict=True)
            try:
                for values in reader:
                    yield reader.line_num - sum(value.count("\n") for value in values), values
            except csv.Error as error:
                raise DataError(f"{where}, line {reader.line_num}: found broken CSV: {error}") from None

    columns = tuple(next(lines(), (0, ()))[1])
    if len(set(columns)) < len(columns) or not all(columns):
        raise DataError(f"{where}: found the header {', '.join(columns)!r}; want a different name per column")

    def rows():
        for number, (line, values) in enumerate(row for row in islice(lines(), 1, None) if row[1]):
            if len(values) == len(columns):
                yield Row(number, dict(zip(columns, values)), line)
            else:
                wanted = f"{len(columns)}, as in the header"
                yield Row(number, {}, line, BadRow("broken CSV", f"{len(values)} values", wanted))

    return Records(columns, None, rows)


def csv_value(text: str) -> Any:
    """A bool or a number, where the text of a CSV is one."""
    try:
        return {"true": True, "false": False}[text.strip().lower()] if text.strip().isalpha() else float(text)
    except (KeyError, ValueError):
        return text  # the reader refuses it, and shows it
