"""What is measured, on which data: `EvaluationConfig`, and the YAML it is read from.

demonstrations:                      # held-out likelihood
  instructions: {path: held_out.jsonl}
pairs:                               # ranking by likelihood and by implicit reward, drift
  preferences: {path: pairs.parquet}
verifiable:                          # answers that can be checked; `verify` is the kind of check
  arithmetic: {path: sums.jsonl, verify: number}
refusals:
  harmful: {path: harmful.jsonl, should_refuse: true, group: topic}
harmlessness:                        # pairs of a harmless and a harmful answer, with intervals, by group
  red_team: {path: harmless_pairs.parquet, group: topic}
prompts:                             # answers whose length, end and repetition are looked at
  everyday: {path: prompts.jsonl}
divergence:                          # exact KL to the reference, both ways
  prior: {path: prior.jsonl, along: [responses, policy, reference]}
generation: {max_new_tokens: 128, temperature: 0.0}
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from uft.config import LAYOUTS
from uft.data.mixture import FeedbackDataset
from uft.data.rows import is_number
from uft.data.sources import ON_BAD_ROW, Source
from uft.evaluation.divergence import ALONG
from uft.recipe import RecipeError, _known, read_yaml

FEEDBACK = ("demonstrations", "pairs")
# sets of prompts, and what each says of its prompts besides where they are
PROMPTS = {
    "verifiable": ("verify", "options"),
    "refusals": ("should_refuse", "group"),
    "prompts": (),
    "divergence": ("along",),
}
_SOURCE = tuple(f.name for f in dataclasses.fields(Source) if f.name != "name")


@dataclass(frozen=True)
class GenerationSettings:
    """How models write where they are asked to.

    max_new_tokens   of an answer; one that is cut there has no end
    temperature      0 is greedy; divergences along samples use 1, whatever is said here
    seed             of what is drawn
    batch_size       answers written at once
    """

    max_new_tokens: int = 128
    temperature: float = 0.0
    seed: int = 0
    batch_size: int = 16

    def __post_init__(self):
        for name, least in (("max_new_tokens", 1), ("batch_size", 1), ("seed", 0)):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < least:
                raise ValueError(f"{name} is {value!r}; want a whole number from {least} on")
        if not is_number(self.temperature) or self.temperature < 0:
            raise ValueError(f"temperature is {self.temperature!r}; want a number >= 0")


@dataclass(frozen=True)
class PromptSet:
    """Prompts of one source.

    source         where they come from
    verify         of verifiable: the kind of check, for rows without a column `kind`
    options        of verifiable: between how many answers each row chooses, for rows without a column `options`; None
                   for free answers, which nobody guesses
    should_refuse  of refusals: whether they should be, for rows without a column `should_refuse`
    group          of refusals: the column that says which group a prompt belongs to
    along          of divergence: along which responses; see `uft.evaluation.divergence`
    """

    source: Source
    verify: str | None = None
    options: int | None = None
    should_refuse: bool | None = None
    group: str | None = None
    along: tuple[str, ...] = ("responses",)

    def __post_init__(self):
        along = (self.along,) if isinstance(self.along, str) else self.along
        if not isinstance(along, (list, tuple)) or not along or not set(along) <= set(ALONG):
            raise ValueError(f"along is {self.along!r}; want some of {', '.join(ALONG)}")
        object.__setattr__(self, "along", tuple(dict.fromkeys(along)))
        if not isinstance(self.verify, (str, type(None))):
            raise ValueError(f"verify is {self.verify!r}; want the kind of check")
        if not isinstance(self.should_refuse, (bool, type(None))):
            raise ValueError(f"should_refuse is {self.should_refuse!r}; want true or false")
        _want_column(self.group)
        k = self.options
        if k is not None and (not isinstance(k, int) or isinstance(k, bool) or k < 2):
            raise ValueError(f"options is {k!r}; want a whole number from 2 on, or none for a free answer")


@dataclass(frozen=True)
class PairSet:
    """Pairs of a harmless and a harmful answer (prompt, chosen, rejected).

    source  where they come from
    group   the column that says which group a pair belongs to; None: all are of a group with the name of the set
    """

    source: Source
    group: str | None = None

    def __post_init__(self):
        _want_column(self.group)


def _want_column(group: Any) -> None:
    if not isinstance(group, (str, type(None))) or group == "":
        raise ValueError(f"group is {group!r}; want the name of a column")


@dataclass(frozen=True)
class EvaluationConfig:
    """What `evaluate` measures.  What is left out is not measured.

    demonstrations, pairs   sources by name, or a `FeedbackDataset`
    verifiable, refusals, prompts, divergence   sets of prompts by name
    harmlessness    sets of pairs by name
    generation      how models write, see `GenerationSettings`
    beta            of the implicit reward; changes margins, not accuracies
    max_length      longest prompt + response of given responses, and longest prompt, in tokens
    token_budget    tokens of a scoring pass, padding included
    fused_head, layout, on_bad_row   as in `UnifiedConfig`
    """

    demonstrations: Any = None
    pairs: Any = None
    verifiable: Mapping[str, PromptSet] = field(default_factory=dict)
    refusals: Mapping[str, PromptSet] = field(default_factory=dict)
    prompts: Mapping[str, PromptSet] = field(default_factory=dict)
    divergence: Mapping[str, PromptSet] = field(default_factory=dict)
    harmlessness: Mapping[str, PairSet] = field(default_factory=dict)
    generation: GenerationSettings = GenerationSettings()
    beta: float = 0.1
    max_length: int = 1024
    token_budget: int = 8192
    on_bad_row: str = "error"
    fused_head: bool = True
    layout: str = "auto"

    def __post_init__(self):
        sections = (*FEEDBACK, *PROMPTS, "harmlessness")
        if all(getattr(self, section) in (None, {}) for section in sections):
            raise ValueError(f"nothing is measured; want data for one of {', '.join(sections)}")
        if not is_number(self.beta) or not self.beta > 0:
            raise ValueError(f"beta is {self.beta!r}; want a number > 0")
        for name, least in (("max_length", 2), ("token_budget", 1)):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < least:
                raise ValueError(f"{name} is {value!r}; want a whole number from {least} on")
        if self.on_bad_row not in ON_BAD_ROW:
            raise ValueError(f"on_bad_row is {self.on_bad_row!r}; want {' or '.join(ON_BAD_ROW)}")
        if self.layout not in LAYOUTS:
            raise ValueError(f"layout is {self.layout!r}; want one of {', '.join(LAYOUTS)}")
        if not isinstance(self.fused_head, bool):
            raise ValueError(f"fused_head is {self.fused_head!r}; want true or false")

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> EvaluationConfig:
        """From plain values, as YAML has them; a source may be rows in memory.  Raises `RecipeError` for unknown keys
        and for values that cannot be used, by name."""
        values = dict(values)
        for key in values:
            _known(key, FIELDS, "")
        for section in FEEDBACK:
            if values.get(section) is not None and not isinstance(values[section], FeedbackDataset):
                values[section] = _sets(section, values[section], _source)
        for section in PROMPTS:
            values[section] = _sets(section, values[section], _prompt_set) if values.get(section) is not None else {}
        if values.get("harmlessness") is not None:
            values["harmlessness"] = _sets("harmlessness", values["harmlessness"], _pair_set)
        if not isinstance(values.get("generation"), (GenerationSettings, type(None))):
            values["generation"] = _settings(values["generation"])
        try:
            return cls(**{key: value for key, value in values.items() if value is not None})
        except (ValueError, TypeError) as error:
            raise RecipeError(str(error)) from None

    @classmethod
    def read(cls, path: str) -> EvaluationConfig:
        """From a YAML file that holds nothing else."""
        return cls.of(read_yaml(path))


FIELDS = tuple(f.name for f in dataclasses.fields(EvaluationConfig))


def _sets(section: str, value: Any, made: Any) -> dict[str, Any]:
    if not isinstance(value, Mapping) or not value:
        raise RecipeError(
            f"{section} is {value!r}; want a mapping of names to sources, such as {{mine: {{path: FILE}}}}"
        )
    return {str(name): made(section, str(name), options) for name, options in value.items()}


def _source(section: str, name: str, options: Any, more: tuple[str, ...] = ()) -> Source:
    if isinstance(options, Source):
        return dataclasses.replace(options, name=name)
    where = f"{section}.{name}"
    if not isinstance(options, Mapping):
        options = {"path" if isinstance(options, str) else "data": options}
    for option in options:
        _known(option, (*_SOURCE, *more), f"{where}: ")
    if options.get("data") is None and not isinstance(options.get("path"), str):
        raise RecipeError(f"{where}: path is {options.get('path')!r}; want a file or the id of a data set")
    try:
        return Source(name=name, **options)
    except (ValueError, TypeError) as error:
        raise RecipeError(f"{where}: {error}") from None


def _prompt_set(section: str, name: str, options: Any) -> PromptSet:
    return _set_of(PromptSet, section, name, options, PROMPTS[section])


def _pair_set(section: str, name: str, options: Any) -> PairSet:
    return _set_of(PairSet, section, name, options, ("group",))


def _set_of(kind: Any, section: str, name: str, options: Any, more: tuple[str, ...]) -> Any:
    if isinstance(options, kind):
        return options
    own = {}
    if isinstance(options, Mapping):
        own = {key: value for key, value in options.items() if key in more}
        options = {key: value for key, value in options.items() if key not in own}
    source = _source(section, name, options, more)
    try:
        return kind(source, **own)
    except ValueError as error:
        raise RecipeError(f"{section}.{name}: {error}") from None


def _settings(value: Any) -> GenerationSettings:
    if not isinstance(value, Mapping):
        raise RecipeError(f"generation is {value!r}; want a mapping such as {{max_new_tokens: 128}}")
    for key in value:
        _known(key, tuple(f.name for f in dataclasses.fields(GenerationSettings)), "generation: ")
    try:
        return GenerationSettings(**value)
    except (ValueError, TypeError) as error:
        raise RecipeError(f"generation: {error}") from None
