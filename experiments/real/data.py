"""The real files as examples: read and checked by `uft.data`, split, cut down to what fits."""

from __future__ import annotations

import random
import re
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatch
from functools import cache
from typing import Any

import numpy as np

from uft.data import Source, Template, load_feedback
from uft.feedback import Example, Response

from ..runs import DEMONSTRATIONS, PREFERENCES
from .base import load_tokenizer
from .files import Place, read
from .settings import Scale
from .splits import PARTS, split

POLITE = "llms-from-scratch-polite"
SOURCES = {
    POLITE: "polite",
    "hh-harmless-test": "hh",
    "alpaca-eval-gpt4": "alpaca",
    "llama-factory-dpo": "llama-factory",
}
TURN = re.compile(r"\n\nHuman: ")
Rows = Sequence[Mapping[str, Any]]
Parts = dict[str, list[Example]]


@dataclass(frozen=True)
class RealData:
    """What a run reads.  The `source` of an example is its task or the collection its pair came from.

    demonstrations, preferences   by part (train, validation, test)
    chosen          the pairs' chosen responses as demonstrations, training part
    heldout_tasks   demonstrations of tasks that no training row has
    pairs_eval      pairs about instructions kept apart
    text            stretches of held-out running text by part (validation, test), with the bytes they predict
    polite, plain   training answers that a judge of politeness learns from
    report          what became of every row
    """

    demonstrations: Parts
    preferences: Parts
    chosen: list[Example]
    heldout_tasks: list[Example]
    pairs_eval: list[Example]
    text: dict[str, tuple[list[Example], int]]
    polite: list[str]
    plain: list[str]
    report: dict[str, Any]


def asked(prompt: Any) -> Any:
    """A prompt in the words of `uft.data.PLAIN_TEMPLATE`; hh-rlhf writes dialogues as `Human: ... Assistant: ...`."""
    if not isinstance(prompt, str) or not prompt.strip():
        return prompt  # refused, and counted, when it is read
    return "User: " + TURN.sub(lambda turn: turn[0].replace("Human", "User"), _without_human(prompt)) + "\n\nAssistant:"


def _without_human(prompt: str) -> str:
    return prompt.strip().removeprefix("Human:").strip()


def answered(text: Any) -> Any:
    return " " + text.strip() if isinstance(text, str) else text


def matches(name: str, patterns: Sequence[str]) -> bool:
    return any(fnmatch(name, pattern) for pattern in patterns)


def task_of(row: Mapping[str, Any]) -> str:
    return row["task"] if row["source"] == "t0" else row["source"]


@cache
def load(place: Place, scale: Scale) -> RealData:
    """Everything but the text to pretrain on, in the tokens of the base."""
    tokenizer = load_tokenizer(place, scale)
    template, report = Template(tokenizer), {}

    def fitting(name: str, rows: Rows, kind: str, source_of) -> list[tuple[int, Example]]:
        found, report[name] = _examples(name, rows, kind, source_of, template, scale.max_length)
        return found

    taught = [row for row in read(place.data, "demonstrations") if matches(task_of(row), scale.rows.tasks)]
    pairs = read(place.data, "pairs")
    demonstrated = fitting(DEMONSTRATIONS, taught, "demonstration", task_of)
    preferred = fitting(PREFERENCES, pairs, "pair", _collection)
    about = [(taught[i]["prompt"], taught[i]["prompt"], taught[i]["completion"]) for i, _ in demonstrated]
    about += [(_opening(pairs[i]["prompt"]), "", "") for i, _ in preferred]
    part_of = split(*zip(*about))
    parts = {
        DEMONSTRATIONS: _by_part([example for _, example in demonstrated], part_of),
        PREFERENCES: _by_part([example for _, example in preferred], part_of[len(demonstrated) :]),
    }
    report["split"] = {
        name: {part: dict(sorted(Counter(e.source for e in examples).items())) for part, examples in found.items()}
        for name, found in parts.items()
    }
    training = [pairs[i] for (i, _), part in zip(preferred, part_of[len(demonstrated) :]) if part == "train"]
    polite, plain = politeness(taught, training)
    held = fitting("heldout_tasks", read(place.data, "demonstrations_heldout_tasks"), "demonstration", task_of)
    apart = fitting("pairs_eval", read(place.data, "pairs_eval"), "pair", _collection)
    return RealData(
        demonstrations=parts[DEMONSTRATIONS],
        preferences=parts[PREFERENCES],
        chosen=[
            replace(e, kind="demonstration", responses=e.responses[:1], preferences=())
            for e in parts[PREFERENCES]["train"]
        ],
        heldout_tasks=[example for _, example in held],
        pairs_eval=[example for _, example in apart],
        text=_text(read(place.data, "pretrain_heldout"), tokenizer, scale),
        polite=polite,
        plain=plain,
        report=report,
    )


def _opening(prompt: str) -> str:
    """The first turn of a dialogue: dialogues that begin alike are one conversation."""
    return _without_human(prompt).split("\n\nAssistant:")[0].strip()


def _by_part(examples: Sequence[Example], part_of: Sequence[str]) -> Parts:
    return {part: [e for e, its in zip(examples, part_of) if its == part] for part in PARTS}


def _collection(row: Mapping[str, Any]) -> str:
    return SOURCES.get(row["source"], row["source"])


def _examples(name: str, rows: Rows, kind: str, source_of, template: Template, max_length: int):
    """(row number, example) of the rows that can be used and fit, and the count of the others by reason."""
    columns = ("completion",) if kind == "demonstration" else ("chosen", "rejected")
    spoken = [{"prompt": asked(row["prompt"])} | {c: answered(row[c]) for c in columns} for row in rows]
    data, found = load_feedback(Source(name, data=spoken, kind=kind), template, on_bad_row="drop")
    kept, too_long = [], Counter()
    for example in data:
        source = source_of(rows[example.row])
        if len(example.prompt) + max(len(r.tokens) for r in example.responses) > max_length:
            too_long[source] += 1
        else:
            kept.append((example.row, replace(example, source=source)))
    read = found[name]
    return kept, {
        "rows": read.rows,
        "dropped": dict(read.dropped),
        "longer than max_length": dict(too_long),
        "used": dict(Counter(example.source for _, example in kept)),
    }


def politeness(demonstrations: Rows, pairs: Rows) -> tuple[list[str], list[str]]:
    """Polite rewritings and plain answers of training pairs.  Half of the pairs prefer a polite rewriting to the plain
    answer, which the demonstration of the same prompt shows; the others prefer the plain answer to a rude one."""
    plain_answer = {row["prompt"]: row["completion"] for row in demonstrations}
    ours = [row for row in pairs if row["source"] == POLITE and row["rejected"] and row["chosen"]]
    polite = [row["chosen"] for row in ours if plain_answer.get(row["prompt"]) == row["rejected"] != row["chosen"]]
    return polite, [plain_answer[row["prompt"]] for row in ours if row["prompt"] in plain_answer]


def _text(rows: Rows, tokenizer: Any, scale: Scale) -> dict[str, tuple[list[Example], int]]:
    """Stretches of the held-out documents, each behind a BOS, until there are `sizes.text_tokens` of them; every
    second document validates."""
    by_source = defaultdict(list)
    for row in rows:
        by_source[row["source"]].append(row["text"])
    width = scale.max_length - 1
    bos = np.array([tokenizer.bos_token_id], dtype=np.int32)
    result = {}
    for position, part in enumerate(("validation", "test")):
        examples, size = [], 0
        documents = {source: texts[position::2] for source, texts in by_source.items()}
        wanted = -(-scale.sizes.text_tokens // (width * len(documents)))  # stretches of each source
        for source, texts in documents.items():
            random.Random(0).shuffle(texts)
            ids = tokenizer("\n".join(texts[:wanted]), add_special_tokens=False, verbose=False)["input_ids"]
            for k in range(min(wanted, len(ids) // width)):
                tokens = ids[k * width : (k + 1) * width]
                examples.append(Example("document", bos, (Response(np.array(tokens, dtype=np.int32)),), (), source, k))
                # in a byte-level vocabulary a character of a token stands for a byte
                size += sum(map(len, tokenizer.convert_ids_to_tokens(tokens)))
        result[part] = (examples, size)
    return result
