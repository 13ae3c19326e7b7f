"""From responses of a model to feedback: whoever labels gives scores, which become pairs or scored responses.

A labeller is one of

    rewards     examples -> rewards (`uft.rlhf.sampling.Rewards`), such as a reward model
    a score     (prompt, response) -> number, such as a verifier (`checked`)
    a judge     (prompt, a, b) -> probability that a is better; a response's score is its mean against the others, asked
                in both orders
    an object   with `scores(prompts, responses)`, as `uft.evaluation.judge.RewardModelJudge`
"""

from __future__ import annotations

import inspect
import json
import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import permutations
from typing import Any

import torch
from tqdm import tqdm

from uft.data.rows import Messages
from uft.evaluation.verifiable import verify
from uft.feedback import Example
from uft.rlhf.targets import SCORES, asked

Prompt = str | Messages


@dataclass(frozen=True)
class Labelled:
    """One response to a prompt.

    text      without special tokens
    tokens    how many were written, EOS included
    ended     whether it ended by itself
    score     the labeller's, higher is better
    """

    text: str
    tokens: int
    ended: bool
    score: float = math.nan


def scores_of(
    labeller: Any,
    prompts: Sequence[Prompt],
    texts: Sequence[Sequence[str]],
    examples: Sequence[Example],
    tokenizer: Any,
) -> list[list[float]]:
    """The score of every response to every prompt.

    texts      of the responses to each prompt; `examples` hold the same as tokens

    Raises ValueError that names the prompt where a labeller fails or says what is no finite number.
    """
    if hasattr(labeller, "scores") and not inspect.isclass(labeller):
        flat = [(prompt, text) for prompt, of_prompt in zip(prompts, texts) for text in of_prompt]
        values = iter([float(value) for value in labeller.scores(*map(list, zip(*flat)))])
        return _finite([[next(values) for _ in of_prompt] for of_prompt in texts], prompts)
    arguments = _required(labeller)
    if arguments == 1:
        return asked(labeller, examples, tokenizer).tolist()
    if arguments not in (2, 3):
        raise ValueError(
            f"label: found {labeller!r}; want a function of examples, of (prompt, response) or of (prompt, a, b), or "
            "an object with `scores`"
        )
    bar = tqdm(zip(prompts, texts), "labelling", len(prompts), unit=" prompts", disable=None, delay=1, leave=False)
    label = _each if arguments == 2 else _round_robin
    found = []
    for i, (prompt, of_prompt) in enumerate(bar):
        try:
            found.append(label(labeller, prompt, of_prompt))
        except Exception as error:
            raise ValueError(f"{_named(i, prompt)}: the labeller failed: {type(error).__name__}: {error}") from error
    return _finite(found, prompts)


def _required(function: Any) -> int:
    """How many arguments are to be given by place; -1 for what is no function, or one of any number."""
    if inspect.isclass(function) or not callable(function):
        return -1
    parameters = inspect.signature(function).parameters.values()
    if any(p.kind is p.VAR_POSITIONAL for p in parameters):
        return -1
    return sum(p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD) and p.default is p.empty for p in parameters)


def _each(score: Callable[[Any, str], float], prompt: Prompt, texts: Sequence[str]) -> list[float]:
    return [float(score(prompt, text)) for text in texts]


def _round_robin(judge: Callable[[Any, str, str], float], prompt: Prompt, texts: Sequence[str]) -> list[float]:
    total = [0.0] * len(texts)
    for i, j in permutations(range(len(texts)), 2):
        p = float(judge(prompt, texts[i], texts[j]))
        if not 0 <= p <= 1:
            raise ValueError(f"found {p}; want a probability in [0, 1]")
        total[i] += p
        total[j] += 1 - p
    # rounded, or 0.3 + 0.7 and 0.7 + 0.3 would be no tie
    return [round(value / max(2 * (len(texts) - 1), 1), 12) for value in total]


def _finite(scores: list[list[float]], prompts: Sequence[Prompt]) -> list[list[float]]:
    for i, of_prompt in enumerate(scores):
        if wrong := [value for value in of_prompt if not math.isfinite(value)]:
            raise ValueError(f"{_named(i, prompts[i])}: the labeller says {wrong[0]}; want a finite number")
    return scores


def _named(i: int, prompt: Prompt) -> str:
    text = prompt if isinstance(prompt, str) else json.dumps(prompt)
    return f"prompt {i} ({text if len(text) <= 60 else f'{text[:59]}…'!r})"


# ---- feedback ----


def feedback_rows(
    kind: str,
    prompts: Sequence[Prompt],
    labelled: Sequence[Sequence[Labelled]],
    *,
    squash: str = "sigmoid",
    keep_cut: bool = False,
) -> tuple[list[dict[str, Any]], dict[str, int]]:
    """Rows to train on, as `uft.data` reads them, and what became of prompts and responses.

    pairs    the best response over the worst, of each prompt; the first of equals
    scores   every response, with its squashed score (`uft.rlhf.targets.SCORES`)

    Left out and counted are `ties` (prompts all of whose responses have one score; pairs only), `too_few` (prompts with
    fewer than two responses left; pairs only), `cut` responses (unless `keep_cut`: they would be taught as if they
    ended there), `blank` ones, and `repeated` ones.
    """
    counts: Counter[str] = Counter(
        dict.fromkeys(("prompts", "responses", "cut", "blank", "repeated", "too_few", "ties"), 0)
    )
    rows: list[dict[str, Any]] = []
    for prompt, responses in zip(prompts, labelled, strict=True):
        counts["prompts"] += 1
        counts["responses"] += len(responses)
        left: dict[str, Labelled] = {}
        for response in responses:
            text = response.text.strip()
            why = "blank" if not text else "repeated" if text in left else None
            if not response.ended and not keep_cut:
                why = "cut"
            if why:
                counts[why] += 1
            else:
                left[text] = response
        if kind == "scores":
            rows += [_scored(prompt, response, squash) for response in left.values()]
            continue
        if len(left) < 2:
            counts["too_few"] += 1
            continue
        best, worst = max(left.values(), key=lambda r: r.score), min(left.values(), key=lambda r: r.score)
        if best.score == worst.score:
            counts["ties"] += 1
        else:
            rows.append({"prompt": prompt, "chosen": _said(prompt, best), "rejected": _said(prompt, worst)})
    return rows, {**counts, kind: len(rows)}


def _scored(prompt: Prompt, response: Labelled, squash: str) -> dict[str, Any]:
    score = float(SCORES[squash](torch.tensor([response.score], dtype=torch.float64), 1))
    return {"prompt": prompt, "completion": _said(prompt, response), "score": score}


def _said(prompt: Prompt, response: Labelled) -> str | Messages:
    return response.text if isinstance(prompt, str) else [{"role": "assistant", "content": response.text}]


def checked(rows: Sequence[Mapping[str, Any]]) -> Callable[[Prompt, str], float]:
    """A labeller that gives 1 for what is right and 0 for what is not, of rows as `uft.evaluation.verifiable` has them
    (prompt, answer, kind number, exact or ifeval, meta).

    Raises ValueError for two rows of one prompt with different answers.
    """
    known: dict[str, Mapping[str, Any]] = {}
    for i, row in enumerate(rows):
        before = known.setdefault(json.dumps(row["prompt"]), row)
        if any(before.get(name) != row.get(name) for name in ("kind", "answer", "meta")):
            raise ValueError(f"row {i}: found another answer to a prompt that stood before; want one")

    def right(prompt: Prompt, response: str) -> float:
        row = known[json.dumps(prompt)]
        return float(verify(row["kind"], response, row.get("answer"), row.get("meta")))

    return right
