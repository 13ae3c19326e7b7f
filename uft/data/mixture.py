"""Several data sets as one: their examples, how often each is drawn, and in which order."""

from __future__ import annotations

import hashlib
import logging
from bisect import bisect_right
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from functools import cached_property
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
import torch

from uft.data.cache import belongs_on_disk, stored
from uft.data.check import Report, SourceReport, read_examples
from uft.data.columns import Examples, Sequences, in_memory, picked
from uft.data.mismatched import Mismatched
from uft.data.rows import DataError, is_number, shown
from uft.data.sources import ON_BAD_ROW, as_sources
from uft.data.template import Template
from uft.feedback import Example
from uft.licences import origin

logger = logging.getLogger(__name__)


class FeedbackDataset(torch.utils.data.Dataset):
    """The examples of several sources, one source behind the other.

    sources   names
    sizes     examples of each
    weights   draws per example and epoch of each, for `MixtureSampler`
    examples  by source: sequences that build an example when it is asked for, from columns in memory or on disk
    origins   the file or id that each source was read from, where that is known
    """

    def __init__(
        self,
        examples: Mapping[str, Sequence[Example]],
        weights: Mapping[str, float] | None = None,
        origins: Mapping[str, str] | None = None,
    ):
        weights = dict(weights or {})
        if unknown := [name for name in weights if name not in examples]:
            raise ValueError(f"weights: found {unknown[0]!r}; want names of sources, {', '.join(examples)}")
        if not examples or (empty := [name for name, each in examples.items() if not len(each)]):
            raise ValueError(f"found no examples{f' in source {empty[0]!r}' if examples else ''}; want at least one")
        self.examples: dict[str, Examples | Mismatched] = {
            name: (each if isinstance(each, (Examples, Mismatched)) else in_memory(each)).named(name)
            for name, each in examples.items()
        }
        self.sources = list(self.examples)
        self.origins = {name: origin for name, origin in (origins or {}).items() if name in self.examples}
        self.sizes = [len(each) for each in self.examples.values()]
        weights = [weights.get(name, 1.0) for name in self.sources]
        _draws(self.sizes, weights)  # refuses what is no weight
        self.weights = [float(weight) for weight in weights]
        self._parts, self._ends = list(self.examples.values()), list(accumulate(self.sizes))

    def __len__(self) -> int:
        return self._ends[-1]

    def __getitem__(self, index: int | slice) -> Example | list[Example]:
        return picked(self, index, self._example)

    def _example(self, i: int) -> Example:
        part = bisect_right(self._ends, i)
        return self._parts[part][i - self._ends[part] + self.sizes[part]]

    def __repr__(self) -> str:
        parts = (f"{name}: {size:,} × {weight:g}" for name, size, weight in zip(self.sources, self.sizes, self.weights))
        return f"FeedbackDataset({', '.join(parts)})"

    def kinds(self) -> dict[str, set[str]]:
        """The kinds of example in each source."""
        return {name: each.kinds for name, each in self.examples.items()}

    @cached_property
    def sequences(self) -> Sequences:
        """The lengths of all sequences that a model is run on, example by example."""
        parts = [part.sequences for part in self._parts]
        counts = np.concatenate([[0], *(np.diff(part.first) for part in parts)])
        return Sequences(np.cumsum(counts), np.concatenate([part.length for part in parts]))

    @cached_property
    def lengths(self) -> np.ndarray:
        """int64 [examples]: tokens that a forward pass sees of each, as `Example.tokens`."""
        first, length = self.sequences
        return np.diff(np.concatenate([[0], np.cumsum(length)])[first])

    @cached_property
    def prompt_lengths(self) -> np.ndarray:
        """int32 [examples]: tokens of each prompt."""
        return np.concatenate([part.prompt_lengths for part in self._parts])

    def mapped(self, function: Callable[[Sequence[Example]], Sequence[Example]]) -> FeedbackDataset:
        """With each source's examples replaced by what `function` makes of them."""
        weights = dict(zip(self.sources, self.weights))
        return FeedbackDataset({name: function(each) for name, each in self.examples.items()}, weights, self.origins)

    def with_mismatched(self, kinds: Collection[str], max_length: int | None, bos: int | None) -> FeedbackDataset:
        """As `mapped` by `uft.feedback.mismatched`, without holding what that makes."""

        def lazily(examples: Examples | Mismatched) -> Examples | Mismatched:
            if not examples.kinds & set(kinds):
                return examples
            # data that another trainer prepared have them already, perhaps of another length
            columns = examples.examples if isinstance(examples, Mismatched) else examples
            return Mismatched(columns, kinds, max_length, bos)

        return self.mapped(lazily)

    @cached_property
    def fingerprint(self) -> str:
        """Changes with any token, mask, target, weight, preference, name or order of the examples."""
        parts = [(name, len(each), each.fingerprint) for name, each in self.examples.items()]
        return hashlib.sha256(repr(parts).encode()).hexdigest()


def load_feedback(
    sources: Any,
    tokenizer: Any,
    max_length: int | None = None,
    *,
    chat_template: str | None = None,
    on_bad_row: str = "error",
    cache: str | Path | None = None,
) -> tuple[FeedbackDataset, Report]:
    """Reads and tokenises sources (whatever `as_sources` takes), and says what became of each row.

    `tokenizer` may be a `Template`, which then holds `max_length` as well.  `on_bad_row` is for sources that do not
    say themselves: "error" raises `BadRow` for the first bad row, "drop" leaves bad rows out, counts and logs them.

    `cache` is a folder in which tokens are kept; a second run, or another process, that wants the same ones finds them
    there (see `uft.data.cache`).  Without it tokens are in memory, those of streamed sources in a temporary folder.
    """
    if on_bad_row not in ON_BAD_ROW:
        raise DataError(f"on_bad_row is {on_bad_row!r}; want {' or '.join(ON_BAD_ROW)}")
    template = tokenizer if isinstance(tokenizer, Template) else Template(tokenizer, max_length, chat_template)
    sources = as_sources(sources)
    examples, reports = {}, []
    for source in sources:
        bad = source.on_bad_row or on_bad_row
        if cache is not None or belongs_on_disk(source):
            examples[source.name], report = stored(source, template, bad, cache)
        else:
            report = SourceReport(source.name, source.where)
            examples[source.name] = in_memory(read_examples(source, report, template, bad))
            report.or_refuse()
        reports.append(report)
        if dropped := ", ".join(f"{n} {reason}" for reason, n in report.dropped.most_common()):
            logger.warning("%s: dropped %d of %d rows: %s", source.where, len(report.bad_rows), report.rows, dropped)
    weights = {source.name: source.weight for source in sources}
    origins = {source.name: origin(source.path) for source in sources if source.path is not None}
    return FeedbackDataset(examples, weights, origins), Report(tuple(reports))


class MixtureSampler(torch.utils.data.Sampler[int]):
    """The order of an epoch over sources of these sizes, given one behind the other as in `FeedbackDataset`.

    Source i is drawn round(weight_i · size_i) times per epoch, evenly among the others: every stretch of an epoch holds
    the sources in proportion, to within a draw or two.  Its own rows come in random permutations, one after the other
    and on across epochs, so no row comes again before all rows of its source have come.

    The order is a function of (sizes, weights, seed, epoch), so a run resumes by skipping what it has seen.
    """

    def __init__(self, sizes: Sequence[int], weights: Sequence[float] | None = None, seed: int = 0):
        self.sizes, self.seed, self.epoch = [int(size) for size in sizes], seed, 0
        self.draws = _draws(self.sizes, [1.0] * len(sizes) if weights is None else weights)

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return sum(self.draws)

    def __iter__(self) -> Iterator[int]:
        order = self.order()
        for start in range(0, len(order), 1 << 16):  # as Python's integers all of them would take five times the room
            yield from order[start : start + (1 << 16)].tolist()

    def order(self) -> np.ndarray:
        """int64 [draws]: the positions in the data set that this epoch visits."""
        # one jitter per source and epoch, or sources of one size would always come in the same turn
        jitter = np.random.default_rng([self.seed, self.epoch, 0]).uniform(-0.5, 0.5, len(self.sizes))
        first = np.cumsum([0, *self.sizes[:-1]])
        when = [(np.arange(n) + 0.5 + j) / n for n, j in zip(self.draws, jitter)]
        what = [first[i] + self._drawn(i) for i in range(len(self.sizes))]
        return np.concatenate(what)[np.argsort(np.concatenate(when), kind="stable")]

    def _drawn(self, i: int) -> np.ndarray:
        """The rows of source i in this epoch: a stretch of its endless row of permutations."""
        size, draws = self.sizes[i], self.draws[i]
        begin, end = self.epoch * draws, (self.epoch + 1) * draws
        passes = range(begin // size, -(-end // size))
        rows = [np.random.default_rng([self.seed, i, p, 1]).permutation(size) for p in passes]
        return np.concatenate(rows)[begin - passes[0] * size : end - passes[0] * size]


def _draws(sizes: Sequence[int], weights: Sequence[float]) -> list[int]:
    """Draws per epoch of each source; refuses what would leave one out."""
    if not len(sizes) or len(sizes) != len(weights):
        raise ValueError(f"found {len(sizes)} sizes and {len(weights)} weights; want one of each per source")
    draws = []
    for size, weight in zip(sizes, weights):
        if size < 1 or not (is_number(weight) and weight > 0):
            raise ValueError(f"found a source of size {size} with weight {shown(weight)}; want positive numbers")
        draws.append(int(np.floor(float(weight) * size + 0.5)))
        if draws[-1] == 0:
            raise ValueError(f"found a source of size {size} with weight {weight:g}, which is never drawn; want more")
    return draws
