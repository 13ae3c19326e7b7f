"""Sets of prompts that need no response: to be answered, verified, refused, or sampled from."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from uft.data.rows import BadRow, DataError, Messages, Row, shown
from uft.data.sources import Source, read_rows
from uft.data.template import Template

logger = logging.getLogger(__name__)

Check = Callable[[Mapping[str, Any]], Any]


@dataclass(frozen=True)
class Prompt:
    """One prompt of a set.

    id       set, row and a digest of what is in the row, so that an earlier evaluation of other rows is noticed
    prompt   a string that a model goes on from, or messages
    tokens   int32 [n], what a model is given: BOS and what the chat template opens the answer with included
    values   the row, by column
    """

    id: str
    prompt: str | Messages
    tokens: np.ndarray
    values: Mapping[str, Any]


def read_prompts(
    source: Source, template: Template, *, on_bad_row: str = "error", check: Check | None = None
) -> list[Prompt]:
    """The rows of a source that have a column `prompt` (a string, or messages); `check` raises `BadRow` for
    those whose other columns cannot be used.

    Raises `BadRow` for the first row that cannot be used, or leaves it out with a warning where `on_bad_row` (or the
    source) says "drop"; `DataError` where none is left.
    """
    found, bad = [], []
    for row in read_rows(source):
        try:
            found.append(_prompt(row, source, template, check))
        except BadRow as problem:
            problem = problem if problem.where else problem.at(source.where, row.number, row.line, source.columns)
            if (source.on_bad_row or on_bad_row) == "error":
                raise problem from None
            bad.append(problem)
    if not found:
        raise DataError(f"{source.where}: found no prompt that can be used among {len(bad)} rows; the first: {bad[0]}")
    if bad:
        logger.warning(
            "%s: dropped %d of %d rows, the first: %s", source.where, len(bad), len(bad) + len(found), bad[0]
        )
    return found


def _prompt(row: Row, source: Source, template: Template, check: Check | None) -> Prompt:
    if row.problem is not None:
        raise row.problem
    prompt = row.values.get("prompt")
    is_messages = isinstance(prompt, (list, tuple)) and prompt and all(map(_is_message, prompt))
    if not is_messages and not (isinstance(prompt, str) and prompt.strip()):
        raise BadRow("no prompt", shown(prompt), "a string or a list of messages", "prompt")
    if check is not None:
        check(row.values)
    if is_messages:
        prompt = [{key: value for key, value in message.items() if value is not None} for message in prompt]
        if prompt[-1]["role"] == "assistant":
            raise BadRow("invalid roles", "a prompt that ends with the assistant", "another's message", "prompt")
    elif source.chat:
        prompt = [{"role": "user", "content": prompt}]
    tokens = template.prompt(prompt, source.special_tokens)
    if template.max_length is not None and len(tokens) > template.max_length:
        raise BadRow("prompt too long", f"{len(tokens)} tokens", f"at most max_length {template.max_length}", "prompt")
    return Prompt(f"{source.name}/{row.number}#{digest(row.values)}", prompt, tokens, row.values)


def _is_message(value: Any) -> bool:
    return isinstance(value, Mapping) and isinstance(value.get("role"), str) and isinstance(value.get("content"), str)


def digest(value: Any) -> str:
    """Eight hexadecimal digits that change with the value; of arrays, with their entries."""
    if isinstance(value, np.ndarray):
        return hashlib.sha256(value.tobytes()).hexdigest()[:8]
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()[:8]
