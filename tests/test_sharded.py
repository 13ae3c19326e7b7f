"""FSDP2 over policy, head and reference: ranks hold shares of the weights, and the step is that of one process."""

import copy
import os
from types import SimpleNamespace

import pytest
import torch
from accelerate.utils import FullyShardedDataParallelPlugin
from accelerate.utils.fsdp_utils import fsdp2_prepare_model
from mixed import KINDS, dataset, model
from peft import LoraConfig, get_peft_model
from ranks import run
from test_trainer import EVERYTHING
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor

from uft.attention import use_packing
from uft.collation import Collator, Cutter
from uft.feedback import mismatched
from uft.head import causal_model, fuse_head
from uft.models import AdapterReference, FrozenReference, score
from uft.presets import make_objective
from uft.sharding import by_fsdp2

# KTO and BCO want statistics over the step, which the trainer collects
OBJECTIVE = {name: term for name, term in EVERYTHING.items() if term.get("loss") not in ("kto", "bco")}
LORA = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")
STEPS = 3


def prepared(seed: int, lora: bool) -> torch.nn.Module:
    policy = model(seed)
    assert fuse_head(policy)
    use_packing(policy, "segments")
    if lora:
        torch.manual_seed(0)
        policy = get_peft_model(policy, copy.deepcopy(LORA))
        for name, parameter in policy.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.05)
    return policy


def accelerated() -> SimpleNamespace:
    """As much of an accelerator as shards a model: accelerate's own makes one on accelerators alone."""
    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2, auto_wrap_policy="transformer_based_wrap", reshard_after_forward=True,
        cpu_ram_efficient_loading=False,
    )  # fmt: skip
    state = SimpleNamespace(fsdp_plugin=plugin)
    return SimpleNamespace(
        state=state, mixed_precision="no", is_main_process=True, device=torch.device("cpu"), torch_device_mesh=None
    )


def sharded(policy: torch.nn.Module, how: str, frozen: bool = False) -> torch.nn.Module:
    if how == "accelerate":
        by_fsdp2(policy, accelerated()) if frozen else fsdp2_prepare_model(accelerated(), policy)
        assert all(isinstance(p, DTensor) for p in policy.parameters())
        return policy
    mesh = init_device_mesh("cpu", (torch.distributed.get_world_size(),))
    inner = causal_model(policy)
    for layer in inner.model.layers:
        fully_shard(layer, mesh=mesh)
    if how == "head apart":
        fully_shard(inner.lm_head, mesh=mesh)
    # as accelerate does it, the root is sharded again after its forward
    fully_shard(policy, mesh=mesh, reshard_after_forward=True)
    assert all(isinstance(p, DTensor) for p in policy.parameters())
    assert isinstance(policy, FSDPModule)
    return policy


def steps(folder, name: str, world: int, how: str, lora: bool) -> None:
    """Some optimiser steps over all kinds; ranks get what is left over of 40 rows dealt out by 3."""
    rank = 0 if world == 1 else int(os.environ["RANK"])
    policy = prepared(0, lora)
    reference = AdapterReference(None) if lora else FrozenReference(prepared(1, False))
    if world > 1:
        torch.distributed.init_process_group("gloo")
        sharded(policy, how)
        if not lora:
            sharded(reference.model, how, frozen=True)
    objective = make_objective(OBJECTIVE)
    examples = mismatched(dataset()[:])
    cut = Cutter(Collator(0, sources=KINDS, packed=True), objective.need, objective.needs, token_budget=100)
    optimizer = torch.optim.SGD([p for p in policy.parameters() if p.requires_grad], lr=1e-2)
    whole = cut(examples)
    counts = sum(objective.counts(batch) for batch in whole.of_gradient) / world
    for _ in range(STEPS):
        mine = cut([e for i, e in enumerate(examples) if i // 3 % world == rank])
        for need in cut.needs:
            if not need.gradient:
                continue
            own = mine.of(need.__eq__)
            if world > 1:  # what uft.loader.even_passes does with accelerate
                most = torch.tensor(len(own))
                torch.distributed.all_reduce(most, torch.distributed.ReduceOp.MAX)
                own += [cut.empty(need)] * (int(most) - len(own))
            for batch in own:
                scored = score(
                    policy, batch, reference if need.reference else None,
                    divergence=need.reference and objective.needs_divergence, differentiable=objective.differentiable,
                )  # fmt: skip
                objective(scored, counts)[0].backward()
        optimizer.step()
        optimizer.zero_grad()
    ends = {
        n: p.full_tensor() if isinstance(p, DTensor) else p for n, p in policy.named_parameters() if p.requires_grad
    }
    if rank == 0:
        torch.save({n: p.detach() for n, p in ends.items()}, folder / f"{name}.pt")


@pytest.mark.parametrize(
    "ranks, how, lora",
    [
        (2, "head in the root", False),
        pytest.param(4, "head apart", False, marks=pytest.mark.slow),
        (2, "accelerate", False),
        (4, "accelerate", True),
        (2, "head apart", True),
        (4, "head in the root", True),
    ],
)
def test_fsdp2_takes_the_step_of_one_process(ranks, how, lora, tmp_path):
    run(steps, tmp_path, 1, "one", 1, how, lora)
    run(steps, tmp_path, ranks, "many", ranks, how, lora)
    one, many = (torch.load(tmp_path / f"{name}.pt") for name in ("one", "many"))
    start = dict(prepared(0, lora).named_parameters())
    assert one.keys() == many.keys()
    moved, apart = (torch.cat([(a[n] - b[n]).flatten() for n in one]).norm() for a, b in ((one, start), (one, many)))
    assert apart <= 1e-5 * moved and moved > 0
