"""Packed rows, shared prompts and padded batches give each response the same log-probabilities and gradient."""

import copy

import numpy as np
import pytest
import torch
from families import FAMILIES, SMALL, example, family, ranked
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from mixed import Tokenizer, dataset, model, parameters, trainer
from peft import LoraConfig, get_peft_model
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from uft.attention import packing_for, use_packing
from uft.collation import Collator, Cutter, Filling, rows_of
from uft.feedback import Example, Need, Response
from uft.head import fuse_head
from uft.models import score
from uft.packing_probe import why_not_packed


def found(policy: torch.nn.Module, batch) -> tuple[torch.Tensor, torch.Tensor]:
    """log-probabilities [R] and the gradient of a weighted sum of them."""
    policy.zero_grad()
    logp = score(policy, batch).logp
    (logp * torch.linspace(-1, 2, len(logp), dtype=logp.dtype)).sum().backward()
    return logp.detach(), torch.cat([p.grad.flatten() for p in policy.parameters() if p.grad is not None])


def assert_equal_layouts(policy, examples, tolerance=1e-5) -> None:
    plain = copy.deepcopy(policy)
    for layout in (dict(prefix_sharing=False), dict(), dict(pad_to_multiple_of=64)):
        batch = Collator(0, packed=True, **layout)(examples)
        logp, gradient = found(policy, batch)
        want, want_gradient = found(plain, Collator(0)(examples))
        assert (logp - want).abs().max() <= tolerance * want.abs().max(), layout
        assert (gradient - want_gradient).norm() <= tolerance * want_gradient.norm(), layout


@pytest.mark.parametrize("fused", [True, False], ids=["fused", "logits"])
@pytest.mark.parametrize("name", FAMILIES)
def test_all_layouts_agree(name, fused):
    policy = family(name, "eager" if name == "gemma2" else "sdpa")
    how = packing_for(policy)
    assert why_not_packed(policy, how) is None
    assert how == ("masks" if name == "gemma2" else "segments")
    if fused:
        assert fuse_head(policy)
    assert_equal_layouts(policy, ranked())


@pytest.mark.parametrize("name", ["llama", "qwen2 windows", "mistral windows"])
def test_masks_and_segments_agree(name):
    policy = family(name, "eager")
    use_packing(policy, "masks")
    assert_equal_layouts(policy, ranked())
    policy = family(name, "sdpa")
    use_packing(policy, "masks")
    assert_equal_layouts(policy, ranked())


@given(
    lengths=st.lists(
        st.tuples(st.integers(1, 9), st.lists(st.integers(1, 9), min_size=1, max_size=4)), min_size=1, max_size=5
    ),
    window=st.sampled_from([None, 2, 5]),
    seed=st.integers(0, 9),
)
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_layouts_agree_for_any_lengths(lengths, window, seed):
    random = np.random.default_rng(seed)
    examples = [example(random, *each) for each in lengths]
    policy = AutoModelForCausalLM.from_config(CONFIG_MAPPING["mistral"](**SMALL | dict(sliding_window=window)))
    use_packing(policy.eval(), "segments")
    assert_equal_layouts(policy, examples)


def test_equal_prompts_of_different_examples_are_run_once():
    random = np.random.default_rng(0)
    first = example(random, 8, [3, 4])
    second = Example("demonstration", first.prompt.copy(), (Response(np.arange(3, 8, dtype=np.int32)),))
    batch = Collator(0, packed=True)([first, second])
    assert batch.input_ids.shape == (1, 8 + 3 + 4 + 5)
    assert batch.prompt.tolist() == [0, 0, 1]
    policy = family("llama")
    use_packing(policy, "segments")
    assert_equal_layouts(policy, [first, second])


def test_a_window_forgotten_would_be_seen():
    """The comparison above fails where sliding windows go by places in the row."""
    policy = family("mistral windows")
    use_packing(policy, "segments")
    right = score(policy, Collator(0, packed=True)(ranked())).logp
    policy.config.sliding_window = None
    for layer in policy.model.layers:
        layer.self_attn.sliding_window = None
    wrong = score(policy, Collator(0, packed=True)(ranked())).logp
    assert (right - wrong).abs().max() > 1e-3


# ---- what goes with it ----


@pytest.mark.parametrize("option", ["checkpointing", "lora", "bfloat16", "compiled"])
def test_layouts_agree_with(option):
    policy = family("qwen2 windows")
    assert why_not_packed(policy, "segments") is None
    fuse_head(policy)
    if option == "lora":
        policy = get_peft_model(policy, LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"))
        for name, parameter in policy.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.1)
    if option == "checkpointing":
        policy.gradient_checkpointing_enable(dict(use_reentrant=False))
        policy.train()
    if option == "compiled":
        torch._dynamo.reset()
        compiled = torch.compile(policy, backend="aot_eager")
        batch = Collator(0, packed=True)(ranked())
        torch.testing.assert_close(score(compiled, batch).logp, score(policy, batch).logp, rtol=1e-5, atol=1e-5)
    if option == "bfloat16":
        with torch.autocast("cpu", torch.bfloat16):
            packed, padded = (score(policy, Collator(0, packed=p)(ranked())).logp for p in (True, False))
        exact = score(policy, Collator(0)(ranked())).logp
        worst = (padded - exact).abs().max()
        assert (packed - exact).abs().max() <= 3 * worst and worst > 0
        return
    assert_equal_layouts(policy, ranked())


def test_generation_is_not_touched():
    plain, packed = family("qwen2 windows"), family("qwen2 windows")
    use_packing(packed, "segments")
    ids = torch.randint(3, 60, (2, 12))
    mask = torch.ones_like(ids)
    mask[0, :5] = 0
    options = dict(attention_mask=mask, do_sample=False, max_new_tokens=8)
    assert torch.equal(plain.generate(ids, **options), packed.generate(ids, **options))


# ---- cutting ----


def needs(kind, chosen, rejected):
    return Need(reference=kind == "pair")


def test_a_batch_is_cut_within_its_budget_and_nothing_is_lost():
    examples = ranked() * 4
    for packed in (True, False):
        for sharing in (True, False):
            collate = Collator(0, packed=packed, prefix_sharing=sharing)
            cut = Cutter(collate, needs, (Need(reference=True),), token_budget=100)(examples)
            assert all(batch.input_ids.numel() <= 100 for batch in cut.batches)
            assert len(cut.batches) < len(examples)
            lengths = sorted(n for batch in cut.batches for n in batch.length.tolist())
            assert lengths == sorted(len(e.prompt) + len(r.tokens) for e in examples for r in e.responses)
            assert sum(len(b.preferences) for b in cut.batches) == sum(len(e.preferences) for e in examples)
            assert cut.examples.total() == len(examples)


def test_one_example_may_exceed_the_budget():
    cut = Cutter(Collator(0, packed=True), needs, (Need(reference=True),), token_budget=5)(ranked())
    assert sorted(len(batch.kind) for batch in cut.batches) == [1, 2, 2, 2, 5]


def test_what_is_read_is_what_cost_says():
    units = [rows_of(e, i) for i, e in enumerate([*ranked(), *ranked()])]  # each prompt comes again
    for options in (dict(), dict(packed=True), dict(packed=True, prefix_sharing=False)):
        for multiple in (1, 32):
            collate = Collator(0, pad_to_multiple_of=multiple, **options)
            filling, rows = Filling(collate), []
            for unit in units:
                rows = [*rows, *unit]
                assert filling.cost_with(unit) == collate.batch(rows).input_ids.numel()
                filling.add(unit)


def test_a_budget_counts_padding_to_a_multiple_and_changes_no_loss():
    sizes, losses = {}, {}
    for budget in (None, 64):
        run = trainer(
            "dpo_nll", dataset(("demonstrations", "pairs")), layout="padded", pad_to_multiple_of=16, optim="sgd",
            token_budget=budget, max_length=64, per_device_train_batch_size=16,
        )  # fmt: skip
        sizes[budget] = seen = []
        run.model.register_forward_pre_hook(
            lambda model, args, kwargs, seen=seen: seen.append(kwargs["input_ids"].shape), with_kwargs=True
        )
        run.train()
        losses[budget] = [entry["loss"] for entry in run.state.log_history if "loss" in entry]
    assert all(width % 16 == 0 for _, width in sizes[None] + sizes[64])
    assert max(n * width for n, width in sizes[64]) == 64  # a pair of the widest, and never more
    assert max(n * width for n, width in sizes[None]) > 64
    np.testing.assert_allclose(losses[64], losses[None], rtol=1e-5)
    assert len(losses[64]) == 2


def test_sharing_reads_fewer_tokens_and_reports_them():
    counts = {}
    for name, options in {"padded": {"layout": "padded"}, "packed": {"prefix_sharing": False}, "shared": {}}.items():
        run = trainer("dpo_nll", dataset(("demonstrations", "pairs")), max_steps=1, per_device_train_batch_size=16,
                      **options)  # fmt: skip
        run.train()
        counts[name] = run.counters()
    pairs, alone = dataset(("pairs",)), dataset(("demonstrations",))
    prompts = sum(len(e.prompt) for e in [*pairs, *alone])
    answers = sum(len(r.tokens) for e in [*pairs, *alone] for r in e.responses)
    assert counts["shared"]["tokens_run"] == prompts + answers
    assert counts["packed"]["tokens_run"] == counts["packed"]["tokens"]
    assert counts["padded"]["tokens_run"] > counts["packed"]["tokens_run"] > counts["shared"]["tokens_run"]
    # what the method costs is not what the layout wastes or saves
    assert len({c["flops"] for c in counts.values()}) == len({c["tokens"] for c in counts.values()}) == 1


def test_every_layout_trains_to_the_same_weights():
    ends = [
        parameters(_trained(**options))
        for options in ({"layout": "padded"}, {"layout": "packed"}, {"layout": "packed", "token_budget": 128,
                                                                     "max_length": 64})
    ]  # fmt: skip
    for end in ends[1:]:
        assert (end - ends[0]).abs().max() <= 1e-4


def _trained(**options):
    run = trainer("dpo_nll", dataset(("demonstrations", "pairs")), max_steps=4, optim="sgd", **options)
    run.train()
    return run.model


def test_tokenizers_without_padding_are_served():
    class NoPad(Tokenizer):
        pad_token_id = None

    from uft.config import UnifiedConfig
    from uft.trainer import UnifiedTrainer

    run = UnifiedTrainer(model(), "sft", UnifiedConfig(output_dir="unused", use_cpu=True, report_to="none"),
                         dataset(("demonstrations",)), processing_class=NoPad())  # fmt: skip
    assert run.data_collator.collate.pad_token_id == Tokenizer.eos_token_id


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["llama", "qwen2 windows", "mistral windows", "granite"])
def test_layouts_agree_on_a_gpu(name):
    """In bfloat16, where packed rows are attended to by PyTorch's variable-length flash attention."""
    policy = family(name).cuda()
    exact = score(policy, Collator(0)(ranked()).to("cuda")).logp
    policy = policy.bfloat16()
    want, want_gradient = found(policy, Collator(0)(ranked()).to("cuda"))
    assert why_not_packed(policy, "segments") is None
    for sharing in (True, False):
        logp, gradient = found(policy, Collator(0, packed=True, prefix_sharing=sharing)(ranked()).to("cuda"))
        assert (logp - exact).abs().max() <= 3 * (want - exact).abs().max()
        assert (gradient - want_gradient).norm() <= 0.05 * want_gradient.norm()


@pytest.mark.gpu
def test_a_trainer_packs_on_a_gpu():
    run = trainer("dpo_nll", dataset(("demonstrations", "pairs")), use_cpu=False, bf16=True, layout="packed")
    run.train()
    assert np.isfinite(run.state.log_history[0]["loss"])
    assert run.state.log_history[0]["rewards/margins"] == 0.0


@pytest.mark.parametrize("packed", [False, True])
def test_a_response_without_tokens_is_refused(packed):
    responses = (Response(np.array([6])), Response(np.array([], dtype=np.int32)))
    empty = Example("pair", np.array([5]), responses, ((0, 1),), "s", 4)
    with pytest.raises(ValueError, match="row 4 of 's': found a response without tokens"):
        Collator(0, sources=("s",), packed=packed)([empty])
