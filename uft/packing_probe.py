"""Whether a model gives in a packed row what it gives row by row: tried out on a few tokens before it is relied on.

Two prompts, one of them with two responses, are run in one row and alone.  Sliding windows are longer than that, so it
is noted instead which window each layer asks its attention for, and compared with the configuration.

In half precision, rounding can hide what a wrong position or a neighbour's tokens do to a model of random weights.
Models whose families the tests hold to the comparison in float32 are believed there; others must come closer to the
right logits than to those of the two mistakes.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface

from uft.attention import NAME, attend, layers_of, packed_inputs, packing_for, use_packing
from uft.head import causal_model
from uft.segments import Part, Segments

ROWS = (((5, 6, 7, 8, 9), ((10, 11, 12), (13, 14))), ((9, 8, 7), ((6, 5, 4, 3),)))
# compared in float32 by tests/test_layouts.py
TESTED = (
    "llama", "qwen2", "qwen3", "mistral", "phi3", "gemma2", "gemma3_text", "olmo2", "granite", "gpt_neox",
)  # fmt: skip


def enable_packing(model: nn.Module) -> None:
    """Makes the model read packed rows.  Raises ValueError where it cannot."""
    how = packing_for(model)
    if why := why_not_packed(model, how):
        raise ValueError(why)


@torch.no_grad()
def why_not_packed(model: nn.Module, how: str) -> str | None:
    """What is wrong with packed rows, or None.  Leaves the model able to read them only if it returns None."""
    inner, training = causal_model(model), model.training
    before = inner.config._attn_implementation
    embeddings = inner.get_input_embeddings().weight
    model.eval()
    try:
        # in the precision of the weights: mixed precision would hide differences
        with torch.autocast(embeddings.device.type, enabled=False):
            found = _compared(model, how, embeddings)
    except Exception as error:  # a model that cannot be run like this is not one to be packed
        found = f"{type(error).__name__}: {error}".splitlines()[0][:200]
    finally:
        model.train(training)
    if found is not None:
        inner.packed_attention = None
        inner.set_attn_implementation(before)
    return found


def _compared(model: nn.Module, how: str, embeddings: Tensor) -> str | None:
    device, vocabulary = embeddings.device, embeddings.shape[0]
    ids, parts, answers, alone = [], [], [], []
    for prompt, responses in ROWS:
        first = len(parts)
        for k, response in enumerate(responses):
            new = [*(() if k else prompt), *response]
            parts.append(Part(len(new), first, len(prompt) if k else 0))
            ids += new
            answers.append(slice(len(ids) - len(response), len(ids)))
            alone.append(torch.tensor([[*prompt, *response]], device=device) % vocabulary)
    row = torch.tensor([ids], device=device) % vocabulary
    logits = [
        model(input_ids=one, use_cache=False).logits[0, -(at.stop - at.start) :] for one, at in zip(alone, answers)
    ]

    def apart(**inputs: Any) -> float:
        together = model(input_ids=row, use_cache=False, **inputs).logits[0, -len(ids) :]
        return max(float((together[at].float() - one.float()).abs().max()) for at, one in zip(answers, logits))

    places = torch.arange(len(ids), device=device)[None]
    as_one_text = apart(position_ids=places)
    use_packing(model, how)
    segments = Segments.of(parts).to(device)
    rest = packed_inputs(model, segments, device)
    with _windows() as windows:
        worst = apart(position_ids=segments.position_ids().to(device), **rest)
    largest = max(float(one.float().abs().max()) for one in logits)
    config = causal_model(model).config.get_text_config()
    told = f"its logits in a packed row differ by {worst:.2g} from those alone (largest logit {largest:.2g})"
    if how == "segments" and (wrong := _another_window(windows, config)):
        return wrong
    if embeddings.dtype == torch.float32:
        return None if worst <= 1e-4 * largest else told
    if worst > 5e-2 * largest:
        return told
    if config.model_type in TESTED:
        return None
    wrong_positions = apart(position_ids=places, **rest)
    mistakes = min(as_one_text, wrong_positions)
    return None if worst <= 0.25 * mistakes else f"{told}; mistakes would show as {mistakes:.2g} in {embeddings.dtype}"


@contextmanager
def _windows() -> Iterator[dict[int, int | None]]:
    """What each layer asks of its attention while this lasts."""
    seen: dict[int, int | None] = {}

    def noted(module: nn.Module, *args: Any, sliding_window: int | None = None, **kwargs: Any):
        seen[getattr(module, "layer_idx", len(seen))] = sliding_window
        return attend(module, *args, sliding_window=sliding_window, **kwargs)

    AttentionInterface.register(NAME, noted)
    try:
        yield seen
    finally:
        AttentionInterface.register(NAME, attend)


def _another_window(seen: dict[int, int | None], config: Any) -> str | None:
    for layer, (_, window) in enumerate(layers_of(config)):
        if layer in seen and seen[layer] != window:
            return f"layer {layer} asks its attention for a window of {seen[layer]}, its configuration says {window}"
    return None
