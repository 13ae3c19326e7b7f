"""Data sets on disk, whole or not at all."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any

from uft.data.rows import BadRow, DataError, Row, shown
from uft.data.sources import Source

FORMATS = ("parquet", "jsonl")
BATCH = 1024  # rows


@contextmanager
def written_aside(folder: Path) -> Iterator[Path]:
    """A folder beside this one that takes its place at the end; where something fails, nothing is changed."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    aside = folder.with_name(f".{folder.name}.{os.getpid()}")
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir()
    try:
        yield aside
        for path in (*aside.iterdir(), aside):
            _sync(path)
        if folder.exists():
            old = folder.with_name(f".{folder.name}.{os.getpid()}.old")
            os.rename(folder, old)
            try:
                os.rename(aside, folder)
            except BaseException:
                os.rename(old, folder)
                raise
            shutil.rmtree(old)
        else:
            os.rename(aside, folder)
        _sync(folder.parent)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_lines(path: Path, rows: Iterable[Mapping[str, Any]]) -> int:
    """JSON lines.  Raises `BadRow`, whose row is that of the result, for a value that JSON does not have: objects, NaN,
    text that is no UTF-8."""
    written = 0
    with open(path, "w", encoding="utf-8") as file:
        for row in rows:
            try:
                file.write(_json(row) + "\n")
            except (TypeError, ValueError):
                wanted = "`format: parquet`, or a value that JSON has"
                raise _unwritable(row, written, lambda name, value: _json({name: value}), wanted) from None
            written += 1
    return written


def _json(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False, allow_nan=False)
    if not text.isascii():
        text.encode()  # lone surrogates are no UTF-8
    return text


def _unwritable(row: Mapping[str, Any], number: int, write: Callable[[str, Any], Any], wanted: str) -> BadRow:
    """What is wrong with the first column that cannot be written."""
    for name, value in row.items():
        try:
            write(name, value)
        except (TypeError, ValueError, OverflowError, NotImplementedError) as error:  # pyarrow's are these
            found = f"{shown(value)} ({' '.join(str(error).split())})"
            return BadRow("cannot be written", found, wanted, name, row=number)
    return BadRow("cannot be written", shown(dict(row)), wanted, row=number)


def write_rows(path: Path, rows: Iterable[Mapping[str, Any]], origin: Path | None, numbers: Iterable[str] = ()) -> int:
    """Parquet or JSON lines, as the path says; the number of rows.  Parquet from parquet keeps the schema of `origin`,
    but for the columns `numbers`, which become float64."""
    if path.suffix == ".jsonl":
        return write_lines(path, rows)
    import pyarrow
    import pyarrow.parquet

    if origin is not None and origin.suffix == ".parquet":
        schema = pyarrow.parquet.read_schema(origin)
        for name in numbers:
            schema = schema.set(schema.get_field_index(name), pyarrow.field(name, pyarrow.float64()))
    else:
        rows = list(rows)
        columns = list(dict.fromkeys(name for row in rows for name in row))
        rows = [{name: row.get(name) for name in columns} for row in rows]
        try:
            schema = pyarrow.Table.from_pylist(rows).schema
        except UnicodeEncodeError:
            raise _unwritable_text(rows) from None
        except (pyarrow.ArrowException, TypeError, ValueError, OverflowError) as error:
            raise DataError(
                f"{path.name}: found columns that parquet cannot hold: {error}; want `format: jsonl`"
            ) from None
    written, rows = 0, iter(rows)
    with pyarrow.parquet.ParquetWriter(path, schema, compression="zstd") as writer:
        while batch := list(islice(rows, BATCH)):
            try:
                writer.write_table(pyarrow.Table.from_pylist(batch, schema=schema))
            except (TypeError, ValueError, OverflowError, NotImplementedError):
                raise _bad_of(batch, written, schema) from None
            written += len(batch)
    return written


def _unwritable_text(rows: Sequence[Mapping[str, Any]]) -> BadRow:
    """The first value that is no UTF-8."""

    def write(name: str, value: Any) -> None:
        json.dumps({name: value}, ensure_ascii=False, default=str).encode()

    found = (_unwritable(row, number, write, "text that is UTF-8") for number, row in enumerate(rows))
    return next(problem for problem in found if problem.column is not None)


def _bad_of(batch: Sequence[Mapping[str, Any]], start: int, schema: Any) -> BadRow:
    """The first row of a batch, at `start` of the result, that does not fit the schema of a parquet file."""
    import pyarrow

    for number, row in enumerate(batch, start):
        problem = _unwritable(
            row,
            number,
            lambda name, value: pyarrow.array([value], schema.field(name).type),
            "what the file's type holds",
        )
        if problem.column is not None:
            return problem
    return BadRow(
        "cannot be written", f"rows {start} to {start + len(batch) - 1}", "rows of the file's schema", row=start
    )


class Digest:
    """sha256 of a source: of the file where it is one, else of its rows as JSON with sorted keys."""

    def __init__(self, source: Source):
        self.path = None if source.path is None or not Path(source.path).is_file() else Path(source.path)
        self._rows = hashlib.sha256()

    def add(self, row: Row) -> None:
        if self.path is None:
            self._rows.update(json.dumps(row.values, sort_keys=True, default=str).encode() + b"\n")

    def hexdigest(self) -> str:
        if self.path is None:
            return self._rows.hexdigest()
        with open(self.path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
