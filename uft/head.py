"""The fused head: a causal language model that yields log-probabilities of chosen tokens instead of logits.

`fuse_head(model)` changes one instance of any AutoModelForCausalLM whose head is a linear layer, adapters included.
Its forward then also takes `score=Wanted(...)`: while the model runs, the head is given the hidden states of the wanted
positions alone and returns their log-probabilities, and the forward returns a `HeadOutput`.  The call goes through
whatever is wrapped around the model (peft, DistributedDataParallel, FSDP), so their hooks see head and gradients.

What a model does with its logits (scale, softcap) is measured rather than read from its configuration: the head's
output is replaced by a ramp once, and what comes out is fitted.  Where that fails, or the head is no linear layer,
there is one warning, and the model goes on giving logits.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import MethodType
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.utils import ModelOutput, logging
from uft_kernels import linear_divergence, linear_logprob

logger = logging.get_logger(__name__)


class Scales(NamedTuple):
    """What a model does with the logits of its head: softcap * tanh(logit_scale * z / softcap)."""

    logit_scale: float = 1.0
    softcap: float | None = None


@dataclass(frozen=True)
class HeadState:
    """A head and the hidden states of N tokens, from which every log-probability follows.

    hidden   [N, D]
    weight   [V, D]
    bias     [V] or None
    """

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None
    scales: Scales


@dataclass(frozen=True)
class Wanted:
    """Which tokens to score.

    mask             bool [R, T - 1]: the positions that predict a token which counts; N of them
    target           int64 [N], these tokens
    reference        also the divergence from this reference at the same N tokens
    differentiable   the divergences that want a gradient; of kl, reverse_kl, entropy
    state            instead of log-probabilities, the `HeadState`
    """

    mask: Tensor
    target: Tensor
    reference: HeadState | None = None
    differentiable: tuple[str, ...] = ()
    state: bool = False


@dataclass
class HeadOutput(ModelOutput):
    """Each float32 [N], in nats.  All but `logp` are None unless a reference was given."""

    logp: Tensor | None = None
    reference_logp: Tensor | None = None
    kl: Tensor | None = None
    reverse_kl: Tensor | None = None
    entropy: Tensor | None = None
    state: HeadState | None = None


# ---- what a head computes ----


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


# ---- the model's own forward, with another head for a moment ----


@contextmanager
def _instead(head: nn.Module, forward: Any) -> Iterator[None]:
    """`head(...)` runs `forward` with all of the module's hooks around it."""
    before = head.__dict__.get("forward")
    head.forward = forward
    try:
        yield
    finally:
        del head.forward
        if before is not None:
            head.forward = before


def _scoring(original: Any) -> Any:
    """A forward like `original`, a function of the model's class, that can also score."""

    def forward(self: nn.Module, *args: Any, score: Wanted | None = None, **kwargs: Any):
        before = self._unfused_forward or MethodType(type(self).forward, self)
        return before(*args, **kwargs) if score is None else _scored(self, before, args, kwargs, score)

    # generation and peft look at the names; no __wrapped__, which accelerate would unwrap
    known = inspect.signature(original)
    added = inspect.Parameter("score", inspect.Parameter.KEYWORD_ONLY, default=None)
    names = [p for p in known.parameters.values() if p.kind is not inspect.Parameter.VAR_KEYWORD]
    rest = [p for p in known.parameters.values() if p.kind is inspect.Parameter.VAR_KEYWORD]
    forward.__signature__ = known.replace(parameters=[*names, added, *rest])
    forward.scores = True
    return forward


def _scored(model: nn.Module, before: Any, args: tuple, kwargs: dict[str, Any], score: Wanted) -> HeadOutput:
    head, found = model.get_output_embeddings(), None

    def instead(hidden: Tensor, *_: Any, **__: Any) -> Tensor:
        nonlocal found
        if found is not None:
            raise ValueError(
                f"the head of {type(model).__name__} runs more than once in a forward; want fused_head=False"
            )
        rows = hidden[:, -score.mask.shape[1] - 1 : -1][score.mask]  # prompt tuning puts positions in front
        state = HeadState(*linear_parts(head, rows), model.fused_head)
        if score.state:
            found = HeadOutput(state=state)
            return rows[None]
        # one tensor goes through the module's hooks, and every gradient comes back through it: FSDP waits for that to
        # gather the head's weight again
        found, values = _through_one(_compute(state, score, model.head_filter_eps))
        return values

    with _instead(head, instead):
        before(*args, **kwargs)
    if found is None:
        raise ValueError(f"the head of {type(model).__name__} did not run in its forward; want fused_head=False")
    return found


def _through_one(found: HeadOutput) -> tuple[HeadOutput, Tensor]:
    """The same values as parts of one tensor [1, k, N], and that tensor."""
    values = torch.stack([value for value in found.values() if value.requires_grad] or [found.logp])[None]
    parts = iter(values[0].unbind())
    differentiable = {name: next(parts) for name, value in found.items() if value.requires_grad}
    return HeadOutput(**{**found, **differentiable}), values


def _compute(ours: HeadState, score: Wanted, filter_eps: float) -> HeadOutput:
    kept, target = len(score.target), score.target  # every token counts: nothing to look for
    if score.reference is None:
        found = linear_logprob(
            ours.hidden, ours.weight, target, ours.bias, kept=kept, filter_eps=filter_eps, **ours.scales._asdict()
        )
        return HeadOutput(logp=found.logp)
    theirs = score.reference
    if not theirs.weight.untyped_storage().size():
        raise ValueError("the reference's head was sharded again after its forward; want fused_head=False")
    found = linear_divergence(
        ours.hidden, ours.weight, theirs.hidden, theirs.weight, target, ours.bias, theirs.bias, kept=kept,
        **ours.scales._asdict(), reference_softcap=theirs.scales.softcap,
        reference_logit_scale=theirs.scales.logit_scale, differentiable=("logp", *score.differentiable),
    )  # fmt: skip
    return HeadOutput(found.logp, found.reference_logp, found.kl, found.reverse_kl, found.entropy)


# ---- fusing ----


def fuse_head(model: nn.Module, filter_eps: float = 0.0) -> bool:
    """Gives the model a fused head where that computes what its logits say; else warns once and changes nothing.

    filter_eps   see `uft_kernels.linear_logprob`; of log-probabilities alone, divergences are always exact

    Runs the model once on four tokens.  Returns whether the head is fused.  Harmless to call again.
    """
    if has_fused_head(model):
        causal_model(model).head_filter_eps = filter_eps
        return True
    model = causal_model(model)
    try:
        scales, why = _measured(model), ""
    except Exception as error:  # a model that cannot be run like this is not a model to be changed
        scales, why = None, f"{type(error).__name__}: {error}".splitlines()[0][:200]
    if not isinstance(scales, Scales):
        name = type(model).__name__
        logger.warning_once(
            f"the head of {name} is not fused, log-probabilities come from whole logits: {scales or why}"
        )
        return False
    model.fused_head, model.head_filter_eps = scales, filter_eps
    model._unfused_forward = model.__dict__.get("forward")
    model.forward = MethodType(_scoring(type(model).forward), model)
    return True


@torch.no_grad()
def _measured(model: nn.Module) -> Scales | str:
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


def unfuse_head(model: nn.Module) -> None:
    """Takes back what `fuse_head` did, where it did something."""
    model = causal_model(model)
    if getattr(model.forward, "scores", False):
        before = model._unfused_forward
        del model.forward
        if before is not None:
            model.forward = before


def has_fused_head(model: nn.Module) -> bool:
    """Whether the model scores now: others may have replaced its forward since, or its head."""
    model = causal_model(model)
    forward = model.forward
    while not getattr(forward, "scores", False):  # accelerate wraps it for mixed precision
        forward = getattr(forward, "__wrapped__", None)
        if forward is None:
            return False
    return is_linear_head(model.get_output_embeddings())


def is_peft(model: nn.Module) -> bool:
    return hasattr(model, "peft_config") and hasattr(model, "disable_adapter")


def unwrapped(model: nn.Module) -> nn.Module:
    """The model, with its adapter, inside DistributedDataParallel, torch.compile and the like."""
    while not is_peft(model):
        inner = getattr(model, "module", None) or getattr(model, "_orig_mod", None)
        if not isinstance(inner, nn.Module):
            break
        model = inner
    return model


def causal_model(model: nn.Module) -> nn.Module:
    """The model itself, without its adapter."""
    model = unwrapped(model)
    return model.get_base_model() if is_peft(model) else model
