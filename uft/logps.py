"""Log-probabilities of the responses of a data set as columns, in memory and in a file."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

MISSING = np.float32(np.inf)  # which no log-probability is; NaN may be one, of a broken model


class Logps:
    """One log-probability per response, in nats; MISSING where none was computed.  Those of an example are known where
    any is: responses that no term is on are never scored.

    first    by source, int64 [examples + 1]: the responses of example i are values[first[i] : first[i + 1]]
    values   by source, float32 [responses]
    """

    def __init__(self, first: Mapping[str, np.ndarray], values: Mapping[str, np.ndarray] | None = None):
        self.first = {name: np.asarray(each, dtype=np.int64) for name, each in first.items()}
        self.values = dict(values or {n: np.full(each[-1], MISSING, np.float32) for n, each in self.first.items()})

    @classmethod
    def of(cls, data: Any) -> Logps:
        """Room for all responses of a `FeedbackDataset`."""
        return cls({name: part.sequences.first for name, part in data.examples.items()})

    def get(self, key: tuple[str, int], default: Sequence[float] = ()) -> Sequence[float]:
        """Those of the example at a position of a source, or the default where they were not computed."""
        source, index = key
        first = self.first.get(source, ())
        if not 0 <= index < len(first) - 1:
            return default
        found = self.values[source][first[index] : first[index + 1]]
        return default if (found == MISSING).all() else found.tolist()

    def known(self, source: str) -> np.ndarray:
        """bool [examples]: which have any."""
        have = np.concatenate([[0], np.cumsum(self.values[source] != MISSING)])
        return np.diff(have[self.first[source]]) > 0

    def fill(self, other: Logps) -> None:
        """Takes from another what is not known here."""
        for name, values in self.values.items():
            self.values[name] = np.where(values == MISSING, other.values[name], values)

    def save(self, path: Path) -> None:
        """Written aside and renamed, so that the file is whole or absent."""
        path.parent.mkdir(parents=True, exist_ok=True)
        aside = path.with_name(f".{path.name}.{os.getpid()}.npz")
        names = list(self.values)
        columns = {f"values{i}": self.values[name] for i, name in enumerate(names)}
        columns |= {f"first{i}": self.first[name] for i, name in enumerate(names)}
        try:
            with open(aside, "wb") as file:
                np.savez(file, source=np.array(names), **columns)
                file.flush()
                os.fsync(file.fileno())
            os.replace(aside, path)
        except OSError as error:
            aside.unlink(missing_ok=True)
            raise OSError(
                f"{path}: the reference's log-probabilities could not be written ({error.strerror})"
            ) from error

    @classmethod
    def load(cls, path: Path) -> Logps | None:
        """What `save` wrote, or None where there is no such file.  Raises ValueError for a damaged one."""
        if not path.exists():
            return None
        try:
            with np.load(path, allow_pickle=False) as file:
                names = list(enumerate(file["source"].tolist()))
                first, values = ({name: file[f"{of}{i}"] for i, name in names} for of in ("first", "values"))
            if any(first[name][-1] != len(values[name]) for _, name in names):
                raise ValueError("columns of different lengths")
            return cls(first, values)
        except Exception as error:
            raise ValueError(f"{path}: not a readable cache of reference log-probabilities ({error})") from error
