"""The rows of all sources in memory, with what is computed of their words once."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
from tqdm import tqdm

from uft.data.quality.items import Item, Words, read_evaluation, read_items, shingles
from uft.data.rows import BadRow, DataError
from uft.data.sources import Source

MOST_PARTS = 40  # values of the column that sources are split by


@dataclass
class Corpus:
    """items    rows of all sources, in their order
    bad      rows that cannot be read, by group
    words    shared with whatever is compared with the rows
    """

    items: list[Item]
    bad: dict[str, list[BadRow]] = field(default_factory=dict)
    words: Words = field(default_factory=Words)

    @classmethod
    def read(
        cls, sources: Sequence[Source], groups: Sequence[str], by: str | None = None, annotator: str = "annotator"
    ) -> Corpus:
        """Raises `DataError` for a source that cannot be read at all, and for a column `by` with too many values."""
        items: list[Item] = []
        bad: dict[str, list[BadRow]] = {}
        parts: set[str | None] = set()
        for source, group in zip(sources, groups, strict=True):
            for item in _bar(read_items(source, group, by, annotator), f"{group}: reading"):
                if isinstance(item, BadRow):
                    bad.setdefault(group, []).append(item)
                else:
                    items.append(item)
                    parts.add(item.part)
                    if len(parts - {None}) > MOST_PARTS:
                        raise DataError(
                            f"by is {by!r}: found more than {MOST_PARTS} different values in this column by row "
                            f"{item.row} of {group}; want a column of few"
                        )
        return cls(items, bad)

    @cached_property
    def groups(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(item.group for item in self.items))

    @cached_property
    def parts(self) -> np.ndarray:
        """int64 [items]: the position of each item's group."""
        position = {group: i for i, group in enumerate(self.groups)}
        return np.array([position[item.group] for item in self.items], dtype=np.int64)

    @cached_property
    def row_words(self) -> list[list[np.ndarray]]:
        """Words and marks of the prompt and of each response."""
        # a prompt often stands in many rows
        prompts: dict[str, np.ndarray] = {}
        found = []
        for item in _bar(self.items, "words"):
            if item.prompt not in prompts:
                prompts[item.prompt] = self.words(item.prompt)
            found.append([prompts[item.prompt], *map(self.words, item.responses)])
        return found

    def later_words(self, i: int) -> list[np.ndarray]:
        """Words and marks of what others say within the responses of item i."""
        return list(map(self.words, self.items[i].later))

    def prompt_parts(self, i: int, size: int) -> list[np.ndarray]:
        """The n-grams of the prompt of item i, as the only part."""
        return self.row_parts(i, size)[:1]

    def row_parts(self, i: int, size: int) -> list[np.ndarray]:
        """The n-grams of the prompt and of each response of item i, and of what others say within the responses, where
        they do."""
        found = self._shingles.setdefault(size, {})
        if i not in found:
            found[i] = [shingles(words, size) for words in (*self.row_words[i], *self.later_words(i))]
        return found[i]

    @cached_property
    def _shingles(self) -> dict[int, dict[int, list[np.ndarray]]]:
        return {}

    def of(self, group: str) -> list[int]:
        """Positions of the items of a group."""
        return np.flatnonzero(self.parts == self.groups.index(group)).tolist()

    def count(self, positions: Iterable[int]) -> dict[str, int]:
        """How many of these items are of each group."""
        found = Counter(self.items[i].group for i in positions)
        return {group: found[group] for group in self.groups}


@dataclass(frozen=True)
class Evaluation:
    """Prompts of all evaluation files: text, file and row number of each; `lacking` counts the rows without one."""

    files: tuple[str, ...]
    texts: list[str]
    parts: np.ndarray
    rows: list[int]
    lacking: tuple[int, ...]

    @classmethod
    def read(cls, sources: Sequence[Source], names: Sequence[str]) -> Evaluation:
        texts, parts, rows, lacking = [], [], [], [0] * len(sources)
        for part, source in enumerate(sources):
            for row, text in _bar(read_evaluation(source), f"{names[part]}: reading"):
                if not text:
                    lacking[part] += 1
                    continue
                texts.append(text)
                parts.append(part)
                rows.append(row)
        return cls(tuple(names), texts, np.array(parts, dtype=np.int64), rows, tuple(lacking))

    def place(self, position: int) -> str:
        return f"{self.files[self.parts[position]]} row {self.rows[position]}"


def _bar(each: Iterable, title: str) -> Iterable:
    return tqdm(each, title, unit=" rows", disable=None, delay=1, leave=False)


def positive(name: str, value: object) -> None:
    if not isinstance(value, (int, float)) or isinstance(value, bool) or not value > 0:
        raise DataError(f"{name} is {value!r}; want a number > 0")
