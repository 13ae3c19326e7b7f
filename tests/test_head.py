"""The fused head gives what the logits give, for every kind of model, and leaves the others alone."""

import copy
import logging
import sys
from types import MethodType

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from largest import LargestTensor
from mixed import VOCABULARY, dataset, model
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM
from uft_kernels import products

from uft.collation import Collator
from uft.head import fuse_head, has_fused_head, unfuse_head
from uft.linear_head import Scales
from uft.models import AdapterReference, FrozenReference, make_reference, response_logits, score

SIZES = dict(
    vocab_size=VOCABULARY, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, head_dim=8, max_position_embeddings=128, pad_token_id=0, bos_token_id=1, eos_token_id=2,
    initializer_range=0.3,
)  # fmt: skip
# what each family does with its logits; caps far below the logits, so that they tell
FAMILIES = {
    "llama": {},
    "llama tied": {"tie_word_embeddings": True},
    "qwen2": {},
    "qwen3": {},
    "mistral": {"sliding_window": 4},
    "gemma2": {"final_logit_softcapping": 2.0},
    "gemma3_text": {},
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 128},
    "phi": {},  # a bias on the head
    "cohere": {"logit_scale": 0.25},
    "granite": {"logits_scaling": 3.0},
}
EXPECTED = {"gemma2": Scales(1.0, 2.0), "cohere": Scales(0.25), "granite": Scales(round(1 / 3, 6))}


def family(name: str, seed: int = 0) -> nn.Module:
    options = FAMILIES[name]
    sizes = {k: v for k, v in SIZES.items() if name != "gpt2" or k in ("vocab_size", "initializer_range")}
    config = AutoConfig.for_model(name.split()[0], **sizes | options)
    torch.manual_seed(seed)
    return AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()  # GPT-2 has dropout


def batch(padding_side: str = "right"):
    return Collator(pad_token_id=0, sources=("pairs", "demonstrations"), padding_side=padding_side)(
        list(dataset(("pairs", "demonstrations"), 3))
    )


def scored(policy, rows, reference=None):
    """Every number that scoring gives, and a gradient that all of them enter."""
    found = score(policy, rows, reference, divergence=reference is not None)
    outputs = [found.token_logp] + ([found.reference_logp, found.kl, found.reverse_kl] if reference else [])
    loss = sum((output * torch.linspace(1, 2, output.numel()).view_as(output)).sum() for output in outputs)
    wanted = [p for p in policy.parameters() if p.requires_grad]
    return outputs, torch.autograd.grad(loss, wanted, allow_unused=True)


def close(found, wanted):
    for a, b in zip(found, wanted, strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            torch.testing.assert_close(a, b, rtol=2e-4, atol=2e-5 * float(b.detach().abs().max()) + 1e-7)


def same_as_logits(policy, rows, other=None):
    """Fused and unfused copies of the policy agree, with and without a reference."""
    fused, plain = copy.deepcopy(policy), policy
    assert fuse_head(fused) and has_fused_head(fused) and not has_fused_head(plain)
    for reference in (None, other):
        references = [None, None]
        if reference is not None:
            references = [FrozenReference(copy.deepcopy(reference)), FrozenReference(copy.deepcopy(reference))]
            fuse_head(references[0].model)
        (found, gradients), (wanted, expected) = (
            scored(m, rows, r) for m, r in zip((fused, plain), references, strict=True)
        )
        close(found, wanted)
        close(gradients, expected)
    return fused


@pytest.mark.parametrize("name", FAMILIES)
def test_log_probabilities_and_gradients_are_those_of_the_logits(name):
    fused = same_as_logits(family(name), batch(), family(name, seed=1))
    assert fused.fused_head == EXPECTED.get(name, Scales())


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_sides(side):
    same_as_logits(family("llama"), batch(side), family("llama", seed=1))


ADAPTERS = {
    "body": dict(target_modules="all-linear"),
    "head too": dict(target_modules=["q_proj", "lm_head"], lora_alpha=32),
    "head as a whole": dict(target_modules=["q_proj"], modules_to_save=["lm_head"]),
}


@pytest.mark.parametrize("name", ADAPTERS)
def test_adapters(name):
    policy = get_peft_model(family("llama"), LoraConfig(r=4, task_type="CAUSAL_LM", **ADAPTERS[name]))
    with torch.no_grad():
        for key, parameter in policy.named_parameters():
            if "lora_B" in key or "modules_to_save" in key:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    fused = same_as_logits(policy, batch(), family("llama", seed=1))
    reference = AdapterReference()  # the adapter off, its head too
    plain = scored(policy, batch(), reference)
    for found, wanted in zip(scored(fused, batch(), reference), plain):
        close(found, wanted)
    assert plain[0][2].max() > 1e-3


@pytest.mark.parametrize("rank", [3, 16])
def test_an_untrained_adapter_on_a_head_changes_no_bit(rank):
    """At this width the bits of a product depend on how many columns it sums."""
    config = SIZES | dict(hidden_size=256, head_dim=64)
    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", **config))
    policy = get_peft_model(base, LoraConfig(r=rank, task_type="CAUSAL_LM", **ADAPTERS["head too"]))
    fuse_head(policy)
    found = score(policy, batch(), AdapterReference(), divergence=True)
    assert torch.equal(found.logp, found.reference_logp) and found.kl.abs().max() < 1e-5
    found.logp.sum().backward()
    assert policy.lm_head.lora_B.default.weight.grad.any()


def test_variants_of_adapters_keep_their_logits():
    config = LoraConfig(r=4, target_modules=["lm_head"], use_dora=True)
    assert not fuse_head(get_peft_model(family("llama"), config))


@pytest.mark.parametrize("wants", ["nothing", "all"])
def test_margins_are_exactly_zero_however_the_head_is_cut(wants, monkeypatch):
    monkeypatch.setattr(products, "BUDGET", 7 * VOCABULARY * 4)
    monkeypatch.setattr(products, "KEEP", 0)
    policy = family("gemma2").requires_grad_(wants == "all")
    fuse_head(policy)
    found = score(policy, batch(), FrozenReference.of(policy))
    assert torch.equal(found.logp, found.reference_logp)


@pytest.mark.parametrize("fused", [False, True])
def test_no_logits_are_formed(fused, monkeypatch):
    V = 2000
    for name, value in (("BUDGET", 4 * V * 4), ("SLAB", 4 * V * 4), ("KEEP", 0)):
        monkeypatch.setattr(products, name, value)
    policy, rows = model(vocab_size=V), batch()
    if fused:
        fuse_head(policy)
    reference, tokens = FrozenReference.of(policy), int(rows.shifted.sum())
    with LargestTensor() as largest:
        found = score(policy, rows, reference, divergence=True)
        (found.logp.sum() + found.kl.sum()).backward()
    assert (largest.elements < tokens * V) == fused


def test_the_model_stays_what_it_was(tmp_path):
    policy, rows = family("gemma2"), batch()
    plain = copy.deepcopy(policy)
    fuse_head(policy)
    assert torch.equal(policy(input_ids=rows.input_ids).logits, plain(input_ids=rows.input_ids).logits)
    prompt = rows.input_ids[:1, :3]
    texts = [m.generate(prompt, max_new_tokens=5, do_sample=False) for m in (policy, plain)]
    assert torch.equal(*texts)
    policy.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(again) is type(plain) and not has_fused_head(again)
    other = copy.deepcopy(policy)  # is bound to itself, not to what it was copied from
    with torch.no_grad():
        other.get_output_embeddings().weight.mul_(2.0)
    assert not torch.equal(score(other, rows).logp, score(policy, rows).logp)


def test_fusing_twice_changes_nothing():
    policy = model()
    assert fuse_head(policy)
    forward = policy.forward
    assert fuse_head(policy) and policy.forward == forward


class Doubled(nn.Linear):
    def forward(self, hidden):
        return 2 * super().forward(hidden)


class Around(nn.Module):
    """A model around another, whose head is its own."""

    def __init__(self, inner, lowered=None):
        super().__init__()
        self.inner, self.lowered, self.config = inner, lowered, inner.config
        self.get_output_embeddings, self.get_input_embeddings = inner.get_output_embeddings, inner.get_input_embeddings

    def forward(self, **inputs):
        return self.changed(self.inner(**inputs))


class Shifted(Around):
    """Some logits are lowered, among them not the last, which is where a scale could be read off."""

    def changed(self, found):
        lower = torch.zeros(found.logits.shape[-1])
        lower[self.lowered] = 100.0
        found.logits = found.logits - lower
        return found


class Twice(Around):
    """The head runs again while training, as for tokens further ahead."""

    def changed(self, found):
        if self.training:
            self.get_output_embeddings()(torch.zeros(2, 9, 32))
        return found


def test_an_unknown_head_falls_back_with_one_warning(caplog, monkeypatch):
    odd = model()
    odd.lm_head = Doubled(32, VOCABULARY, bias=False)
    shifted, nameless = Shifted(model(), slice(5, 9)), model()
    nameless.get_output_embeddings = lambda: None
    rows = batch()
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    for each, why in ((odd, "Doubled"), (shifted, "neither scaled nor capped"), (nameless, "no output embeddings")):
        caplog.clear()
        assert not fuse_head(each) and not fuse_head(each)
        assert [why in record.message for record in caplog.records] == [True]
    wanted = response_logits(odd, rows).log_softmax(-1).gather(-1, rows.input_ids[:, 1:][rows.shifted][:, None])
    torch.testing.assert_close(score(odd, rows).token_logp[rows.shifted], wanted.squeeze(-1))


def test_a_head_that_runs_twice_while_training_is_refused_there():
    policy = Twice(model())
    assert fuse_head(policy)
    score(policy.eval(), batch())
    with pytest.raises(ValueError, match="runs more than once in a forward; want fused_head=False"):
        score(policy.train(), batch())


def test_what_changes_the_model_afterwards_is_noticed(tmp_path):
    rows = batch()
    policy = model()
    fuse_head(policy)
    wanted = score(policy, rows).logp
    unfuse_head(policy)
    assert not has_fused_head(policy) and "forward" not in policy.__dict__
    torch.testing.assert_close(score(policy, rows).logp, wanted)
    # another head
    fuse_head(policy)
    adapted = get_peft_model(policy, LoraConfig(r=4, target_modules=["lm_head"], use_dora=True))
    assert not has_fused_head(adapted)
    torch.testing.assert_close(score(adapted, rows).logp, wanted)
    assert fuse_head(adapted.merge_and_unload())
    # another forward, as kernels that patch models give one
    policy = model()
    fuse_head(policy)
    policy.forward = MethodType(type(policy).forward, policy)
    assert not has_fused_head(policy)
    torch.testing.assert_close(score(policy, rows).logp, wanted)
    # pickled, which keeps no forward of its own
    fuse_head(policy)
    torch.save(policy, tmp_path / "model.pt")
    again = torch.load(tmp_path / "model.pt", weights_only=False)
    torch.testing.assert_close(score(again, rows).logp, wanted)


def test_low_precision_and_autocast():
    rows = batch()
    low = family("llama").bfloat16()
    fused = copy.deepcopy(low)
    assert fuse_head(fused)
    gold = score(family("llama").double(), rows).token_logp
    errors = [(score(m, rows).token_logp.double() - gold).abs().max() for m in (fused, low)]
    assert errors[0] <= 1.5 * errors[1]  # logits that are never rounded are no worse
    full = family("llama")
    fuse_head(full)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = score(full, rows, FrozenReference.of(full), divergence=True)
    assert found.token_logp.dtype == torch.float32 and torch.equal(found.logp, found.reference_logp)
    (found.logp.sum() + found.kl.sum()).backward()
    assert full.lm_head.weight.grad.dtype == torch.float32


def test_the_wrapper_of_mixed_precision_still_scores():
    policy, rows = family("llama"), batch()
    fuse_head(policy)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        wanted = score(policy, rows).logp
    AcceleratorState._reset_state(reset_partial_state=True)
    try:
        wrapped = Accelerator(cpu=True, mixed_precision="bf16").prepare_model(policy)
        assert has_fused_head(wrapped)
        assert torch.equal(score(wrapped, rows).logp, wanted)
        unfuse_head(wrapped)  # as a later stage may ask for
        assert not has_fused_head(wrapped)
        torch.testing.assert_close(score(wrapped, rows).logp, wanted, rtol=0.05, atol=0.05)
        assert fuse_head(wrapped) and torch.equal(score(wrapped, rows).logp, wanted)
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture
def one_process():
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def wrapped_in(name: str, policy: nn.Module) -> nn.Module:
    if name == "DDP":
        return nn.parallel.DistributedDataParallel(policy, find_unused_parameters=True)
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (1,))
    if name == "FSDP, head apart":
        fully_shard(policy.lm_head, mesh=mesh)
    for layer in policy.model.layers:
        fully_shard(layer, mesh=mesh)
    return fully_shard(policy, mesh=mesh)


@pytest.mark.parametrize("name", ["DDP", "FSDP", "FSDP, head apart"])
def test_wrapped_models(name, one_process):
    policy, rows = model(), batch()
    fuse_head(policy)
    reference = FrozenReference.of(model(seed=1))
    fuse_head(reference.model)

    def backward(policy):
        found = score(policy, rows, reference, divergence=True)
        (found.token_logp.sum() + found.kl.sum()).backward()
        grads = (p.grad.full_tensor() if hasattr(p.grad, "full_tensor") else p.grad for p in policy.parameters())
        return [found.logp.detach(), *(g.clone() for g in grads)]

    wanted = backward(copy.deepcopy(policy))
    for found, expected in zip(backward(wrapped_in(name, policy)), wanted, strict=True):
        torch.testing.assert_close(found, expected)


def test_a_filter_of_the_backward_changes_gradients_and_no_value(monkeypatch):
    from uft_kernels import linear_filter

    monkeypatch.setattr(linear_filter, "DENSE", 2.0)
    exact, rows = model(vocab_size=1000), batch()
    filtered = copy.deepcopy(exact)
    fuse_head(exact), fuse_head(filtered, filter_eps=0.01)
    found, wanted = (scored(policy, rows) for policy in (filtered, exact))
    assert torch.equal(found[0][0], wanted[0][0])
    assert not torch.allclose(found[1][-1], wanted[1][-1])
    # nothing of a model of 1,000 equally likely entries is above 0.01 but what the targets' blocks hold
    assert 0 < int(found[1][-1].any(-1).sum()) < 1000 == int(wanted[1][-1].any(-1).sum())


@pytest.mark.parametrize("options", [{}, {"filter_eps": 2.0**-12}, {"head": "lora"}, {"head": "saved"}], ids=str)
def test_a_reference_sums_in_the_order_of_its_policy(options, monkeypatch):
    """Where one of several ways is taken by what wants a gradient, both take the same."""
    seen = []
    linear = sys.modules["uft.head"].linear_logprob

    def recorded(*args, fused, **rest):
        seen.append(fused)
        return linear(*args, fused=fused, **rest)

    monkeypatch.setattr("uft.head.linear_logprob", recorded)
    policy = family("llama")
    if head := options.get("head"):
        lora = {"target_modules": ["q_proj", "lm_head"]} if head == "lora" else {"modules_to_save": ["lm_head"]}
        policy = get_peft_model(policy, LoraConfig(r=2, task_type="CAUSAL_LM", **lora))
    fuse_head(policy, options.get("filter_eps", 0.0))
    score(policy, batch(), make_reference(policy))
    assert len(seen) == 2 and len(set(seen)) == 1 and seen[0] == (not options.get("filter_eps"))
