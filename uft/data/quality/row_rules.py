"""Rules of `uft data filter` that look at one row at a time.  Each is a dataclass of its options, called with the
positions of the rows that are left; it yields those to be dropped, with what was found."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from uft.data.quality.corpus import Corpus, Evaluation
from uft.data.quality.endings import SIGNS, Lexicon, at_longest, signs
from uft.data.quality.items import Item
from uft.data.quality.measure import count_tokens
from uft.data.quality.scripts import known_scripts, share_in
from uft.data.quality.terms import UNSAFE, Matcher, read_terms
from uft.data.rows import DataError, is_number, shown

Dropped = Iterator[tuple[int, str]]  # position in the corpus, what was found
COLUMNS = ("prompt", "completion", "chosen", "rejected", "messages", "text")


@dataclass(frozen=True)
class Context:
    """What rules look at besides the rows that are left: all rows, evaluation prompts, a tokenizer."""

    corpus: Corpus
    evaluation: Evaluation | None = None
    tokenizer: Any = None


def want(ok: bool, key: str, value: Any, wanted: str) -> None:
    if not ok:
        raise DataError(f"{key} is {shown(value)}; want {wanted}")


@dataclass(frozen=True)
class Lengths:
    """Bounds, both inclusive, each `[least, most]` with null for none: characters of the prompt, characters and words
    of every response, tokens of the prompt with the longest response."""

    prompt_characters: tuple[int | None, int | None] = (None, None)
    response_characters: tuple[int | None, int | None] = (None, None)
    response_words: tuple[int | None, int | None] = (None, None)
    tokens: tuple[int | None, int | None] = (None, None)

    def __post_init__(self):
        for field in dataclasses.fields(self):
            ends = getattr(self, field.name)
            ok = isinstance(ends, (list, tuple)) and len(ends) == 2 and all(e is None or is_number(e) for e in ends)
            ok = ok and (None in ends or ends[0] <= ends[1])
            want(ok, field.name, ends, "[least, most], null for no bound")

    def __call__(self, left: Sequence[int], context: Context) -> Dropped:
        items = context.corpus.items
        tokens = [None] * len(left)
        if tuple(self.tokens) != (None, None):
            if context.tokenizer is None:
                raise DataError("lengths.tokens needs a tokenizer; want `tokenizer` with a folder or hub id")
            counted = iter(
                count_tokens([t for i in left for t in (items[i].prompt, *items[i].responses)], context.tokenizer)
            )
            tokens = [next(counted) + max(next(counted) for _ in items[i].responses) for i in left]
        for i, n in zip(left, tokens):
            item = items[i]
            found = [("prompt_characters", len(item.prompt)), ("tokens", n)]
            found += [("response_characters", len(response)) for response in item.responses]
            found += [("response_words", len(response.split())) for response in item.responses]
            for name, value in found:
                least, most = getattr(self, name)
                if value is not None and ((least is not None and value < least) or (most is not None and value > most)):
                    yield i, f"{value} {name.replace('_', ' ')}"
                    break


@dataclass(frozen=True)
class Endings:
    """Responses that are empty or cut off, by signs of `uft.data.quality.endings`.  `columns` says of which
    responses."""

    signs: tuple[str, ...] = ("no text", "mid word", "open fence")
    columns: tuple[str, ...] = ("completion", "chosen", "rejected", "messages", "text")
    max_length: int | None = None

    def __post_init__(self):
        ok = isinstance(self.signs, (list, tuple)) and set(self.signs) <= set(SIGNS)
        want(ok, "signs", self.signs, f"some of {', '.join(SIGNS)}")
        want(set(self.columns) <= set(COLUMNS), "columns", self.columns, f"some of {', '.join(COLUMNS)}")
        if "max length" in self.signs:
            want(is_number(self.max_length), "max_length", self.max_length, "a number of tokens, for sign 'max length'")

    def __call__(self, left: Sequence[int], context: Context) -> Dropped:
        items = context.corpus.items
        # of all rows, dropped ones too: words are no worse for it
        lexicon = Lexicon(text for item in items for text in (item.prompt, *item.responses))
        limited = self._at_limit([items[i] for i in left], context)
        for k, i in enumerate(left):
            for r, (text, column) in enumerate(zip(items[i].responses, items[i].columns)):
                seen = [*signs(text, lexicon), *limited.get((k, r), ())]
                if column in self.columns and (found := [sign for sign in seen if sign in self.signs]):
                    yield i, f"{found[0]} in {column}: {shown(text[-40:])}"
                    break

    def _at_limit(self, items: Sequence[Item], context: Context) -> dict[tuple[int, int], list[str]]:
        found: dict[tuple[int, int], list[str]] = {}
        if not {"longest", "max length"} & set(self.signs):
            return found
        if "max length" in self.signs and context.tokenizer is None:
            raise DataError("sign 'max length' needs a tokenizer; want `tokenizer` with a folder or hub id")
        places = [(k, r) for k, item in enumerate(items) for r in range(len(item.responses))]
        texts, tokenizer = [items[k].responses[r] for k, r in places], context.tokenizer
        sizes = list(map(len, texts)) if tokenizer is None else count_tokens(texts, tokenizer)
        for group in dict.fromkeys(item.group for item in items):
            mine = [n for n, (k, _) in enumerate(places) if items[k].group == group]
            for n in at_longest([sizes[m] for m in mine]):
                found.setdefault(places[mine[n]], []).append("longest")
        if "max length" in self.signs:
            prompts = count_tokens([item.prompt for item in items], tokenizer)
            for place, n in zip(places, sizes):
                if prompts[place[0]] + n >= self.max_length:
                    found.setdefault(place, []).append("max length")
        return found


@dataclass(frozen=True)
class Scripts:
    """At least `share` of the letters of prompt and responses are of the `allowed` scripts, such as LATIN or
    CYRILLIC."""

    allowed: tuple[str, ...] = ("LATIN",)
    share: float = 0.9

    def __post_init__(self):
        ok = isinstance(self.allowed, (list, tuple)) and self.allowed and all(isinstance(a, str) for a in self.allowed)
        want(bool(ok), "allowed", self.allowed, "names of scripts")
        for name in self.allowed:
            if name.upper() not in known_scripts():
                near = difflib.get_close_matches(name.upper(), sorted(known_scripts()), n=1)
                hint = f"; did you mean {near[0]!r}?" if near else ""
                wanted = "the first word of Unicode's names of letters, such as LATIN, CYRILLIC, CJK or HIRAGANA"
                raise DataError(f"allowed has {name!r}, which is no script; want {wanted}{hint}")
        want(is_number(self.share) and 0 < self.share <= 1, "share", self.share, "0 < share <= 1")

    def __call__(self, left: Sequence[int], context: Context) -> Dropped:
        allowed = frozenset(name.upper() for name in self.allowed)
        for i in left:
            item = context.corpus.items[i]
            share = min(share_in(text, allowed) for text in (item.prompt, *item.responses))
            if share < self.share:
                yield i, f"{share:.2f} of the letters"


@dataclass(frozen=True)
class Unsafe:
    """Terms of a list (by default the one that comes along) in the texts of these `columns`."""

    file: str | None = None
    columns: tuple[str, ...] = COLUMNS
    categories: tuple[str, ...] | None = None

    def __post_init__(self):
        want(set(self.columns) <= set(COLUMNS), "columns", self.columns, f"some of {', '.join(COLUMNS)}")
        groups = read_terms(self.file or UNSAFE)
        want(set(self.categories or ()) <= set(groups), "categories", self.categories, f"some of {', '.join(groups)}")

    def __call__(self, left: Sequence[int], context: Context) -> Dropped:
        groups = read_terms(self.file or UNSAFE)
        matcher = Matcher(
            {g: terms for g, terms in groups.items() if g in (self.categories or groups)}, context.corpus.words
        )
        rows = [context.corpus.row_words[i] for i in left]
        matched = iter(matcher([text for texts in rows for text in texts]))
        for i, texts in zip(left, rows):
            names = ("prompt", *context.corpus.items[i].columns)
            seen = [(name, next(matched)) for name, _ in zip(names, texts)]
            for name, found in seen:
                if name in self.columns and found:
                    group, term = next(iter(found.items()))
                    yield i, f"{term!r} ({group}) in {name}"
                    break


@dataclass(frozen=True)
class LengthRatio:
    """Pairs one response of which has more than `most` times the characters of the other."""

    most: float = 5.0

    def __post_init__(self):
        want(is_number(self.most) and self.most >= 1, "most", self.most, "a number >= 1")

    def __call__(self, left: Sequence[int], context: Context) -> Dropped:
        for i in left:
            item = context.corpus.items[i]
            if item.kind == "pair":
                short, long = sorted(map(len, item.responses))
                if long > self.most * max(short, 1):
                    yield i, f"{len(item.responses[0])} and {len(item.responses[1])} characters"
