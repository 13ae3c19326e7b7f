"""What is trained on: preference pairs and demonstrations as token ids, long prompts and short ones.

Real rows from a data folder, tokenised with a byte-level BPE learnt from its running text; or, without one, random
token ids of the same lengths, which are kept in `lengths.json` (lengths alone, no text).
"""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from uft.data.mixture import FeedbackDataset, MixtureSampler
from uft.feedback import Example, Response

from ..real.base import make_tokenizer, sample
from ..real.files import read
from .shapes import VOCABULARY

LENGTHS = Path(__file__).with_name("lengths.json")
KEPT = {"long": 800, "short": 1500, "demonstrations": 1500}  # rows of each whose lengths are kept
TEXT = 3_000_000  # characters that the BPE learns from
CHOSEN = {
    "long": "prompt at least four times as long as the mean of its two responses",
    "short": "prompt no longer than the mean of its two responses",
}


class Pair(NamedTuple):
    prompt: list[int]
    chosen: list[int]
    rejected: list[int]

    @property
    def longest(self) -> int:
        return len(self.prompt) + max(len(self.chosen), len(self.rejected))


class Demonstration(NamedTuple):
    prompt: list[int]
    completion: list[int]

    @property
    def longest(self) -> int:
        return len(self.prompt) + len(self.completion)


Rows = dict[str, list[Any]]  # "long" and "short": pairs, "demonstrations"


@dataclass(frozen=True)
class Workload:
    """Rows in the order in which both trainers see them.

    seed   of the mixture whose order that is
    """

    name: str
    pairs: tuple[Pair, ...]
    demonstrations: tuple[Demonstration, ...] = ()
    seed: int = 0

    def statistics(self) -> dict[str, float]:
        """P and R are mean lengths of prompt and response; the limit is what sharing prompts can save at most."""
        lengths = np.array([[len(part) for part in pair] for pair in self.pairs], dtype=float)
        prompt, responses = lengths[:, 0], lengths[:, 1:]
        P, R = float(prompt.mean()), float(responses.mean())
        return {
            "pairs": len(self.pairs), "P": P, "R": R, "P_max": float(prompt.max()), "R_max": float(responses.max()),
            "longer_to_shorter_response": float((responses.max(1) / responses.min(1)).mean()),
            "tokens": float((2 * prompt + responses.sum(1)).sum()), "response_tokens": float(responses.sum()),
            "limit_of_sharing": 2 * (P + R) / (P + 2 * R),
        }  # fmt: skip

    def padding(self, batch_size: int) -> float:
        """Share of padding in batches that put each response into a row of its own."""
        padded = real = 0
        for start in range(0, len(self.pairs), batch_size):
            part = self.pairs[start : start + batch_size]
            padded += 2 * len(part) * max(pair.longest for pair in part)
            real += sum(2 * len(pair.prompt) + len(pair.chosen) + len(pair.rejected) for pair in part)
        return 1 - real / padded

    def feedback(self) -> FeedbackDataset:
        """For our trainer, whose sampler draws the rows in this workload's order."""
        return FeedbackDataset({"preferences": unordered([as_example(pair) for pair in self.pairs], self.seed)})

    def columns(self) -> dict[str, list[list[int]]]:
        """For TRL's, which takes the rows as they come."""
        return {f"{name}_ids": [list(getattr(pair, name)) for pair in self.pairs] for name in Pair._fields}


def as_example(row: Pair | Demonstration) -> Example:
    prompt, *responses = (np.asarray(part, dtype=np.int32) for part in row)
    if isinstance(row, Demonstration):
        return Example("demonstration", prompt, (Response(responses[0], target=1.0),))
    chosen, rejected = responses
    return Example("pair", prompt, (Response(chosen, target=1.0), Response(rejected, target=0.0)), ((0, 1),))


def unordered(examples: Sequence[Example], seed: int) -> list[Example]:
    """The rows put so that the sampler of this seed draws them in the given order."""
    order = MixtureSampler([len(examples)], seed=seed).order()
    rows: list[Any] = [None] * len(examples)
    for example, at in zip(examples, order):
        rows[at] = example
    return [Example(e.kind, e.prompt, e.responses, e.preferences, row=i) for i, e in enumerate(rows)]


# ---- rows ----


def real_rows(folder: Path) -> Rows:
    """Every pair that belongs to a workload, and every demonstration, in random order."""
    tokenizer = make_tokenizer(sample(read(folder, "pretrain"), TEXT, seed=0), VOCABULARY)

    def tokens(texts: list[str], special: bool) -> list[list[int]]:
        found = tokenizer(texts, add_special_tokens=special)["input_ids"]
        return found if special else [[*ids, tokenizer.eos_token_id] for ids in found]

    def column(rows: list[dict], name: str) -> list[list[int]]:
        return tokens([row[name] for row in rows], name == "prompt")

    pairs, shown = read(folder, "pairs"), read(folder, "demonstrations")
    shown = random.Random(1).sample(shown, min(len(shown), 2 * KEPT["demonstrations"]))
    rows: Rows = {"long": [], "short": []}
    for pair in map(Pair, *(column(pairs, name) for name in Pair._fields)):
        mean = (len(pair.chosen) + len(pair.rejected)) / 2
        if len(pair.prompt) >= 4 * mean:
            rows["long"].append(pair)
        elif len(pair.prompt) <= mean:
            rows["short"].append(pair)
    rows["demonstrations"] = list(map(Demonstration, *(column(shown, name) for name in Demonstration._fields)))
    for name in rows:
        random.Random(0).shuffle(rows[name])
    return rows


def random_rows(path: Path = LENGTHS, seed: int = 0) -> Rows:
    """Random token ids of real lengths: BOS in front of a prompt, EOS behind a response."""
    draw = np.random.default_rng(seed)

    def row(kind: type, lengths: list[int]) -> Any:
        parts = [draw.integers(3, VOCABULARY, n).tolist() for n in lengths]
        parts[0][0] = 1
        for part in parts[1:]:
            part[-1] = 2
        return kind(*parts)

    kept = json.loads(path.read_text())
    return {n: [row(Demonstration if n == "demonstrations" else Pair, each) for each in kept[n]] for n in KEPT}


def write_lengths(rows: Rows, path: Path = LENGTHS, longest: int = 2048) -> None:
    """Lengths alone, a row of the file per kind."""
    kept = {}
    for name, n in KEPT.items():
        fitting = [row for row in rows[name] if row.longest <= longest]
        kept[name] = [[len(part) for part in row] for row in fitting[:n]]
    lines = (f"{json.dumps(name)}: {json.dumps(each, separators=(',', ':'))}" for name, each in kept.items())
    path.write_text("{\n" + ",\n".join(lines) + "\n}\n")


def make_workload(name: str, rows: Rows, n: int, max_length: int, seed: int = 0) -> Workload:
    """The first n rows that fit; where there are fewer, they come again."""

    def first(kind: str) -> tuple:
        fitting = [row for row in rows[kind] if row.longest <= max_length]
        if not fitting:
            raise ValueError(f"{kind}: found no row of at most {max_length} tokens")
        return tuple(fitting[i % len(fitting)] for i in range(n))

    return Workload(name, first(name), first("demonstrations"), seed)
