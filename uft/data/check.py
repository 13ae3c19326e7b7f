"""Reading with a count of everything: the report of what became of each row, and `uft data check`.

Every row of a source is either kept or dropped for one reason, and the counts add up to the rows read.  What `uft data
check` says besides, of rows that can be used, is in `uft.data.quality`.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import islice
from typing import Any, TextIO

from tqdm import tqdm

from uft.data.readers import read_text
from uft.data.rows import BadRow, DataError
from uft.data.sources import Source, as_sources
from uft.data.template import Template
from uft.feedback import Example

HEADER = ("source", "kind", "rows", "kept", "dropped", "examples", "tokens", "prompts cut", "tokenised apart")


@dataclass
class SourceReport:
    """What became of the rows of one source.

    rows, kept    rows read, and those that became examples; the others are in `dropped`, by reason
    examples      more than `kept` where documents were split into chunks; 0 if nothing was tokenised, as is `tokens`
    tokens        of all examples, prompts counted once per response
    cut           rows whose prompt lost tokens on the left
    apart         responses tokenised apart from their prompt, since a token would have belonged to both
    notes         what was done to the texts
    error         why the source as a whole cannot be used
    """

    name: str
    where: str
    kind: str | None = None
    rows: int = 0
    kept: int = 0
    examples: int = 0
    tokens: int = 0
    cut: int = 0
    apart: int = 0
    bad_rows: list[BadRow] = field(default_factory=list, repr=False)
    notes: tuple[str, ...] = ()
    error: str | None = None

    @property
    def dropped(self) -> Counter[str]:
        return Counter(row.reason for row in self.bad_rows)

    @property
    def chunks(self) -> int:
        """Examples beyond one per row kept: the further chunks of documents."""
        return max(0, self.examples - self.kept)

    def or_refuse(self) -> SourceReport:
        """Raises `DataError` if no row can be used."""
        if not self.kept:
            dropped = ", ".join(f"{n} {reason}" for reason, n in self.dropped.most_common())
            raise DataError(f"{self.where}: found no row that can be used among {self.rows} ({dropped})")
        return self

    def cells(self) -> tuple[str, ...]:
        counts = (self.rows, self.kept, len(self.bad_rows), self.examples, self.tokens, self.cut, self.apart)
        return (self.name, self.kind or "?", *(f"{count:,}" for count in counts))


@dataclass(frozen=True)
class Report:
    """What became of the rows of all sources.  `str` is a table; `markdown()` the same as Markdown."""

    sources: tuple[SourceReport, ...]

    @property
    def bad_rows(self) -> list[BadRow]:
        return [row for source in self.sources for row in source.bad_rows]

    @property
    def ok(self) -> bool:
        return not any(source.bad_rows or source.error for source in self.sources)

    def __getitem__(self, name: str) -> SourceReport:
        return next(source for source in self.sources if source.name == name)

    def markdown(self) -> str:
        lines = [HEADER, ("---", "---", *["--:"] * (len(HEADER) - 2)), *(source.cells() for source in self.sources)]
        table = "\n".join(f"| {' | '.join(line)} |" for line in lines)
        remarks = self._remarks()
        return "\n".join([table, *[""] * bool(remarks), *(f"- {remark}" for remark in remarks)])

    def __str__(self) -> str:
        lines = [HEADER, *(source.cells() for source in self.sources)]
        width = [max(len(line[i]) for line in lines) for i in range(len(HEADER))]
        pad = [str.ljust, str.ljust, *[str.rjust] * (len(HEADER) - 2)]
        table = ["  ".join(p(cell, w) for p, cell, w in zip(pad, line, width)).rstrip() for line in lines]
        return "\n".join([*table, *self._remarks()])

    def _remarks(self) -> list[str]:
        remarks = []
        for source in self.sources:
            remarks += [f"{source.name}: {n:,} dropped: {reason}" for reason, n in source.dropped.most_common()]
            remarks += [f"{source.name}: {note}" for note in source.notes]
            remarks += [source.error] if source.error else []
        return remarks


def read_examples(
    source: Source, report: SourceReport, template: Template | None = None, on_bad_row: str = "error"
) -> Iterator[Example]:
    """The examples of a source, counting into `report` as they come.  Without a template rows are only looked at.

    Raises `BadRow` for the first bad row if `on_bad_row` is "error".
    """
    reading = read_text(source)
    report.kind, report.notes = reading.kind, reading.notes
    for texts in _batches(_progress(reading.examples, source.name, reading.total)):
        good = [text for text in texts if not isinstance(text, BadRow)]
        tokenised = iter(good if template is None else template.many(good, source.name))
        for text in texts:
            report.rows += 1
            result = text if isinstance(text, BadRow) else next(tokenised)
            if isinstance(result, BadRow):
                if result is not text:
                    result = result.at(source.where, text.row, text.line, source.columns)
                if on_bad_row == "error":
                    raise result
                report.bad_rows.append(result)
                continue
            report.kept += 1
            if template is not None:
                report.cut += result.cut
                report.apart += result.apart
                report.examples += len(result.examples)
                report.tokens += sum(example.tokens for example in result.examples)
                yield from result.examples
    assert report.rows == report.kept + sum(report.dropped.values()), report


def _progress(rows: Iterable, name: str, total: int | None) -> Iterable:
    # disable=None: a bar only where stderr is a terminal
    return tqdm(rows, name, total, unit=" rows", disable=None, delay=1, leave=False)


def _batches(rows: Iterable, size: int = 256) -> Iterator[list]:
    rows = iter(rows)
    while batch := list(islice(rows, size)):
        yield batch


def check(
    sources: Any, tokenizer: Any = None, max_length: int | None = None, chat_template: str | None = None
) -> Report:
    """Looks at every row of every source and reports all that cannot be used, instead of stopping at the first.

    Without a tokenizer only the texts are looked at, not their lengths.
    """
    template = None
    if tokenizer is not None:
        template = tokenizer if isinstance(tokenizer, Template) else Template(tokenizer, max_length, chat_template)
    elif max_length is not None:
        raise DataError(f"max_length is {max_length} and there is no tokenizer; want one, to count tokens with")
    reports = []
    for source in as_sources(sources):
        report = SourceReport(source.name, source.where, source.kind)
        reports.append(report)
        try:
            for _ in read_examples(source, report, template, on_bad_row="drop"):
                pass
        except DataError as error:
            report.error = str(error)
    return Report(tuple(reports))


def run_check(
    paths: Iterable[str],
    tokenizer: Any = None,
    max_length: int | None = None,
    file: TextIO | None = None,
    **options: Any,
) -> int:
    """The first part of `uft data check`: prints a line per bad row and the counts; the exit code is 1 if there is
    anything bad, else 0.

    `tokenizer` is a tokenizer or the folder or hub id of one; `options` are those of `Source`, for every path.
    """
    file = file or sys.stdout
    try:
        tokenizer = _load(tokenizer) if isinstance(tokenizer, str) else tokenizer
        report = check(_sources(paths, options), tokenizer, max_length)
    except DataError as error:
        print(error, file=file)
        return 1
    _show(report, file)
    return 0 if report.ok else 1


def _sources(paths: Iterable[str], options: Mapping[str, Any]) -> list[Source]:
    return [Source(**{"name": str(path), "path": path, **options}) for path in paths]


def _show(report: Report, file: TextIO) -> None:
    for source in report.sources:
        for row in source.bad_rows:
            print(row, file=file)
    if report.bad_rows:
        print(file=file)
    print(report, file=file)


def _load(tokenizer: str) -> Any:
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(tokenizer)
    except (OSError, ValueError) as error:
        raise DataError(f"tokenizer {tokenizer!r}: cannot be loaded: {error}") from error
