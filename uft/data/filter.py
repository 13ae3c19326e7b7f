"""`uft data filter`: curated data sets from a recipe; every row that is dropped is counted by reason and can be listed.

train_dataset:                       # any sources, as in `uft train`
  preferences: {path: pairs.parquet}
eval_dataset:                        # only their prompts are read
  held_out: {path: pairs_eval.parquet}
rules:                               # see `uft.data.quality.rules`, whose order they are applied in
  endings: {signs: [no text, mid word]}
  contamination: true                # with what it has by default
scores: rank                         # or centre: of the rows that are left, in each source by itself
output_dir: data/curated
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from uft.command_line import recipe_of, recipe_parser
from uft.data.files import csv_value
from uft.data.quality.card import write_card
from uft.data.quality.corpus import Corpus, Evaluation
from uft.data.quality.markdown import table
from uft.data.quality.row_rules import Context
from uft.data.quality.rules import RULES, apply
from uft.data.quality.scores import HOW
from uft.data.quality.writing import FORMATS, Digest, write_lines, write_rows, written_aside
from uft.data.rows import BadRow, DataError, Row, shown
from uft.data.sources import CSV_VALUES, ON_BAD_ROW, Source, open_table, read_rows
from uft.recipe import RecipeError, _known, _sources

_OWN = (
    "train_dataset", "eval_dataset", "rules", "scores", "output_dir", "format", "overwrite", "on_bad_row", "tokenizer",
    "list_dropped",
)  # fmt: skip


@dataclass(frozen=True)
class FilterRecipe:
    """What `uft data filter` does.

    train_dataset  sources by name, each of which becomes a file of its name
    eval_dataset   sources by name, whose prompts must not be trained on
    output_dir     the folder of what is written
    rules, on      by name, see `uft.data.quality.rules`; and the sources that a rule is on, where it is not on all
    scores         rank or centre: what scores become (`uft.data.quality.scores`); by default they stay
    format         parquet or jsonl; by default parquet for parquet, jsonl for everything else
    overwrite      whether an earlier result in output_dir is replaced; by default it is refused
    on_bad_row     drop: counted like all others; error: refused; a source's own goes before it
    tokenizer      folder or hub id, for rules about tokens
    list_dropped   whether dropped.jsonl is written
    plain          the values it was made of, as they go into the card
    """

    train_dataset: dict[str, Source]
    output_dir: str
    rules: dict[str, Any]
    on: dict[str, tuple[str, ...]] = dataclasses.field(default_factory=dict)
    eval_dataset: dict[str, Source] = dataclasses.field(default_factory=dict)
    scores: str | None = None
    format: str | None = None
    overwrite: bool = False
    on_bad_row: str = "drop"
    tokenizer: str | None = None
    list_dropped: bool = True
    plain: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> FilterRecipe:
        """Checks every key.  Raises `RecipeError`."""
        for key in values:
            _known(key, _OWN, "")
        for key in ("train_dataset", "output_dir"):
            if not values.get(key):
                raise RecipeError(f"key {key!r} is missing")
        own = {key: value for key, value in values.items() if value is not None}
        for key in ("train_dataset", "eval_dataset"):
            if key in own:
                own[key] = _sources(own[key], key)
        for name in own["train_dataset"]:
            if not re.fullmatch(r"\w[\w.-]*", name) or name == "dropped":
                raise RecipeError(
                    f"train_dataset: name {name!r} cannot be that of its file; want another, such as 'pairs'"
                )
        rules = own.pop("rules", {})
        if not isinstance(rules, Mapping):
            raise RecipeError(
                f"rules is {shown(rules)}; want a mapping such as {{near_duplicates: {{threshold: 0.8}}}}"
            )
        names = tuple(own["train_dataset"])
        asked = {name: _rule(name, options, names) for name, options in rules.items() if options is not False}
        own["rules"] = {name: rule for name, (rule, _) in asked.items()}
        own["on"] = {name: on for name, (_, on) in asked.items() if on is not None}
        for key, choices in (("scores", tuple(HOW)), ("format", FORMATS), ("on_bad_row", ON_BAD_ROW)):
            if key in own and own[key] not in choices:
                raise RecipeError(f"{key} is {own[key]!r}; want {' or '.join(choices)}")
        for key, kind in (("overwrite", bool), ("list_dropped", bool), ("output_dir", str), ("tokenizer", str)):
            if key in own and not isinstance(own[key], kind):
                raise RecipeError(f"{key} is {own[key]!r}; want {'true or false' if kind is bool else 'a text'}")
        for name, source in own.get("eval_dataset", {}).items():
            if source.on_bad_row is not None:
                raise RecipeError(
                    f"eval_dataset.{name}: on_bad_row is {source.on_bad_row!r}; want it of training data alone, "
                    "since of evaluation files only prompts are read"
                )
        if own.get("eval_dataset") and "contamination" not in rules:
            raise RecipeError("eval_dataset is there and no rule reads it; want `rules: {contamination: true}`")
        if "contamination" in own["rules"] and not own.get("eval_dataset"):
            raise RecipeError("rules.contamination needs 'eval_dataset'; want evaluation files by name")
        return cls(**own, plain=dict(values))


def _rule(name: str, options: Any, sources: Sequence[str]) -> tuple[Any, tuple[str, ...] | None]:
    """A rule, and the sources that it is on (None: all)."""
    _known(name, tuple(RULES), "rules: ")
    where = f"rules.{name}"
    if options in (True, None):
        options = {}
    if not isinstance(options, Mapping):
        raise RecipeError(f"{where} is {shown(options)}; want true, or a mapping of its options")
    on = options.get("on")
    if on is not None:
        on = (on,) if isinstance(on, str) else on
        if not isinstance(on, (list, tuple)) or not on:
            raise RecipeError(f"{where}.on is {on!r}; want names of sources")
        for each in on:
            _known(each, sources, f"{where}.on: ")
    rule = _made(RULES[name], {key: value for key, value in options.items() if key != "on"}, where)
    return rule, None if on is None else tuple(on)


def _made(kind: Any, options: Mapping[str, Any], where: str) -> Any:
    """A rule from plain values; options that are dataclasses themselves (`near`) are mappings too."""
    fields = {field.name: field for field in dataclasses.fields(kind)}
    own = {}
    for key, value in options.items():
        _known(key, tuple(fields), f"{where}: ")
        nested = fields[key].default_factory
        if dataclasses.is_dataclass(nested):
            if not isinstance(value, Mapping):
                example = next(f"{field.name}: {field.default}" for field in dataclasses.fields(nested))
                raise RecipeError(f"{where}.{key} is {shown(value)}; want a mapping such as {{{example}}}")
            value = _made(nested, value, f"{where}.{key}")
        own[key] = tuple(value) if isinstance(value, list) else value
    try:
        return kind(**own)
    except (ValueError, TypeError) as error:
        raise RecipeError(f"{where}: {error}") from None


# ---- filtering ----


@dataclass
class Outcome:
    """What became of the rows of one source: `kept` row numbers, and reason and finding of the others."""

    source: Source
    kept: list[int]
    dropped: dict[int, tuple[str, str]]
    scores: dict[str, dict[int, float]]  # column (by its name in the file) -> row -> value
    digest: str = ""

    @property
    def read(self) -> int:
        return len(self.kept) + len(self.dropped)

    @property
    def reasons(self) -> Counter[str]:
        return Counter(reason for reason, _ in self.dropped.values())

    def counts(self) -> dict[str, Any]:
        return {"read": self.read, "kept": len(self.kept), "dropped": dict(self.reasons)}


def run(values: Mapping[str, Any]) -> tuple[dict[str, Outcome], Path]:
    """Filters as the recipe says, and writes the result.  Raises ValueError and OSError in one sentence."""
    recipe = FilterRecipe.of(values)
    folder = _folder(recipe)
    outcomes = sift(recipe)
    for outcome in outcomes.values():
        if not outcome.kept:
            reasons = ", ".join(f"{n:,} {reason}" for reason, n in outcome.reasons.most_common())
            raise DataError(
                f"{outcome.source.where}: found no row that is kept among {outcome.read:,} ({reasons}); want one at "
                "least, by other rules or without this source"
            )
    with written_aside(folder) as aside:
        for name, outcome in outcomes.items():
            _write(name, outcome, aside, recipe.format)
        if recipe.list_dropped:
            write_lines(aside / "dropped.jsonl", _listed(outcomes))
        write_card(aside, folder.name, recipe, outcomes)
    return outcomes, folder


def _folder(recipe: FilterRecipe) -> Path:
    """Where the result goes, resolved: nothing that is read, and nothing but an earlier result is replaced."""
    asked, said = Path(recipe.output_dir), f"output_dir {recipe.output_dir!r}"
    if asked.is_symlink():
        raise RecipeError(f"{said} is a symbolic link to {str(asked.resolve())!r}; want a folder of its own")
    folder = asked.resolve()
    if folder.exists() and not folder.is_dir():
        raise RecipeError(f"{said} is a file; want a folder, which is made anew")
    if Path.cwd().resolve().is_relative_to(folder):
        raise RecipeError(f"{said} holds the folder this runs in; want a folder of its own, such as 'data/curated'")
    for what, path in _inputs(recipe):
        # as it is written, and where links lead
        if any(each.is_relative_to(folder) for each in (Path(os.path.abspath(path)), Path(path).resolve())):
            raise RecipeError(f"{said} holds {what} {str(path)!r}; want a folder in which nothing is that is read")
    if not folder.exists():
        return folder
    if not recipe.overwrite:
        raise RecipeError(f"{said} is there already; want another, or `overwrite: true`")
    if any(folder.iterdir()) and not (folder / "filter.json").is_file():
        raise RecipeError(f"{said} has no filter.json, so it is not what `uft data filter` has written; want another")
    return folder


def _inputs(recipe: FilterRecipe) -> Iterator[tuple[str, str | Path]]:
    for key in ("train_dataset", "eval_dataset"):
        for name, source in getattr(recipe, key).items():
            if source.path is not None and Path(source.path).exists():
                yield f"{key}.{name}", source.path
    for name, rule in recipe.rules.items():
        if getattr(rule, "file", None) is not None:
            yield f"rules.{name}.file", rule.file
    if recipe.tokenizer is not None and Path(recipe.tokenizer).exists():
        yield "tokenizer", recipe.tokenizer


def sift(recipe: FilterRecipe) -> dict[str, Outcome]:
    """Which rows stay; by source, and every row of it is either kept or dropped for one reason."""
    sources = recipe.train_dataset
    # first, since a wrong name costs nothing yet
    evaluation = tokenizer = None
    if "contamination" in recipe.rules:
        evaluation = Evaluation.read(list(recipe.eval_dataset.values()), list(recipe.eval_dataset))
    if recipe.tokenizer is not None:
        from uft.data.check import _load

        tokenizer = _load(recipe.tokenizer)
    corpus = Corpus.read(list(sources.values()), list(sources))
    bad = {name: corpus.bad.get(name, []) for name in sources}
    for name, source in sources.items():
        if (source.on_bad_row or recipe.on_bad_row) == "error" and bad[name]:
            raise bad[name][0]
    dropped = apply(recipe.rules, Context(corpus, evaluation, tokenizer), recipe.on)
    outcomes = {}
    for name, source in sources.items():
        mine = [i for i, item in enumerate(corpus.items) if item.group == name]
        kept = [i for i in mine if i not in dropped]
        gone = {row.row: (f"bad row: {row.reason}", f"{row.found}; want {row.wanted}") for row in bad[name]}
        gone |= {corpus.items[i].row: dropped[i] for i in mine if i in dropped}
        assert len(kept) + len(gone) == len(mine) + len(bad[name]), name
        scores = {} if recipe.scores is None else _scores(source, [corpus.items[i] for i in kept], recipe.scores)
        outcomes[name] = Outcome(source, [corpus.items[i].row for i in kept], dict(sorted(gone.items())), scores)
    if recipe.scores is not None and not any(outcome.scores for outcome in outcomes.values()):
        raise RecipeError(f"scores is {recipe.scores!r}, and no source has scores; want a column score or score_chosen")
    return outcomes


def _scores(source: Source, items: Sequence[Any], how: str) -> dict[str, dict[int, float]]:
    """New scores of the rows that stay; the two sides of pairs are taken together."""
    names = [name for name in ("score_chosen", "score_rejected") if name in open_table(source).columns]
    kind = items[0].kind if items else None
    if source.score:
        raise DataError(f"{source.where}: `scores` with a score made of several columns; want one column for it")
    if kind == "score":
        names = ["score"]
    elif kind != "pair" or not names:
        return {}
    values = HOW[how]([target for item in items for target in item.targets])
    theirs = [source.columns.get(name, name) for name in names]
    return {c: {item.row: float(v) for item, v in zip(items, values[k :: len(names)])} for k, c in enumerate(theirs)}


# ---- writing ----


def _write(name: str, outcome: Outcome, folder: Path, form: str | None) -> None:
    """The rows that stay, with the columns they came with, read once more."""
    source, kept = replace(outcome.source, columns={}, score={}), set(outcome.kept)
    path = None if source.path is None else Path(source.path)
    # of a CSV only the mapping says which of its texts are numbers
    numbers = _numbers(outcome.source) if path is not None and path.suffix == ".csv" else ()
    digest, seen = Digest(source), 0

    def rows():
        nonlocal seen
        for row in read_rows(source):
            seen += 1
            digest.add(row)
            if row.number in kept:
                # some have our names, and are read already
                texts = {name: row.values[name] for name in numbers if isinstance(row.values.get(name), str)}
                read = {name: csv_value(text) for name, text in texts.items()}
                yield _rescored(row._replace(values=row.values | read), outcome.scores)

    form = form or ("parquet" if path is not None and path.suffix == ".parquet" else "jsonl")
    try:
        written = write_rows(folder / f"{name}.{form}", rows(), path, list(outcome.scores))
    except BadRow as problem:  # which knows the row of the result
        raise problem.at(source.where, outcome.kept[problem.row], None, {}) from None
    outcome.digest = digest.hexdigest()
    if (seen, written) != (outcome.read, len(kept)):
        raise DataError(
            f"{source.where}: found {seen} rows, {written} of them kept, when read again; want {outcome.read} and "
            f"{len(kept)}, as before: the source has changed"
        )


def _numbers(source: Source) -> set[str]:
    """Columns, by their names in the file, that are read as numbers or bools."""
    return {source.columns.get(name, name) for name in (*CSV_VALUES, *source.score)}


def _rescored(row: Row, scores: Mapping[str, Mapping[int, float]]) -> dict[str, Any]:
    return row.values | {column: values[row.number] for column, values in scores.items()}


def _listed(outcomes: Mapping[str, Outcome]):
    for name, outcome in outcomes.items():
        for row, (reason, found) in outcome.dropped.items():
            yield {"source": name, "row": row, "reason": reason, "found": found}


def summary(outcomes: Mapping[str, Outcome]) -> str:
    """A table of counts: a line per source, a column per reason."""
    found = dict.fromkeys(reason for outcome in outcomes.values() for reason in outcome.reasons)
    reasons = [reason for reason in found if reason not in RULES] + [rule for rule in RULES if rule in found]
    lines = [
        (name, outcome.read, len(outcome.kept), len(outcome.dropped), *(outcome.reasons[reason] for reason in reasons))
        for name, outcome in outcomes.items()
    ]
    if len(lines) > 1:
        lines.append(("all", *(sum(line[k] for line in lines) for k in range(1, len(reasons) + 4))))
    return table(("source", "rows read", "kept", "dropped", *(reason.replace("_", " ") for reason in reasons)), lines)


def parser() -> argparse.ArgumentParser:
    return recipe_parser(
        "uft data filter",
        "Curated data sets by the rules of a recipe, with a card; every dropped row is counted by reason and listed.",
        """
  uft recipe data_filter > filter.yaml
  uft data filter --config filter.yaml --output_dir data/curated""",
        dry_run=False,
    )


def main(words: Sequence[str]) -> int:
    outcomes, folder = run(recipe_of(words, dry_run=False).recipe)
    print(summary(outcomes))
    print(f"data, README.md and filter.json in {folder}")
    return 0
