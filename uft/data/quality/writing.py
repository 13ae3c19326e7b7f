"""Data sets on disk, whole or not at all."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any

from uft.data.rows import DataError, Row, shown
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
    """JSON lines.  Raises `DataError` for a value that JSON does not have."""
    written = 0
    with open(path, "w", encoding="utf-8") as file:
        for row in rows:
            try:
                file.write(json.dumps(row, ensure_ascii=False) + "\n")
            except TypeError as error:
                bad = next((k for k, v in row.items() if not _is_json(v)), "?")
                wanted = "`format: parquet`, or a value that JSON has"
                raise DataError(f"column {bad!r}: found {shown(row.get(bad))} ({error}); want {wanted}") from None
            written += 1
    return written


def _is_json(value: Any) -> bool:
    try:
        json.dumps(value)
    except TypeError:
        return False
    return True


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
        except pyarrow.ArrowException as error:
            raise DataError(
                f"{path.name}: found columns that parquet cannot hold: {error}; want `format: jsonl`"
            ) from None
    written, rows = 0, iter(rows)
    with pyarrow.parquet.ParquetWriter(path, schema, compression="zstd") as writer:
        while batch := list(islice(rows, BATCH)):
            writer.write_table(pyarrow.Table.from_pylist(batch, schema=schema))
            written += len(batch)
    return written


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
