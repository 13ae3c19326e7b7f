"""Rows as plain text, and what is compared of it: normalised keys and hashes of words.

Two texts are the same if they are after NFKC, case folding and joining of white space; punctuation counts, so that
"3 + 4" is not "3 - 4".  Conversations are the contents of their messages, so that a prompt is the same whether it
stands in a file as a string or as a user's message.
"""

from __future__ import annotations

import hashlib
import math
import re
import unicodedata
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from uft.data.files import SUFFIXES
from uft.data.readers import ROLES, TextExample, read_text
from uft.data.rows import BadRow, DataError, Messages, Row
from uft.data.sources import Source, read_rows

# writing systems without spaces between words: Thai, Lao, Burmese, Khmer, Tai and Javanese and Balinese letters,
# kana, bopomofo, Chinese characters, and what of these stands beyond the first plane
SPACELESS = (
    (0x0E00, 0x0EFF), (0x1000, 0x109F), (0x1780, 0x17FF), (0x1950, 0x19DF), (0x1A20, 0x1AAF), (0x1B00, 0x1B7F),
    (0x3005, 0x3007), (0x3021, 0x312F), (0x31A0, 0x31FF), (0x3400, 0x4DBF), (0x4E00, 0x9FFF), (0xA980, 0xA9FF),
    (0xAA60, 0xAADF), (0xF900, 0xFAFF), (0x1AFF0, 0x1B16F), (0x20000, 0x3FFFF),
)  # fmt: skip


def _class(points: Iterable[int]) -> str:
    """The inside of a character class of these code points, in their order."""
    runs: list[list[int]] = []
    for point in points:
        if runs and point == runs[-1][1] + 1:
            runs[-1][1] = point
        else:
            runs.append([point, point])
    return "".join(rf"\U{first:08x}-\U{last:08x}" for first, last in runs)


# combining marks are part of the letter before them, without which words of Indic scripts fall to pieces; so are the
# joiners that shape letters (U+200C, U+200D)
MARKS = _class([c for c in range(0x300, 0x1F000) if unicodedata.category(chr(c))[0] == "M" or c in (0x200C, 0x200D)])
ALONE = _class(c for first, last in SPACELESS for c in range(first, last + 1) if chr(c).isalpha())
ASCII_WORD = re.compile(r"\w+|[^\w\s]")
WORD = re.compile(rf"[{ALONE}][{MARKS}]*|(?:[^\W{ALONE}]++[{MARKS}]*+)++|[^\w\s]")


@dataclass(frozen=True)
class Item:
    """A row as plain text.

    group        the source's name, with the value of the column that sources are split by behind it
    responses    what the assistant says; otherwise as in `uft.data.readers.TextExample`, as are targets, preferences
                 and columns
    later        what others say between the assistant's turns of each response; () where nobody does
    asked        user turns one by one, and the prompt without system messages, where they are not all of the prompt
    annotator    who judged, where a column says so
    part         the value of the column that sources are split by
    """

    group: str
    row: int
    kind: str
    prompt: str
    responses: tuple[str, ...]
    targets: tuple[float, ...]
    preferences: tuple[tuple[int, int], ...] = ()
    columns: tuple[str, ...] = ("completion",)
    annotator: str | None = None
    later: tuple[str, ...] = ()
    asked: tuple[str, ...] = ()
    part: str | None = None

    @cached_property
    def _digests(self) -> tuple[bytes, ...]:
        found = list(map(_digest, (self.prompt, *self.responses)))
        for k, text in enumerate(self.later, start=1):
            found[k] = _joint((found[k], _digest(text)))
        return tuple(found)

    @cached_property
    def prompt_key(self) -> bytes | None:
        """None where there is no prompt: two documents do not share one."""
        return _joint(self._digests[:1]) if self.prompt.strip() else None

    @cached_property
    def response_keys(self) -> tuple[bytes, ...]:
        """Of each response together with the prompt."""
        prompt, *responses = self._digests
        return tuple(_joint((prompt, response)) for response in responses)

    @cached_property
    def row_key(self) -> bytes:
        """Of the prompt and all responses in their order."""
        return _joint(self._digests)


def normalised(text: str) -> str:
    folded = text if text.isascii() else unicodedata.normalize("NFKC", text)
    return " ".join(folded.casefold().split())


def key(*texts: str) -> bytes:
    """16 bytes that texts share if and only if they are the same after normalisation."""
    return _joint(map(_digest, texts))


def _digest(text: str) -> bytes:
    return hashlib.blake2b(normalised(text).encode("utf-8", "surrogatepass"), digest_size=16).digest()


def _joint(digests: Iterable[bytes]) -> bytes:
    return hashlib.blake2b(b"".join(digests), digest_size=16).digest()


def plain_text(text: str | Messages, *roles: str) -> str:
    """Contents of the messages, of these roles alone (by default all)."""
    if isinstance(text, str):
        return text
    return "\n\n".join(message["content"] for message in text if not roles or message["role"] in roles)


def item_of(text: TextExample, row: Row, group: str, by: str | None = None, annotator: str = "annotator") -> Item:
    part = _name(row.values.get(by)) if by else None
    prompt = plain_text(text.prompt)
    return Item(
        group if part is None else f"{group}/{part}", text.row, text.kind, prompt,
        tuple(plain_text(response, "assistant") for response in text.responses), text.targets, text.preferences,
        text.columns, _name(row.values.get(annotator)), _later(text.responses), _asked(text, prompt),
        part,
    )  # fmt: skip


def _name(value: Any) -> str | None:
    """A value that names somebody or something, on one line; None where it is blank."""
    if isinstance(value, float) and math.isnan(value):
        return None
    return None if value is None else " ".join(str(value).split()) or None


def _later(responses: Sequence[str | Messages]) -> tuple[str, ...]:
    others = tuple(role for role in ROLES if role != "assistant")
    found = tuple("" if isinstance(each, str) else plain_text(each, *others) for each in responses)
    return found if any(found) else ()


def _asked(text: TextExample, prompt: str) -> tuple[str, ...]:
    turns: list[str] = []
    for messages in (text.prompt, *text.responses):
        if not isinstance(messages, str):
            turns += [message["content"] for message in messages if message["role"] == "user"]
    if not isinstance(text.prompt, str):
        turns.append(plain_text(without_system(text.prompt)))
    return tuple(turn for turn in dict.fromkeys(turns) if turn.strip() and turn != prompt)


def without_system(messages: Messages) -> Messages:
    """The messages without those of the system and the developer, unless there are no others."""
    return [m for m in messages if m.get("role") not in ("system", "developer")] or messages


def read_items(
    source: Source, group: str | None = None, by: str | None = None, annotator: str = "annotator"
) -> Iterator[Item | BadRow]:
    """Each row of a source as an `Item`, or what is wrong with it.  The source is read twice side by side: as text,
    and with the columns that no reader knows.  Raises `DataError` if it cannot be used as a whole."""
    texts = read_text(source).examples
    for text, row in zip(texts, read_rows(source), strict=True):
        yield text if isinstance(text, BadRow) else item_of(text, row, group or source.name, by, annotator)


def read_evaluation(source: Source) -> Iterator[tuple[int, str]]:
    """Row number and prompt of each row of an evaluation file: column `prompt`, or what comes before the assistant in
    `messages`, or the whole `text`, without system messages; "" where there is none.  Raises `DataError` if no row has
    one."""
    read = 0
    for row in read_rows(source):
        prompt = _prompt_of(row.values)
        read += bool(prompt)
        yield row.number, prompt
    if not read:
        raise DataError(f"{source.where}: found no prompt; want a column prompt, messages or text that holds one")


def _prompt_of(values: Mapping[str, Any]) -> str:
    value = values.get("prompt")
    if value is None:
        value = values.get("messages", values.get("text"))
    if isinstance(value, (list, tuple)):
        turns = [m for m in value if isinstance(m, Mapping) and isinstance(m.get("content"), str)]
        first = next((i for i, m in enumerate(turns) if m.get("role") == "assistant" and i > 0), len(turns))
        asked = turns if "prompt" in values and values["prompt"] is not None else turns[:first]
        return plain_text(without_system(asked)).strip()
    return value.strip() if isinstance(value, str) else ""


def short_names(sources: list[Source]) -> list[str]:
    """What reports call the sources: of files the name without folder and ending, with a number where two are alike."""
    names = []
    for source in sources:
        path = Path(source.name)
        short = path.stem if path.suffix in SUFFIXES else path.name if path.exists() else source.name
        alike = sum(name == short or name.startswith(f"{short} (") for name in names)
        names.append(f"{short} ({alike + 1})" if alike else short)
    return names


# ---- words ----


class _Hashes(dict):
    """Word -> hash, worked out when first asked for."""

    def __missing__(self, word: str) -> int:
        digest = int.from_bytes(hashlib.blake2b(word.encode("utf-8", "surrogatepass"), digest_size=8).digest())
        self[word] = found = digest | 1 if word[0].isalnum() or word[0] == "_" else digest & ~1
        return found


class Words:
    """Texts as arrays of the 64-bit hashes of their words and punctuation marks, the same in every process.

    The lowest bit says whether it is a word.  In scripts that are written without spaces each letter is one.
    """

    def __init__(self):
        self._known = _Hashes()

    def __call__(self, text: str) -> np.ndarray:
        """uint64 [words and marks]"""
        found = words_of(normalised(text))
        return np.fromiter(map(self._known.__getitem__, found), np.uint64, len(found))


def words_of(text: str) -> list[str]:
    """Words and marks in their order."""
    return (ASCII_WORD if text.isascii() else WORD).findall(text)


def flat_words(texts: Sequence[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """The words (no marks) of all texts one behind the other, with a 0 behind each text that no word has, so that an
    n-gram over an end is none of any text; and int64 of the same length, whose they are."""
    bare = [only_words(text) for text in texts]
    end = np.zeros(1, np.uint64)
    flat = np.concatenate([part for text in bare for part in (text, end)]) if bare else np.zeros(0, np.uint64)
    return flat, np.repeat(np.arange(len(bare)), [len(text) + 1 for text in bare])


def only_words(hashes: np.ndarray) -> np.ndarray:
    return hashes[(hashes & np.uint64(1)).astype(bool)]


_FACTORS = np.random.default_rng(20051416).integers(0, 2**63, 64, dtype=np.uint64) * np.uint64(2) + np.uint64(1)


def ngrams(hashes: np.ndarray, size: int) -> np.ndarray:
    """uint64 [max(n − size + 1, 0)]: a hash of every `size` words in a row, h = mix(Σ_j a_j w_j) mod 2^64, a_j odd."""
    count = len(hashes) - size + 1
    if count <= 0:
        return np.zeros(0, np.uint64)
    total = np.zeros(count, np.uint64)
    for j in range(size):
        total += hashes[j : j + count] * _FACTORS[j % len(_FACTORS)]
    # MurmurHash3's finaliser: the low bits of a sum of products depend on the low bits of the words alone
    total ^= total >> np.uint64(33)
    total *= np.uint64(0xFF51AFD7ED558CCD)
    total ^= total >> np.uint64(33)
    total *= np.uint64(0xC4CEB9FE1A85EC53)
    return total ^ (total >> np.uint64(33))


def shingles(hashes: np.ndarray, size: int) -> np.ndarray:
    """The set of its `size`-grams, sorted; of a text with fewer words the text itself."""
    return np.unique(ngrams(hashes, min(size, len(hashes)))) if len(hashes) else np.zeros(0, np.uint64)
