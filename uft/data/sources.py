"""Where rows come from: a file, a data set on the hub, or anything in memory; all are read as numbered dicts.

A row that cannot be read (broken JSON, invalid UTF-8) comes out as a `BadRow`, so that it can be counted; a source
that cannot be read (no such file, nothing in it, a column that it lacks, a corrupt parquet) raises `DataError`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields, replace
from itertools import chain, islice
from pathlib import Path
from typing import Any

from tqdm import tqdm

from uft.data.files import SUFFIXES, Records, csv_value
from uft.data.origins import open_origin
from uft.data.rows import BadRow, DataError, Row, is_number, shown

__all__ = ["BadRow", "DataError", "Row", "Source", "Table", "as_sources", "open_table", "read_rows", "shown"]

ON_BAD_ROW = ("error", "drop")
TEXT_COLUMNS = {"text", "messages", "prompt", "completion", "chosen", "rejected"}
PEEK = 100  # rows looked at to learn whether answers repeat their prompt
# read from the text of a CSV as a bool or a number
CSV_VALUES = ("label", "score", "score_chosen", "score_rejected", "weight")


@dataclass(frozen=True)
class Source:
    """One data set of a mixture.

    name          what it is called in the mixture, in logs and in messages
    path          .json, .jsonl, .parquet or .csv file, folder written by `Dataset.save_to_disk`, or id on the hub
    data          instead of `path`: datasets.Dataset, list of dicts, anything whose [i] is a dict, or a
                  datasets.IterableDataset, which is read once (twice if it does not name its columns)
    kind          document, demonstration, pair, label or score; by default found from the columns
    columns       {our column name: theirs}
    split, subset which part of a hub data set; `revision`: which commit, branch or tag
    limit         use only the first so many rows; or `fraction`, the first so many of all
    weight        draws per epoch and row: 1 shows each row once, 2 twice, 0.5 every second one (a column called
                  weight is something else: the factor on the loss of each row)
    score         {column: weight}: the score is the weighted mean of these columns, each of which is in score_range
    score_range   (lowest, highest) score in the file, rescaled to [0, 1]; by default scores must lie there already
    chat          whether strings are what a user and an assistant say, to be put into the chat template
    special_tokens whether special tokens written out in the texts ("<|im_end|>") are meant to be such; by default
                  a row with one is a bad row, since a text could end its own turn, or speak in another role
    on_bad_row    "error", or "drop" (counted and reported); by default what `load_feedback` is told
    streaming     neither texts nor tokens are held in memory: a hub data set is read without being downloaded first,
                  and tokens are kept on disk.  A stream without end needs a `limit`
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
    special_tokens: bool = False
    on_bad_row: str | None = None
    streaming: bool = False
    revision: str | None = None

    def __post_init__(self):
        if (self.path is None) == (self.data is None):
            raise DataError(
                f"source {self.name!r} has {'neither path nor' if self.path is None else 'both path and'} data"
            )
        self._want(isinstance(self.name, str) and self.name != "", "name", "a name")
        self._want(isinstance(self.path, (str, Path, type(None))), "path", "a file, a folder or an id on the hub")
        self._want(_is_names(self.columns), "columns", "a mapping from our column names to theirs")
        self._want(isinstance(self.split, str), "split", "the name of a split")
        self._want(isinstance(self.subset, (str, type(None))), "subset", "the name of a subset")
        self._want(isinstance(self.revision, (str, type(None))), "revision", "a commit, a branch or a tag")
        self._want(isinstance(self.chat, bool), "chat", "true or false")
        self._want(isinstance(self.streaming, bool), "streaming", "true or false")
        self._want(isinstance(self.special_tokens, bool), "special_tokens", "true or false")
        self._want(self.on_bad_row in (None, *ON_BAD_ROW), "on_bad_row", " or ".join(ON_BAD_ROW))
        self._check_numbers()

    def _check_numbers(self) -> None:
        limit, fraction, ends = self.limit, self.fraction, self.score_range
        is_limit = limit is None or (isinstance(limit, int) and is_number(limit) and limit >= 1)
        self._want(is_limit, "limit", "a whole number from 1 on")
        self._want(fraction is None or (is_number(fraction) and 0 < fraction <= 1), "fraction", "0 < fraction <= 1")
        self._want(limit is None or fraction is None, "fraction", "limit or fraction, not both")
        self._want(is_number(self.weight) and self.weight > 0, "weight", "a positive number")
        self._want(_is_weights(self.score), "score", "a mapping from columns to positive weights")
        is_range = isinstance(ends, (list, tuple)) and len(ends) == 2 and all(map(is_number, ends))
        self._want(ends is None or (is_range and ends[0] < ends[1]), "score_range", "(lowest, highest)")

    def _want(self, ok: bool, option: str, wanted: str) -> None:
        if not ok:
            raise DataError(f"source {self.name!r}: {option} is {shown(getattr(self, option))}; want {wanted}")

    @property
    def where(self) -> str:
        """What error messages call it: the file's path as it was given, or the data set's name."""
        return f"data set {self.name!r}" if self.path is None else str(self.path)


def _is_names(value: Any) -> bool:
    return isinstance(value, Mapping) and all(isinstance(name, str) for name in (*value, *value.values()))


def _is_weights(value: Any) -> bool:
    if not isinstance(value, Mapping):
        return False
    return all(isinstance(name, str) and is_number(weight) and weight > 0 for name, weight in value.items())


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
    """Opens a source and looks at its first rows.  Raises `DataError` if there is nothing that can be read.

    Where no schema names the columns all rows are looked at, since a column may begin late.
    """
    columns, total, rows = opened = open_origin(source)
    limit, first = source.limit, {}
    if columns is None or (source.fraction is not None and total is None):
        first, total = _survey(opened, source)
    if source.fraction is not None:
        limit = max(1, int(total * source.fraction))
    if columns is None:
        columns = tuple(name for name, number in first.items() if limit is None or number < limit)
    records = islice(rows(), limit)
    head = list(islice(records, PEEK))
    while all(row.problem for row in head) and (more := next(records, None)):
        head.append(more)  # broken rows say nothing about the others
    if not head:
        raise DataError(f"{source.where}: found no rows; want at least one")
    theirs = set(source.columns.values())
    for option, named in (("columns", theirs), ("score", set(source.score))):
        if columns and not named <= set(columns):
            lacking = ", ".join(sorted(named - set(columns)))
            raise DataError(
                f"{source.where}: found columns {', '.join(columns)}; want {lacking}, which `{option}` names"
            )
    from_csv = source.path is not None and Path(source.path).suffix == ".csv"

    def renamed(row: Row) -> Row:
        if row.problem is not None:
            return row._replace(problem=row.problem.at(source.where, row.number, row.line, source.columns))
        values = row.values
        if theirs:
            # a column of theirs that happens to have our name gives way to the one that was asked for
            values = {name: value for name, value in values.items() if name not in theirs | set(source.columns)}
            values |= {ours: row.values[name] for ours, name in source.columns.items() if name in row.values}
        if from_csv:
            numbers = {*CSV_VALUES, *source.score}
            values = {k: csv_value(v) if k in numbers else v for k, v in values.items()}
        return row._replace(values=values)

    kept = (name for name in columns if name not in theirs | set(source.columns))
    head = [renamed(row) for row in head]
    if total is not None and limit is not None:
        total = min(total, limit)
    return Table((*source.columns, *kept) if columns else (), head, chain(head, map(renamed, records)), total)


def _survey(opened: Records, source: Source) -> tuple[dict[str, int], int]:
    """One pass over the rows: their columns, each with the row in which it is first, and how many rows there are."""
    first: dict[str, int] = {}
    total = 0
    # disable=None: a bar only where stderr is a terminal
    bar = tqdm(opened.rows(), f"{source.name}: columns", opened.total, unit=" rows", disable=None, delay=1, leave=False)
    for row in islice(bar, source.limit):
        total += 1
        if not row.values.keys() <= first.keys():
            first |= {name: row.number for name in row.values if name not in first}
    return first, total
