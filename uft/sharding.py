"""What accelerate leaves open where weights are in shards: the frozen reference, and gradients between passes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from accelerate import Accelerator
from torch import nn
from torch.distributed.fsdp import FSDPModule

OF_WEIGHTS = ("offload_param", "stage3_param_persistence_threshold", "stage3_max_live_parameters")  # of ZeRO's options


def placed(model: nn.Module, accelerator: Accelerator) -> nn.Module:
    """The frozen model as this rank runs it: on its device, in the precision of training, sharded like the policy.

    In shards under FSDP2 and ZeRO-3; whole under DDP, ZeRO-1 and 2, and FSDP1, which cannot shard a model without an
    optimiser.
    """
    plugin = accelerator.state.deepspeed_plugin
    if plugin is not None and plugin.zero_stage == 3:
        return _by_zero(model, plugin.deepspeed_config)
    if accelerator.is_fsdp2:
        return by_fsdp2(model.to(accelerator.device), accelerator)
    before = list(accelerator._models)
    model = accelerator.prepare_model(model, device_placement=True, evaluation_mode=True)
    accelerator._models[:] = before  # transformers takes what is in this list for the policy
    return model


def by_fsdp2(model: nn.Module, accelerator: Any) -> nn.Module:
    """In the units into which accelerate cuts the policy, each sharded again after its forward: there is no backward,
    after which it would do that with the head."""
    from accelerate.utils.fsdp_utils import fsdp2_prepare_model

    model = fsdp2_prepare_model(accelerator, model)
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_reshard_after_forward(True, recurse=False)
    return model


def _by_zero(model: nn.Module, policy: dict[str, Any]) -> nn.Module:
    """Weights in shards; of the policy's configuration, what concerns weights alone."""
    import deepspeed

    zero = policy["zero_optimization"]
    kept = {name: zero[name] for name in OF_WEIGHTS if zero.get(name, "auto") != "auto"}
    config = {name: policy[name] for name in ("bf16", "fp16") if name in policy}
    config |= {"zero_optimization": {"stage": 3, **kept}, "train_micro_batch_size_per_gpu": 1}
    engine, *_ = deepspeed.initialize(model=model, config=config)
    engine.eval()  # which returns nothing
    return engine


def reduce_each_pass(accelerator: Accelerator, asked: Mapping[str, Any] | None) -> None:
    """FSDP2 would keep whole gradients between the passes of a step.  They are reduced after each, unless the user's
    `gradient_accumulation_kwargs` say otherwise: who shards is short of memory."""
    if accelerator.is_fsdp2 and "sync_each_batch" not in (asked or {}):
        accelerator.gradient_state.plugin_kwargs["sync_each_batch"] = True
