"""Tokenised once: stores found again by what they were made from, and made by one process per machine.

A store's name is a fingerprint of all that decides its content:

    the data      every byte of a file or folder; every row of what is in memory; of a streamed hub data set the commit,
                  which is looked up first and then streamed.  Neither dates nor sizes are trusted
    the options   all of `Source` but its name, its weight and what is done about bad rows, which the store lists
    the tokens    tokenizer, chat template, max_length (`Template.fingerprint`)
    the code      the files of this package, and the versions of the libraries that render and tokenise

What has no such fingerprint (an IterableDataset in memory), or no folder to stay in, goes to a temporary folder.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
import tempfile
import weakref
from collections.abc import Iterator, Mapping
from dataclasses import fields, replace
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

from uft.data.check import SourceReport, read_examples
from uft.data.columns import FORMAT, Examples
from uft.data.origins import is_stream, open_origin
from uft.data.ranks import forget_failure, is_first, made_by_first, told_by_first
from uft.data.rows import BadRow, DataError
from uft.data.sources import Source
from uft.data.store import load, write
from uft.data.template import Template

logger = logging.getLogger(__name__)

# options that do not change the tokens of a row; `path`, `data` and `revision` count by what they stand for
WITHOUT = ("name", "path", "data", "weight", "on_bad_row", "streaming", "revision")
LIBRARIES = ("transformers", "tokenizers", "jinja2")


class Place(NamedTuple):
    """Where a store is or will be.  The revision is the one to be streamed."""

    path: Path
    key: str
    revision: str | None
    temporary: bool


def belongs_on_disk(source: Source) -> bool:
    return source.streaming or is_stream(_data_of(source))


def stored(
    source: Source, template: Template, on_bad_row: str, folder: str | Path | None = None
) -> tuple[Examples, SourceReport]:
    """The examples of a source from its store in this folder, which is made where there is none, and its report."""
    path, key, revision, temporary = told_by_first(lambda: _place(source, template, folder))

    def make() -> None:
        report = SourceReport(source.name, source.where)
        examples = read_examples(replace(source, revision=revision), report, template, on_bad_row)
        write(path, key, examples, lambda: {"report": _as_json(report.or_refuse())})

    made_by_first(path, make)
    examples, facts = load(path, key, verify=is_first())
    if temporary and is_first():
        weakref.finalize(examples.columns, _remove, path.parent, os.getpid())
    report = _from_json(facts["report"], source)
    if report.bad_rows and on_bad_row == "error":
        raise report.bad_rows[0]  # the store was made when they were to be dropped
    logger.info("%s: %d examples are in %s", source.where, len(examples), path)
    return examples, report


def _place(source: Source, template: Template, folder: str | Path | None) -> Place:
    identity, revision = (None, source.revision) if folder is None else _identity(source)
    if identity is None:
        parent = Path(tempfile.mkdtemp(prefix="uft-tokens-"))
        return Place(parent / "tokens", "temporary", revision, True)
    options = [(f.name, _plain(getattr(source, f.name))) for f in fields(Source) if f.name not in WITHOUT]
    parts = [FORMAT, identity, options, template.fingerprint(), _code(), [(name, _version(name)) for name in LIBRARIES]]
    key = hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:32]
    path = Path(folder).expanduser() / f"tokens-{key}"
    forget_failure(path)
    return Place(path, key, revision, False)


def _remove(folder: Path, owner: int) -> None:
    if os.getpid() == owner:  # not in a worker forked from it
        shutil.rmtree(folder, ignore_errors=True)


# ---- what a source holds ----


def _data_of(source: Source) -> Any:
    return source.data.get(source.split) if isinstance(source.data, Mapping) else source.data


def _identity(source: Source) -> tuple[Any, str | None]:
    """What tells this content from any other, None where nothing does; and the revision that was looked at."""
    if source.data is not None:
        return None if is_stream(_data_of(source)) else _rows(source), source.revision
    path = Path(source.path).expanduser()
    if path.is_dir():
        files = sorted(file for file in path.rglob("*") if file.is_file())
        return [(file.relative_to(path).as_posix(), _bytes(file, source)) for file in files], source.revision
    if path.exists():
        return [path.suffix, _bytes(path, source)], source.revision
    if not source.streaming:
        return _rows(source), source.revision
    commit = _commit(source)
    return [str(source.path), commit], commit


def _bytes(path: Path, source: Source) -> str:
    try:
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise DataError(f"{source.where}: cannot be read: {error}") from None


def _rows(source: Source) -> str:
    columns, _, rows = open_origin(source)
    digest = hashlib.sha256(repr(columns).encode())
    for row in islice(rows(), source.limit):
        digest.update(json.dumps([_plain(row.values), str(row.problem)]).encode())
    return digest.hexdigest()


def _commit(source: Source) -> str:
    from huggingface_hub import HfApi

    try:
        return HfApi().dataset_info(str(source.path), revision=source.revision).sha
    except Exception as error:
        raise DataError(
            f"{source.where}: found no such file, and its commit on the hub cannot be looked up: "
            f"{type(error).__name__}: {error}"
        ) from error


def _plain(value: Any) -> Any:
    """As JSON can hold it, the order of mappings kept."""
    if isinstance(value, Mapping):
        return [[str(key), _plain(each)] for key, each in value.items()]
    if isinstance(value, (list, tuple)):
        return [_plain(each) for each in value]
    if value is None or isinstance(value, (str, int, float, bool)):
        return value
    return _plain(value.tolist()) if hasattr(value, "tolist") else repr(value)


@cache
def _code() -> str:
    here = Path(__file__).parent
    digest = hashlib.sha256()
    for path in [*sorted(here.glob("*.py")), here.parent / "feedback.py"]:
        digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


# ---- the report of a store ----


def _as_json(report: SourceReport) -> dict[str, Any]:
    counts = {f.name: getattr(report, f.name) for f in fields(report) if f.name not in ("name", "where", "bad_rows")}
    return counts | {"bad_rows": [list(row.args) for row in report.bad_rows]}


def _from_json(facts: Mapping[str, Any], source: Source) -> SourceReport:
    """As if the source had been read now: its name and its path may be others than when the store was made."""

    def bad_rows() -> Iterator[BadRow]:
        for reason, found, wanted, column, _, row, line in facts["bad_rows"]:
            yield BadRow(reason, found, wanted, column, source.where, row, line)

    own = {"bad_rows": list(bad_rows()), "notes": tuple(facts["notes"])}
    return SourceReport(source.name, source.where, **{**facts, **own})
