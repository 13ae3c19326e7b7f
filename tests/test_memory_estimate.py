"""The estimate of memory, against hand-made numbers and against what a backward really saves."""

import contextlib

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, LlamaConfig, Qwen3Config

from uft.memory import Shape, _Setup, estimate

SIZES = dict(
    vocab_size=64, hidden_size=32, intermediate_size=80, num_attention_heads=4, num_key_value_heads=2, head_dim=12,
    num_hidden_layers=2, tie_word_embeddings=False,
)  # fmt: skip
TOKENS = 16


def llama(**changes) -> LlamaConfig:
    return LlamaConfig(**SIZES | changes)


def test_weights_gradients_and_optimiser_by_hand():
    """A layer: q and o 32 x 48, k and v 32 x 24, three of 32 x 80, two norms; embedding, head and a norm outside."""
    layer = 2 * 32 * 48 + 2 * 32 * 24 + 3 * 32 * 80 + 2 * 32
    whole = 2 * layer + 2 * 64 * 32 + 32
    assert Shape.of(llama()).parameters == whole and Shape.of(llama()).layer == layer + 32 // 2
    memory = estimate(llama(), tokens=TOKENS)
    step = memory.moments["the optimiser's step"]
    assert [step[name] for name in ("weights", "reference", "gradients", "optimiser")] == [
        4 * whole, 4 * whole, 4 * whole, 8 * whole
    ]  # fmt: skip
    half = estimate(llama(), tokens=TOKENS, dtype=torch.bfloat16, reference="cached", optim="sgd")
    step = half.moments["the optimiser's step"]
    assert (step["weights"], step["reference"], step["gradients"], step["optimiser"]) == (2 * whole, 0, 2 * whole, 0)


def test_an_adapter_by_hand():
    ends = 2 * ((32 + 48) * 2 + (32 + 24) * 2 + (32 + 80) * 3)
    memory = estimate(llama(), tokens=TOKENS, lora_r=4, reference="adapter")
    policy = get_peft_model(
        AutoModelForCausalLM.from_config(llama()), LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")
    )
    assert sum(p.numel() for p in policy.parameters() if p.requires_grad) == 4 * ends
    step = memory.moments["the optimiser's step"]
    assert (step["gradients"], step["optimiser"], step["reference"]) == (4 * 4 * ends, 8 * 4 * ends, 0)
    assert Shape.of(policy) == Shape.of(llama())


def test_more_is_more_and_shards_are_less():
    def total(**changes) -> int:
        return estimate(llama(vocab_size=4096), **{"tokens": 256, "counted": 128} | changes).total

    plain = total()
    for more in ({"tokens": 512}, {"counted": 256}, {"passes": 2}, {"sharding": "ddp", "ranks": 2}, {"shared": 64}):
        assert total(**more) > plain, more
    for less in ({"reference": "cached"}, {"optim": "sgd"}, {"lora_r": 2, "reference": "adapter"}):
        assert total(**less) < plain, less
    assert total(tokens=4096, gradient_checkpointing=True) < total(tokens=4096)
    sharded = [total(sharding="fsdp2", ranks=n) for n in (2, 4, 8)]
    assert sharded == sorted(sharded, reverse=True) and len(set(sharded)) == 3
    # with several passes FSDP2 holds whole gradients, unless it is told to reduce each
    several = {"sharding": "fsdp2", "ranks": 8, "passes": 2}
    assert total(**several) < total(**several, sync_each_batch=False)


def test_zero_by_hand():
    """Section 3 of the paper: 2 bytes of weights, and of 2 + 4 + 8 for gradient, copy and AdamW a share."""
    whole, ranks = Shape.of(llama()).parameters, 4
    memory = estimate(llama(), tokens=TOKENS, autocast=torch.bfloat16, sharding="zero2", ranks=ranks)
    step = memory.moments["the optimiser's step"]
    assert (step["weights"], step["gradients"], step["optimiser"]) == (2 * whole, 2 * whole // 4, 8 * whole // 4)
    assert step["copies"] == 4 * whole // ranks + 2 * 32**2


def test_the_table_adds_up():
    memory = estimate(llama(), tokens=256)
    lines = memory.table().splitlines()
    assert lines[0].split()[0] == "weights" and memory.moment in lines[-1]
    assert memory.total == sum(memory.parts.values()) == max(sum(m.values()) for m in memory.moments.values())


@pytest.mark.parametrize("wrong", [{"optim": "lion"}, {"reference": "auto"}, {"sharding": "fsdp"}, {"counted": 17}])
def test_what_is_not_known_is_refused(wrong):
    with pytest.raises(ValueError, match=str(next(iter(wrong.values())))):
        estimate(llama(), **{"tokens": 16} | wrong)


def test_a_model_on_the_meta_device_is_enough():
    with torch.device("meta"):
        policy = AutoModelForCausalLM.from_config(llama())
    assert estimate(policy, tokens=64) == estimate(llama(), tokens=64) == estimate(Shape.of(llama()), tokens=64)


@pytest.mark.slow
@pytest.mark.parametrize("arm", [{"reference": "frozen"}, {"reference": "adapter", "lora_r": 16}])
def test_a_measured_peak(arm):
    """Ten million parameters, as in `make bench-memory`; small enough that the allocator shows."""
    from experiments.memory import measured, with_formula

    row = with_formula({"size": "10M", "arm": arm} | measured("10M", 2, arm))
    assert abs(row["error"]) < 0.15


# ---- what a layer saves ----


def saved_bytes(policy: torch.nn.Module, autocast: torch.dtype | None) -> int:
    """Of all that the forward saves for the backward and that is no parameter, each storage once."""
    known = {p.untyped_storage().data_ptr() for p in (*policy.parameters(), *policy.buffers())}
    seen: dict[int, torch.UntypedStorage] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            seen[storage.data_ptr()] = storage
        return tensor

    ids = torch.arange(TOKENS)[None]
    context = torch.autocast("cpu", autocast) if autocast else contextlib.nullcontext()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor), context:
        kept = policy(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).logits
        assert kept.requires_grad
    return sum(storage.nbytes() for storage in seen.values())


CASES = {
    "float32": (torch.float32, None, 0),
    "bfloat16": (torch.bfloat16, None, 0),
    "autocast": (torch.float32, torch.bfloat16, 0),
    "adapter": (torch.float32, None, 4),
    "adapter on bfloat16": (torch.bfloat16, None, 4),
    "adapter under autocast": (torch.float32, torch.bfloat16, 4),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("family", [LlamaConfig, Qwen3Config])
def test_a_layer_saves_what_is_said(family, case):
    """To the byte: what a model of three layers saves beyond one of two."""
    dtype, autocast, rank = CASES[case]
    found = []
    for layers in (2, 3):
        torch.manual_seed(0)
        policy = AutoModelForCausalLM.from_config(family(**SIZES | {"num_hidden_layers": layers}), dtype=dtype)
        if rank:
            policy = get_peft_model(policy, LoraConfig(r=rank, target_modules="all-linear", task_type="CAUSAL_LM"))
        found.append(saved_bytes(policy, autocast))
    shape = Shape.of(policy)
    setup = _Setup(
        shape, TOKENS, TOKENS, 0, rank, dtype.itemsize, (autocast or dtype).itemsize, bool(autocast), False, False
    )
    weights = (shape.linear + rank * shape.ends) // 3 * setup.activation if autocast else 0
    assert found[1] - found[0] == setup.layer() + weights
