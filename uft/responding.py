"""Tokens that a model writes: greedily, or sampled so that luck depends on seed and place alone.

Padding is on the left, made here; of the model's own settings only its EOS tokens are kept.

Sampling takes no random number from torch.  Each prompt has uniform numbers of its own, by seed and place in the list,
and token t is where the cumulative probabilities pass the t-th:

    y_t = min { v : sum_{w <= v} p(w) > u_t },   p = softmax(logits / temperature)

So what is sampled does not depend on the batch size either, and two models asked with one seed are given the same luck.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm
from transformers import GenerationConfig, LogitsProcessor

from uft.head import causal_model, unwrapped


def respond(
    model: nn.Module,
    tokenizer: Any,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int = 128,
    temperature: float = 0.0,
    seed: int | Sequence[int] = 0,
    places: Sequence[Sequence[int]] | None = None,
    batch_size: int = 16,
) -> list[tuple[list[int], bool]]:
    """One response to each tokenised prompt, in their order: its tokens, EOS included, and whether it ended.

    places   numbers that, with the seed, decide each prompt's luck; by default its place in the list
    """
    seeds = [seed] if isinstance(seed, int) else list(seed)
    places = [(i,) for i in range(len(prompts))] if places is None else places
    # alike lengths share a batch; the longest come first, so that memory that does not suffice is noticed at once
    order = sorted(range(len(prompts)), key=lambda i: -len(prompts[i]))
    results: dict[int, tuple[list[int], bool]] = {}
    with _generating(model, tokenizer, max_new_tokens) as run, _bar(len(order), "generating") as bar:
        for start in range(0, len(order), batch_size):
            batch = order[start : start + batch_size]
            sampler = None
            if temperature > 0:
                luck = np.stack([np.random.default_rng([*seeds, *places[i]]).random(max_new_tokens) for i in batch])
                sampler = Sampler(torch.from_numpy(luck), temperature)
            for i, ids, ended in zip(batch, *run([list(prompts[i]) for i in batch], sampler)):
                results[i] = ids, ended
            bar.update(len(batch))
    return [results[i] for i in range(len(prompts))]


class Sampler(LogitsProcessor):
    """Leaves only the token that was sampled; see the top of the file.

    uniform   float64 [rows, steps] in [0, 1)
    """

    def __init__(self, uniform: Tensor, temperature: float):
        self.uniform, self.temperature, self.prompt_length = uniform, temperature, None

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        if self.prompt_length is None:
            self.prompt_length = input_ids.shape[1]
        # generate may run a step or two beyond the last and drop them
        step = min(input_ids.shape[1] - self.prompt_length, self.uniform.shape[1] - 1)
        dtype = torch.float32 if scores.device.type == "mps" else torch.float64
        below = (scores.to(dtype) / self.temperature).softmax(-1).cumsum(-1)
        u = self.uniform[:, step, None].to(scores.device, dtype) * below[:, -1:]
        chosen = torch.searchsorted(below, u, right=True).clamp(max=scores.shape[1] - 1)
        return torch.full_like(scores, float("-inf")).scatter(1, chosen, 0.0)


def ends_of(model: nn.Module, tokenizer: Any) -> set[int]:
    """The tokens that end a response: the tokenizer's and those of the model's own settings."""
    own = causal_model(model).generation_config.eos_token_id
    return {tokenizer.eos_token_id, *np.atleast_1d(own or []).astype(int).tolist()}


@contextmanager
def _generating(model: nn.Module, tokenizer: Any, max_new_tokens: int) -> Iterator[Callable]:
    """Yields a function from prompts' tokens to the tokens of the responses, EOS included, and whether they ended.

    Every module is in evaluation mode meanwhile, and afterwards in the one it was in before.
    """
    causal, eos = causal_model(model), ends_of(model, tokenizer)
    own = causal.generation_config
    pad = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    plain = GenerationConfig(
        max_new_tokens=max_new_tokens, do_sample=False, use_cache=True, eos_token_id=sorted(eos), pad_token_id=pad
    )

    def run(prompts: Sequence[list[int]], sampler: Sampler | None) -> tuple[list[list[int]], list[bool]]:
        longest = max(map(len, prompts))
        ids = torch.tensor([[pad] * (longest - len(p)) + p for p in prompts], device=causal.device)
        mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts], device=causal.device)
        whole = unwrapped(model).generate(
            input_ids=ids, attention_mask=mask, generation_config=plain, logits_processor=[sampler] if sampler else []
        )
        written = [list(_until(row, eos)) for row in whole[:, longest:].tolist()]
        return written, [row[-1] in eos for row in written]

    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    # what a given configuration leaves open is filled in from the model's
    causal.generation_config = plain
    try:
        yield run
    finally:
        causal.generation_config = own
        for module, training in modes:
            module.training = training


def _until(row: Iterable[int], eos: set[int]) -> Iterator[int]:
    for token in row:
        yield token
        if token in eos:
            return


def _bar(total: int, name: str) -> tqdm:
    # disable=None: a bar only where stderr is a terminal
    return tqdm(total=total, desc=name, unit=" prompts", disable=None, delay=1, leave=False)
