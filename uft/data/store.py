"""Stores: tokenised examples on disk, one file per column, written in bounded memory and read where they are needed.

A store is a folder.  Its `store.json` says how long each column is and its sha256, and keeps what was told of the
source (its report).  It is written aside and renamed, so that it is whole or absent.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import socket
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import IO, Any

import numpy as np

from uft.data.columns import COLUMNS, FORMAT, Buffers, Examples
from uft.data.rows import DataError
from uft.feedback import Example

LONG = ("tokens", "in_loss")
BLOCK = 1 << 20  # tokens or examples that are held before they are written


@dataclass(frozen=True)
class _File:
    """A column too long to be mapped: read by position, so that what was read does not count as memory of this process,
    and a file that someone cuts short is an error and no signal."""

    path: Path
    dtype: Any
    items: int

    @cached_property
    def _file(self):
        return open(self.path, "rb", buffering=0)

    def __getstate__(self):
        return {"path": self.path, "dtype": self.dtype, "items": self.items}

    def __setstate__(self, state):
        self.__dict__.update(state)

    def __len__(self) -> int:
        return self.items

    def __getitem__(self, part: slice) -> np.ndarray:
        size = np.dtype(self.dtype).itemsize
        wanted = (part.stop - part.start) * size
        read = os.pread(self._file.fileno(), wanted, part.start * size) if wanted else b""
        if len(read) < wanted:
            raise _damaged(self.path, f"{len(read)} bytes at {part.start * size}", f"{wanted}")
        return np.frombuffer(read, self.dtype)


class _Mapped(Mapping[str, Any]):
    """The columns of a store; a process that gets them from another opens them itself."""

    def __init__(self, folder: Path, items: Mapping[str, int]):
        self.folder, self.items_of = folder, dict(items)
        self._open = {name: self._opened(name) for name in COLUMNS}

    def _opened(self, name: str) -> Any:
        path, dtype, items = self.folder / f"{name}.bin", COLUMNS[name], self.items_of[name]
        if name in LONG:
            return _File(path, dtype, items)
        return np.asarray(np.memmap(path, dtype, "r", shape=(items,))) if items else np.zeros(0, dtype)

    def __reduce__(self):
        return _Mapped, (self.folder, self.items_of)

    def __getitem__(self, name: str) -> Any:
        return self._open[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._open)

    def __len__(self) -> int:
        return len(self._open)


def write(folder: Path, key: str, examples: Iterable[Example], facts: Callable[[], Mapping[str, Any]]) -> None:
    """Writes a store in bounded memory.  `facts` is asked at the end for what to keep beside the examples.

    Where another process has written the same store meanwhile, that one stays.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    _remove_abandoned(folder)
    aside = folder.with_name(f".{folder.name}.{socket.gethostname()}.{os.getpid()}")
    aside.mkdir()
    try:
        columns = _write_columns(aside, examples)
        with open(aside / "store.json", "w") as file:
            json.dump({"format": FORMAT, "key": key, "columns": columns, **facts()}, file)
            _sync(file)
        _sync_folder(aside)
        try:
            os.rename(aside, folder)
        except OSError:
            if not (folder / "store.json").exists():
                raise
        _sync_folder(folder.parent)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def _write_columns(folder: Path, examples: Iterable[Example]) -> dict[str, dict[str, Any]]:
    """How many items each column has, and its sha256."""
    buffers, items, digests = Buffers(), dict.fromkeys(COLUMNS, 0), {name: hashlib.sha256() for name in COLUMNS}
    with ExitStack() as stack:
        files = {name: stack.enter_context(open(folder / f"{name}.bin", "wb")) for name in COLUMNS}

        def hand_on() -> None:
            for name, held in buffers.held.items():
                if held:
                    digests[name].update(held)
                    items[name] += len(held)
                    held.tofile(files[name])
                    del held[:]

        for example in examples:
            buffers.add(example)
            if len(buffers.held["tokens"]) > BLOCK or len(buffers.held["kind"]) > BLOCK:
                hand_on()
        buffers.end()
        hand_on()
        for file in files.values():
            _sync(file)
    return {name: {"items": items[name], "sha256": digests[name].hexdigest()} for name in COLUMNS}


def _sync(file: IO) -> None:
    file.flush()
    os.fsync(file.fileno())


def _sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _remove_abandoned(folder: Path) -> None:
    """What processes of this machine that are no more had begun to write."""
    start = f".{folder.name}.{socket.gethostname()}."
    for other in folder.parent.glob(f"{start}*"):
        pid = other.name.removeprefix(start)
        if pid.isdigit() and not Path(f"/proc/{pid}").exists() and Path("/proc/self").exists():
            shutil.rmtree(other, ignore_errors=True)


def load(folder: Path, key: str, *, verify: bool = True) -> tuple[Examples, dict[str, Any]]:
    """The examples of a store and the facts kept beside them.  `verify` reads every file and compares its sha256.

    Raises `DataError` for a store that is damaged.
    """
    path = folder / "store.json"
    try:
        facts = json.loads(path.read_text())
        columns = {name: (facts["columns"][name]["items"], facts["columns"][name]["sha256"]) for name in COLUMNS}
        found = {"format": facts["format"], "key": facts["key"]}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise _damaged(path, f"{type(error).__name__}: {error}", "a description of the store's columns") from None
    if found != {"format": FORMAT, "key": key}:
        raise _damaged(path, f"format {found['format']}, key {found['key']!r}", f"format {FORMAT}, key {key!r}")
    for name, (items, sha256) in columns.items():
        file = folder / f"{name}.bin"
        try:
            size = file.stat().st_size
        except OSError as error:
            raise _damaged(file, f"{error}", "a readable file") from None
        wanted = items * np.dtype(COLUMNS[name]).itemsize
        if size != wanted:
            raise _damaged(file, f"{size} bytes", f"{wanted}")
        if verify:
            with open(file, "rb") as content:
                digest = hashlib.file_digest(content, "sha256").hexdigest()
            if digest != sha256:
                raise _damaged(file, f"content with sha256 {digest[:12]}…", f"{sha256[:12]}…, as it was written")
    digests = {name: sha256 for name, (_, sha256) in columns.items()}
    return Examples(_Mapped(folder, {name: items for name, (items, _) in columns.items()}), digests=digests), facts


def _damaged(path: Path, found: str, wanted: str) -> DataError:
    return DataError(
        f"{path}: a damaged store of tokenised examples: found {found}; want {wanted}. Delete the folder "
        f"{path.parent}, and the data will be tokenised again"
    )
