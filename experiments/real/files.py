"""The real files: which there are, their rows, and names for what is made of them."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pyarrow.parquet as parquet

FILES = ("pretrain", "pretrain_heldout", "demonstrations", "demonstrations_heldout_tasks", "pairs", "pairs_eval")


@dataclass(frozen=True)
class Place:
    """Where the real files are, and where what is made of them is kept."""

    data: Path
    made: Path


def missing(folder: Path) -> list[str]:
    return [f"{name}.parquet" for name in FILES if not (folder / f"{name}.parquet").is_file()]


def read(folder: Path, name: str) -> list[dict[str, Any]]:
    return parquet.read_table(folder / f"{name}.parquet").to_pylist()


@cache
def fingerprint(folder: Path) -> str:
    """Changes with any byte of the files."""
    digest = hashlib.sha256()
    for name in FILES:
        digest.update((folder / f"{name}.parquet").read_bytes())
    return digest.hexdigest()[:20]


def key_of(content: Any) -> str:
    """A name for something: the hash of everything that led to it."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:20]
