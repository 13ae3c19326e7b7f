"""From examples to what a model reads: one batch, padded or packed, and the micro-batches an objective wants run.

A padded batch has a row per response.  A packed one is a single row without padding, in which a prompt with several
responses stands once (`uft.segments`).  Both give the same log-probabilities.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from uft.feedback import KINDS, Batch, Example, Need
from uft.logps import MISSING, Logps
from uft.segments import Part, Segments


class Row(NamedTuple):
    """Response `k` of the `nth` example of what is collated, with the prompt that stands before it.

    By number, not by identity: a mixture may draw an example twice.
    """

    prompt: np.ndarray
    example: Example
    k: int
    nth: int = 0

    @property
    def tokens(self) -> np.ndarray:
        return self.example.responses[self.k].tokens

    @property
    def index(self) -> int:
        """Where the example stands in its source: chunks of a document share a row number, but no place."""
        return self.example.row if self.example.index is None else self.example.index

    @property
    def kind(self) -> str:
        return "mismatched" if self.example.responses[self.k].mismatched else self.example.kind

    @property
    def sides(self) -> tuple[bool, bool]:
        """Whether it is the better, and whether it is the worse, of some pair."""
        pairs = self.example.preferences
        return any(self.k == better for better, _ in pairs), any(self.k == worse for _, worse in pairs)

    def in_loss(self) -> np.ndarray:
        """bool [response tokens]: which of them count."""
        mask = self.example.responses[self.k].in_loss
        mask = np.ones(len(self.tokens), dtype=bool) if mask is None else mask
        if len(self.prompt):
            return mask
        return np.concatenate([[False], mask[1:]])  # nothing stands before the first to predict it from


def rows_of(example: Example, nth: int = 0) -> list[Row]:
    if not all(len(response.tokens) for response in example.responses):
        where = f"row {example.row} of {example.source!r}"
        raise ValueError(f"{where}: found a response without tokens; want at least one (its end)")
    responses = enumerate(example.responses)
    return [Row(example.prompt if r.prompt is None else r.prompt, example, k, nth) for k, r in responses]


@dataclass(frozen=True)
class Collator:
    """Examples -> Batch.  Pads to the longest response of the batch, or to a multiple of `pad_to_multiple_of`.

    packed           one row without padding, but for the multiple
    prefix_sharing   in a packed row, responses to the same prompt share it
    sources          gives the codes in `Batch.source`
    reference_logps  `get((source, index))` are the reference's log-probabilities of an example's responses, in order,
                     for examples of `reference_kinds`
    """

    pad_token_id: int
    sources: Sequence[str] = ("train",)
    padding_side: str = "right"
    pad_to_multiple_of: int = 1
    packed: bool = False
    prefix_sharing: bool = True
    reference_logps: Logps | dict[tuple[str, int], Sequence[float]] | None = field(default=None, repr=False)
    reference_kinds: frozenset[str] = frozenset()

    def __call__(self, examples: Sequence[Example]) -> Batch:
        return self.batch([row for i, example in enumerate(examples) for row in rows_of(example, i)])

    def batch(self, rows: Sequence[Row], need: Need | None = None) -> Batch:
        """One batch of these responses."""
        place = {(row.nth, row.k): i for i, row in enumerate(rows)}
        owners = {row.nth: row.example for row in rows}
        prompts = {nth: i for i, nth in enumerate(owners)}
        preferences = [
            (place[nth, better], place[nth, worse])
            for nth, example in owners.items()
            for better, worse in example.preferences
            if (nth, better) in place and (nth, worse) in place
        ]
        length = np.array([len(row.prompt) + len(row.tokens) for row in rows], dtype=np.int64)

        def whole(values: list) -> Tensor:
            return torch.tensor(values, dtype=torch.int64)

        def real(values: list) -> Tensor:
            return torch.tensor(values, dtype=torch.float32)

        batch = Batch(
            length=torch.from_numpy(length),
            kind=whole([KINDS.index(row.kind) for row in rows]),
            source=whole([self.sources.index(row.example.source) for row in rows]),
            row=whole([row.example.row for row in rows]),
            index=whole([row.index for row in rows]),
            response=whole([row.k for row in rows]),
            prompt=whole([prompts[row.nth] for row in rows]),
            target=real([row.example.responses[row.k].target for row in rows]),
            weight=real([row.example.responses[row.k].weight for row in rows]),
            preferences=whole(preferences).reshape(-1, 2),
            side=whole([sum(is_side << bit for bit, is_side in enumerate(row.sides)) for row in rows]),
        )
        if need is not None:
            batch["need"] = need
        if self.reference_logps is not None:
            batch["reference_logp"] = real([self._reference_logp(row) for row in rows])
        return Batch(batch | (self._packed(rows, length) if self.packed else self._padded(rows, length)))

    def _padded(self, rows: Sequence[Row], length: np.ndarray) -> Batch:
        width = self._multiple(int(length.max(initial=1)))
        ids = np.full((max(len(rows), 1), width), self.pad_token_id, dtype=np.int64)
        attention = np.zeros_like(ids)
        in_loss = np.zeros((len(rows), width), dtype=bool)
        for i, (row, n) in enumerate(zip(rows, length)):
            start, m = width - n if self.padding_side == "left" else 0, len(row.prompt)
            ids[i, start : start + m] = row.prompt
            ids[i, start + m : start + n] = row.tokens
            attention[i, start : start + n] = 1
            in_loss[i, start + m : start + n] = row.in_loss()
        attention[len(rows) :] = 1  # the one row of an empty batch
        row, time = np.nonzero(in_loss[:, 1:])
        return Batch(
            input_ids=torch.from_numpy(ids),
            attention_mask=torch.from_numpy(attention),
            in_loss=torch.from_numpy(in_loss),
            predicts=torch.from_numpy(row * width + time),
            answers=torch.from_numpy(ids[row, time + 1]),
        )

    def _packed(self, rows: Sequence[Row], length: np.ndarray) -> Batch:
        in_loss = np.zeros((len(rows), int(length.max(initial=1))), dtype=bool)
        trees: dict[object, list[int]] = {}
        for i, row in enumerate(rows):
            alone = not self.prefix_sharing or not len(row.prompt)
            trees.setdefault(i if alone else row.prompt.tobytes(), []).append(i)
        ids: list[np.ndarray] = []
        parts: list[Part] = []
        predicts: list[np.ndarray] = [np.zeros(0, dtype=np.int64)] * len(rows)
        at = 0
        for members in trees.values():
            prompt, first, last = rows[members[0]].prompt, len(parts), 0
            for k, i in enumerate(members):
                counted, m = rows[i].in_loss(), len(prompt)
                in_loss[i, m : length[i]] = counted
                if k == 0:
                    ids.append(prompt)
                    last = at + m - 1  # the prompt's last token, which predicts the first of each response
                    at += m
                ids.append(rows[i].tokens)
                parts.append(Part(int(length[i]) if k == 0 else len(rows[i].tokens), first, m if k else 0))
                before = np.arange(at - 1, at - 1 + len(counted))
                before[0] = last
                predicts[i] = before[counted]
                at += len(counted)
        if padding := self._multiple(max(at, 1)) - at:
            ids.append(np.full(padding, self.pad_token_id))
            parts.append(Part(padding, len(parts)))
        segments = Segments.of(parts)
        answers = [row.tokens[row.in_loss()] for row in rows]
        return Batch(
            input_ids=torch.from_numpy(np.concatenate(ids).astype(np.int64))[None],
            position_ids=segments.position_ids(),
            segments=segments,
            in_loss=torch.from_numpy(in_loss),
            predicts=torch.from_numpy(np.concatenate([*predicts, np.zeros(0, dtype=np.int64)])),
            answers=torch.from_numpy(np.concatenate([*answers, np.zeros(0)]).astype(np.int64)),
        )

    def _multiple(self, n: int) -> int:
        return -(-n // self.pad_to_multiple_of) * self.pad_to_multiple_of

    def _reference_logp(self, row: Row) -> float:
        example = row.example
        values = self.reference_logps.get((example.source, row.index), ())
        if row.k < len(values) and values[row.k] != MISSING:
            return values[row.k]
        if example.kind in self.reference_kinds:
            raise ValueError(f"no reference log-probability for row {example.row} of {example.source!r}")
        return float("nan")


class Filling:
    """Rows that will be one batch: `units` of them, and how many tokens a model would read with one unit more."""

    def __init__(self, collate: Collator):
        self.collate = collate
        self.units: list[list[Row]] = []
        self._rows = self._longest = self._tokens = 0
        self._prompts: set[object] = set()

    def add(self, unit: list[Row]) -> None:
        self.units.append(unit)
        self._rows, self._longest, self._tokens = self._with(unit)
        self._prompts |= self._starts(unit).keys()

    def cost_with(self, unit: list[Row]) -> int:
        """Padding included."""
        rows, longest, tokens = self._with(unit)
        multiple = self.collate._multiple
        return multiple(tokens) if self.collate.packed else rows * multiple(longest)

    def _with(self, unit: list[Row]) -> tuple[int, int, int]:
        longest = max((len(row.prompt) + len(row.tokens) for row in unit), default=0)
        fresh = sum(n for prompt, n in self._starts(unit).items() if prompt not in self._prompts)
        tokens = self._tokens + fresh + sum(len(row.tokens) for row in unit)
        return self._rows + len(unit), max(self._longest, longest), tokens

    def _starts(self, unit: list[Row]) -> dict[object, int]:
        """The prompts that are read, each once where it is shared, and how long they are."""
        shared = self.collate.prefix_sharing
        return {row.prompt.tobytes() if shared else (row.nth, row.k): len(row.prompt) for row in unit}


# ---- what a model runs ----


@dataclass(frozen=True)
class MicroBatches:
    """The batches into which some examples are cut, each of one `Need`.

    examples   how many there are of each source
    """

    batches: tuple[Batch, ...]
    examples: Counter[str]

    def of(self, wanted: Callable[[Need], bool]) -> list[Batch]:
        return [batch for batch in self.batches if wanted(batch.need)]

    @property
    def of_gradient(self) -> list[Batch]:
        """Those that are trained on."""
        return self.of(lambda need: need.gradient)

    def pin_memory(self) -> MicroBatches:
        return replace(self, batches=tuple(batch.pin_memory() for batch in self.batches))


@dataclass(frozen=True)
class Cutter:
    """Examples -> MicroBatches: responses that no term is on are left out, those that need different things run apart.

    need          from (kind, chosen, rejected) to the Need of such a response; None leaves it out
    needs         all that can come of it, in the order in which they run
    token_budget  at most so many tokens per batch, padding included, where a single example allows it
    """

    collate: Collator
    need: Callable[[str, bool, bool], Need | None]
    needs: tuple[Need, ...]
    token_budget: int | None = None

    def __call__(self, examples: Sequence[Example]) -> MicroBatches:
        groups: dict[Need, list[list[Row]]] = {need: [] for need in self.needs}
        for i, example in enumerate(examples):
            own: dict[Need, list[Row]] = {}
            for row in rows_of(example, i):
                need = self.need(row.kind, *row.sides)
                if need is not None:
                    own.setdefault(need, []).append(row)
            for need, rows in own.items():
                groups[need].append(rows)  # what belongs together stays together
        batches = [
            self.collate.batch([row for rows in part for row in rows], need)
            for need, units in groups.items()
            for part in self._cut(units)
        ]
        return MicroBatches(tuple(batches), Counter(example.source for example in examples))

    @property
    def sources(self) -> Sequence[str]:
        return self.collate.sources

    def packed(self) -> Cutter:
        return replace(self, collate=replace(self.collate, packed=True))

    def empty(self, need: Need) -> Batch:
        """A batch without responses: one token that counts nowhere, so that every rank runs as often."""
        return self.collate.batch([], need)

    def _cut(self, units: list[list[Row]]) -> list[list[list[Row]]]:
        """Few parts within the budget: units in order of length, each to the first part that has room for it."""
        if self.token_budget is None or not units:
            return [units] if units else []
        parts: list[Filling] = []
        for unit in sorted(units, key=lambda rows: -sum(len(row.prompt) + len(row.tokens) for row in rows)):
            for part in parts:
                if part.cost_with(unit) <= self.token_budget:
                    break
            else:
                part = Filling(self.collate)
                parts.append(part)
            part.add(unit)
        return [part.units for part in parts]
