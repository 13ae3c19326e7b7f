"""Tokenised examples as columns: flat arrays in memory, or files that are read where they are needed.

    per token        tokens                                       of each example its prompt, then for each response the
                                                                  prompt of its own, if it has one, and its tokens
    per masked token in_loss                                      of the responses that have a mask
    per example      kind, row, prompt_length, first_token, first_response, first_preference
                                                                  the three `first_` have one entry more, their end
    per response     length, target, weight, mismatched           own_prompt: length of the prompt of its own, or -1
                     own_prompt, first_mask                       first_mask: where its mask begins, or -1
    per preference   better, worse

`uft.data.store` keeps them on disk.
"""

from __future__ import annotations

import hashlib
import json
import operator
from array import array
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np

from uft.feedback import KINDS, Example, Response

FORMAT = 1  # to be raised with every change of what the columns mean
COLUMNS = {
    "tokens": np.int32, "in_loss": np.bool_,
    "kind": np.uint8, "row": np.int64, "prompt_length": np.int32,
    "first_token": np.int64, "first_response": np.int64, "first_preference": np.int64,
    "length": np.int32, "target": np.float64, "weight": np.float64, "mismatched": np.bool_,
    "own_prompt": np.int32, "first_mask": np.int64,
    "better": np.int32, "worse": np.int32,
}  # fmt: skip
_CODES = {np.int32: "i", np.int64: "q", np.float64: "d", np.uint8: "B", np.bool_: "B"}


class Sequences(NamedTuple):
    """Tokens of the sequences that a model is run on, one per response: `length[first[i] : first[i + 1]]` are those of
    example i, prompt included."""

    first: np.ndarray
    length: np.ndarray


class Examples(Sequence[Example]):
    """The examples of one source.  Those asked for are built; what arrays can answer is answered from them."""

    def __init__(self, columns: Mapping[str, Any], source: str = "train", digests: Mapping[str, str] | None = None):
        self.columns, self.source, self._digests = columns, source, digests

    def named(self, source: str) -> Examples:
        """The same examples, from a source of this name."""
        return Examples(self.columns, source, self._digests)

    def __len__(self) -> int:
        return len(self.columns["kind"])

    def __getitem__(self, index: int | slice) -> Example | list[Example]:
        return picked(self, index, self._example)

    def _example(self, i: int) -> Example:
        c = self.columns
        begin, end = c["first_token"][i : i + 2].tolist()
        tokens, at = c["tokens"][begin:end], int(c["prompt_length"][i])
        prompt, responses = tokens[:at], []
        first, last = c["first_response"][i : i + 2].tolist()
        for r in range(first, last):
            own, n, mask = int(c["own_prompt"][r]), int(c["length"][r]), int(c["first_mask"][r])
            mine = None if own < 0 else tokens[at : at + own]
            at += max(own, 0)
            in_loss = None if mask < 0 else c["in_loss"][mask : mask + n]
            target, weight = float(c["target"][r]), float(c["weight"][r])
            responses.append(Response(tokens[at : at + n], in_loss, target, weight, bool(c["mismatched"][r]), mine))
            at += n
        first, last = c["first_preference"][i : i + 2].tolist()
        preferences = tuple(zip(c["better"][first:last].tolist(), c["worse"][first:last].tolist()))
        kind, row = KINDS[c["kind"][i]], int(c["row"][i])
        return Example(kind, prompt, tuple(responses), preferences, self.source, row, index=i)

    def prompt(self, i: int) -> np.ndarray:
        """The prompt of example i alone."""
        begin = int(self.columns["first_token"][i])
        return self.columns["tokens"][begin : begin + int(self.columns["prompt_length"][i])]

    @cached_property
    def kinds(self) -> set[str]:
        return {kind for code, kind in enumerate(KINDS) if (self.columns["kind"] == code).any()}

    def are(self, kinds: Collection[str]) -> np.ndarray:
        """bool [examples]: which are of one of these kinds."""
        return np.isin(self.columns["kind"], [KINDS.index(kind) for kind in kinds])

    @property
    def prompt_lengths(self) -> np.ndarray:
        """int32 [examples]"""
        return self.columns["prompt_length"]

    @property
    def sequences(self) -> Sequences:
        c = self.columns
        prompt = np.repeat(c["prompt_length"], np.diff(c["first_response"]))
        return Sequences(c["first_response"], c["length"] + np.where(c["own_prompt"] < 0, prompt, c["own_prompt"]))

    @cached_property
    def fingerprint(self) -> str:
        """Changes with any token, mask, target, weight, preference, row number or order; not with the source's name."""
        digests = self._digests or {name: _sha256(self.columns[name]) for name in COLUMNS}
        return hashlib.sha256(json.dumps([FORMAT, sorted(digests.items())]).encode()).hexdigest()


def picked(examples: Sequence, index: int | slice, build: Callable[[int], Example]) -> Example | list[Example]:
    """What [index] of these is, where `build` makes the one at a position."""
    if isinstance(index, slice):
        return [build(i) for i in range(*index.indices(len(examples)))]
    position = operator.index(index)
    position += len(examples) * (position < 0)
    if not 0 <= position < len(examples):
        raise IndexError(f"found index {index} for {len(examples)} examples")
    return build(position)


# ---- columns being filled ----


class Buffers:
    """Columns that grow by an example at a time; what was handed on is forgotten."""

    def __init__(self):
        self.held = {name: array(_CODES[dtype]) for name, dtype in COLUMNS.items()}
        self.tokens = self.masked = self.responses = self.preferences = 0

    def add(self, example: Example) -> None:
        held = self.held
        self._starts()
        held["kind"].append(KINDS.index(example.kind))
        held["row"].append(example.row)
        held["prompt_length"].append(self._tokens(example.prompt))
        for response in example.responses:
            own, mask, n = response.prompt, response.in_loss, len(response.tokens)
            held["own_prompt"].append(-1 if own is None else self._tokens(own))
            held["length"].append(self._tokens(response.tokens))
            held["first_mask"].append(-1 if mask is None else self.masked)
            if mask is not None:
                if len(mask) != n:
                    raise ValueError(f"row {example.row}: found a mask of {len(mask)} for {n} tokens; want one of each")
                held["in_loss"].frombytes(np.asarray(mask, dtype=np.bool_).tobytes())
                self.masked += n
            held["target"].append(response.target)
            held["weight"].append(response.weight)
            held["mismatched"].append(response.mismatched)
        for better, worse in example.preferences:
            held["better"].append(better)
            held["worse"].append(worse)
        self.responses += len(example.responses)
        self.preferences += len(example.preferences)

    def _tokens(self, ids: np.ndarray) -> int:
        self.held["tokens"].frombytes(np.asarray(ids, dtype=np.int32).tobytes())
        self.tokens += len(ids)
        return len(ids)

    def _starts(self) -> None:
        self.held["first_token"].append(self.tokens)
        self.held["first_response"].append(self.responses)
        self.held["first_preference"].append(self.preferences)

    end = _starts


def in_memory(examples: Iterable[Example]) -> Examples:
    """The examples as columns in memory."""
    buffers = Buffers()
    for example in examples:
        buffers.add(example)
    buffers.end()
    columns = {}
    for name, held in buffers.held.items():
        columns[name] = np.frombuffer(held, COLUMNS[name]) if held else np.zeros(0, COLUMNS[name])
        columns[name].flags.writeable = False  # whoever gets an example gets a view
    return Examples(columns)


def _sha256(column: np.ndarray) -> str:
    digest, block = hashlib.sha256(), 1 << 24
    for start in range(0, len(column), block):
        digest.update(np.ascontiguousarray(column[start : start + block]))
    return digest.hexdigest()
