"""The responses of a round, written by its policy and labelled, as files."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from uft.compute import Cost
from uft.data.quality.writing import write_lines
from uft.data.rows import DataError
from uft.data.template import Template
from uft.feedback import Example, Response
from uft.head import causal_model
from uft.record import plain
from uft.responding import ends_of
from uft.rlhf.labelling import Labelled, Prompt, feedback_rows, scores_of
from uft.rlhf.sampling import ended, sample
from uft.rlhf.targets import SCORES, reward_costs


@dataclass(frozen=True)
class RoundOptions:
    """How the rounds of one run are made.

    samples         responses per prompt
    max_new_tokens  of a response
    temperature     at which they are written
    feedback        pairs (best over worst) or scores
    squash          of scores: sigmoid, or score where they lie in [0, 1]
    keep_cut        whether responses that found no end count
    keep            all: feedback of earlier rounds is trained on too; last: this round's alone
    share           share of an epoch's draws that are of rounds' feedback; None: every row is drawn once
    reference       previous (the policy at the beginning of the round) or base (that of the first)
    batch_size      responses written at once
    """

    samples: int = 4
    max_new_tokens: int = 128
    temperature: float = 1.0
    feedback: str = "pairs"
    squash: str = "sigmoid"
    keep_cut: bool = False
    keep: str = "all"
    share: float | None = None
    reference: str = "previous"
    batch_size: int = 64

    def __post_init__(self):
        for name, wanted in (
            ("feedback", ("pairs", "scores")), ("squash", tuple(SCORES)), ("keep", ("all", "last")),
            ("reference", ("previous", "base")),
        ):  # fmt: skip
            if getattr(self, name) not in wanted:
                raise ValueError(f"rounds: {name} is {getattr(self, name)!r}; want {' or '.join(wanted)}")
        least = 2 if self.feedback == "pairs" else 1
        if self.samples < least or min(self.max_new_tokens, self.batch_size) < 1:
            found = f"samples {self.samples}, max_new_tokens {self.max_new_tokens}, batch_size {self.batch_size}"
            raise ValueError(f"rounds: found {found}; want at least {least}, 1 and 1")
        if not 0 < self.temperature < float("inf"):
            raise ValueError(f"rounds: temperature is {self.temperature}; want a number > 0, or all responses are one")
        if self.share is not None and not 0 < self.share < 1:
            raise ValueError(f"rounds: share is {self.share}; want a number between 0 and 1")


def write_feedback(
    policy: nn.Module,
    prompts: Sequence[Prompt],
    label: Any,
    tokenizer: Any,
    folder: Path,
    options: RoundOptions,
    seed: Sequence[int],
) -> dict[str, Any]:
    """responses.jsonl and feedback.jsonl in a folder; returns what they hold and cost, as JSON.

    Raises ValueError that names the prompt for one without room, or that cannot be labelled; `DataError` where there is
    nothing left to train on.
    """
    examples = _as_examples(prompts, policy, tokenizer, options.max_new_tokens)
    answered = sample(
        policy, tokenizer, examples, samples=options.samples, max_new_tokens=options.max_new_tokens,
        temperature=options.temperature, seed=seed, batch_size=options.batch_size,
    )  # fmt: skip
    texts = [[_text(each, tokenizer) for each in example.responses] for example in answered]
    scores = scores_of(label, prompts, texts, answered, tokenizer)
    eos = ends_of(policy, tokenizer)
    labelled = [
        [
            Labelled(text, len(each.tokens), ended(each, eos), score)
            for text, each, score in zip(of_prompt, example.responses, values)
        ]
        for of_prompt, example, values in zip(texts, answered, scores)
    ]
    rows, counts = feedback_rows(options.feedback, prompts, labelled, squash=options.squash, keep_cut=options.keep_cut)
    if not rows:
        raise DataError(
            f"found nothing to train on among {counts['responses']} responses ({counts['cut']} cut, "
            f"{counts['blank']} blank, {counts['ties']} prompts tied); want responses that differ in score"
        )
    everything = [
        {"prompt": prompt, "response": each.text, "tokens": each.tokens, "ended": each.ended, "score": each.score}
        for prompt, of_prompt in zip(prompts, labelled)
        for each in of_prompt
    ]
    write_lines(folder / "responses.jsonl", map(plain, everything))
    write_lines(folder / "feedback.jsonl", map(plain, rows))
    n, values = np.array([each["tokens"] for each in everything]), np.array(scores, dtype=np.float64)
    whole = n + np.repeat([len(example.prompt) for example in examples], options.samples)
    return {
        "counts": counts,
        "scores": {"mean": values.mean(), "best": values.max(-1).mean(), "worst": values.min(-1).mean()},
        "compute": {
            "generated_tokens": int(n.sum()),
            "flops": int(
                Cost.of(policy).forward(whole, n).sum() + sum(c.forward(whole).sum() for c in reward_costs(label))
            ),
        },
    }


def _as_examples(prompts: Sequence[Prompt], policy: nn.Module, tokenizer: Any, max_new_tokens: int) -> list[Example]:
    template = Template(tokenizer)
    room = getattr(causal_model(policy).config.get_text_config(), "max_position_embeddings", None)
    examples = []
    for i, prompt in enumerate(prompts):
        ids = template.prompt(prompt)
        if not len(ids) or (room and len(ids) + max_new_tokens > room):
            found = f"{len(ids)} tokens and {max_new_tokens} to come"
            raise ValueError(f"prompt {i}: found {found}; want at least 1, and at most {room} together")
        examples.append(Example("demonstration", ids, (), source="prompts", row=i, index=i))
    return examples


def _text(response: Response, tokenizer: Any) -> str:
    return tokenizer.decode(response.tokens.tolist(), skip_special_tokens=True, clean_up_tokenization_spaces=False)
