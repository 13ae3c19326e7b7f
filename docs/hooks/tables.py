"""MkDocs hook: tables that are made from the code while the site is built.

    <!-- keys: module.Class -->           every field of a dataclass: key, default, meaning
    <!-- keys: module.Class but a b -->   all but these
    <!-- own keys: module.Class -->       those that its parent does not have
    <!-- meanings: module.Class -->       key and meaning, where a recipe's defaults are not the class's
    <!-- rules -->                        the rules of `uft data filter` with their options
    <!-- losses: PAIRWISE -->             a table of `uft.losses`: name, equation, what it gets, options, paper

A meaning is the field's help, or its line in the class's docstring.  A key without either fails the build.
"""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import Files
from mkdocs.structure.pages import Page

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # experiments are read from the checkout
MARKER = re.compile(r"<!-- (keys|own keys|meanings|losses|rules)(?:: ([\w.]+)(?: but ([\w ]+))?)? -->")
ROW = re.compile(r"^(\w+(?:, \w+)*)(?: {2,}| (?=\S))(.*)$")
PAPER = re.compile(r"\[([\w-]+)\]\s+([^\[]+?)(?=\s{2,}|\n|$)")


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    return MARKER.sub(lambda found: made(found[1], found[2], (found[3] or "").split()), markdown)


def made(what: str, name: str | None = None, but: Sequence[str] = ()) -> str:
    """The table of a marker, as Markdown.  Raises PluginError for a key that nothing explains."""
    if what == "losses":
        return losses_table(name)
    if what == "rules":
        return rules_table()
    module, _, qualified = name.rpartition(".")
    cls = getattr(importlib.import_module(module), qualified)
    if unknown := set(but) - {field.name for field in dataclasses.fields(cls)}:
        raise PluginError(f"{name} has no field {unknown.pop()!r}; want one of its own behind `but`")
    rows = keys(cls, inherited=what != "own keys", but=but)
    if what == "meanings":
        return _table(("key", "meaning"), [(key, meaning) for key, _, meaning in rows])
    return _table(("key", "default", "meaning"), rows)


def keys(cls: type, *, inherited: bool = True, but: Sequence[str] = ()) -> list[tuple[str, str, str]]:
    """Key, default and meaning of each field."""
    parent = {} if inherited else {f.name: f for f in dataclasses.fields(cls.__mro__[1])}
    explained = meanings(cls)
    rows = []
    for field in dataclasses.fields(cls):
        # a field of the parent is its own again where its default differs
        old = field.name in parent and _same(field, parent[field.name])
        if field.init and not old and field.name not in but:
            meaning = field.metadata.get("help") or explained.get(field.name)
            if not meaning:
                raise PluginError(f"{cls.__qualname__}.{field.name} has no help and no line in the docstring; want one")
            rows.append((f"`{field.name}`", _default(field), _cell(meaning)))
    return rows


def meanings(cls: type) -> dict[str, str]:
    """Field -> meaning, from the aligned rows of a docstring, whose continuation lines are indented."""
    names = {field.name for field in dataclasses.fields(cls)}
    found: dict[str, str] = {}
    current: list[str] = []
    for line in inspect.cleandoc(cls.__doc__ or "").split("\n"):
        row = ROW.match(line)
        keys = [key for key in row[1].split(", ") if key in names] if row else []
        if keys and len(keys) == len(row[1].split(", ")):
            current = keys
            found |= dict.fromkeys(keys, row[2].strip())
        elif line.startswith(" ") and current:
            found |= {key: f"{found[key]} {line.strip()}" for key in current}
        else:
            current = []
    # said in the row of another
    for name in names - set(found):
        other = next((key for key, text in found.items() if f"`{name}`" in text), None)
        if other:
            found[name] = f"see `{other}`"
    return found


def _same(field: dataclasses.Field, other: dataclasses.Field) -> bool:
    return (field.default, field.metadata) == (other.default, other.metadata)


def _default(field: dataclasses.Field) -> str:
    if field.default is not dataclasses.MISSING:
        value = field.default
    elif field.default_factory is not dataclasses.MISSING:
        value = field.default_factory()
    else:
        return "(needed)"
    if dataclasses.is_dataclass(value):
        return "its defaults"
    if value is None or value in ((), {}, []):
        return "none"
    if isinstance(value, bool):
        return f"`{str(value).lower()}`"
    if isinstance(value, tuple):
        return f"`[{', '.join('null' if each is None else str(each) for each in value)}]`"
    return f"`{getattr(value, 'value', value)}`"


def rules_table() -> str:
    from uft.data.quality.rules import RULES

    rows = []
    for name, rule in RULES.items():
        summary = inspect.getdoc(rule).split("\n\n")[0]
        options = ", ".join(f"`{f.name}`: {_default(f)}" for f in dataclasses.fields(rule))
        rows.append((f"`{name}`", _cell(summary), options or "–"))
    return _table(("rule", "drops", "options: default"), rows)


# ---- losses ----


def losses_table(name: str) -> str:
    from uft import losses

    table: Mapping[str, Callable] = getattr(losses, name)
    rows = []
    for key, loss in table.items():
        parameters = inspect.signature(loss).parameters.values()
        gets = [f"`{p.name}`" for p in parameters if p.kind is not p.KEYWORD_ONLY]
        options = [f"`{p.name}`: {p.default:g}" for p in parameters if p.kind is p.KEYWORD_ONLY]
        first = _cell(inspect.getdoc(loss).split("\n\n")[0])
        rows.append((f"`{key}`", _linked(first, loss), ", ".join(gets), ", ".join(options) or "–"))
    return _table(("loss", "is", "gets", "options"), rows)


def _linked(text: str, loss: Callable) -> str:
    """[DPO] as a link to the paper that the module's docstring names so."""
    papers = dict(PAPER.findall(sys.modules[loss.__module__].__doc__))

    def link(found: re.Match[str]) -> str:
        number = re.search(r"arXiv:(\d{4}\.\d{5})", papers.get(found[1], ""))
        return f"[{found[1]}](https://arxiv.org/abs/{number[1]})" if number else f"[{found[1]}]"

    return re.sub(r"\[([\w-]+)\](?!\()", link, text)


# ---- Markdown ----


def _cell(text: Any) -> str:
    return re.sub(r"\s+", " ", str(text)).replace("|", "\\|").replace("<", "&lt;").replace("*", "\\*").strip()


def _table(header: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    lines = [header, tuple("---" for _ in header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
