"""On-policy responses as examples, which the collator, the policy and a reward model take like any other feedback."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from torch import nn

from uft.feedback import Example, Response
from uft.responding import respond

Rewards = Callable[[Sequence[Example]], Sequence[Sequence[float]]]
"""Examples -> a reward for each response of each, higher is better; a reward model, a verifier or a judge."""


def sample(
    model: nn.Module,
    tokenizer: Any,
    prompts: Sequence[Example],
    *,
    samples: int = 1,
    max_new_tokens: int = 128,
    temperature: float = 1.0,
    seed: int | Sequence[int] = 0,
    places: Sequence[Sequence[int]] | None = None,
    batch_size: int = 64,
) -> list[Example]:
    """For each prompt an example of kind "score" with `samples` responses of the model, without targets as yet.

    What the prompts' own responses are does not matter.  Source, row and index stay those of the prompt.

    places   numbers of each prompt that, with the seed, decide the luck of its responses; by default where it stands
    """
    if places is not None:
        places = [(*place, k) for place in places for k in range(samples)]
    repeated = [example.prompt.tolist() for example in prompts for _ in range(samples)]
    written = respond(
        model, tokenizer, repeated, max_new_tokens=max_new_tokens, temperature=temperature, seed=seed, places=places,
        batch_size=batch_size,
    )  # fmt: skip
    responses = [Response(np.array(ids, dtype=np.int32)) for ids, _ in written]
    return [
        replace(prompt, kind="score", responses=tuple(responses[i * samples : (i + 1) * samples]), preferences=())
        for i, prompt in enumerate(prompts)
    ]


def with_targets(examples: Sequence[Example], targets: Sequence[Sequence[float]]) -> list[Example]:
    """The examples with these numbers as the targets of their responses."""
    return [
        replace(
            example,
            responses=tuple(
                replace(response, target=float(target))
                for response, target in zip(example.responses, of_example, strict=True)
            ),
        )
        for example, of_example in zip(examples, targets, strict=True)
    ]


def ended(response: Response, eos: set[int]) -> bool:
    """Whether it ended by itself, and not because there was no room left."""
    return int(response.tokens[-1]) in eos
