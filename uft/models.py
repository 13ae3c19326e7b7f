"""Policy and reference: loading them, and turning a batch into log-probabilities.

The reference comes in three forms that give the same rewards: a frozen copy, the policy with its adapter switched
off (or an earlier adapter switched on), and log-probabilities computed beforehand (`uft/reference_cache.py`).
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel
from transformers.integrations import deepspeed
from transformers.utils import find_adapter_config_file
from uft_kernels import token_divergence, token_logprob

from uft.attention import packed_inputs, packing_of
from uft.feedback import Batch
from uft.head import HeadOutput, HeadState, Wanted, has_fused_head, is_peft, sums_as, unwrapped
from uft.packing_probe import enable_packing

REFERENCE_ADAPTER = "reference"
REFERENCE_MODES = ("auto", "frozen", "adapter", "cached", "none")


def load_policy(
    model: str | PretrainedConfig | PreTrainedModel,
    *,
    dtype: str | torch.dtype = "auto",
    attn_implementation: str | None = None,
    trust_remote_code: bool = False,
    **more: Any,
) -> PreTrainedModel:
    """The policy, from a hub id, a path, a config (fresh weights) or a model that is already there.

    Only safetensors files are read.  Remote code runs only where `trust_remote_code` asks for it.  `more` goes to
    `from_pretrained`, such as `revision`; raises ValueError where nothing is loaded by it.
    """
    if more and not isinstance(model, str):
        raise ValueError(f"model: {', '.join(more)} is for loading, and a {type(model).__name__} is given; want a path")
    if isinstance(model, nn.Module):
        return model
    options: dict[str, Any] = {"trust_remote_code": trust_remote_code, **more}
    if attn_implementation:
        options["attn_implementation"] = attn_implementation
    with _whole():
        if isinstance(model, PretrainedConfig):
            return AutoModelForCausalLM.from_config(model, **options)
        return AutoModelForCausalLM.from_pretrained(model, dtype=dtype, use_safetensors=True, **options)


def load_with_adapter(model: Any, *, trained: bool, **options: Any) -> nn.Module:
    """As `load_policy`; a folder or id that holds an adapter gives it on its base model, to be `trained` or frozen."""
    if not isinstance(model, str) or find_adapter_config_file(model) is None:
        return load_policy(model, **options)
    from peft import PeftConfig, PeftModel

    if more := [name for name in options if name not in ("dtype", "attn_implementation", "trust_remote_code")]:
        raise ValueError(f"model: {model} is an adapter, and {', '.join(more)} would be its base's; want it loaded")
    base = load_policy(PeftConfig.from_pretrained(model).base_model_name_or_path, **options)
    return PeftModel.from_pretrained(base, model, is_trainable=trained)


@contextmanager
def _whole() -> Iterator[None]:
    """Under ZeRO-3 transformers would hand out weights while they are loaded.  Head and attention are tried out and
    references copied before that, so they are loaded whole into each rank's host memory; DeepSpeed shards them then."""
    before = deepspeed._hf_deepspeed_config_weak_ref
    deepspeed.unset_hf_deepspeed_config()
    try:
        yield
    finally:
        deepspeed._hf_deepspeed_config_weak_ref = before


@dataclass(frozen=True)
class Scored:
    """A batch with the log-probabilities that the terms of an objective need.  R responses, T tokens.  Nats.

    token_logp       [R, T - 1]  of the policy, 0 where the token does not count
    logp             [R]         summed over the response
    length           [R]         response tokens that count
    reference_logp   [R] or None
    kl, reverse_kl, entropy   [R, T - 1] or None, per token; KL(policy || reference) and the other way round
    """

    batch: Batch
    token_logp: Tensor
    logp: Tensor
    length: Tensor
    reference_logp: Tensor | None = None
    kl: Tensor | None = None
    reverse_kl: Tensor | None = None
    entropy: Tensor | None = None


def response_logits(model: nn.Module, batch: Batch) -> Tensor:
    """Logits at the positions that predict a counted token: [N, V], N = batch.shifted.sum()."""
    predicts, _ = _counted(batch)
    return _run(model, batch).logits[:, -batch.input_ids.shape[1] :].flatten(0, 1).index_select(0, predicts)


def _counted(batch: Batch) -> tuple[Tensor, Tensor]:
    """int64 [N] each: where the counted tokens are predicted in input_ids laid flat, and the tokens."""
    if "predicts" not in batch:  # a selection of a padded batch
        row, time = batch.shifted.nonzero().unbind(-1)
        return row * batch.input_ids.shape[1] + time, batch.input_ids[row, time + 1]
    return batch.predicts, batch.answers


def _run(model: nn.Module, batch: Batch, **more: Any) -> Any:
    inputs = {"input_ids": batch.input_ids}
    if batch.packed:
        if packing_of(model) is None:  # a reference that was put in place later
            enable_packing(model)
        inputs["position_ids"] = batch.position_ids
        inputs |= packed_inputs(model, batch.segments, batch.input_ids.device)
    else:
        inputs["attention_mask"] = batch.attention_mask
        if not bool(batch.attention_mask[:, 0].all()):  # left padding: absolute positions must not count it
            inputs["position_ids"] = (batch.attention_mask.cumsum(-1) - 1).clamp(min=0)
    return model(**inputs, use_cache=False, **more)


def _scatter(values: Tensor, mask: Tensor) -> Tensor:
    return torch.zeros(mask.shape, dtype=values.dtype, device=values.device).masked_scatter(mask, values)


def score(
    model: nn.Module,
    batch: Batch,
    reference: Reference | None = None,
    *,
    divergence: bool = False,
    differentiable: tuple[str, ...] = ("kl", "reverse_kl"),
) -> Scored:
    """The policy's log-probabilities of a batch, and the reference's where one is given or cached in the batch.

    Both models see the same tokens in the same layout, so that they agree to the bit while they are equal.

    divergence       also the exact per-token KL to the reference, which needs the reference model itself
    differentiable   the divergences that want a gradient, each of which costs a frozen head a matrix product

    A model whose head is fused (`uft.head.fuse_head`) never forms the logits of its tokens.
    """
    if divergence and reference is None:
        raise ValueError("the KL to the reference needs a reference model; cached log-probabilities do not hold it")
    wanted = differentiable if divergence else None
    mask, known, theirs = batch.shifted, batch.get("reference_logp"), None
    if reference is not None and (known is None or divergence):
        with torch.no_grad(), reference.applied(model) as reference_model:
            if not divergence:
                theirs = token_logps(reference_model, batch).logp
            elif has_fused_head(model) and has_fused_head(reference_model):
                theirs = _run(reference_model, batch, score=_wanted(batch, state=True)).state
            else:
                theirs = response_logits(reference_model, batch)
    found = token_logps(model, batch, theirs if divergence else None, wanted or ())
    if known is None and theirs is not None:
        known = _scatter(found.reference_logp if divergence else theirs, mask).sum(-1)
    token_logp = _scatter(found.logp, mask)
    divergences = {
        name: _scatter(found[name], mask) for name in ("kl", "reverse_kl", "entropy") if found.get(name) is not None
    }
    return Scored(batch, token_logp, token_logp.sum(-1), mask.sum(-1).float(), known, **divergences)


def token_logps(
    model: nn.Module, batch: Batch, reference: HeadState | Tensor | None = None, differentiable: tuple[str, ...] = ()
) -> HeadOutput:
    """Log-probabilities of the counted tokens, [N] each, and their divergence from a reference: the state of its fused
    head, or its logits [N, V]."""
    if has_fused_head(model) and not isinstance(reference, Tensor):
        return _run(model, batch, score=_wanted(batch, reference=reference, differentiable=differentiable))
    logits, (_, target) = response_logits(model, batch), _counted(batch)
    found = HeadOutput(logp=token_logprob(logits, target))
    if reference is not None:
        divergence = token_divergence(logits, reference)
        found["reference_logp"] = token_logprob(reference, target)
        for name in ("kl", "reverse_kl", "entropy"):
            found[name] = getattr(divergence, name)
    return found


def _wanted(batch: Batch, **more: Any) -> Wanted:
    return Wanted(*_counted(batch), width=batch.input_ids.shape[1], **more)


class Reference:
    """What the policy is measured against.  `applied(policy)` yields the model to run."""

    @contextmanager
    def applied(self, policy: nn.Module) -> Iterator[nn.Module]:
        raise NotImplementedError


class FrozenReference(Reference):
    """A model of its own: a frozen copy of the policy as it is now, or any other model."""

    def __init__(self, model: nn.Module):
        self.model = model.eval().requires_grad_(False)

    @classmethod
    def of(cls, policy: nn.Module) -> FrozenReference:
        return cls(copy.deepcopy(policy))

    @contextmanager
    def applied(self, policy: nn.Module) -> Iterator[nn.Module]:
        with sums_as(self.model, policy):
            yield self.model


class AdapterReference(Reference):
    """The policy's own base weights, seen with the adapter switched off, or with the frozen adapter `adapter`.

    Switching off gives the *base* model.  After an earlier stage trained the adapter that is the wrong reference,
    so `of` keeps a frozen copy of a trained adapter under the name "reference" (`REFERENCE_ADAPTER`).
    """

    def __init__(self, adapter: str | None = None):
        self.adapter = adapter

    @classmethod
    def of(cls, policy: nn.Module) -> AdapterReference:
        if not is_peft(policy):
            raise ValueError("reference 'adapter' needs a policy with an adapter; got a full model")
        if adapter_is_identity(policy):
            return cls(None)
        active = policy.active_adapter
        if REFERENCE_ADAPTER in policy.peft_config:
            policy.delete_adapter(REFERENCE_ADAPTER)
        policy.add_adapter(REFERENCE_ADAPTER, copy.deepcopy(policy.peft_config[active]))
        with torch.no_grad():
            parameters = dict(policy.named_parameters())
            for name, parameter in parameters.items():
                if f".{active}." in name:
                    parameters[name.replace(f".{active}.", f".{REFERENCE_ADAPTER}.")].copy_(parameter)
        policy.set_adapter(active)
        for name, parameter in policy.named_parameters():
            if f".{REFERENCE_ADAPTER}." in name:
                parameter.requires_grad_(False)
        return cls(REFERENCE_ADAPTER)

    @contextmanager
    def applied(self, policy: nn.Module) -> Iterator[nn.Module]:
        peft_model = unwrapped(policy)
        was_training = policy.training
        policy.eval()  # the reference has no dropout, whatever the policy has
        try:
            with sums_as(policy, policy), self._switched(peft_model):
                yield policy
        finally:
            policy.train(was_training)

    @contextmanager
    def _switched(self, peft_model: nn.Module) -> Iterator[None]:
        if self.adapter is None:
            with peft_model.disable_adapter():
                yield
            return
        active = peft_model.active_adapter
        trainable = {name: p.requires_grad for name, p in peft_model.named_parameters()}
        peft_model.set_adapter(self.adapter)
        try:
            yield
        finally:
            peft_model.set_adapter(active)
            for name, parameter in peft_model.named_parameters():  # set_adapter makes what it activates trainable
                parameter.requires_grad_(trainable[name])


def make_reference(policy: nn.Module, mode: str = "auto") -> Reference | None:
    """The reference that is the policy as it stands now.

    auto      adapter where the policy has one, frozen copy otherwise
    frozen    a deep copy (adapters included)
    adapter   the same weights with the adapter off, or with a frozen copy of a trained adapter
    none      no reference
    """
    if mode not in REFERENCE_MODES:
        raise ValueError(f"reference is {mode!r}; want one of {', '.join(REFERENCE_MODES)}")
    if mode == "none":
        return None
    if mode == "adapter" or (mode == "auto" and is_peft(policy)):
        return AdapterReference.of(policy)
    return FrozenReference.of(policy)


def adapter_is_identity(policy: nn.Module) -> bool:
    """Whether the active adapter changes nothing yet (LoRA's B is zero before the first step)."""
    active = policy.active_adapter
    ends = (f"lora_B.{active}", f"lora_embedding_B.{active}")
    last_factors = [p for name, p in policy.named_parameters() if any(end in name for end in ends)]
    return bool(last_factors) and all(not p.any() for p in last_factors)


def merged(policy: nn.Module) -> nn.Module:
    """The policy with its adapter folded into the weights; a full model comes back as it is."""
    return policy.merge_and_unload() if is_peft(policy) else policy
