"""Which tokens of a packed row see which: several sequences in one row, and several responses behind one prompt.

A packed row [1, L] is cut into parts, one per response.  The first part of a prompt is the prompt and its first
response, an ordinary sequence.  Each further part is a response alone; its tokens see the first `shared` tokens of that
first part, which are the prompt, and themselves.  So a prompt runs once, whatever follows it, and each response
computes what it would compute in a row of its own.

    row       p p p p a a a  b b  q q c c
    part      0 0 0 0 0 0 0  1 1  2 2 2 2        b answers p as well
    position  0 1 2 3 4 5 6  4 5  0 1 2 3

Positions of a response go on from its prompt, so that a sliding window is a difference of positions, and that is one of
places in [prompt, response].
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from torch import Tensor

_TENSORS = ("cu_q", "cu_k", "keys")


@dataclass(frozen=True)
class Part:
    """length   tokens of the row that it is
    first    the part whose beginning it sees; itself for the first part of a prompt
    shared   how many tokens of that part
    """

    length: int
    first: int
    shared: int = 0


@dataclass(frozen=True)
class Segments:
    """The parts of a row, in order, and the same as variable-length attention kernels want it.

    cu_q, cu_k     int32 [parts + 1]   where the queries and the keys of each part begin
    keys           int64 [K]           where in the row each key stands; a prompt stands before each of its responses
    max_q, max_k   the longest, rounded up, so that few different kernels are compiled
    shares         whether some prompt has more than one response
    """

    parts: tuple[Part, ...]
    cu_q: Tensor
    cu_k: Tensor
    keys: Tensor
    max_q: int
    max_k: int
    shares: bool
    _masks: dict = field(default_factory=dict, init=False, compare=False, repr=False)

    @classmethod
    def of(cls, parts: Sequence[Part]) -> Segments:
        lengths = np.array([part.length for part in parts])
        shared = np.array([part.shared for part in parts])
        starts = np.concatenate([[0], lengths.cumsum()])
        keys = [
            np.arange(begin, begin + n)
            for i, part in enumerate(parts)
            for begin, n in ((starts[part.first], part.shared), (starts[i], part.length))
            if n
        ]
        return cls(
            parts=tuple(parts),
            cu_q=torch.from_numpy(starts.astype(np.int32)),
            cu_k=torch.from_numpy(np.concatenate([[0], (lengths + shared).cumsum()]).astype(np.int32)),
            keys=torch.from_numpy(np.concatenate(keys).astype(np.int64)),
            max_q=_rounded(int(lengths.max())),
            max_k=_rounded(int((lengths + shared).max())),
            shares=bool(shared.any()),
        )

    def __len__(self) -> int:
        return sum(part.length for part in self.parts)

    def position_ids(self) -> Tensor:
        """int64 [1, L]"""
        return torch.cat([torch.arange(part.shared, part.shared + part.length) for part in self.parts])[None]

    def part_mask(self, part: Part, window: int | None, device: torch.device) -> Tensor:
        """bool [length, shared + length]: what the queries of a part see of [prompt, itself]."""
        key = (part.length, part.shared, window, device)
        if key not in self._masks:
            self._masks[key] = _band(part.length, part.shared, window, device)
        return self._masks[key]

    def mask(self, window: int | None = None, device: torch.device | str = "cpu") -> Tensor:
        """bool [L, L]: the same for the row as a whole."""
        whole = torch.zeros(len(self), len(self), dtype=torch.bool, device=device)
        starts = np.concatenate([[0], np.cumsum([part.length for part in self.parts])])
        for part, start in zip(self.parts, starts):
            seen = self.part_mask(part, window, whole.device)
            first, rows = starts[part.first], slice(start, start + part.length)
            whole[rows, first : first + part.shared] = seen[:, : part.shared]
            whole[rows, rows] = seen[:, part.shared :]
        return whole

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Segments:
        moved = {name: getattr(self, name).to(device, non_blocking=non_blocking) for name in _TENSORS}
        return replace(self, **moved)

    def pin_memory(self) -> Segments:
        pinned = {name: getattr(self, name).pin_memory() for name in _TENSORS}
        return replace(self, **pinned)


def _band(length: int, shared: int, window: int | None, device: torch.device) -> Tensor:
    """Query i stands at position shared + i; it sees the keys up to there, and of these the last `window`."""
    seen = torch.ones(length, shared + length, dtype=torch.bool, device=device).tril(shared)
    return seen if window is None else seen.triu(shared - window + 1)


def _rounded(n: int, to: int = 128) -> int:
    return -(-n // to) * to
