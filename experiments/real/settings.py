"""Settings of the comparison on real data: typed, read from `experiments/recipes/real_*.yaml`."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import yaml

RECIPES = Path(__file__).resolve().parents[1] / "recipes"
Section = TypeVar("Section")


@dataclass(frozen=True)
class Base:
    """The base model: a Llama-style decoder with tied embeddings, pretrained on `tokens` tokens of running text.

    vocabulary             entries of the byte-level BPE, learnt from `tokenizer_characters` characters of that text
    hidden_size, intermediate_size, layers, heads   as in a Llama's configuration
    tokens, batch_tokens   in all, and per optimiser step
    learning_rate          peak
    """

    vocabulary: int
    tokenizer_characters: int
    hidden_size: int
    intermediate_size: int
    layers: int
    heads: int
    tokens: int
    batch_tokens: int
    learning_rate: float


@dataclass(frozen=True)
class Rows:
    """Which rows are used, all of at most `max_length` tokens (prompt and response).

    tasks        patterns of names of tasks to learn from; other tasks are left out
    answered     those whose greedy answers are measured, too
    min_source   sources with fewer held-out pairs than this are not reported on their own
    """

    tasks: tuple[str, ...]
    answered: tuple[str, ...]
    min_source: int


@dataclass(frozen=True)
class Design:
    """The sequential design, whose cost every arm gets: demonstrations by likelihood, then pairs by DPO.

    demonstrations, preferences   examples drawn (rows may come several times)
    batch_size                    examples per optimiser step
    micro_batch_size              examples per pass
    beta                          of every implicit reward
    replay                        share of the demonstrations that the arm with replay draws again
    """

    demonstrations: int
    preferences: int
    batch_size: int
    micro_batch_size: int
    beta: float
    replay: float


@dataclass(frozen=True)
class Sizes:
    """How many rows measure.

    demonstrations     held-out demonstrations of the tasks that are learnt
    answers_per_task   prompts that are answered, of each task; `answer_tokens` at most in an answer
    heldout_tasks      demonstrations of tasks that are not learnt
    text_tokens        running text of the kind that the base model read
    generations        prompts whose answers are looked at; `new_tokens` at most in one
    """

    demonstrations: int
    answers_per_task: int
    answer_tokens: int
    heldout_tasks: int
    text_tokens: int
    generations: int
    new_tokens: int


@dataclass(frozen=True)
class Scale:
    """Everything a run depends on besides its stages, its seed and the data.

    name         in reports and folders
    max_length   longest prompt + response, in tokens
    base, rows, design, sizes   see below
    """

    name: str
    max_length: int
    base: Base
    rows: Rows
    design: Design
    sizes: Sizes


@dataclass(frozen=True)
class Settings:
    """The beta of every arm is design.beta.

    scale            how large everything is
    learning_rates   the grid of each arm, one trial each and search seed
    search_seeds     of the trials; each has a base model of its own
    seeds            of the runs that are reported
    """

    scale: Scale
    learning_rates: dict[str, tuple[float, ...]]
    search_seeds: tuple[int, ...]
    seeds: tuple[int, ...]


def read_settings(path: Path) -> Settings:
    """Raises ValueError naming the file and what in it is unknown or missing."""
    found = yaml.safe_load(path.read_text())
    try:
        return settings_from(found)
    except (TypeError, KeyError) as error:
        raise ValueError(f"{path.name}: {error}") from None


def settings_from(values: Mapping[str, Any]) -> Settings:
    values = dict(values)
    scale = dict(values.pop("scale"))
    parts = {name: _section(kind, scale.pop(name)) for name, kind in SECTIONS.items()}
    rates = {arm: tuple(map(float, grid)) for arm, grid in values.pop("learning_rates").items()}
    return Settings(Scale(**scale, **parts), rates, tuple(values.pop("search_seeds")), **_tuples(values))


SECTIONS = {"base": Base, "rows": Rows, "design": Design, "sizes": Sizes}


def _section(kind: type[Section], values: Mapping[str, Any]) -> Section:
    numbers = {f.name for f in dataclasses.fields(kind) if f.type == "float"}
    return kind(**{k: float(v) if k in numbers else v for k, v in _tuples(values).items()})


def _tuples(values: Mapping[str, Any]) -> dict[str, Any]:
    return {key: tuple(value) if isinstance(value, list) else value for key, value in values.items()}
