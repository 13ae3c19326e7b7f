"""A queue of pairs to be judged by people, and what they say as pairs for training.

A queue is JSON lines, an item each:

    {"id": "3f…", "prompt": …, "response_a": …, "response_b": …, "rule": "margin", "value": -0.02, "choice": null,
     "annotator": null}

Which response is a is drawn by seed and id, so that sides say nothing.  People put a, b, tie or skip into `choice` and
their name into `annotator`; several of them work on copies, or add lines with the same id.  `read_answers` checks what
comes back against the queue that was handed out, and `resolve` makes one judgement per item:

    a or b   more than half of its votes (skips are no votes) say so
    tie      there are votes, and neither has more than half
    skipped  nobody voted, and somebody skipped
    open     nothing was filled in
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from uft.data.quality.agreement import krippendorff_alpha
from uft.data.quality.writing import write_lines
from uft.data.rows import BadRow, DataError, is_number, shown
from uft.data.sources import Source, read_rows
from uft.record import write_json

CHOICES = ("a", "b", "tie", "skip")
TEXTS = ("prompt", "response_a", "response_b")
OUTCOMES = ("pairs", "tie", "skipped", "open")


# ---- handing out ----


def item_id(prompt: Any, first: Any, second: Any) -> str:
    """16 hexadecimal digits of a prompt and its two responses, whichever of them stands first."""
    sides = sorted(json.dumps(each, sort_keys=True, ensure_ascii=False) for each in (first, second))
    content = json.dumps([json.dumps(prompt, sort_keys=True, ensure_ascii=False), *sides], ensure_ascii=False)
    return hashlib.sha256(content.encode("utf-8", "surrogatepass")).hexdigest()[:16]


def queue_items(
    pairs: Sequence[tuple[Any, Any, Any]], rule: str = "", values: Sequence[float] | None = None, seed: int = 0
) -> list[dict[str, Any]]:
    """Items of a queue in this order, from (prompt, response, response).

    values   of the rule, one per pair

    Raises ValueError for two pairs that are the same but for their sides, and for responses that are equal.
    """
    values = [None] * len(pairs) if values is None else list(values)
    items: list[dict[str, Any]] = []
    place: dict[str, int] = {}
    for i, ((prompt, first, second), value) in enumerate(zip(pairs, values, strict=True)):
        if first == second:
            raise ValueError(f"pair {i}: found {shown(first)} twice; want two responses that differ")
        name = item_id(prompt, first, second)
        if name in place:
            raise ValueError(f"pair {i}: found the prompt and responses of pair {place[name]}; want each pair once")
        place[name] = i
        # by content: the same file handed in the other way round gives the same sides
        sides = sorted((first, second), key=lambda each: json.dumps(each, sort_keys=True))
        turned = np.random.default_rng([seed, *bytes.fromhex(name)]).random() < 0.5
        a, b = sides[::-1] if turned else sides
        value = None if value is None or not np.isfinite(value) else float(value)
        items.append(
            {"id": name, "prompt": prompt, "response_a": a, "response_b": b, "rule": rule, "value": value,
             "choice": None, "annotator": None}
        )  # fmt: skip
    return items


def refuse_loss(outputs: Sequence[Path], overwrite: bool, inputs: Iterable[str | Path]) -> None:
    """Raises `DataError` where an output is there already, unless `overwrite`, and always where it is an input."""
    read = {Path(path).resolve() for path in inputs}
    for path in outputs:
        if path.resolve() in read:
            raise DataError(f"output {str(path)!r} is a file that is read; want another --output")
        if path.exists() and not overwrite:
            raise DataError(f"output {str(path)!r} is there already; want another --output, or --overwrite")


# ---- taking back ----


@dataclass(frozen=True)
class Answers:
    """What came back.

    items      of the queue, by id, in its order
    votes      id -> annotator -> choice, skips included
    unfilled   lines without a choice
    problems   what cannot be used, a `BadRow` each
    """

    items: dict[str, dict[str, Any]]
    votes: dict[str, dict[str, str]]
    unfilled: int
    problems: list[BadRow]


def read_queue(path: str | Path) -> dict[str, dict[str, Any]]:
    """The items of a queue by id, in its order; raises `BadRow` for one without its id and texts, or there twice."""
    items: dict[str, dict[str, Any]] = {}
    for row in read_rows(Source("queue", path)):
        if row.problem is not None:
            raise row.problem
        where = {"where": str(path), "row": row.number, "line": row.line}
        name = row.values.get("id")
        if not isinstance(name, str) or not name:
            raise BadRow("no id", shown(name), "the id that the queue was written with", "id", **where)
        if missing := [column for column in TEXTS if row.values.get(column) is None]:
            raise BadRow("missing value", "nothing", "a text", missing[0], **where)
        if name in items:
            if any(items[name][column] != row.values[column] for column in TEXTS):
                raise BadRow("id twice", f"{name} with other texts", "one item per id", "id", **where)
            continue  # a line for another annotator
        items[name] = {column: row.values.get(column) for column in ("id", *TEXTS, "rule", "value")}
    return items


def read_answers(paths: Sequence[str | Path], queue: Mapping[str, dict[str, Any]]) -> Answers:
    """Every line of the files that came back, checked against the queue.  Problems are collected, not raised.

    A line without a choice is counted as not filled in.  One annotator says one thing of an item: a second line is a
    double, whatever it says, since nobody knows which of them was meant.
    """
    votes: dict[str, dict[str, str]] = {name: {} for name in queue}
    first: dict[tuple[str, str], str] = {}
    problems, unfilled = [], 0
    for path in paths:
        for row in read_rows(Source("answers", path)):
            try:
                if row.problem is not None:
                    raise row.problem
                found = _vote(row.values, queue)
                if found is None:
                    unfilled += 1
                    continue
                name, annotator, choice = found
                if (name, annotator) in first:
                    before = f"{choice!r} by {shown(annotator)} for {name}, who said {votes[name][annotator]!r} in"
                    raise BadRow(
                        "double", f"{before} {first[name, annotator]}", "one choice per item and annotator", "choice"
                    )
                first[name, annotator] = f"{path}, row {row.number}"
                votes[name][annotator] = choice
            except BadRow as problem:
                problems.append(problem if problem.where else problem.at(str(path), row.number, row.line, {}))
    return Answers(dict(queue), votes, unfilled, problems)


def _vote(values: Mapping[str, Any], queue: Mapping[str, dict[str, Any]]) -> tuple[str, str, str] | None:
    """(id, annotator, choice) of a line, or None where nothing was filled in."""
    name, choice, annotator = (values.get(column) for column in ("id", "choice", "annotator"))
    if not isinstance(name, str) or name not in queue:
        raise BadRow("unknown id", shown(name), "an id of the queue", "id")
    for column in TEXTS:
        # an answer to other texts, or to the same with their sides exchanged, is none to these
        if values.get(column) is not None and values[column] != queue[name][column]:
            raise BadRow(
                "other text", shown(values[column]), f"that of the queue, {shown(queue[name][column])}", column
            )
    if choice is None or (isinstance(choice, str) and not choice.strip()):
        return None
    known = choice.strip().lower() if isinstance(choice, str) else choice
    if known not in CHOICES:
        raise BadRow("invalid choice", shown(choice), ", ".join(CHOICES), "choice")
    annotator = "" if annotator is None else annotator
    if not isinstance(annotator, str):
        raise BadRow("wrong type", shown(annotator), "a name", "annotator")
    return name, annotator.strip(), known


# ---- one judgement per item ----


def resolve(votes: Mapping[str, str]) -> str:
    """a, b, tie, skipped or open; see the top of the file.  `votes` are of one item, by annotator."""
    counts = Counter(choice for choice in votes.values() if choice != "skip")
    total = sum(counts.values())
    if not total:
        return "skipped" if votes else "open"
    return next((side for side in ("a", "b") if 2 * counts[side] > total), "tie")


def pairs_of(answers: Answers) -> tuple[list[dict[str, Any]], dict[str, int]]:
    """(pairs in the standard columns, counts).  The counts of `OUTCOMES` add up to the items of the queue.

    A pair also has `id`, `votes` (how many) and `agreement` (the share of them for the chosen side).
    """
    pairs, counts = [], Counter(dict.fromkeys(OUTCOMES, 0))
    for name, item in answers.items.items():
        votes = answers.votes[name]
        outcome = resolve(votes)
        if outcome not in ("a", "b"):
            counts[outcome] += 1
            continue
        counts["pairs"] += 1
        chosen, rejected = (f"response_{outcome}", "response_b" if outcome == "a" else "response_a")
        said = [choice for choice in votes.values() if choice != "skip"]
        pairs.append(
            {"prompt": item["prompt"], "chosen": item[chosen], "rejected": item[rejected], "id": name,
             "votes": len(said), "agreement": said.count(outcome) / len(said)}
        )  # fmt: skip
    said = Counter(choice for votes in answers.votes.values() for choice in votes.values())
    more = {
        "items": len(answers.items), "lines_unfilled": answers.unfilled, "problems": len(answers.problems),
        **{f"votes_{choice}": said[choice] for choice in CHOICES},
        "annotators": len({annotator for votes in answers.votes.values() for annotator in votes}),
    }  # fmt: skip
    return pairs, dict(counts) | more


# ---- uft data queue ----


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "uft data queue",
        description="Judgements of people, as pairs for training.",
        epilog="example: uft data queue import ann.jsonl bob.jsonl --queue queue.jsonl --output pairs.jsonl",
    )
    commands = parser.add_subparsers(dest="command", required=True)
    taking = commands.add_parser("import", help="checks what came back and writes pairs")
    taking.add_argument("answers", nargs="+", metavar="FILE", help="filled queues, of one annotator or several")
    taking.add_argument("--queue", required=True, help="the queue as it was handed out")
    taking.add_argument("--output", type=Path, required=True, help="pairs as JSON lines; counts go beside it")
    taking.add_argument("--overwrite", action="store_true", help="replace pairs and counts that are there already")
    taking.add_argument("--drop", action="store_true", help="leave out lines that cannot be used; otherwise no pairs")
    return parser


def main(words: Sequence[str]) -> int:
    """`uft data queue import`: exit code 1 where anything that came back cannot be used."""
    given = parser().parse_args(list(words))
    return run_import(given.answers, given.queue, given.output, given.drop, given.overwrite)


def run_import(paths: Sequence[str], queue: str, output: Path, drop: bool = False, overwrite: bool = False) -> int:
    """Writes the pairs and `<output>.counts.json`; prints a line per problem and the counts.

    Problems mean exit code 1, and no pairs unless `drop`.  Raises `DataError` for files that would be lost.
    """
    if output.suffix != ".jsonl":
        raise DataError(f"output is {str(output)!r}; want a file ending in .jsonl")
    refuse_loss([output, output.with_suffix(".counts.json")], overwrite, [*paths, queue])
    answers = read_answers(paths, read_queue(queue))
    for problem in answers.problems:
        print(problem)
    pairs, counts = pairs_of(answers)
    alpha = krippendorff_alpha([[c for c in votes.values() if c != "skip"] for votes in answers.votes.values()])
    counts = counts | {"krippendorff_alpha": alpha if is_number(alpha) else None}
    for name, count in counts.items():
        print(
            f"{name.replace('_', ' ')}: {'–' if count is None else f'{count:.3g}' if name.endswith('alpha') else count}"
        )
    if answers.problems and not drop:
        print(f"{len(answers.problems)} lines cannot be used: nothing written; --drop leaves them out", file=sys.stderr)
        return 1
    output.parent.mkdir(parents=True, exist_ok=True)
    write_lines(output, pairs)
    write_json(output.with_suffix(".counts.json"), counts)
    print(f"{len(pairs)} pairs in {output}")
    return 1 if answers.problems else 0
