"""Where rows come from: a file, a data set on the hub, or anything in memory; all are read as numbered dicts.

Row numbers are 0-based everywhere and count records: blank lines between JSON lines are no records, the header of a
CSV is none either.  In text files the line (1-based) is named beside the row.

A row that cannot be read (broken JSON, invalid UTF-8) comes out as a `BadRow`, so that it can be counted; a source
that cannot be read (no such file, nothing in it, a column that it lacks, a corrupt parquet) raises `DataError`.
"""

from __future__ import annotations

import csv
import json
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields, replace
from itertools import chain, islice
from numbers import Real
from pathlib import Path
from typing import Any, NamedTuple

SUFFIXES = (".json", ".jsonl", ".parquet", ".csv")
ON_BAD_ROW = ("error", "drop")
TEXT_COLUMNS = {"text", "messages", "prompt", "completion", "chosen", "rejected"}
PEEK = 100  # rows looked at to learn the columns of a file without a schema
CSV_VALUES = ("label", "score", "score_chosen", "score_rejected")  # read from the text of a CSV as a bool or a number


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


@dataclass(frozen=True)
class Source:
    """One data set of a mixture.

    path          .json, .jsonl, .parquet or .csv file, folder written by `Dataset.save_to_disk`, or id on the hub
    data          instead of `path`: datasets.Dataset, list of dicts, or anything whose [i] is a dict
    kind          document, demonstration, pair, label or score; by default found from the columns
    columns       {our column name: theirs}
    split, subset which part of a hub data set
    limit         use only the first so many rows; or `fraction`, the first so many of all
    weight        draws per epoch and row: 1 shows each row once, 2 twice, 0.5 every second one
    score         {column: weight}: the score is the weighted mean of these columns, each of which is in score_range
    score_range   (lowest, highest) score in the file, rescaled to [0, 1]; by default scores must lie there already
    chat          whether strings are what a user and an assistant say, to be put into the chat template
    on_bad_row    "error", or "drop" (counted and reported); by default what `load_feedback` is told
    """

    name: str
    path: str | Path | None = None
    data: Any = field(default=None, repr=False)
    kind: str | None = None
    columns: Mapping[str, str] = field(default_factory=dict)
    split: str = "train"
    subset: str | None = None
    limit: int | None = None
    fraction: float | None = None
    weight: float = 1.0
    score: Mapping[str, float] = field(default_factory=dict)
    score_range: tuple[float, float] | None = None
    chat: bool = False
    on_bad_row: str | None = None

    def __post_init__(self):
        def want(ok: bool, option: str, wanted: str):
            if not ok:
                raise DataError(f"source {self.name!r}: {option} is {shown(getattr(self, option))}; want {wanted}")

        def number(value: Any) -> bool:
            return isinstance(value, Real) and math.isfinite(value)

        if (self.path is None) == (self.data is None):
            raise DataError(
                f"source {self.name!r} has {'neither path nor' if self.path is None else 'both path and'} data"
            )
        want(isinstance(self.name, str) and self.name != "", "name", "a name")
        want(isinstance(self.columns, Mapping), "columns", "a mapping from our column names to theirs")
        want(
            self.limit is None or (isinstance(self.limit, int) and self.limit >= 1), "limit", "a whole number from 1 on"
        )
        want(
            self.fraction is None or (number(self.fraction) and 0 < self.fraction <= 1), "fraction", "0 < fraction <= 1"
        )
        want(self.limit is None or self.fraction is None, "fraction", "limit or fraction, not both")
        want(number(self.weight) and self.weight > 0, "weight", "a positive number")
        is_weights = isinstance(self.score, Mapping) and all(number(w) and w > 0 for w in self.score.values())
        want(is_weights, "score", "a mapping from columns to positive weights")
        want(isinstance(self.chat, bool), "chat", "true or false")
        want(self.on_bad_row in (None, *ON_BAD_ROW), "on_bad_row", " or ".join(ON_BAD_ROW))
        ends = self.score_range
        is_range = isinstance(ends, (list, tuple)) and len(ends) == 2 and all(map(number, ends)) and ends[0] < ends[1]
        want(ends is None or is_range, "score_range", "(lowest, highest)")

    @property
    def where(self) -> str:
        """What error messages call it: the file's path as it was given, or the data set's name."""
        return f"data set {self.name!r}" if self.path is None else str(self.path)


def as_sources(data: Any, name: str = "train") -> list[Source]:
    """Sources from what people write: {name: source}, a list of sources, or one source.

    A source is a `Source`, a path or hub id, options with `path` among them (as in YAML), or rows in memory.
    """
    if isinstance(data, Mapping) and not _is_options(data) and not hasattr(data, "column_names"):
        return [_source(each, key) for key, each in data.items()]
    if (
        isinstance(data, (list, tuple))
        and data
        and all(_is_options(d) or isinstance(d, (str, Path, Source)) for d in data)
    ):
        sources = [_source(each) for each in data]
        names = [source.name for source in sources]
        if twice := [name for name in names if names.count(name) > 1]:
            raise DataError(f"two sources are named {twice[0]!r}; want a name of its own for each")
        return sources
    return [_source(data, None if _names_itself(data) else name)]


def _names_itself(data: Any) -> bool:
    return isinstance(data, (str, Path, Source)) or _is_options(data)


def _is_options(data: Any) -> bool:
    return isinstance(data, Mapping) and isinstance(data.get("path"), (str, Path)) and not TEXT_COLUMNS & set(data)


def _source(data: Any, name: str | None = None) -> Source:
    if isinstance(data, Source):
        return data if name is None else replace(data, name=name)
    if isinstance(data, (str, Path)):
        data = {"path": data}
    options = dict(data) if _is_options(data) else {"data": data}
    known = [f.name for f in fields(Source)]
    if unknown := [key for key in options if key not in known]:
        raise DataError(f"source {options['path']!r}: option {unknown[0]!r} is unknown; want {', '.join(known)}")
    if name is None and "name" not in options:
        path = Path(options["path"])
        name = path.stem if path.suffix in SUFFIXES else path.name
    return Source(**options | ({} if name is None else {"name": name}))


class Row(NamedTuple):
    """One record: its 0-based number, its values by our column names, its line in a text file; or what is wrong."""

    number: int
    values: dict[str, Any]
    line: int | None = None
    problem: BadRow | None = None


@dataclass(frozen=True)
class Table:
    """A source, opened: its columns under our names, its first rows, all its rows, and their number if it is known."""

    columns: tuple[str, ...]
    head: list[Row]
    rows: Iterator[Row]
    total: int | None


def read_rows(source: Source) -> Iterator[Row]:
    """The rows of a source, in its order; those that cannot be read carry a `problem`."""
    return open_table(source).rows


def open_table(source: Source) -> Table:
    """Opens a source and looks at its first rows.  Raises `DataError` if there is nothing that can be read."""
    columns, total, records = _records(source)
    limit = source.limit
    if source.fraction is not None:
        total = sum(1 for _ in _records(source)[2]) if total is None else total
        limit = max(1, int(total * source.fraction))
    records = islice(records, limit)
    head = list(islice(records, PEEK))
    while all(record.problem for record in head) and (more := next(records, None)):
        head.append(more)  # the columns are those of the first row that can be read
    if not head:
        raise DataError(f"{source.where}: found no rows; want at least one")
    if columns is None:
        columns = tuple(dict.fromkeys(key for record in head for key in record.values))
    theirs = set(source.columns.values())
    for option, named in (("columns", theirs), ("score", set(source.score))):
        if columns and not named <= set(columns):
            lacking = ", ".join(sorted(named - set(columns)))
            raise DataError(
                f"{source.where}: found columns {', '.join(columns)}; want {lacking}, which `{option}` names"
            )
    from_csv = source.path is not None and Path(source.path).suffix == ".csv"

    def renamed(record: Row) -> Row:
        if record.problem is not None:
            place = (source.where, record.number, record.line, source.columns)
            return record._replace(problem=record.problem.at(*place))
        values = record.values
        if theirs:
            # a column of theirs that happens to have our name gives way to the one that was asked for
            values = {name: value for name, value in values.items() if name not in theirs | set(source.columns)}
            values |= {ours: record.values[name] for ours, name in source.columns.items() if name in record.values}
        if from_csv:
            numbers = {*CSV_VALUES, *source.score}
            values = {k: _csv_value(v) if k in numbers else v for k, v in values.items()}
        return record._replace(values=values)

    kept = (name for name in columns if name not in theirs | set(source.columns))
    head = [renamed(record) for record in head]
    if total is not None and limit is not None:
        total = min(total, limit)
    return Table((*source.columns, *kept) if columns else (), head, chain(head, map(renamed, records)), total)


# ---- formats: each gives (columns or None, number of rows or None, records) ----

Records = tuple[tuple[str, ...] | None, int | None, Iterator[Row]]


def _records(source: Source) -> Records:
    if source.data is not None:
        return _memory(source, source.data)
    path = Path(source.path).expanduser()
    if path.is_dir():
        return _memory(source, _from_folder(source, path))
    if not path.exists():
        return _memory(source, _from_hub(source))
    if path.suffix not in SUFFIXES:
        raise DataError(f"{source.where}: found a file ending in {path.suffix!r}; want {', '.join(SUFFIXES)}")
    try:
        with open(path, "rb") as file:
            start = file.read(4096)
    except OSError as error:
        raise DataError(f"{source.where}: cannot be read: {error}") from None
    if not start:
        raise DataError(f"{source.where}: found an empty file; want rows")
    if path.suffix == ".parquet":
        return _parquet(source, path)
    if path.suffix == ".csv":
        return _csv(source, path)
    is_list = path.suffix == ".json" and start.removeprefix(b"\xef\xbb\xbf").lstrip().startswith(b"[")
    return _json_list(source, path) if is_list else (None, None, _json_lines(path))


def _from_hub(source: Source) -> Any:
    path = str(source.path)
    if Path(path).suffix in SUFFIXES or not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", path) or path.startswith("."):
        raise DataError(f"{source.where}: found no such file; want a file, or the id of a data set on the hub")
    import datasets

    try:
        return datasets.load_dataset(path, source.subset, split=source.split)
    except Exception as error:
        raise DataError(
            f"{source.where}: found no such file, and as a data set on the hub (subset {source.subset!r}, split "
            f"{source.split!r}) it cannot be loaded: {type(error).__name__}: {error}"
        ) from error


def _from_folder(source: Source, path: Path) -> Any:
    import datasets

    try:
        return datasets.load_from_disk(str(path))
    except Exception as error:
        raise DataError(
            f"{source.where}: found a folder that cannot be loaded; want one written by Dataset.save_to_disk, or a "
            f"file: {type(error).__name__}: {error}"
        ) from error


def _memory(source: Source, data: Any) -> Records:
    if isinstance(data, Mapping):
        if source.split not in data:
            raise DataError(f"{source.where}: found splits {', '.join(map(str, data))}; want {source.split!r}")
        data = data[source.split]
    if not hasattr(data, "__len__") or not hasattr(data, "__getitem__") or isinstance(data, (str, bytes)):
        raise DataError(f"{source.where}: found {type(data).__name__}; want rows that can be counted and indexed")

    def records():
        for number in range(len(data)):
            try:
                yield _record(number, data[number])
            except UnicodeDecodeError as error:
                yield Row(number, {}, None, _bad_utf8(error))
            except KeyError:
                raise DataError(
                    f"{source.where}: found {type(data).__name__}, which has no row {number}; want rows by position"
                ) from None

    columns = getattr(data, "column_names", None)
    return (tuple(columns) if columns else None), len(data), records()


def _parquet(source: Source, path: Path) -> Records:
    import pyarrow
    import pyarrow.parquet

    broken = (pyarrow.ArrowException, OSError)
    try:
        file = pyarrow.parquet.ParquetFile(path)
    except broken as error:
        raise DataError(f"{source.where}: found a corrupt parquet file: {error}") from error

    def records():
        number = 0
        try:
            for batch in file.iter_batches(batch_size=1024):
                for values in _dicts(batch):
                    bad = isinstance(values, UnicodeDecodeError)
                    yield Row(number, {}, None, _bad_utf8(values)) if bad else _record(number, values)
                    number += 1
        except broken as error:
            raise DataError(f"{source.where}: found a corrupt parquet file behind row {number}: {error}") from error

    return tuple(file.schema_arrow.names), file.metadata.num_rows, records()


def _dicts(batch: Any) -> list[dict | UnicodeDecodeError]:
    try:
        return batch.to_pylist()
    except UnicodeDecodeError as error:
        return [error] if len(batch) == 1 else [each for i in range(len(batch)) for each in _dicts(batch.slice(i, 1))]


def _json_list(source: Source, path: Path) -> Records:
    try:
        values = json.loads(path.read_bytes().decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        bad = _bad_utf8(error)
        raise DataError(f"{source.where}: {bad.reason}: found {bad.found}; want {bad.wanted}") from None
    except (ValueError, RecursionError) as error:
        raise DataError(f"{source.where}: found broken JSON: {error}; want a list of objects") from None
    return None, len(values), (_record(number, value) for number, value in enumerate(values))


def _json_lines(path: Path) -> Iterator[Row]:
    number = 0
    with open(path, "rb") as file:
        for line, content in enumerate(file, start=1):
            if line == 1:
                content = content.removeprefix(b"\xef\xbb\xbf")
            if not content.strip():
                continue
            try:
                yield _record(number, json.loads(content.decode("utf-8")), line)
            except UnicodeDecodeError as error:
                yield Row(number, {}, line, _bad_utf8(error))
            except (ValueError, RecursionError) as error:
                text = content.decode("utf-8").strip()
                found = f"{shown(text)} ({error})"
                yield Row(number, {}, line, BadRow("broken JSON", found, "one JSON object per line"))
            number += 1


def _csv(source: Source, path: Path) -> Records:
    csv.field_size_limit(2**31 - 1)

    def rows():
        # surrogateescape keeps bytes that are no UTF-8, so that the row they stand in can be named
        with open(path, encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
            reader = csv.reader(file, strict=True)
            try:
                for values in reader:
                    yield reader.line_num - sum(value.count("\n") for value in values), values
            except csv.Error as error:
                raise DataError(f"{source.where}, line {reader.line_num}: found broken CSV: {error}") from None

    columns = tuple(next(rows(), (0, ()))[1])
    if len(set(columns)) < len(columns) or not all(columns):
        raise DataError(f"{source.where}: found the header {', '.join(columns)!r}; want a different name per column")

    def records():
        for number, (line, values) in enumerate(row for row in islice(rows(), 1, None) if row[1]):
            if len(values) == len(columns):
                yield Row(number, dict(zip(columns, values)), line)
            else:
                wanted = f"{len(columns)}, as in the header"
                yield Row(number, {}, line, BadRow("broken CSV", f"{len(values)} values", wanted))

    return columns, None, records()


def _csv_value(text: str) -> Any:
    try:
        return {"true": True, "false": False}[text.strip().lower()] if text.strip().isalpha() else float(text)
    except (KeyError, ValueError):
        return text  # the reader refuses it, and shows it


def _record(number: int, values: Any, line: int | None = None) -> Row:
    if isinstance(values, Mapping):
        return Row(number, dict(values), line)
    return Row(number, {}, line, BadRow("not an object", shown(values), "a mapping from column to value"))


def _bad_utf8(error: UnicodeDecodeError) -> BadRow:
    found = f"byte 0x{error.object[error.start]:02x} at position {error.start}"
    return BadRow("invalid UTF-8", found, "UTF-8")
