"""Everything that a report says of a set of sources, as plain numbers: no text of the data is in it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from uft.data.quality.agreement import agreement
from uft.data.quality.bias import length_and_target, length_bias, share
from uft.data.quality.contamination import Overlap, look_for
from uft.data.quality.corpus import Corpus, Evaluation, positive
from uft.data.quality.duplicates import Near, same, same_or_near, shared_rows
from uft.data.quality.endings import SIGNS, Lexicon, at_longest, signs
from uft.data.quality.graph import conflicts, label_conflicts, preferences_of
from uft.data.quality.items import short_names
from uft.data.quality.scores import describe
from uft.data.quality.scripts import main_script
from uft.data.quality.terms import TERMS, UNSAFE, Matcher, rates, read_terms
from uft.data.rows import DataError
from uft.data.sources import Source

ALL = "all sources together"
QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95, 1.0)


@dataclass(frozen=True)
class Options:
    """How sources are looked at.

    by           a column by whose values each source is split into groups
    annotator    the column that says who judged
    beta         of the losses that scores are for
    tokenizer    counts tokens, if there is one; `max_length` is what responses may be cut at
    """

    near: Near = field(default_factory=Near)
    overlap: Overlap = field(default_factory=Overlap)
    by: str | None = None
    annotator: str = "annotator"
    beta: float = 0.1
    tokenizer: Any = None
    max_length: int | None = None
    terms: str | Path = TERMS
    unsafe: str | Path = UNSAFE

    def __post_init__(self):
        positive("beta", self.beta)

    def shown(self) -> dict[str, Any]:
        named = {"terms": Path(self.terms).name, "unsafe": Path(self.unsafe).name}
        tokens = None if self.tokenizer is None else type(self.tokenizer).__name__
        plain = {"by": self.by, "annotator": self.annotator, "beta": self.beta, "max_length": self.max_length}
        recall = {f"{s:g}": self.near.recall(s) for s in (self.near.threshold, 0.9, 1.0)}
        near = asdict(self.near) | {"recall_at_similarity": recall}
        return plain | named | {"tokenizer": tokens, "near": near, "overlap": asdict(self.overlap)}


def measure(
    sources: Sequence[Source], evaluation: Sequence[Source] = (), options: Options | None = None
) -> dict[str, Any]:
    """The findings.  Raises `DataError` for a source or a list of terms that cannot be used as a whole; rows that
    cannot be used are counted and left out."""
    options = options or Options()
    lists = {name: read_terms(getattr(options, name)) for name in ("terms", "unsafe")}
    # first, since a wrong name costs nothing yet
    asked = Evaluation.read(evaluation, short_names(list(evaluation)))
    corpus = Corpus.read(sources, short_names(list(sources)), options.by, options.annotator)
    _some(corpus, options)
    return {
        "settings": options.shown(),
        "rows": _rows(corpus),
        "lengths": _lengths(corpus, options.tokenizer),
        "scripts": each_group(corpus, lambda items: dict(Counter(main_script(r) for r in _responses(items)))),
        "endings": _endings(corpus, options),
        "duplicates": _duplicates(corpus, options.near),
        "contamination": _contamination(corpus, asked, options.overlap) if evaluation else {},
        "labels": _labels(corpus),
        "length_bias": each_group(corpus, lambda items: _length_bias(items), "pair"),
        "length_and_target": each_group(corpus, _length_and_target, "label", "score"),
        "conflicts": _conflicts(corpus),
        "agreement": _agreement(corpus),
        "scores": _scores(corpus, options.beta),
        **{name: _terms(corpus, groups) for name, groups in lists.items()},
    }


def _some(corpus: Corpus, options: Options) -> None:
    """Refuses a column that was asked for and that no row has; the default one for annotators need not be there."""
    wanted = [("by", options.by, any(item.part is not None for item in corpus.items))]
    if options.annotator != Options.annotator:
        wanted.append(("annotator", options.annotator, any(item.annotator is not None for item in corpus.items)))
    for name, column, found in wanted:
        if column is not None and corpus.items and not found:
            raise DataError(f"{name} is {column!r}: found no row of any source with a value in this column; want one")


def each_group(corpus: Corpus, what: Callable[[list], Any], *kinds: str) -> dict[str, Any]:
    """What a function says of the items of each group, of groups of these kinds (all by default)."""
    found = {}
    for group in corpus.groups:
        items = [corpus.items[i] for i in corpus.of(group)]
        wanted = [item for item in items if not kinds or item.kind in kinds]
        if wanted:
            found[group] = what(wanted)
    return found


def _responses(items: Sequence[Any]) -> list[str]:
    return [response for item in items for response in item.responses]


def _rows(corpus: Corpus) -> dict[str, Any]:
    found = each_group(
        corpus,
        lambda items: {
            "kind": "/".join(sorted({item.kind for item in items})),
            "rows": len(items),
            "prompts": len({item.prompt_key for item in items} - {None}),
            "responses": sum(len(item.responses) for item in items),
        },
    )
    bad = {group: dict(Counter(row.reason for row in rows)) for group, rows in corpus.bad.items()}
    return {"groups": found, "bad": bad}


def quantiles(values: Sequence[float]) -> dict[str, Any]:
    values = np.asarray(values, dtype=float)
    return {"mean": float(values.mean())} | {f"{q:g}": float(np.quantile(values, q)) for q in QUANTILES}


def _lengths(corpus: Corpus, tokenizer: Any) -> dict[str, Any]:
    def of(items):
        found = {
            "prompt_characters": quantiles([len(item.prompt) for item in items]),
            "response_characters": quantiles([len(r) for r in _responses(items)]),
        }
        if tokenizer is not None:
            found["prompt_tokens"] = quantiles(count_tokens([item.prompt for item in items], tokenizer))
            found["response_tokens"] = quantiles(count_tokens(_responses(items), tokenizer))
        return found

    return each_group(corpus, of)


def count_tokens(texts: Sequence[str], tokenizer: Any, batch: int = 1000) -> list[int]:
    """Tokens of each text, without special tokens."""
    found: list[int] = []
    for start in range(0, len(texts), batch):
        ids = tokenizer(list(texts[start : start + batch]), add_special_tokens=False, verbose=False)["input_ids"]
        found += map(len, ids)
    return found


def _endings(corpus: Corpus, options: Options) -> dict[str, Any]:
    lexicon = Lexicon(text for item in corpus.items for text in (item.prompt, *item.responses))

    def of(items):
        texts = _responses(items)
        counted = Counter(sign for text in texts for sign in signs(text, lexicon))
        sizes = count_tokens(texts, options.tokenizer) if options.tokenizer is not None else list(map(len, texts))
        counted["longest"] = len(at_longest(sizes))
        if options.tokenizer is not None and options.max_length is not None:
            prompts = count_tokens([item.prompt for item in items for _ in item.responses], options.tokenizer)
            counted["max length"] = sum(p + r >= options.max_length for p, r in zip(prompts, sizes))
        return {"responses": len(texts)} | {sign: counted[sign] for sign in SIGNS}

    return each_group(corpus, of)


def _duplicates(corpus: Corpus, settings: Near) -> dict[str, Any]:
    """Rows that repeat an earlier one, and rows of each group that share a prompt, response or row with each other "
    "group."""
    items, parts, count = corpus.items, corpus.parts, len(corpus.groups)
    found: dict[str, Any] = {"groups": list(corpus.groups)}

    def add(name: str, leader: np.ndarray) -> None:
        repeats = corpus.count(np.flatnonzero(leader != np.arange(len(leader))).tolist())
        found[name] = {"repeats": repeats, "shared": shared_rows(leader, parts, count).tolist()}

    for name, keys, sets in (
        ("prompt", [item.prompt_key for item in items], corpus.prompt_parts),
        ("row", [item.row_key for item in items], corpus.row_parts),
    ):
        exact, near, _ = same_or_near(keys, lambda i, s=sets: s(i, settings.ngram), settings, f"near {name}s")
        add(f"exact_{name}", exact)
        add(f"near_{name}", near)
    of, keys = zip(*[(i, k) for i, item in enumerate(items) for k in item.response_keys]) if items else ((), ())
    of, first = np.array(of, dtype=np.int64), same(keys)
    own = first == np.arange(len(first))
    repeats = corpus.count(dict.fromkeys(of[~own].tolist()))
    found["exact_response"] = {"repeats": repeats, "shared": shared_rows(first, parts[of], count).tolist()}
    return found


def _contamination(corpus: Corpus, asked: Evaluation, settings: Overlap) -> dict[str, Any]:
    found = look_for(asked.texts, corpus, range(len(corpus.items)), settings)
    files = {}
    for part, name in enumerate(asked.files):
        mine = asked.parts == part
        ways = {way: (hits.row[mine[hits.prompt]], hits.prompt[mine[hits.prompt]]) for way, hits in found.ways.items()}
        ways["any"] = tuple(np.concatenate([each[k] for each in ways.values()]) for k in (0, 1))
        files[name] = {
            "prompts": int(mine.sum()),
            "rows_without_prompt": asked.lacking[part],
            "prompts_found": {way: len(set(hit.tolist())) for way, (_, hit) in ways.items()},
            "rows": {way: corpus.count(set(rows.tolist())) for way, (rows, _) in ways.items()},
        }
    return {"templates_ignored": found.templates, "files": files}


def _labels(corpus: Corpus) -> dict[str, Any]:
    return each_group(corpus, lambda items: share(sum(i.targets[0] == 1 for i in items), len(items)), "label")


def _length_bias(items: Sequence[Any]) -> dict[str, Any]:
    return length_bias([len(i.responses[0]) for i in items], [len(i.responses[1]) for i in items])


def _length_and_target(items: Sequence[Any]) -> dict[str, Any]:
    return length_and_target([len(i.responses[0]) for i in items], [i.targets[0] for i in items])


def _agreement(corpus: Corpus) -> dict[str, Any]:
    """By source, and of all together: often each annotator's judgements are a file of their own."""
    found = each_group(corpus, agreement)
    if len(corpus.groups) > 1:
        found[ALL] = agreement(corpus.items)
    return {group: kinds for group, kinds in found.items() if kinds}


def _scores(corpus: Corpus, beta: float) -> dict[str, Any]:
    """Of scored responses, and of both sides of pairs that have scores: some other than 1 and 0, which pairs without
    scores have too."""
    found = {}
    for group in corpus.groups:
        items = [corpus.items[i] for i in corpus.of(group)]
        kind, targets = items[0].kind, [target for item in items for target in item.targets]
        if kind == "score" or (kind == "pair" and any(item.targets != (1.0, 0.0) for item in items)):
            found[group] = {"kind": kind} | describe(targets, beta)
    return found


def _conflicts(corpus: Corpus) -> dict[str, Any]:
    """Across groups: a pair of one source may contradict one of another.  Rows are counted where they stand."""
    found, labels = conflicts(preferences_of(corpus.items)), label_conflicts(corpus.items)
    return {
        "contradictions": len(found.contradictions),
        "contradicting_rows": corpus.count({i for rows in found.contradictions for i in rows}),
        "cycles": len(found.cycles),
        "shortest_cycles": sorted(map(len, found.shortest)),
        "rows_on_cycles": corpus.count({i for rows in found.cycles for i in rows}),
        "label_contradictions": len(labels),
        "label_contradicting_rows": corpus.count({i for rows in labels for i in rows}),
    }


def _terms(corpus: Corpus, groups: dict[str, tuple[str, ...]]) -> dict[str, Any]:
    """Rates of terms in better and in worse responses: chosen and rejected, label 1 and 0, scores above the median and
    not; of other kinds in all responses.  And in prompts."""
    matcher = Matcher(groups, corpus.words)
    found = {}
    for group in corpus.groups:
        positions = corpus.of(group)
        kind = corpus.items[positions[0]].kind
        matched = iter(matcher([text for i in positions for text in corpus.row_words[i]]))
        texts = {i: [next(matched) for _ in corpus.row_words[i]] for i in positions}
        targets = np.array([corpus.items[i].targets[0] for i in positions])
        limit = np.median(targets) if kind == "score" else 0.5
        if kind == "pair":
            better, worse = [texts[i][1] for i in positions], [texts[i][2] for i in positions]
        elif kind in ("label", "score"):
            better = [texts[i][1] for i, t in zip(positions, targets) if t > limit]
            worse = [texts[i][1] for i, t in zip(positions, targets) if t <= limit]
        else:
            better, worse = [texts[i][1] for i in positions], []
        prompts = {name: sum(name in texts[i][0] for i in positions) for name in groups}
        found[group] = {
            "kind": kind,
            "responses": rates(list(groups), better, worse, kind == "pair"),
            "prompts": {name: share(hits, len(positions)) for name, hits in prompts.items() if hits},
        }
    return found
