"""Languages by script: which writing systems the letters of a text belong to.

The standard library does not have Unicode's property Script; the first word of a letter's name is nearly the same
(LATIN, CYRILLIC, HIRAGANA, ...; CJK for Chinese characters).  Which of the languages of a script it is cannot be seen.
"""

from __future__ import annotations

import unicodedata
from collections import Counter
from functools import cache


@cache
def script_of(character: str) -> str | None:
    """The script of a letter, None for anything else."""
    if not character.isalpha():
        return None
    name = unicodedata.name(character, "")
    first = name.split(" ")[0].split("-")[0]
    # full-width Latin, mathematical letters and ordinals are letters of other names
    if first in (
        "FULLWIDTH",
        "HALFWIDTH",
        "MATHEMATICAL",
        "FEMININE",
        "MASCULINE",
        "MODIFIER",
        "MICRO",
        "KELVIN",
        "ANGSTROM",
    ):
        plain = unicodedata.normalize("NFKC", character)
        return script_of(plain) if plain != character and len(plain) == 1 else None
    return first or None


@cache
def known_scripts() -> frozenset[str]:
    """All that `script_of` may say of a letter of the first two planes; beyond there are Chinese characters alone."""
    return frozenset(filter(None, (script_of.__wrapped__(chr(point)) for point in range(0x20000))))


def scripts(text: str) -> Counter[str]:
    """Number of letters by script."""
    if text.isascii():
        letters = sum(map(str.isalpha, text))
        return Counter({"LATIN": letters} if letters else {})
    found: Counter[str] = Counter()
    for character, count in Counter(text).items():
        script = script_of(character)
        if script:
            found[script] += count
    return found


def main_script(text: str) -> str:
    """The script of most letters; "none" for a text without letters."""
    found = scripts(text)
    return found.most_common(1)[0][0] if found else "none"


def share_in(text: str, allowed: frozenset[str]) -> float:
    """Share of the letters that are of these scripts; 1 for a text without letters."""
    found = scripts(text)
    return sum(found[name] for name in allowed) / found.total() if found else 1.0
