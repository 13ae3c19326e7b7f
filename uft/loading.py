"""What a trainer starts from: the policy with its adapter and without dropout, its tokenizer, its reference, its data
and how they are laid out."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn
from transformers import AutoTokenizer, PreTrainedTokenizerBase
from transformers.utils import logging

from uft.attention import packing_for
from uft.checkpoint import last_checkpoint
from uft.collation import Collator, Cutter
from uft.config import UnifiedConfig
from uft.data.mixture import FeedbackDataset
from uft.head import causal_model, fuse_head, unfuse_head
from uft.models import FrozenReference, Reference, is_peft, load_policy, load_with_adapter, make_reference
from uft.objective import Objective
from uft.packing_probe import enable_packing

logger = logging.get_logger(__name__)

# of `model_init_kwargs`: what suits a reference that was named by itself as well
OF_ANY_MODEL = ("dtype", "attn_implementation", "trust_remote_code")
NOT_LOADED = {
    "device_map": "the trainer moves the model",
    "quantization_config": "base weights are not quantised here; dtype bfloat16 and LoRA need less memory, too",
}


def tokenizer_of(model: Any, args: UnifiedConfig) -> PreTrainedTokenizerBase:
    """The tokenizer of a model given by path or id, or of a loaded one that remembers its path."""
    path = model if isinstance(model, str) else getattr(getattr(model, "config", None), "_name_or_path", "")
    if not path:
        raise ValueError("processing_class is missing; want the model's tokenizer")
    options = loading_options(args)
    named = {"revision": options["revision"]} if isinstance(model, str) and "revision" in options else {}
    return load_tokenizer(path, options["trust_remote_code"], **named)


def load_tokenizer(name: str, trust_remote_code: bool = False, **options: Any) -> PreTrainedTokenizerBase:
    """Raises OSError that names what was looked for."""
    try:
        return AutoTokenizer.from_pretrained(name, trust_remote_code=trust_remote_code, **options)
    except (OSError, ValueError) as error:
        if newest := last_checkpoint(name):
            raise OSError(f"{name}: found no model, but a checkpoint; want {newest}, or trainer.save_model()") from None
        why = " ".join(str(error).split()).partition(". ")[0]
        raise OSError(f"tokenizer of {name}: found none in a folder or on the hub ({why})") from None


def loading_options(args: UnifiedConfig) -> dict[str, Any]:
    """What `load_policy` is told: dtype, attn_implementation, trust_remote_code, and all of `model_init_kwargs`, which
    count more where they are given.  Raises ValueError for what the trainer decides."""
    given = {name: value for name, value in (args.model_init_kwargs or {}).items() if value is not None}
    for name, why in NOT_LOADED.items():
        if name in given:
            raise ValueError(f"model_init_kwargs.{name} is {_short(given[name])}; want it left out: {why}")
    if "torch_dtype" in given:
        given.setdefault("dtype", given.pop("torch_dtype"))
    own = {name: getattr(args, name) for name in ("dtype", "attn_implementation", "trust_remote_code")}
    return own | given


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) < 80 and "\n" not in text else f"of type {type(value).__name__}"


def load_for_use(
    name: str, *, dtype: str = "auto", device: str = "auto", attn_implementation: str | None = None,
    trust_remote_code: bool = False,
) -> nn.Module:  # fmt: skip
    """A model to be asked or measured, on its device and in evaluation mode; an adapter on its base model.

    device   auto (a GPU where there is one), cpu, cuda, cuda:1, ...

    Raises ValueError for a device that is not there.
    """
    model = load_with_adapter(
        name, trained=False, dtype=dtype, attn_implementation=attn_implementation, trust_remote_code=trust_remote_code
    )
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        return model.to(device).eval()
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"device is {device!r}: {str(error).splitlines()[0]}") from None


def prepared_policy(model: Any, args: UnifiedConfig, peft_config: Any) -> nn.Module:
    """The model to be trained: loaded, with its adapter, without dropout.

    A folder that holds an adapter goes on with it.  Raises ValueError where nothing of the model would be trained.
    """
    policy = load_with_adapter(model, trained=True, **loading_options(args))
    peft_config = peft_config or args.peft_config()
    if peft_config is not None and isinstance(model, str) and is_peft(policy):
        raise ValueError(f"model: found an adapter in {model}, and another one is asked for; want one of them")
    if peft_config is not None and not is_peft(policy):
        from peft import get_peft_model

        policy = get_peft_model(policy, copy.deepcopy(peft_config))  # which peft changes
    if not any(parameter.requires_grad for parameter in policy.parameters()):
        raise ValueError("model: found no weight that wants a gradient; want some that are trained")
    if args.gradient_checkpointing and is_peft(policy):
        policy.enable_input_require_grads()
    if args.disable_dropout:
        without_dropout(policy)
    _fused(policy, args, args.filter_eps)
    return policy


def without_dropout(model: nn.Module) -> None:
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        elif isinstance(getattr(module, "attention_dropout", None), float):
            module.attention_dropout = 0.0


def _fused(model: nn.Module, args: UnifiedConfig, filter_eps: float = 0.0) -> None:
    fuse_head(model, filter_eps) if args.fused_head else unfuse_head(model)


def usable(data: FeedbackDataset, objective: Objective, max_length: int, bos: int | None) -> FeedbackDataset:
    """The data with the mismatched responses that some term asks for.  Refuses rows that no term would use."""
    for name, kinds in data.kinds().items():
        if unused := kinds - objective.kinds:
            raise ValueError(
                f"data set {name!r} holds examples of kind {', '.join(sorted(unused))}, which no term of objective "
                f"{objective.name!r} uses; it uses {', '.join(sorted(objective.kinds))}"
            )
    kinds = objective.kinds_with_mismatched
    return data.with_mismatched(kinds, max_length, bos) if kinds else data


def idle_terms(objective: Objective, data: FeedbackDataset) -> list[str]:
    """Terms that no row of the data concerns: the objective is then another one than its name says."""
    present = set().union(*data.kinds().values())
    idle = [term for term in objective.terms if not Objective((term,)).kinds & present]
    for term in idle:
        logger.warning(
            f"term {term.name!r} of objective {objective.name!r} is on {term.on}, of which there is no row in the "
            "training data: it has no effect"
        )
    return [term.name for term in idle]


def sources_of(*datasets: FeedbackDataset | Mapping[str, FeedbackDataset] | None) -> tuple[str, ...]:
    """The names of all sources, each once."""
    names: dict[str, None] = {}
    for data in datasets:
        for part in data.values() if isinstance(data, Mapping) else [data] if data is not None else []:
            names |= dict.fromkeys(part.sources)
    return tuple(names) or ("train",)


def cutter_for(objective: Objective, tokenizer: Any, args: UnifiedConfig, sources: Sequence[str]) -> Cutter:
    """What makes batches of examples, padded as yet."""
    pad = tokenizer.pad_token_id
    collate = Collator(
        pad_token_id=tokenizer.eos_token_id if pad is None else pad,
        sources=sources,
        padding_side=args.padding_side,
        pad_to_multiple_of=args.pad_to_multiple_of,
        prefix_sharing=args.prefix_sharing,
    )
    return Cutter(collate, objective.need, objective.needs, args.token_budget)


def lay_out(policy: nn.Module, reference: Reference | None, args: UnifiedConfig) -> bool:
    """Makes the models read packed rows, and says whether they can; as args.layout wants it.

    Raises ValueError where rows are to be packed and a model cannot read them.
    """
    if why := _depends_on_others(policy, args.max_length):
        logger.warning_once(
            f"{type(causal_model(policy)).__name__} has {why}, and max_length is {args.max_length}: its "
            "log-probabilities depend on the longest row of a batch, so on what else is in it"
        )
    if args.layout == "padded":
        return False
    models = [policy, *([reference.model] if isinstance(reference, FrozenReference) else [])]
    for model in models:
        try:
            if (args.layout, packing_for(model)) == ("auto", "masks"):
                raise ValueError("eager attention would form the scores of the whole row")
            enable_packing(model)
        except ValueError as error:
            name = type(causal_model(model)).__name__
            if args.layout == "packed":
                raise ValueError(f"layout is 'packed', which {name} cannot read: {error}") from error
            logger.warning_once(f"{name} reads padded batches, not packed ones: {error}")
            return False
    return True


def reference_for(
    policy: nn.Module, reference: Any, objective: Objective, args: UnifiedConfig, tokenizer: Any
) -> Reference | None:
    """The reference that the objective needs: the one given, or the policy as it is now in the form that
    args.reference says.  None where it needs none, or where its log-probabilities are to be cached.

    Raises ValueError for one that does not know the tokens of the policy.
    """
    if not objective.needs_reference:
        return None
    if args.reference == "none":
        raise ValueError(f"objective {objective.name!r} needs a reference, and reference is 'none'")
    if isinstance(reference, Reference):
        if isinstance(reference, FrozenReference):
            _check_vocabulary(policy, reference.model, objective, tokenizer)
            _fused(reference.model, args)
        return reference
    if reference is not None:
        options = loading_options(args)
        model = load_policy(reference, **{name: options[name] for name in OF_ANY_MODEL})
        if {id(p) for p in model.parameters()} & {id(p) for p in policy.parameters()}:
            raise ValueError("reference is the model that is trained; want another one, or none for a copy of it")
        _check_vocabulary(policy, model, objective, tokenizer)
        _fused(model, args)
        return FrozenReference(model)
    if args.reference == "cached":
        if objective.needs_divergence:
            raise ValueError("a KL term needs the reference model itself; reference 'cached' keeps only its logps")
        return None  # its log-probabilities are computed by ReferenceCache before the first step
    return make_reference(policy, args.reference)


def _check_vocabulary(policy: nn.Module, reference: nn.Module, objective: Objective, tokenizer: Any) -> None:
    """Embeddings may be padded, so those of two models with one tokenizer may differ in number."""
    ours, theirs = (causal_model(m).get_input_embeddings().weight.shape[0] for m in (policy, reference))
    wanted = len(tokenizer) if hasattr(tokenizer, "__len__") else ours
    if theirs < wanted or (objective.needs_divergence and theirs != ours):
        why = "a KL compares the same tokens" if theirs >= wanted else f"the tokenizer has {wanted:,}"
        raise ValueError(f"reference: found a vocabulary of {theirs:,} and {ours:,} in the policy; {why}")


def _depends_on_others(model: nn.Module, max_length: int) -> str | None:
    """The kind of rotary embedding whose frequencies follow the longest row of a batch, where that can happen."""
    config = causal_model(model).config.get_text_config()
    rope = getattr(config, "rope_parameters", None) or {}
    for one in [rope, *(each for each in rope.values() if isinstance(each, Mapping))]:
        kind = one.get("rope_type")
        reach = one.get("original_max_position_embeddings") or getattr(config, "max_position_embeddings", max_length)
        if kind in ("dynamic", "longrope") and max_length > reach:
            return f"{kind} rotary embeddings beyond {reach} tokens"
    return None
