"""Rows with something planted in them."""

from __future__ import annotations

import json
import random
from pathlib import Path

from uft.data.quality.corpus import Corpus
from uft.data.sources import Source

WORDS = [
    "red",
    "green",
    "blue",
    "iron",
    "salt",
    "stone",
    "river",
    "cloud",
    "bread",
    "wine",
    "north",
    "south",
    "seven",
    "nine",
    "lamp",
    "door",
    "field",
    "horse",
]


def sentence(seed: int, length: int = 40) -> str:
    """Words without order; two seeds share hardly an n-gram."""
    draw = random.Random(seed)
    return " ".join(f"{draw.choice(WORDS)}{draw.randrange(50)}" for _ in range(length))


def write(path: Path, rows: list[dict]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def corpus(**sources: list[dict]) -> Corpus:
    return Corpus.read([Source(name=name, data=rows) for name, rows in sources.items()], list(sources))


def pair(prompt: str, chosen: str, rejected: str, **more) -> dict:
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected, **more}
