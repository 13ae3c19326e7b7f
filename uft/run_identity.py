"""What has to be the same for a resumed run to end as the uninterrupted one would have.

Every checkpoint keeps it.  What may change between a run and its resumption (more steps, other logging, evaluation,
saving, another folder) is not in it.  Other software or another device is worth a warning only, since it changes the
last digits, and often none.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from transformers.utils import logging

from uft.models import FrozenReference, is_peft, unwrapped
from uft.objective import Objective, weight_at
from uft.record import plain, write_json
from uft.reference_cache import NAMES

logger = logging.get_logger(__name__)

FILE = "run_identity.json"
# of the configuration: whatever the arithmetic of an optimiser step, or the order of the data, depends on
ARGUMENTS = (
    "per_device_train_batch_size", "gradient_accumulation_steps", "world_size", "dataloader_drop_last", "seed",
    "data_seed", "ignore_data_skip", "padding_side", "pad_to_multiple_of", "prefix_sharing", "token_budget",
    "reference_cache_exact", "disable_dropout", "fused_head", "filter_eps", "reference",
    "learning_rate", "lr_scheduler_type", "lr_scheduler_kwargs", "warmup_steps", "warmup_ratio", "weight_decay",
    "optim", "optim_args", "adam_beta1", "adam_beta2", "adam_epsilon", "max_grad_norm", "bf16", "fp16", "tf32",
)  # fmt: skip
# weights of another shape cannot be loaded, whatever the user says
NEVER_ACCEPTED = ("model",)
WARNED = ("software",)


def run_identity(trainer: Any) -> dict[str, Any]:
    """Named facts, nested; all of them JSON."""
    data, args, model = trainer.train_dataset, trainer.args, unwrapped(trainer.model)
    bare = model.get_base_model() if is_peft(model) else model
    trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    found = {
        "model": {
            "architecture": type(bare).__name__,
            "parameters": sum(p.numel() for p in model.parameters()),
            "trained_parameters": sum(p.numel() for _, p in trained),
            "shapes": _digest((name, tuple(p.shape), str(p.dtype)) for name, p in trained),
        },
        "frozen_weights": _frozen_weights(trainer, model),
        "configuration": _digest(sorted((k, v) for k, v in bare.config.to_dict().items() if k not in NAMES)),
        "adapter": _adapter(model),
        "objective": _objective(trainer.objective),
        "balance": _balance(trainer),
        "data": {
            "sources": dict(zip(data.sources, zip(data.sizes, data.weights))),
            "fingerprint": data.fingerprint[:16],
        },
        "arguments": {name: getattr(args, name, None) for name in ARGUMENTS},
        "packed": trainer.data_collator.collate.packed,  # which args.layout "auto" leaves to the model
        "optimiser_state": not args.save_only_model,
        "software": {
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "attention": getattr(bare.config, "_attn_implementation", None),
            "device": args.device.type,
            "threads": torch.get_num_threads() if args.device.type == "cpu" else None,
        },
    }
    # a function given as a weight shows the address it has in this process
    return json.loads(re.sub(r" at 0x[0-9a-f]+", "", json.dumps(plain(found))))


def write_identity(identity: Mapping[str, Any], checkpoint: Path) -> None:
    write_json(checkpoint / FILE, identity)


def check_identity(identity: Mapping[str, Any], checkpoint: Path, accepted: Collection[str]) -> None:
    """Raises ValueError where the checkpoint is of a run that would not have gone on as this one will.

    accepted   names that may differ, such as "world_size", "data" or "all"
    """
    # a run may save weights alone from now on, but cannot go on from them
    here = {**identity, "optimiser_state": True}
    differing = differences(json.loads((checkpoint / FILE).read_text()), here)
    refused = []
    for name, text in differing.items():
        path = name.split(".")
        if path[0] in WARNED:
            logger.warning(f"{checkpoint}: {text}; the last digits of results may differ")
        elif path[0] not in NEVER_ACCEPTED and {*path, "all"} & set(accepted):
            logger.warning(f"{checkpoint}: {text}; accepted, but no longer the run that it was")
        else:
            refused.append((path, text))
    if not refused:
        return
    advice = "want the same"
    if all(path[0] not in NEVER_ACCEPTED for path, _ in refused):
        names = dict.fromkeys(path[1] if path[0] == "arguments" else path[0] for path, _ in refused)
        advice += f", or `resume_despite: [{', '.join(names)}]`, after which the result is not that of one exact run"
    raise ValueError(f"{checkpoint}: is of another run: {'; '.join(text for _, text in refused)}; {advice}")


def differences(there: Mapping[str, Any], here: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """{dotted name: what is there and what is here} for every fact that is not the same."""
    found = {}
    for name in dict.fromkeys([*there, *here]):
        a, b = there.get(name), here.get(name)
        if isinstance(a, Mapping) and isinstance(b, Mapping):
            found |= differences(a, b, f"{prefix}{name}.")
        elif a != b:
            shown = f"{prefix}{name}".removeprefix("arguments.")
            found[f"{prefix}{name}"] = f"{shown} is {_short(a)} there and {_short(b)} here"
    return found


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _objective(objective: Objective) -> dict[str, Any]:
    """The terms by name; a weight that is a function by its values over a run."""
    found = {}
    for term, told in zip(objective.terms, objective.describe(), strict=True):
        values = [weight_at(term.weight, k / 8) for k in range(9)]
        schedule = {"schedule": told["weight"]} if dataclasses.is_dataclass(term.weight) else {}
        found[term.name] = {**told, "weight": values, **schedule}
    return found


def _balance(trainer: Any) -> dict[str, Any] | None:
    """What decides the weights, and the data that it measures."""
    balancer = trainer.objective.balancer
    if balancer is None:
        return None
    found: dict[str, Any] = {"method": repr(balancer)}
    if balancer.quantity:
        data = trainer.eval_dataset
        parts = data.items() if isinstance(data, Mapping) else [("", data)]
        found["measured_on"] = {name: part.fingerprint[:16] for name, part in parts if part is not None}
        found["measured_in_batches_of"] = trainer.args.eval_batch_size
    return found


def _adapter(model: nn.Module) -> str | None:
    """A digest of what peft was told, but for where the base model came from."""
    if not is_peft(model):
        return None
    configs = ((name, sorted(vars(config).items())) for name, config in sorted(model.peft_config.items()))
    return _digest(
        (name, [(k, sorted(v) if isinstance(v, set) else v) for k, v in fields if k not in NAMES])
        for name, fields in configs
    )


def _frozen_weights(trainer: Any, model: nn.Module) -> dict[str, str | None]:
    """Of the weights that a run depends on and no checkpoint brings back."""
    frozen = trainer.reference.model if isinstance(trainer.reference, FrozenReference) else None
    return {
        "under_the_adapter": sampled(model) if is_peft(model) else None,
        "of_the_reference": trainer.reference_cache.weights
        or (sampled(unwrapped(frozen)) if frozen is not None else None),
    }


def sampled(model: nn.Module, per_parameter: int = 256) -> str:
    """A digest of the shape and some numbers of every parameter that is not trained: cheap where there are billions."""
    parts = []
    for name, parameter in sorted(model.named_parameters()):
        if parameter.requires_grad or hasattr(parameter, "to_local") or not parameter.numel():
            continue  # what is sharded differs between ranks
        flat = parameter.detach().flatten()
        some = flat[:: max(1, len(flat) // per_parameter)].cpu().contiguous()
        parts.append((name, tuple(parameter.shape), some.view(torch.uint8).numpy().tobytes()))
    return _digest(parts)


def _digest(parts: Any) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(repr(part).encode())
    return digest.hexdigest()[:16]
