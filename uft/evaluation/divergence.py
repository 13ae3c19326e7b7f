"""How far policy and reference are apart: exact KL over the whole vocabulary, both ways, along stated responses.

    kl           Σ_t KL(π(· | x, y_<t) ‖ π_ref(· | x, y_<t)) / Σ tokens        policy ‖ reference, nats per token
    reverse_kl   the same of KL(π_ref ‖ π)                                      reference ‖ policy
    entropy      of the policy, nats per token
    ..._sequence the mean of the sums over each response

The tokens y come from somewhere, and that decides what is measured:

    responses    those of the data: how far apart the two are where neither may ever go
    policy       sampled from the policy: `kl_sequence` estimates KL(π ‖ π_ref) of whole responses, without bias but for
                 those cut off at max_new_tokens, and with less variance than log-ratios of the samples have
    reference    sampled from the reference: `reverse_kl_sequence` estimates KL(π_ref ‖ π), which on new-task prompts
                 predicted forgetting in arXiv:2509.04259; on prompts of earlier tasks see arXiv:2607.04364

Both heads meet in `uft_kernels.linear_divergence`: no logits are held where heads are fused.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import nn
from tqdm.auto import tqdm

from uft.collation import Collator
from uft.data.mixture import FeedbackDataset
from uft.evaluation.scoring import TOKEN_BUDGET, Scores, score_data
from uft.feedback import Example, Response
from uft.models import Reference

ALONG = ("responses", "policy", "reference")


def divergence(scores: Scores) -> dict[str, float]:
    """The measures above, over all responses with a token that counts.  Raises ValueError where there is none."""
    if scores.kl is None:
        raise ValueError("found no divergences; want `score_data(..., divergence=True)`")
    counted = scores.length > 0
    if not counted.any():
        raise ValueError("found no token that counts; want at least one")
    found = {}
    for name in ("kl", "reverse_kl", "entropy"):
        values = getattr(scores, name)[counted]
        found[name] = float(values.sum() / scores.length[counted].sum())
        found[f"{name}_sequence"] = float(values.mean())
    return found


def divergence_along(
    model: nn.Module,
    reference: Reference,
    along: str,
    collate: Collator,
    *,
    data: FeedbackDataset | None = None,
    prompts: Sequence[np.ndarray] = (),
    eos: int,
    max_new_tokens: int = 128,
    seed: int = 0,
    batch_size: int = 16,
    token_budget: int = TOKEN_BUDGET,
    label: str = "divergence",
) -> dict[str, float]:
    """`divergence` along one of ALONG: the responses of `data`, or samples to `prompts` (int tokens each).

    Raises ValueError for another name and for a missing `data` or `prompts`.
    """
    if along not in ALONG:
        raise ValueError(f"along is {along!r}; want {', '.join(ALONG)}")
    if along == "responses":
        if data is None:
            raise ValueError("along 'responses' needs data with responses")
    else:
        options: Mapping[str, Any] = dict(eos=eos, max_new_tokens=max_new_tokens, seed=seed, batch_size=batch_size)
        if along == "policy":
            data = sampled(model, prompts, **options)
        else:
            with reference.applied(model) as reference_model:
                data = sampled(reference_model, prompts, **options)
    return divergence(
        score_data(model, data, collate, reference=reference, divergence=True, token_budget=token_budget, label=label)
    )


def sampled(
    model: nn.Module, prompts: Sequence[np.ndarray], *, eos: int, max_new_tokens: int = 128, seed: int = 0,
    batch_size: int = 16,
) -> FeedbackDataset:  # fmt: skip
    """The prompts as demonstrations, each with one response that the model sampled."""
    if not len(prompts):
        raise ValueError("found no prompts; want at least one")
    responses = sample(model, prompts, eos=eos, max_new_tokens=max_new_tokens, seed=seed, batch_size=batch_size)
    return FeedbackDataset(
        {
            "sampled": [
                Example("demonstration", np.asarray(prompt, np.int32), (Response(tokens, None, 1.0),), row=i)
                for i, (prompt, tokens) in enumerate(zip(prompts, responses))
            ]
        }
    )


@torch.no_grad()
def sample(
    model: nn.Module, prompts: Sequence[np.ndarray], *, eos: int, max_new_tokens: int = 128, seed: int = 0,
    batch_size: int = 16,
) -> list[np.ndarray]:  # fmt: skip
    """int32 tokens of one response per prompt from the model's own distribution: temperature 1, nothing left out, no
    penalty; the end-of-sequence token included where it comes before max_new_tokens.

    Each place in the list has random numbers of its own: a response depends on no other prompt and no batch size, and
    two models are sampled with the same ones.  The global generators are left alone.
    """
    if any(not len(prompt) for prompt in prompts):
        raise ValueError("found an empty prompt; want at least one token to go on from")
    device = next(model.parameters()).device
    result: list[np.ndarray] = [np.zeros(0, np.int32)] * len(prompts)
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    with tqdm(total=len(order), desc="sampling", unit=" prompts", disable=None, delay=1, leave=False) as bar:
        for start in range(0, len(order), batch_size):
            group = order[start : start + batch_size]
            draws = np.stack([np.random.default_rng([seed, i]).random(max_new_tokens) for i in group], axis=1)
            written = _sample(model, [prompts[i] for i in group], torch.from_numpy(draws).to(device), eos)
            for i, tokens in zip(group, written):
                result[i] = tokens
            bar.update(len(group))
    return result


def _sample(model: nn.Module, prompts: Sequence[np.ndarray], draws: torch.Tensor, eos: int) -> list[np.ndarray]:
    """`draws` is float64 [steps, prompts], uniform: each picks the token at that place of the distribution function."""
    width = max(len(prompt) for prompt in prompts)
    ids = torch.full((len(prompts), width), eos)
    seen = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):  # padded on the left
        ids[row, width - len(prompt) :] = torch.from_numpy(np.array(prompt, np.int64))
        seen[row, width - len(prompt) :] = 1
    ids, seen = ids.to(draws.device), seen.to(draws.device)
    places, cache, written = (seen.cumsum(-1) - 1).clamp(min=0), None, []
    ended = torch.zeros(len(prompts), dtype=torch.bool, device=draws.device)
    for draw in draws:
        output = model(input_ids=ids, attention_mask=seen, position_ids=places, past_key_values=cache, use_cache=True)
        cache = output.past_key_values
        upto = output.logits[:, -1].double().softmax(-1).cumsum(-1)
        ids = torch.searchsorted(upto, (draw * upto[:, -1])[:, None], right=True).clamp(max=upto.shape[-1] - 1)
        written.append(ids.masked_fill(ended[:, None], eos))
        ended |= ids[:, 0] == eos
        if bool(ended.all()):
            break
        seen, places = torch.cat([seen, torch.ones_like(ids)], -1), places[:, -1:] + 1
    rows = torch.cat(written, -1).cpu().numpy().astype(np.int32)
    return [row[: int(np.argmax(row == eos)) + 1] if (row == eos).any() else row for row in rows]
