"""`uft data check`: what cannot be used, line by line, and a report on the rest (`uft.data.quality`)."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from uft.data.check import _load, _show, _sources, check
from uft.data.quality.contamination import Overlap
from uft.data.quality.duplicates import Near
from uft.data.quality.markdown import markdown
from uft.data.quality.measure import Options, measure
from uft.data.quality.report import write_report
from uft.data.quality.terms import read_terms
from uft.data.readers import READERS
from uft.data.rows import DataError
from uft.data.sources import Source, open_table


def main(words: Sequence[str]) -> int:
    """Validation of every row, then the report of quality.  The exit code is that of validation: 1 for a bad row, or
    for a source or an option that cannot be used, else 0; what the report finds is for a reader to judge."""
    asked = vars(parser().parse_args(list(words)))
    source_options = {name: asked[name] for name in ("kind", "split", "subset", "limit", "streaming", "special_tokens")}
    try:
        options = None if asked["quick"] else _quality_options(asked)
        tokenizer = None if asked["tokenizer"] is None else _load(asked["tokenizer"])
        sources = _sources(asked["paths"], source_options)
        if options is not None:
            _open_others(asked["eval"], options)
        report = check(sources, tokenizer, asked["max_length"])
        _show(report, sys.stdout)
        good = [source for source, found in zip(sources, report.sources) if not found.error and found.kept]
        if options is not None and good:
            _quality(good, asked, replace(options, tokenizer=tokenizer))
    except DataError as error:
        print(error)
        return 1
    return 0 if report.ok else 1


def _quality_options(asked: Mapping[str, Any]) -> Options:
    near = Near(asked["threshold"], asked["near_ngram"], asked["permutations"])
    chosen = {name: asked[name] for name in ("by", "annotator", "beta", "max_length")}
    lists = {name: asked[name] for name in ("terms", "unsafe") if asked[name] is not None}
    return Options(near, Overlap(asked["ngram"], asked["max_documents"], near), **chosen, **lists)


def _open_others(evaluation: Sequence[str], options: Options) -> None:
    """Everything else that will be read: a wrong name is noticed before long work."""
    for source in _sources(evaluation, {}):
        open_table(source)
    for path in (options.terms, options.unsafe):
        read_terms(path)


def _quality(sources: Sequence[Source], asked: Mapping[str, Any], options: Options) -> None:
    findings = measure(sources, _sources(asked["eval"], {}), options)
    print(f"\n{markdown(findings)}", end="")
    if asked["report"] is not None:
        print(f"\n{write_report(findings, asked['report'])}, with report.json and figures beside it")


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "uft data check",
        description="Validates data sets, one line per bad row, and reports on their quality.",
        epilog="example: uft data check pairs.parquet scores.jsonl --eval held_out.jsonl --report runs/data",
    )
    add = parser.add_argument
    add("paths", nargs="+", metavar="FILE", help="file, folder of save_to_disk, or id on the hub")
    add("--tokenizer", help="folder or hub id; without one, lengths are in characters alone")
    add("--max_length", type=int, help="longest prompt + response in tokens")
    add("--kind", choices=READERS, help="by default found from the columns")
    add("--split", default="train", help="of a hub data set")
    add("--subset", help="of a hub data set")
    add("--limit", type=int, help="look at the first so many rows only")
    add("--streaming", action="store_true", help="read a hub data set without downloading it first")
    add("--special_tokens", action="store_true", help="those written out in texts are meant to be such")
    add("--quick", action="store_true", help="validation alone")
    add("--eval", nargs="+", default=[], metavar="FILE", help="evaluation files, whose prompts are looked for")
    add("--report", metavar="FOLDER", help="write report.md, report.json and figures there")
    add("--by", metavar="COLUMN", help="split each source by the values of this column")
    add("--annotator", default="annotator", metavar="COLUMN", help="who judged; default: annotator")
    add("--threshold", type=float, default=0.8, help="Jaccard similarity from which texts are near duplicates")
    add("--near_ngram", type=int, default=3, help="words of the n-grams that near duplicates share")
    add("--permutations", type=int, default=128, help="of MinHash")
    add("--ngram", type=int, default=13, help="words in a row that make an overlap with evaluation prompts")
    add("--max_documents", type=int, default=10, help="prompts from which on an n-gram is a template, and no overlap")
    add("--beta", type=float, default=0.1, help="of the losses that scores are for")
    add("--terms", metavar="FILE", help="list of terms for groups of people, instead of the one that comes along")
    add("--unsafe", metavar="FILE", help="list of unsafe terms, likewise")
    return parser
