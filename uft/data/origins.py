"""Where a source's rows are read from: a file, a folder of save_to_disk, the hub, data in memory, a stream.

Files of lines and parquet are read as they go, so they may be larger than memory; a JSON list is read whole.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from uft.data.files import SUFFIXES, Records, open_file
from uft.data.rows import DataError, Row, bad_utf8, record

if TYPE_CHECKING:
    from uft.data.sources import Source


def open_origin(source: Source) -> Records:
    """Raises `DataError` if there is nothing that can be read."""
    if source.data is not None:
        return _data(source, source.data)
    path = Path(source.path).expanduser()
    if path.is_dir():
        return _data(source, _from_folder(source, path))
    if not path.exists():
        return _data(source, _from_hub(source))
    return open_file(path, source.where, whole=not source.streaming)


def is_stream(data: Any) -> bool:
    """Whether these are rows that come one after the other and cannot be counted, as in datasets.IterableDataset."""
    return hasattr(data, "column_names") and hasattr(data, "__iter__") and not hasattr(data, "__len__")


def _from_hub(source: Source) -> Any:
    path = str(source.path)
    if Path(path).suffix in SUFFIXES or not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", path) or path.startswith("."):
        raise DataError(f"{source.where}: found no such file; want a file, or the id of a data set on the hub")
    import datasets

    options = {"streaming": True} if source.streaming else {}
    options |= {} if source.revision is None else {"revision": source.revision}
    try:
        return datasets.load_dataset(path, source.subset, split=source.split, **options)
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


def _data(source: Source, data: Any) -> Records:
    if isinstance(data, Mapping):
        if source.split not in data:
            raise DataError(f"{source.where}: found splits {', '.join(map(str, data))}; want {source.split!r}")
        data = data[source.split]
    if is_stream(data):
        return _stream(source, data)
    if not hasattr(data, "__len__") or not hasattr(data, "__getitem__") or isinstance(data, (str, bytes)):
        raise DataError(f"{source.where}: found {type(data).__name__}; want rows that can be counted and indexed")

    def rows():
        for number in range(len(data)):
            try:
                yield record(number, data[number])
            except UnicodeDecodeError as error:
                yield Row(number, {}, None, bad_utf8(error))
            except KeyError:
                raise DataError(
                    f"{source.where}: found {type(data).__name__}, which has no row {number}; want rows by position"
                ) from None

    columns = getattr(data, "column_names", None)
    return Records(tuple(columns) if columns else None, len(data), rows)


def _stream(source: Source, data: Any) -> Records:
    """Where the stream names no columns, `open_table` goes through it once more than otherwise."""

    def rows():
        number = 0
        try:
            for values in data:
                yield record(number, values)
                number += 1
        except Exception as error:  # whatever the network, a decoder or a map function has to say
            raise DataError(
                f"{source.where}: the stream broke at row {number}: {type(error).__name__}: {error}"
            ) from error

    return Records(tuple(data.column_names) if data.column_names else None, None, rows)
