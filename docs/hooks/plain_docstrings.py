"""Griffe extension: plain-text docstrings as Markdown that looks like them.

Docstrings here are prose with blocks in aligned columns.  A block that is indented or has columns becomes
preformatted text, so that its columns stay; of prose only what Markdown would take for a tag is escaped.
"""

from __future__ import annotations

import re
import textwrap
from typing import Any

import griffe

# two spaces or more inside a line, but not those behind the end of a sentence
COLUMNS = re.compile(r"\S(?<![.?!:;])  +\S|\S   +\S")
CODE = re.compile(r"(`+[^`]+`+)")


class PlainDocstrings(griffe.Extension):
    """Changes the docstring of everything that is loaded."""

    def on_object(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        if obj.docstring is not None:
            obj.docstring.value = as_markdown(obj.docstring.value)


def as_markdown(text: str) -> str:
    """Each block (what stands between empty lines) as preformatted text or as prose."""
    found: list[tuple[bool, list[str]]] = []
    for block in re.split(r"\n[ \t]*\n", text.strip("\n")):
        lines = block.split("\n")
        for formatted, part in _parts(lines):
            if formatted:
                part = textwrap.dedent("\n".join(part)).split("\n")
            if formatted and found and found[-1][0]:
                found[-1][1].extend(["", *part])
            else:
                found.append((formatted, list(part)))
    return "\n\n".join(
        "\n".join(["```text", *lines, "```"]) if formatted else _prose("\n".join(lines)) for formatted, lines in found
    )


def _parts(lines: list[str]) -> list[tuple[bool, list[str]]]:
    """A block is one part, but for a list and for a sentence that stands directly above its columns."""
    if re.match(r"[-*] |\d+\. ", lines[0]):
        return [(False, lines)]
    formatted = [line.startswith(" ") or bool(COLUMNS.search(line)) for line in lines]
    if True not in formatted:
        return [(False, lines)]
    # a first line without columns is a sentence, unless what follows is the rest of its row
    first = formatted.index(True)
    if first and not lines[first].startswith(" "):
        return [(False, lines[:first]), (True, lines[first:])]
    return [(True, lines)]


def _prose(text: str) -> str:
    parts = CODE.split(text)
    escaped = [part if i % 2 else re.sub(r"([*_])", r"\\\1", part.replace("<", "&lt;")) for i, part in enumerate(parts)]
    # a list keeps its marks
    return re.sub(r"(?m)^(\s*)\\\* ", r"\1* ", "".join(escaped))
