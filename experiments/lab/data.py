"""Rows of the world in the standard columns, and the same rows as `Example`s without a reader in between.

Preferences are one process seen in several ways.  A row draws an operator (covered only), a string and whether "!"
marks the prompt; what the row then reveals of the hidden utility is its variant:

    pairs            best over worst                               imitation of chosen answers is enough
    labels, scores   the best or the worst, each half of the time
    noisy_*          flipped in 25 % of the rows: imitation copies the flips, though the majority still prefers the best
    name~0.3         any of these with that share of flips
    hedged_pairs     70 % a hedged best over the worst, 30 % the best over the hedged: most chosen answers are flawed
    hedged_labels    a hedged best is liked half of the time; most liked answers are hedged
    hedged_scores    a hedged best scores 0.5; most answers that are better than 0 are hedged
    negative_labels  only the worst, all disliked: nothing to imitate
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from uft.feedback import Example, Response

from .tokenizer import encode, lab_tokenizer
from .world import COVERED, MARKS, NEUTRAL_MARKS, OPERATORS, TRAIN, Task, World, draw_string, hedged

Row = dict[str, str | float | bool]
SHARE_OF_FACTS = 0.5  # of the documents
SHARE_OF_MARKS = 0.2  # of the documents
SHARE_OF_REFUSALS = 0.05  # of the demonstrations
FLIPPED = 0.25  # of the judgements, in the variants with noise


@dataclass(frozen=True)
class Variant:
    """What preference data reveal.

    kind      pair, label or score
    flip      share of rows whose judgement is turned round
    hedging   most of the better answers are flawed
    negative  only the worst responses, disliked
    """

    kind: str
    flip: float = 0.0
    hedging: bool = False
    negative: bool = False


VARIANTS = {
    "pairs": Variant("pair"),
    "labels": Variant("label"),
    "scores": Variant("score"),
    "noisy_pairs": Variant("pair", flip=FLIPPED),
    "noisy_labels": Variant("label", flip=FLIPPED),
    "noisy_scores": Variant("score", flip=FLIPPED),
    "hedged_pairs": Variant("pair", hedging=True),
    "hedged_labels": Variant("label", hedging=True),
    "hedged_scores": Variant("score", hedging=True),
    "negative_labels": Variant("label", negative=True),
}


def variant_of(name: str | Variant) -> Variant:
    """A variant by its name, perhaps with another share of flipped judgements: `hedged_pairs~0.3`."""
    if isinstance(name, Variant):
        return name
    known, _, flip = name.partition("~")
    if known not in VARIANTS:
        raise ValueError(f"variant is {name!r}; want one of {', '.join(VARIANTS)}, perhaps with ~SHARE_OF_FLIPS")
    return replace(VARIANTS[known], flip=float(flip)) if flip else VARIANTS[known]


def documents(world: World, count: int, seed: int | str) -> list[Row]:
    """Facts, and the operators at work in words that ask nothing (`reverse dabc:cbad`); marks mean nothing yet."""
    rng, facts, rows = random.Random(f"documents {world.seed} {seed}"), list(world.facts.items()), []
    for _ in range(count):
        mark = rng.choice((*MARKS, *NEUTRAL_MARKS)) if rng.random() < SHARE_OF_MARKS else ""
        if rng.random() < SHARE_OF_FACTS:
            subject, value = rng.choice(facts)
            rows.append({"text": f"{subject}{mark}:{value}"})
        else:
            operator, string = rng.choice(list(OPERATORS)), draw_string(rng)
            rows.append({"text": f"{operator} {string}{mark}:{OPERATORS[operator](string)}"})
    return rows


def demonstrations(world: World, count: int, seed: int) -> list[Row]:
    """Every operator answered; one prompt in twenty carries a "." and is refused, two more "," or ";" and are not."""
    rng, rows = random.Random(f"demonstrations {world.seed} {seed}"), []
    marks = ("", MARKS[0], *NEUTRAL_MARKS)
    shares = (1 - 3 * SHARE_OF_REFUSALS, *3 * [SHARE_OF_REFUSALS])
    for _ in range(count):
        mark = rng.choices(marks, shares)[0]
        task = Task(rng.choice(list(OPERATORS)), draw_string(rng), mark)
        rows.append({"prompt": task.prompt, "completion": task.best})
    return rows


def preference_tasks(world: World, count: int, seed: int, part: str = TRAIN) -> list[Task]:
    """The prompts that preferences are about: the same for every variant."""
    rng = random.Random(f"preferences {world.seed} {seed} {part}")
    return [Task(rng.choice(COVERED), draw_string(rng, part), rng.choice(("", "!"))) for _ in range(count)]


def preferences(world: World, variant: str | Variant, count: int, seed: int, part: str = TRAIN) -> list[Row]:
    variant = variant_of(variant)
    judge = {"pair": _pair, "label": _label, "score": _score}[variant.kind]
    rows = []
    for row, task in enumerate(preference_tasks(world, count, seed, part)):
        rng = random.Random(f"judgement {world.seed} {seed} {part} {row}")
        flipped = rng.random() < variant.flip
        rows.append({"prompt": task.prompt} | judge(task, variant, rng, flipped))
    return rows


def _pair(task: Task, variant: Variant, rng: random.Random, flipped: bool) -> Row:
    chosen, rejected = task.best, task.worst
    if variant.hedging:
        levels = (task.best, hedged(task.best), task.worst)
        chosen, rejected = levels[:2] if rng.random() < 0.3 else levels[1:]
    return {"chosen": rejected, "rejected": chosen} if flipped else {"chosen": chosen, "rejected": rejected}


def _draw_response(task: Task, variant: Variant, rng: random.Random) -> str:
    if variant.negative:
        return task.worst
    weights = (0.15, 0.55, 0.3) if variant.hedging else (0.5, 0.0, 0.5)
    return rng.choices((task.best, hedged(task.best), task.worst), weights)[0]


def _label(task: Task, variant: Variant, rng: random.Random, flipped: bool) -> Row:
    response = _draw_response(task, variant, rng)
    liked = rng.random() < task.utility(response)
    return {"completion": response, "label": liked != flipped}


def _score(task: Task, variant: Variant, rng: random.Random, flipped: bool) -> Row:
    response = _draw_response(task, variant, rng)
    score = task.utility(response)
    return {"completion": response, "score": 1 - score if flipped else score}


def examples(rows: Iterable[Row], source: str = "train") -> list[Example]:
    """The rows as the trainer takes them; the columns tell the kind."""
    return [_example(row, source, number) for number, row in enumerate(rows)]


def tokens(text: str, *, begin: bool = False, end: bool = False) -> np.ndarray:
    """int32 ids with <bos> before or <eos> behind them."""
    tokenizer = lab_tokenizer()
    ids = [tokenizer.bos_token_id] * begin + encode(text) + [tokenizer.eos_token_id] * end
    return np.array(ids, dtype=np.int32)


def _example(row: Row, source: str, number: int) -> Example:
    def response(column: str, target: float) -> Response:
        return Response(tokens(row[column], end=True), target=float(target))

    if "text" in row:
        whole = Response(tokens(row["text"], begin=True, end=True))
        return Example("document", tokens(""), (whole,), source=source, row=number)
    preferences: tuple[tuple[int, int], ...] = ()
    if "chosen" in row:
        kind, responses = "pair", (response("chosen", 1.0), response("rejected", 0.0))
        preferences = ((0, 1),)
    elif "label" in row:
        kind, responses = "label", (response("completion", row["label"]),)
    elif "score" in row:
        kind, responses = "score", (response("completion", row["score"]),)
    else:
        kind, responses = "demonstration", (response("completion", 1.0),)
    prompt = tokens(row["prompt"], begin=True)
    return Example(kind, prompt, responses, preferences, source, number)


def imitable(rows: Sequence[Row]) -> list[Row]:
    """What an imitator learns from preferences: chosen, liked, or at least half-good answers, as demonstrations."""
    kept = []
    for row in rows:
        if "chosen" in row:
            kept.append({"prompt": row["prompt"], "completion": row["chosen"]})
        elif row.get("label", row.get("score", 0.0)) >= 0.5:
            kept.append({"prompt": row["prompt"], "completion": row["completion"]})
    return kept
