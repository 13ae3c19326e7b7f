"""Prompts of pairs that stand in the answers: taken off their front, or found as what the two have in common."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from uft.data.rows import Messages, Row


def repeats_prompt(values: Mapping[str, Any]) -> bool:
    prompt, chosen, rejected = (values.get(name) for name in ("prompt", "chosen", "rejected"))
    strings = all(isinstance(text, str) for text in (prompt, chosen, rejected))
    return bool(strings and prompt and chosen.startswith(prompt) and rejected.startswith(prompt))


def repeating(head: list[Row]) -> tuple[int, int]:
    """How many rows repeat their prompt in both answers, and how many could.  A row with an empty or missing text,
    which is refused later, says nothing."""

    def says_something(values: Mapping[str, Any]) -> bool:
        texts = [values.get(name) for name in ("prompt", "chosen", "rejected")]
        return all(isinstance(text, str) and text.strip() for text in texts)

    whole = [row.values for row in head if says_something(row.values)]
    return sum(map(repeats_prompt, whole)), len(whole)


def without_prompt(values: dict[str, Any]) -> dict[str, Any]:
    if not repeats_prompt(values):
        return values
    return values | {name: values[name][len(values["prompt"]) :] for name in ("chosen", "rejected")}


def implicit_prompt(chosen: str | Messages, rejected: str | Messages) -> tuple:
    """(prompt, chosen, rejected) where the first is the beginning that the two have in common.

    As TRL's `extract_prompt`: shared leading messages, or shared leading characters less a space at their end.  If one
    is the beginning of the other, its last message or character still counts as response.
    """
    shorter = min(len(chosen), len(rejected))
    shared = next((i for i in range(shorter) if chosen[i] != rejected[i]), max(shorter - 1, 0))
    if shared > 0 and chosen[shared] != rejected[shared] and chosen[shared - 1] == " ":
        shared -= 1
    return chosen[:shared], chosen[shared:], rejected[shared:]
