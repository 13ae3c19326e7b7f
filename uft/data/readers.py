"""From rows to prompts and responses as text: one reader per kind of example, and what it asks of a row.

    kind            columns                                                             chosen when a source has
    document        text                                                                text
    demonstration   prompt, completion  |  messages                                     these, and none of below
    pair            chosen, rejected (prompt, score_chosen, score_rejected optional)    chosen, rejected
    label           prompt, completion, label                                           completion, label
    score           prompt, completion, score                                           completion, score

Any kind may have a column weight besides: the factor (>= 0) on the loss of the row, for both sides of a pair.
The names are TRL's.  Texts are strings, or lists of {role, content}; within a row all of one sort.

An empty prompt ('') is allowed in a demonstration, which then teaches the response unconditionally; where a response
is judged as an answer, it must answer something.  In a conversation the prompt holds at least one message and does
not end with the assistant's, and a response starts and ends with the assistant's.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from numbers import Real
from typing import Any

from uft.data.prompts import implicit_prompt, repeating, without_prompt
from uft.data.rows import BadRow, DataError, Messages, Row, shown
from uft.data.sources import Source, open_table

ROLES = ("system", "developer", "user", "assistant", "tool")


@dataclass(frozen=True, slots=True)
class TextExample:
    """A row as text; otherwise as `uft.feedback.Example`.

    columns          those the responses came from
    prompt_column    the one the prompt came from
    weight           factor on the loss of its responses
    special_tokens   whether special tokens written out in the text are meant to be such
    """

    kind: str
    prompt: str | Messages
    responses: tuple[str | Messages, ...]
    targets: tuple[float, ...]
    preferences: tuple[tuple[int, int], ...] = ()
    columns: tuple[str, ...] = ("completion",)
    row: int = 0
    line: int | None = None
    prompt_column: str = "prompt"
    weight: float = 1.0
    special_tokens: bool = False


# ---- readers ----


def document(row: Mapping[str, Any], source: Source) -> TextExample:
    text = _string(row, "text")
    _not_blank(text, "text", "empty text")
    return TextExample("document", "", (text,), (math.nan,), columns=("text",))


def demonstration(row: Mapping[str, Any], source: Source) -> TextExample:
    if "messages" not in row:
        return TextExample("demonstration", *_prompt_and_completion(row, empty_prompt=True), (1.0,))
    messages = _messages(row, "messages")
    first = next((i for i, message in enumerate(messages) if message["role"] == "assistant"), len(messages))
    _prompt(messages[:first], "messages")
    _response(messages[first:], "messages")
    responses = (messages[first:],)
    return TextExample(
        "demonstration", messages[:first], responses, (1.0,), columns=("messages",), prompt_column="messages"
    )


def pair(row: Mapping[str, Any], source: Source) -> TextExample:
    chosen, rejected = _text(row, "chosen"), _text(row, "rejected")
    if type(chosen) is not type(rejected):
        raise _mixed("rejected", rejected, "chosen", chosen)
    _not_blank(chosen, "chosen")
    _not_blank(rejected, "rejected")
    _must_differ(chosen, rejected)

    prompt, prompt_column = _text(row, "prompt") if "prompt" in row else None, "prompt"
    if prompt is None or (isinstance(prompt, str) and not isinstance(chosen, str)):
        prompt, chosen, rejected = implicit_prompt(chosen, rejected)
        prompt_column = "chosen, rejected"
        if not prompt:
            raise BadRow("empty prompt", "nothing in common", "both to start with the prompt", prompt_column)
    elif type(prompt) is not type(chosen):
        raise _mixed("chosen", chosen, "prompt", prompt)
    elif not isinstance(prompt, str) and chosen[: len(prompt)] == prompt == rejected[: len(prompt)]:
        chosen, rejected = chosen[len(prompt) :], rejected[len(prompt) :]
    _prompt(prompt, "prompt")
    _response(chosen, "chosen")
    _response(rejected, "rejected")
    _must_differ(chosen, rejected)  # again: less of a prompt they may differ in white space only

    targets = (1.0, 0.0)
    if "score_chosen" in row or "score_rejected" in row:
        targets = _score(row, "score_chosen", source), _score(row, "score_rejected", source)
        if targets[0] < targets[1]:
            found = f"score_chosen {row['score_chosen']} below score_rejected {row['score_rejected']}"
            raise BadRow("scores contradict", found, "the chosen response scored at least as high", "score_chosen")
    sides = ("chosen", "rejected")
    return TextExample("pair", prompt, (chosen, rejected), targets, ((0, 1),), sides, prompt_column=prompt_column)


def label(row: Mapping[str, Any], source: Source) -> TextExample:
    prompt, responses = _prompt_and_completion(row)
    value = _number(row, "label", "true, false, 0 or 1")
    if value not in (0.0, 1.0):
        raise BadRow("label not 0 or 1", shown(row["label"]), "true, false, 0 or 1", "label")
    return TextExample("label", prompt, responses, (value,))


def score(row: Mapping[str, Any], source: Source) -> TextExample:
    prompt, responses = _prompt_and_completion(row)
    weights = source.score or {"score": 1.0}
    total = sum(weight * _score(row, column, source) for column, weight in weights.items())
    return TextExample("score", prompt, responses, (total / sum(weights.values()),))


@dataclass(frozen=True)
class Reader:
    """How a kind is read.  `columns` are alternative sets of columns, one of which a source must have; `read` is handed
    these and the `optional` ones that there are, and nothing else."""

    read: Callable[[Mapping[str, Any], Source], TextExample]
    columns: tuple[tuple[str, ...], ...]
    optional: tuple[str, ...] = ()


SCORES = ("score_chosen", "score_rejected")
READERS = {
    "document": Reader(document, (("text",),)),
    "demonstration": Reader(demonstration, (("prompt", "completion"), ("messages",))),
    "pair": Reader(pair, (("chosen", "rejected"),), ("prompt", *SCORES)),
    "label": Reader(label, (("prompt", "completion", "label"),)),
    "score": Reader(score, (("prompt", "completion", "score"),)),
}
JUDGED = ("pair", "label", "score")  # these are taken before a demonstration, and that before a document


def detect_kind(columns: tuple[str, ...], where: str = "data") -> str:
    """The kind of example that a source with these columns holds.  Raises `DataError` if that is none, or not clear."""
    fitting = [kind for kind, reader in READERS.items() if any(set(each) <= set(columns) for each in reader.columns)]
    judged = [kind for kind in fitting if kind in JUDGED]
    if len(judged) > 1:
        raise DataError(f"{where}: found the columns of {' and of '.join(judged)}; want `kind` to say which to read")
    if not fitting:
        wanted = "; ".join(f"{kind}: {_alternatives(kind)}" for kind in READERS)
        raise DataError(f"{where}: found columns {', '.join(columns)}; want those of a kind ({wanted})")
    return judged[0] if judged else "demonstration" if "demonstration" in fitting else fitting[0]


def _alternatives(kind: str) -> str:
    return " | ".join(", ".join(each) for each in READERS[kind].columns)


# ---- sources ----


@dataclass(frozen=True)
class Reading:
    """A source being read: the kind of its examples (None: no row can be read), and the examples and bad rows.

    `notes` say what was done to the texts; `total` is the number of rows, where it is known beforehand.
    """

    kind: str | None
    examples: Iterator[TextExample | BadRow]
    total: int | None
    notes: tuple[str, ...] = ()


def read_text(source: Source) -> Reading:
    """Opens a source and reads its rows as text.  Raises `DataError` if the source as a whole cannot be used."""
    if source.kind not in (None, *READERS):
        raise DataError(f"{source.where}: found kind {source.kind!r}; want {', '.join(READERS)}")
    table = open_table(source)
    if not table.columns:
        return Reading(source.kind, (row.problem for row in table.rows), table.total)
    present = (*table.columns, *(["score"] if source.score else []))
    kind = source.kind or detect_kind(present, source.where)
    if source.score and kind != "score":
        raise DataError(f"{source.where}: found score {source.score} for kind {kind!r}; want it for kind 'score' only")
    if not any(set(each) <= set(present) for each in READERS[kind].columns):
        found = ", ".join(table.columns)
        raise DataError(f"{source.where}: found columns {found}; want {_alternatives(kind)} for kind {kind!r}")
    scores = set(SCORES) & set(table.columns)
    if kind == "pair" and len(scores) == 1:
        raise DataError(f"{source.where}: found column {scores.pop()!r} alone; want {' and '.join(SCORES)}")

    reader = READERS[kind]
    needed = next(each for each in reader.columns if set(each) <= set(present))
    columns = (*needed, *(name for name in reader.optional if name in table.columns), *source.score)
    # not where it is one of the columns that the score is made of
    weighted = "weight" in table.columns and "weight" not in source.score
    notes = []
    if weighted:
        notes.append(f"losses are multiplied by column {source.columns.get('weight', 'weight')!r}")
    if source.score:
        notes.append("score is the mean of " + ", ".join(f"{name} × {w:g}" for name, w in source.score.items()))
    if kind == "pair" and "prompt" not in columns:
        notes.append("prompts are what chosen and rejected have in common")
    # one row alone may repeat its prompt by chance ("Hi" answered by "Hi there"), so all must
    some, whole = repeating(table.head) if kind == "pair" else (0, 0)
    repeated = 0 < some == whole
    if repeated:
        notes.append("prompts were taken off the front of chosen and rejected, which repeat them")
    elif some > whole / 2:
        notes.append(f"{some} of the first {whole} rows repeat their prompt in both answers, not all: left as it is")

    def read(row: Row) -> TextExample | BadRow:
        if row.problem is not None:
            return row.problem
        values = {name: row.values.get(name) for name in columns}
        try:
            example = reader.read(without_prompt(values) if repeated else values, source)
            example = _as_chat(example) if source.chat else example
            weight = _weight(row.values) if weighted else 1.0
        except BadRow as problem:
            return problem.at(source.where, row.number, row.line, source.columns)
        return replace(example, row=row.number, line=row.line, weight=weight, special_tokens=source.special_tokens)

    return Reading(kind, map(read, table.rows), table.total, tuple(notes))


def _as_chat(example: TextExample) -> TextExample:
    """Strings as a user's message and the assistant's answer."""
    if example.kind == "document" or not isinstance(example.prompt, str):
        return example
    _prompt(example.prompt, "prompt")
    responses = tuple([{"role": "assistant", "content": response}] for response in example.responses)
    return replace(example, prompt=[{"role": "user", "content": example.prompt}], responses=responses)


# ---- what a row must hold ----


def _value(row: Mapping[str, Any], column: str, wanted: str) -> Any:
    if row.get(column) is None:
        raise BadRow("missing value", "nothing", wanted, column)
    return row[column]


def _string(row: Mapping[str, Any], column: str, wanted: str = "a string") -> str:
    value = _value(row, column, wanted)
    if not isinstance(value, str):
        raise BadRow("wrong type", shown(value), wanted, column)
    return _encodable(value, column)


def _encodable(text: str, column: str) -> str:
    if not text.isascii():
        try:
            text.encode()
        except UnicodeEncodeError as error:
            found = f"{text[error.start]!r} at position {error.start}"
            raise BadRow("invalid UTF-8", found, "text that can be written as UTF-8", column) from None
    return text


def _text(row: Mapping[str, Any], column: str) -> str | Messages:
    if isinstance(row.get(column), (list, tuple)):
        return _messages(row, column)
    return _string(row, column, "a string or a list of messages")


def _messages(row: Mapping[str, Any], column: str) -> Messages:
    messages = _value(row, column, "a list of messages")
    if not isinstance(messages, (list, tuple)):
        raise BadRow("wrong type", shown(messages), "a list of messages", column)
    for message in messages:
        if not isinstance(message, Mapping) or not {"role", "content"} <= set(message):
            raise BadRow("wrong type", shown(message), "messages with role and content", column)
        if message["role"] not in ROLES:
            raise BadRow("invalid roles", f"role {shown(message['role'])}", ", ".join(ROLES), column)
        if not isinstance(message["content"], str):
            raise BadRow("wrong type", f"content {shown(message['content'])}", "content that is a string", column)
        _encodable(message["content"], column)
    # parquet gives every message the keys of all of them, with None where it has none
    return [{key: value for key, value in message.items() if value is not None} for message in messages]


def _prompt_and_completion(row: Mapping[str, Any], empty_prompt: bool = False) -> tuple:
    prompt, completion = _text(row, "prompt"), _text(row, "completion")
    if type(prompt) is not type(completion):
        raise _mixed("completion", completion, "prompt", prompt)
    if not (empty_prompt and isinstance(prompt, str)):
        _prompt(prompt, "prompt")
    _response(completion, "completion")
    return prompt, (completion,)


def _prompt(prompt: str | Messages, column: str) -> None:
    if isinstance(prompt, str):
        _not_blank(prompt, column, "empty prompt")
    elif not prompt:
        raise BadRow("empty prompt", "no message before the assistant's", "at least one", column)
    elif prompt[-1]["role"] == "assistant":
        raise BadRow("invalid roles", "a prompt that ends with the assistant", "another's message at its end", column)


def _response(response: str | Messages, column: str) -> None:
    _not_blank(response, column)
    if isinstance(response, str):
        return
    roles = [message["role"] for message in response]
    if roles[0] != "assistant" or roles[-1] != "assistant":
        found = f"a response with roles {shown(', '.join(roles))}"
        raise BadRow("invalid roles", found, "the assistant's message at its start and end", column)
    for message in response:
        if message["role"] == "assistant":
            _not_blank(message["content"], column)


def _not_blank(text: str | Messages, column: str, reason: str = "empty response") -> None:
    last = text if isinstance(text, str) else text[-1]["content"] if text else ""
    if not last.strip():
        raise BadRow(reason, shown(last), "text that is not only white space", column)


def _must_differ(chosen: str | Messages, rejected: str | Messages) -> None:
    if _trimmed(chosen) == _trimmed(rejected):
        found = f"{shown(rejected)} twice" if chosen == rejected else f"{shown(rejected)}, chosen but for white space"
        raise BadRow("equal responses", found, "chosen and rejected to differ", "rejected")


def _trimmed(text: str | Messages) -> str | Messages:
    if isinstance(text, str):
        return text.strip()
    return [message | {"content": message["content"].strip()} for message in text]


def _mixed(column: str, text: str | Messages, other: str, other_text: str | Messages) -> BadRow:
    sort = {str: "a string", list: "a list of messages"}
    wanted = f"{sort[type(other_text)]}, as {other} is"
    return BadRow("mixed formats", sort[type(text)], wanted, column)


def _number(row: Mapping[str, Any], column: str, wanted: str) -> float:
    value = _value(row, column, wanted)
    value = value.item() if hasattr(value, "item") else value  # numpy's and torch's scalars
    if not isinstance(value, Real):
        raise BadRow("wrong type", shown(row[column]), wanted, column)
    try:
        return float(value)
    except OverflowError:  # an integer of hundreds of digits
        return math.inf if value > 0 else -math.inf


def _weight(row: Mapping[str, Any]) -> float:
    wanted = "a number >= 0"
    value = _number(row, "weight", wanted)
    if isinstance(row["weight"], bool):
        raise BadRow("wrong type", shown(row["weight"]), wanted, "weight")
    if not (math.isfinite(value) and value >= 0):
        raise BadRow("weight out of range", f"{value:g}", wanted, "weight")
    return value


def _score(row: Mapping[str, Any], column: str, source: Source) -> float:
    low, high = source.score_range or (0.0, 1.0)
    wanted = f"a number in [{low:g}, {high:g}]"
    value = _number(row, column, wanted)
    if isinstance(row[column], bool):
        raise BadRow("wrong type", shown(row[column]), wanted, column)
    if math.isnan(value):
        raise BadRow("score is NaN", "nan", wanted, column)
    if not low <= value <= high:
        hint = "" if source.score_range else "; or set score_range"
        raise BadRow("score out of range", f"{value:g}", wanted + hint, column)
    return (value - low) / (high - low)
