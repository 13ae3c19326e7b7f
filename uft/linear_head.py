"""What a model's head computes: a product with a weight, adapters included, and what the model does with its result.

Scale and softcap are measured rather than read from a configuration: the head's output is replaced by a ramp once, and
what comes out is fitted.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Scales(NamedTuple):
    """What a model does with the logits of its head: softcap * tanh(logit_scale * z / softcap)."""

    logit_scale: float = 1.0
    softcap: float | None = None


def linear_parts(head: nn.Module, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor | None] | None:
    """(hidden, weight, bias) with head(hidden) = hidden @ weight.T + bias, or None where the head is no linear layer.

    A low-rank adapter on the head makes both wider: W + s B A = [W, B] [1, s A].  Switched off it leaves zeros behind,
    so that the product sums in the same order and an untrained adapter changes no bit.
    """
    head = _active(head)
    if not is_linear_head(head):
        return None
    if _is_linear(head):
        return hidden, head.weight, head.bias
    base = head.base_layer
    hiddens, weights = [hidden], [base.weight]
    for name in () if head.merged else head.active_adapters:
        if name not in head.lora_A:
            continue
        a, b = head.lora_A[name], head.lora_B[name].weight.to(base.weight.dtype)
        if head.disable_adapters:
            hiddens.append(hidden.new_zeros(*hidden.shape[:-1], b.shape[1]))
            weights.append(torch.zeros_like(b))
        else:
            low = a(head.lora_dropout[name](hidden.to(a.weight.dtype)))
            hiddens.append((head.scaling[name] * low).to(hidden.dtype))
            weights.append(b)
    if len(hiddens) == 1:
        return hidden, base.weight, base.bias
    return torch.cat(hiddens, -1), torch.cat(weights, -1), base.bias


def is_linear_head(head: nn.Module) -> bool:
    """nn.Linear, with or without plain LoRA, or a copy of it that peft trains as a whole."""
    head = _active(head)
    return _is_linear(head) or (_is_lora(head) and _is_linear(head.base_layer))


def _active(head: nn.Module) -> nn.Module:
    if type(head).__name__ != "ModulesToSaveWrapper":  # peft: trained copies beside the original
        return head
    name = None if head.disable_adapters else next(iter(head.active_adapters), None)
    return dict(head.modules_to_save.items()).get(name, head.original_module)


def _is_linear(head: nn.Module) -> bool:
    """nn.Linear, or one that FSDP has given another class."""
    return isinstance(head, nn.Linear) and type(head).forward is nn.Linear.forward


def _is_lora(head: nn.Module) -> bool:
    """Plain LoRA over a linear layer: no DoRA or other variant, no bias of its own."""
    plain = type(head).__name__ == "Linear" and type(head).__module__ == "peft.tuners.lora.layer"
    more = ("lora_variant", "use_dora", "lora_bias")
    return plain and not any(any(getattr(head, name, {}).values()) for name in more)


# ---- what the model does with it ----


@torch.no_grad()
def measured(model: nn.Module) -> Scales | str:
    """What the model does with its head's output, or why its head cannot be fused."""
    head = model.get_output_embeddings()
    if head is None:
        return "it names no output embeddings"
    if any(p.is_meta or not p.numel() for p in model.parameters()):
        return "its weights are not all in memory"
    if not is_linear_head(head):
        return f"its head is a {type(head).__name__}"
    if hasattr(head, "_hf_hook") or hasattr(model, "_original_forward"):
        return "accelerate has wrapped it already"
    seen: list[tuple[Tensor, Tensor]] = []
    # rows of several reaches: the first tells the scale, the last where a softcap ends
    reach = torch.tensor([1.0, 50.0, 1e4, 1e8], dtype=torch.float64)
    ramps = None

    def ramp(_module: nn.Module, inputs: tuple, output: Tensor) -> Tensor:
        nonlocal ramps
        seen.append((inputs[0], output))
        steps = torch.linspace(-1, 1, output.shape[-1], dtype=torch.float64)
        ramps = (reach[:, None] * steps).to(output.device)[None]
        return ramps

    training = [(module, module.training) for module in model.modules()]
    handle = head.register_forward_hook(ramp)
    try:
        ids = torch.arange(4, device=model.get_input_embeddings().weight.device)[None]
        found = model.eval()(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).logits
    finally:
        handle.remove()
        for module, was in training:
            module.training = was
    if len(seen) != 1 or seen[0][1].shape[:2] != (1, 4):
        return f"its head runs {len(seen)} times in a forward"
    hidden, output = seen[0]
    if not _close(F.linear(*linear_parts(head, hidden)).to(output.dtype), output):
        return "its head is not hidden @ weight.T + bias"
    scales = _fitted(reach, found[0, :, -1].double().cpu())
    again = scaled(ramps, scales)
    # row by row, for what is added to a logit is seen in the row of the smallest
    if found.shape != again.shape or not all(map(_close, found[0].double(), again[0].double())):
        return "its logits are neither scaled nor capped in a known way"
    return scales


def _fitted(reach: Tensor, found: Tensor) -> Scales:
    """The scales that turn `reach` into `found`: c tanh(s x / c) at x = 1 and at an x that is far beyond c."""
    if math.isclose(found[3] / found[0], reach[3] / reach[0], rel_tol=1e-3):
        return Scales(_neat(found[3] / reach[3]))
    cap = float(found[3])
    return Scales(_neat(cap * math.atanh(found[0] / cap)), _neat(cap))


def _neat(x: float) -> float:
    """Six digits, which is what float32 leaves of a constant."""
    return float(f"{float(x):.6g}")


def scaled(logits: Tensor, scales: Scales) -> Tensor:
    logits = logits * scales.logit_scale
    return logits if scales.softcap is None else scales.softcap * torch.tanh(logits / scales.softcap)


def _close(a: Tensor, b: Tensor) -> bool:
    return bool((a - b).abs().max() <= (1e-5 + 4 * torch.finfo(a.dtype).eps) * b.abs().max())
