"""Mismatched responses (see `uft.feedback.mismatched`) of examples that are not all held in memory."""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Sequence
from functools import cached_property

import numpy as np

from uft.data.columns import Examples, Sequences, picked
from uft.feedback import Example, with_responses_of


class Mismatched(Sequence[Example]):
    """What `uft.feedback.mismatched` makes of the examples of one source, each made when it is asked for.

    partner   int64 [examples], whose responses stand behind the prompt of each; -1 where none do
    """

    def __init__(self, examples: Examples, kinds: Collection[str], max_length: int | None, bos: int | None):
        self.examples, self.source, self.max_length, self.bos = examples, examples.source, max_length, bos
        self.partner = _partners(examples, kinds)

    def named(self, source: str) -> Mismatched:
        other = object.__new__(Mismatched)
        other.__dict__ = {**self.__dict__, "examples": self.examples.named(source), "source": source}
        return other

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, index: int | slice) -> Example | list[Example]:
        return picked(self, index, self._example)

    def _example(self, i: int) -> Example:
        own, partner = self.examples[i], int(self.partner[i])
        return own if partner < 0 else with_responses_of(self.examples[partner], own, self.max_length, self.bos)

    @property
    def kinds(self) -> set[str]:
        return self.examples.kinds

    def are(self, kinds: Collection[str]) -> np.ndarray:
        return self.examples.are(kinds)

    @property
    def prompt_lengths(self) -> np.ndarray:
        return self.examples.prompt_lengths

    @cached_property
    def sequences(self) -> Sequences:
        own, response = self.examples.sequences, self.examples.columns["length"]
        count, has = np.diff(own.first), self.partner >= 0
        extra = np.where(has, count[self.partner], 0)
        first = np.concatenate([[0], np.cumsum(count + extra)])
        length = np.empty(first[-1], dtype=np.int64)
        length[_ranges(first[:-1], count)] = own.length
        # behind the own prompt, or as much of its end as fits; responses leave room for some of it
        theirs, prompt = response[_ranges(own.first[self.partner], extra)], np.repeat(self.prompt_lengths, extra)
        if self.max_length is not None:
            prompt = np.minimum(prompt, (self.max_length - theirs).clip(min=0))
        length[_ranges(first[:-1] + count, extra)] = theirs + prompt
        return Sequences(first, length)

    @cached_property
    def fingerprint(self) -> str:
        digest = hashlib.sha256(repr((self.examples.fingerprint, self.max_length, self.bos)).encode())
        digest.update(self.partner)
        digest.update(self.sequences.length)
        return digest.hexdigest()


def _ranges(first: np.ndarray, count: np.ndarray) -> np.ndarray:
    """The numbers from first[i] on, count[i] of them, for each i one behind the other."""
    ends = np.cumsum(count)
    return np.repeat(first - ends + count, count) + np.arange(ends[-1] if len(ends) else 0)


def _partners(examples: Examples, kinds: Collection[str]) -> np.ndarray:
    """The nearest example before each with another prompt, among the examples of these kinds, taken as a ring.

    Examples with equal prompts come in runs, and what stands before a run is the partner of all in it.
    """
    partner = np.full(len(examples), -1, dtype=np.int64)
    at = np.flatnonzero(examples.are(kinds))
    if not len(at):
        return partner
    before = np.roll(at, 1)
    lengths = examples.prompt_lengths
    begins = lengths[at] != lengths[before]  # a run of equal prompts
    for k in np.flatnonzero(~begins):
        begins[k] = not np.array_equal(examples.prompt(at[k]), examples.prompt(before[k]))
    if not begins.any():
        raise ValueError(f"source {examples.source!r}: KTO's KL needs answers to at least two different prompts")
    run = np.flatnonzero(begins)
    # before the first run's begin stands the last one, which goes on around the ring
    own_run = np.searchsorted(run, np.arange(len(at)), side="right") - 1
    partner[at] = before[run[own_run]]
    return partner
