"""The data of an evaluation: read once, before any model runs, for as many models as are to be compared."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from uft.data.files import csv_value
from uft.data.mixture import FeedbackDataset, load_feedback
from uft.data.rows import BadRow, DataError, is_number, shown
from uft.data.sources import read_rows
from uft.data.template import Template
from uft.evaluation.config import FEEDBACK, PROMPTS, EvaluationConfig, PairSet, PromptSet
from uft.evaluation.prompts import Prompt, digest, read_prompts
from uft.evaluation.safety import group_of
from uft.evaluation.verifiable import verify


@dataclass(frozen=True)
class EvaluationData:
    """What a configuration's data are, in tokens.

    tokens   prompts to sample from, by set of `divergence`
    groups   of `harmlessness`: the group of each of its examples
    """

    demonstrations: FeedbackDataset | None = None
    pairs: FeedbackDataset | None = None
    prompts: dict[str, dict[str, list[Prompt]]] = field(default_factory=dict)
    responses: dict[str, FeedbackDataset] = field(default_factory=dict)
    tokens: dict[str, list[np.ndarray]] = field(default_factory=dict)
    harmlessness: FeedbackDataset | None = None
    groups: list[str] = field(default_factory=list)

    def ids(self) -> dict[str, list[str]]:
        """By section, what tells samples apart."""
        given = {name: getattr(self, name) for name in (*FEEDBACK, "harmlessness")}
        found = {name: example_ids(data) for name, data in given.items() if data is not None}
        return found | {
            section: [prompt.id for prompts in sets.values() for prompt in prompts]
            for section, sets in self.prompts.items()
            if sets
        }


def example_ids(data: FeedbackDataset) -> list[str]:
    """One per example."""
    return [
        f"{example.source}/{example.index}#"
        + digest(np.concatenate([example.prompt, *(r.tokens for r in example.responses if not r.mismatched)]))
        for example in (data[i] for i in range(len(data)))
    ]


def read_data(config: EvaluationConfig, tokenizer: PreTrainedTokenizerBase) -> EvaluationData:
    """Reads and tokenises what the configuration names.  Raises `BadRow` and `DataError`."""

    def feedback(value: Any) -> FeedbackDataset | None:
        if value is None or isinstance(value, FeedbackDataset):
            return value
        return load_feedback(value, tokenizer, config.max_length, on_bad_row=config.on_bad_row)[0]

    given: dict[str, Any] = {section: feedback(getattr(config, section)) for section in FEEDBACK}
    if config.harmlessness:
        given["harmlessness"] = feedback([each.source for each in config.harmlessness.values()])
        given["groups"] = [
            group for name, each in config.harmlessness.items() for group in _groups(name, each, given["harmlessness"])
        ]
    for section in ("pairs", "harmlessness"):
        data = given.get(section)
        if data is not None and (other := set().union(*data.kinds().values()) - {"pair"}):
            raise DataError(f"{section}: found examples of kind {min(other)}; want pairs (prompt, chosen, rejected)")
    if not any(getattr(config, section) for section in PROMPTS):
        return EvaluationData(**given)
    template = Template(tokenizer, config.max_length)
    prompts: dict[str, dict[str, list[Prompt]]] = {section: {} for section in PROMPTS if section != "divergence"}
    for section, sets in prompts.items():
        for name, each in getattr(config, section).items():
            check = partial(CHECKS[section], of_set=each) if section in CHECKS else None
            sets[name] = read_prompts(each.source, template, on_bad_row=config.on_bad_row, check=check)
            if each.group is not None and not any(each.group in prompt.values for prompt in sets[name]):
                raise DataError(f"{each.source.where}: found no column {each.group!r}; want that of `group`")
    responses, tokens = {}, {}
    for name, each in config.divergence.items():
        if "responses" in each.along:
            responses[name] = data = feedback([each.source])
            tokens[name] = _distinct(data[i].prompt for i in range(len(data)) if len(data[i].prompt))
        else:
            read = read_prompts(each.source, template, on_bad_row=config.on_bad_row)
            tokens[name] = _distinct(prompt.tokens for prompt in read)
        if each.along != ("responses",) and not tokens[name]:
            raise DataError(f"divergence.{name}: found no prompts to sample from; want some, or along: responses")
    return EvaluationData(**given, prompts=prompts, responses=responses, tokens=tokens)


def _groups(name: str, of_set: PairSet, data: FeedbackDataset) -> list[str]:
    """The group of each example of a set."""
    rows = [example.row for example in data.examples[name][:]]
    if of_set.group is None:
        return [name] * len(rows)
    by_row = {row.number: row.values for row in read_rows(of_set.source)}
    if not any(of_set.group in by_row[row] for row in rows):
        raise DataError(f"{of_set.source.where}: found no column {of_set.group!r}; want that of `group`")
    return [group_of(by_row[row].get(of_set.group)) for row in rows]


# ---- what rows of prompts say ----


def check_of(values: Mapping[str, Any], of_set: PromptSet) -> tuple[str, int | None]:
    """How an answer to a verifiable row is checked, and between how many answers it chooses; None for a free one."""
    kind = values.get("kind") if values.get("kind") is not None else of_set.verify
    if kind != "judge":
        try:  # whether anything could be checked, before a model writes it
            verify(kind, "", values.get("answer"), values.get("meta"))
        except ValueError as error:
            found = f"kind {shown(kind)} and answer {shown(values.get('answer'))}"
            raise BadRow("no check", found, f"a row that can be checked ({error})", "kind, answer") from None
    options = values.get("options") if values.get("options") is not None else of_set.options
    k = csv_value(options) if isinstance(options, str) else options
    k = len(k) if isinstance(k, (list, tuple)) else k
    if k is not None and not (is_number(k) and k == int(k) and k >= 2):
        raise BadRow("wrong type", shown(options), "a whole number from 2 on, or the list of answers", "options")
    return kind, None if k is None else int(k)


def should_refuse(values: Mapping[str, Any], of_set: PromptSet) -> bool:
    value = values.get("should_refuse") if values.get("should_refuse") is not None else of_set.should_refuse
    known = csv_value(value) if isinstance(value, str) else value
    if isinstance(known, str) or known not in (True, False):  # "no" is a truth in Python
        raise BadRow("no bool", shown(value), "true or false, or should_refuse of the set", "should_refuse")
    return bool(known)


CHECKS = {"verifiable": check_of, "refusals": should_refuse}


def _distinct(prompts: Iterable[np.ndarray]) -> list[np.ndarray]:
    return list({prompt.tobytes(): prompt for prompt in map(np.asarray, prompts)}.values())
