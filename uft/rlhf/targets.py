"""Rewards of sampled responses, asked for and made into the targets that losses take.

[RLOO]   Ahmadian et al. 2024, arXiv:2402.14740            [GRPO]   Shao et al. 2024, arXiv:2402.03300
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from uft.compute import Cost
from uft.data.mixture import FeedbackDataset
from uft.feedback import Example
from uft.rlhf.advantages import group_normalised, leave_one_out
from uft.rlhf.sampling import Rewards


def _within(rewards: Tensor) -> Tensor:
    if len(wrong := rewards[(rewards < 0) | (rewards > 1)]):
        raise ValueError(f"found a reward of {wrong[0].item():g}; want rewards in [0, 1], or another target")
    return rewards


# from rewards [R], `samples` responses to a prompt one after another, to targets [R]
SCORES: dict[str, Callable[[Tensor, int], Tensor]] = {
    "sigmoid": lambda rewards, samples: rewards.sigmoid(),
    "score": lambda rewards, samples: _within(rewards),
}
ADVANTAGES: dict[str, Callable[[Tensor, int], Tensor]] = {
    "reward": lambda rewards, samples: rewards,
    "signed": lambda rewards, samples: 2 * _within(rewards) - 1,
    "rloo": leave_one_out,
    "grpo": group_normalised,
}
OF_GROUPS = ("rloo", "grpo")
TARGETS = SCORES | ADVANTAGES


def reward_costs(rewards: Any) -> list[Cost]:
    """What one pass of each reward model in it costs; what another function costs is not known."""
    models = (getattr(each, "model", None) for each in getattr(rewards, "members", [rewards]))
    return [Cost.of(model) for model in models if isinstance(model, nn.Module)]


def verified(check: Callable[[str, str], float], tokenizer: Any, data: FeedbackDataset | Mapping[str, Any]) -> Rewards:
    """Rewards that check(text, answer) gives, the answer being the first response of the prompt's own row in `data`.

    Texts are without special tokens.  `uft.evaluation.verifiable` has functions that check: `exact_match`, or
    `lambda text, answer: verify("number", text, answer)`.
    """
    rows = data.examples if isinstance(data, FeedbackDataset) else data

    def text(tokens: Any) -> str:
        return tokenizer.decode(tokens.tolist(), skip_special_tokens=True, clean_up_tokenization_spaces=False)

    def rewards(examples: Sequence[Example]) -> list[list[float]]:
        answers = [text(rows[example.source][example.index].responses[0].tokens) for example in examples]
        return [
            [float(check(text(response.tokens), answer)) for response in example.responses]
            for example, answer in zip(examples, answers)
        ]

    rewards.__qualname__ = f"verified({getattr(check, '__qualname__', type(check).__qualname__)})"
    return rewards


def asked(rewards: Rewards, examples: Sequence[Example], tokenizer: Any) -> Tensor:
    """float64 [examples, samples]: the rewards.  Raises ValueError that names the prompt where there is none, or one
    that is not finite."""
    try:
        found = [list(map(float, each)) for each in rewards(examples)]
    except Exception as error:
        culprit = _first_refused(rewards, examples)
        where = "one of the responses" if culprit is None else f"a response to {_shown(culprit, tokenizer)}"
        raise ValueError(f"the reward function failed for {where}: {type(error).__name__}: {error}") from error
    if len(found) != len(examples):
        raise ValueError(f"found rewards of {len(found)} prompts; want those of {len(examples)}")
    for example, values in zip(examples, found):
        if len(values) != len(example.responses):
            want = f"found {len(values)} rewards for {len(example.responses)} responses"
            raise ValueError(f"{want} to {_shown(example, tokenizer)}; want one for each")
        if wrong := [value for value in values if not math.isfinite(value)]:
            raise ValueError(
                f"the reward of a response to {_shown(example, tokenizer)} is {wrong[0]}; want a finite number"
            )
    return torch.tensor(found, dtype=torch.float64)


def _first_refused(rewards: Rewards, examples: Sequence[Example]) -> Example | None:
    for example in examples:
        try:
            rewards([example])
        except Exception:
            return example
    return None


def _shown(example: Example, tokenizer: Any) -> str:
    where = f"row {example.row} of {example.source!r}"
    if not hasattr(tokenizer, "decode"):
        return where
    text = tokenizer.decode(example.prompt.tolist())
    return f"{where} ({text if len(text) <= 60 else f'{text[:59]}…'!r})"
