"""The fused head: a causal language model that yields log-probabilities of chosen tokens instead of logits.

`fuse_head(model)` changes one instance of any AutoModelForCausalLM whose head is a linear layer, adapters included.
Its forward then also takes `score=Wanted(...)`: while the model runs, the head is given the hidden states of the wanted
positions alone and returns their log-probabilities, and the forward returns a `HeadOutput`.  The call goes through
whatever is wrapped around the model (peft, DistributedDataParallel, FSDP), so their hooks see head and gradients.

Where the head is no linear layer, or its logits are changed in a way that is not known (`uft.linear_head`), there is
one warning, and the model goes on giving logits.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from transformers.utils import ModelOutput, logging
from uft_kernels import linear_divergence, linear_logprob

from uft.linear_head import Scales, is_linear_head, linear_parts, measured

logger = logging.get_logger(__name__)


@dataclass(frozen=True)
class HeadState:
    """A head and the hidden states of N tokens, from which every log-probability follows.

    hidden   [N, D]
    weight   [V, D]
    bias     [V] or None
    unit     what FSDP2 gathers and shards together with the head
    """

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None
    scales: Scales
    unit: FSDPModule | None = None

    def gather(self) -> None:
        """Puts the weight back where FSDP2 or ZeRO-3 has sharded it again since; it stays until the model's next
        forward, for the policy's backward reads it too."""
        if not self.weight.untyped_storage().size():
            if hasattr(self.weight, "all_gather"):  # DeepSpeed's
                return self.weight.all_gather()
            if self.unit is None:
                raise ValueError("the reference's head was sharded again after its forward; want fused_head=False")
            self.unit.unshard()


@dataclass(frozen=True)
class Wanted:
    """Which tokens to score.

    predicts         int64 [N], the positions that predict a token which counts, in the batch laid flat
    target           int64 [N], these tokens
    width            positions per row of the batch
    reference        also the divergence from this reference at the same N tokens
    differentiable   the divergences that want a gradient; of kl, reverse_kl, entropy
    state            instead of log-probabilities, the `HeadState`
    """

    predicts: Tensor
    target: Tensor
    width: int
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


@contextmanager
def _after_hooks(head: nn.Module, hook: Any) -> Iterator[None]:
    """`hook` sees what comes out of all of the head's hooks.  DeepSpeed's gather weights when gradients reach what they
    return; others only look, and torch.compile need not see one more."""
    if not hasattr(next(head.parameters()), "ds_id"):
        yield
        return
    handle = head.register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()


def _scoring(original: Any) -> Any:
    """A forward like `original`, a function of the model's class, that can also score."""

    def forward(self: nn.Module, *args: Any, score: Wanted | None = None, **kwargs: Any):
        before = self._unfused_forward or partial(type(self).forward, self)
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
        # prompt tuning puts positions in front
        rows = hidden[:, -score.width :].flatten(0, 1).index_select(0, score.predicts)
        state = HeadState(*linear_parts(head, rows), model.fused_head)
        if score.state:
            found = HeadOutput(state=replace(state, unit=_sharded_with(head, model)))
            return rows[None]
        # one tensor goes through the module's hooks, and every gradient comes back through it: FSDP and DeepSpeed wait
        # for that to gather the head's weight again
        computed = _compute(state, score, model.head_filter_eps, _may_fuse(model))
        values = _as_one(computed)
        found = _of_one(computed, values)
        return values

    def after_hooks(_module: nn.Module, _inputs: tuple, values: Tensor) -> None:
        nonlocal found
        if not score.state:
            found = _of_one(found, values)

    with _instead(head, instead), _after_hooks(head, after_hooks):
        before(*args, **kwargs)
    if found is None:
        raise ValueError(f"the head of {type(model).__name__} did not run in its forward; want fused_head=False")
    return found


def _may_fuse(model: nn.Module) -> bool:
    """Whether logits and rows may come from one kernel: where the head is trained and no backward is filtered; of a
    reference, whether they may for its policy."""
    known = getattr(model, "head_may_fuse", None)
    if known is not None:
        return known
    trained = any(p.requires_grad for p in model.get_output_embeddings().parameters())
    return trained and not model.head_filter_eps


@contextmanager
def sums_as(reference: nn.Module, policy: nn.Module) -> Iterator[None]:
    """A reference that equals its policy has the same log-probabilities to the bit: both sum in the same order.

    To be entered before an adapter is switched off, which takes its gradients away.
    """
    reference, policy = causal_model(reference), causal_model(policy)
    before = getattr(reference, "head_may_fuse", None)
    if has_fused_head(policy):
        reference.head_may_fuse = _may_fuse(policy)
    try:
        yield
    finally:
        reference.head_may_fuse = before


def _sharded_with(head: nn.Module, model: nn.Module) -> FSDPModule | None:
    """The innermost module around the head that FSDP2 shards as one."""
    units = (m for m in model.modules() if isinstance(m, FSDPModule) and any(part is head for part in m.modules()))
    return [None, *units][-1]


def _as_one(found: HeadOutput) -> Tensor:
    """The values that have a gradient as one tensor [1, k, N]."""
    values = [value for value in found.values() if value.requires_grad] or [found.logp]
    return torch.stack([torch.stack(values)])  # no view, to which FSDP could not tie its hook safely


def _of_one(found: HeadOutput, values: Tensor) -> HeadOutput:
    """The same output, with what has a gradient taken from `_as_one`."""
    parts = iter(values[0].unbind())
    differentiable = {name: next(parts) for name, value in found.items() if value.requires_grad}
    return HeadOutput(**{**found, **differentiable})


def _compute(ours: HeadState, score: Wanted, filter_eps: float, may_fuse: bool) -> HeadOutput:
    kept, target = len(score.target), score.target  # every token counts: nothing to look for
    if score.reference is None:
        found = linear_logprob(
            ours.hidden, ours.weight, target, ours.bias, kept=kept, filter_eps=filter_eps, fused=may_fuse,
            **ours.scales._asdict(),
        )  # fmt: skip
        return HeadOutput(logp=found.logp)
    theirs = score.reference
    theirs.gather()
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
    model = causal_model(model)
    if _can_score(model):
        model.head_is_fused, model.head_filter_eps = True, filter_eps
        return True
    try:
        scales, why = measured(model), ""
    except Exception as error:  # a model that cannot be run like this is not a model to be changed
        scales, why = None, f"{type(error).__name__}: {error}".splitlines()[0][:200]
    if not isinstance(scales, Scales):
        name = type(model).__name__
        logger.warning_once(
            f"the head of {name} is not fused, log-probabilities come from whole logits: {scales or why}"
        )
        return False
    model.fused_head, model.head_is_fused, model.head_filter_eps = scales, True, filter_eps
    model._unfused_forward = model.__dict__.get("forward")
    model.forward = MethodType(_scoring(type(model).forward), model)
    return True


def unfuse_head(model: nn.Module) -> None:
    """Takes back what `fuse_head` did, where it did something.  Inside of a wrapper it is only not used any more."""
    model = causal_model(model)
    model.head_is_fused = False
    if getattr(model.forward, "scores", False):
        before = model._unfused_forward
        del model.forward
        if before is not None:
            model.forward = before


def has_fused_head(model: nn.Module) -> bool:
    """Whether the model's log-probabilities come from its head."""
    model = causal_model(model)
    return getattr(model, "head_is_fused", False) and _can_score(model)


def _can_score(model: nn.Module) -> bool:
    """Others may have replaced a fused model's forward since, or its head."""
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
