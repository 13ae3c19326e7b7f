"""Packed rows, shared prompts and padded batches give each response the same log-probabilities and gradient."""

import copy

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from mixed import Tokenizer, dataset, model, parameters, trainer
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from uft import attention
from uft.attention import packing_for, use_packing
from uft.collation import Collator, Cutter, rows_of
from uft.feedback import Example, Need, Response
from uft.head import fuse_head
from uft.models import score
from uft.packing_probe import TESTED, why_not_packed
from uft.segments import Part, Segments

SMALL = dict(
    vocab_size=60, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, max_position_embeddings=128, pad_token_id=0, bos_token_id=1, eos_token_id=2,
)  # fmt: skip
WINDOW = 6  # shorter than most prompts, so that a response loses sight of the beginning of its prompt
FAMILIES = {
    "llama": dict(model_type="llama"),
    "qwen2": dict(model_type="qwen2"),
    "qwen2 windows": dict(
        model_type="qwen2", use_sliding_window=True, sliding_window=WINDOW, max_window_layers=1,
        layer_types=["full_attention", "sliding_attention"],
    ),
    "qwen3": dict(model_type="qwen3", head_dim=8),
    "mistral windows": dict(model_type="mistral", sliding_window=WINDOW),
    "phi3 windows": dict(model_type="phi3", sliding_window=WINDOW),
    "gemma2": dict(model_type="gemma2", head_dim=8, sliding_window=WINDOW, attn_logit_softcapping=5.0),
    "gemma3": dict(model_type="gemma3_text", head_dim=8, sliding_window=WINDOW),
    "olmo2": dict(model_type="olmo2"),
    "granite": dict(model_type="granite", attention_multiplier=0.5),
    "gpt_neox": dict(model_type="gpt_neox"),
}  # fmt: skip


def family(name: str, attends: str = "sdpa") -> torch.nn.Module:
    options = SMALL | FAMILIES[name]
    torch.manual_seed(0)
    config = CONFIG_MAPPING[options.pop("model_type")](**options)
    policy = AutoModelForCausalLM.from_config(config, attn_implementation=attends)
    for parameter in policy.parameters():  # so that attention matters
        if parameter.ndim > 1:
            parameter.data.mul_(5)
    return policy.eval()


def example(random: np.random.Generator, prompt: int, responses: list[int]) -> Example:
    def tokens(n: int) -> np.ndarray:
        return random.integers(3, 60, n).astype(np.int32)

    made = []
    for n in responses:
        in_loss = random.random(n) < 0.8
        in_loss[-1] = True
        made.append(Response(tokens(n), in_loss, 1.0))
    pairs = tuple((k, k + 1) for k in range(len(made) - 1))
    return Example("pair", tokens(prompt), tuple(made), pairs)


def ranked() -> list[Example]:
    """Pairs, a lone response, and a prompt with five responses."""
    random = np.random.default_rng(0)
    lengths = [(9, [4, 7]), (3, [5]), (12, [1, 6, 3, 8, 2]), (1, [3, 3]), (7, [10, 1])]
    return [example(random, *each) for each in lengths]


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


def test_positions_and_parts_by_hand():
    segments = Segments.of([Part(5, 0), Part(2, 0, 3), Part(2, 2)])
    assert segments.position_ids().tolist() == [[0, 1, 2, 3, 4, 3, 4, 0, 1]]
    assert segments.cu_q.tolist() == [0, 5, 7, 9]
    assert segments.cu_k.tolist() == [0, 5, 10, 12]
    assert segments.keys.tolist() == [0, 1, 2, 3, 4, 0, 1, 2, 5, 6, 7, 8]
    seen = [
        "100000000", "110000000", "111000000", "111100000", "111110000",
        "111001000", "111001100",
        "000000010", "000000011",
    ]  # fmt: skip
    assert segments.mask().int().tolist() == [[int(c) for c in row] for row in seen]
    # positions 3 and 4 of the second response see two positions back: (2, 3) and (3, 4)
    assert segments.mask(2)[5].nonzero().flatten().tolist() == [2, 5]
    assert segments.mask(2)[6].nonzero().flatten().tolist() == [5, 6]


def test_what_varlen_kernels_are_told_is_what_masks_say():
    """Queries aligned with the end of their keys, keys taken from the row by `keys`."""
    segments = Collator(0, packed=True)(ranked()).segments
    for window in (None, 4):
        dense = segments.mask(window)
        for s in range(len(segments.parts)):
            q0, q1 = segments.cu_q[s : s + 2].tolist()
            k0, k1 = segments.cu_k[s : s + 2].tolist()
            keys = segments.keys[k0:k1]
            for q in range(q0, q1):
                end = (k1 - k0) - (q1 - q0) + (q - q0) + 1
                begin = 0 if window is None else max(0, end - window)
                assert sorted(keys[begin:end].tolist()) == dense[q].nonzero().flatten().tolist()


def varlen_by_hand(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, **options):
    """What flash attention's variable-length kernel is documented to compute, in float32 and one sequence at a time."""
    groups = query.shape[1] // key.shape[1]
    assert groups == 1 or options.get("enable_gqa")
    left, right = options.get("window_size", (-1, 0 if options.get("is_causal") else -1))
    found = []
    for s in range(len(cu_seq_q) - 1):
        q = query[cu_seq_q[s] : cu_seq_q[s + 1]]
        k, v = (x[cu_seq_k[s] : cu_seq_k[s + 1]].repeat_interleave(groups, 1) for x in (key, value))
        assert len(q) <= max_q and len(k) <= max_k
        scores = torch.einsum("qhd,khd->hqk", q, k) * options.get("scale", q.shape[-1] ** -0.5)
        apart = torch.arange(len(k)) - (torch.arange(len(q))[:, None] + len(k) - len(q))  # 0 where aligned with the end
        hidden = (apart > right) if right >= 0 else torch.zeros_like(apart, dtype=torch.bool)
        hidden = hidden | (apart < -left) if left >= 0 else hidden
        found.append(torch.einsum("hqk,khd->qhd", scores.masked_fill(hidden, -torch.inf).softmax(-1), v))
    return torch.cat(found)


OLDER = frozenset(("query", "is_causal"))


@pytest.mark.parametrize("window, known", [(None, None), (4, None), (None, OLDER)])
@pytest.mark.parametrize("scaling", [None, 0.7])
@pytest.mark.parametrize("sharing", [True, False])
def test_the_call_of_varlen_attention(window, known, scaling, sharing, monkeypatch):
    """Against attention by parts, for this version of torch and for one that takes fewer arguments."""
    segments = Collator(0, packed=True, prefix_sharing=sharing)(ranked()).segments
    query, key, value = (torch.randn(1, heads, len(segments), 8, requires_grad=True) for heads in (4, 2, 2))
    monkeypatch.setattr(attention, "varlen_attn", varlen_by_hand)
    if known is not None:
        monkeypatch.setattr(attention, "KNOWN", known)
    assert {"window_size", "enable_gqa", "scale"} <= attention.KNOWN or known is OLDER
    outputs = [
        attention._varlen(query, key, value, segments, scaling, window),
        attention._by_parts(query, key, value, segments, 0.0, scaling, window),
    ]
    weight = torch.randn_like(outputs[0])
    torch.testing.assert_close(*outputs, rtol=1e-5, atol=1e-5)
    gradients = [torch.autograd.grad((out * weight).sum(), (query, key, value)) for out in outputs]
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-5)


def test_an_older_varlen_attention_has_no_windows(monkeypatch):
    monkeypatch.setattr(attention, "KNOWN", OLDER)
    segments = Segments.of([Part(3, 0)])
    with pytest.raises(ValueError, match="no sliding windows in varlen_attn; want layout padded"):
        attention._varlen(*torch.randn(3, 1, 2, 3, 8), segments, None, 2)


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


# ---- models that cannot ----


def test_a_model_that_does_not_hand_segments_on_is_found_out():
    policy = family("llama")
    layer = policy.model.layers[1].self_attn
    original = layer.forward
    layer.forward = lambda *args, segments=None, **kwargs: original(*args, **kwargs)
    assert "did not hand `segments`" in why_not_packed(policy, "segments")
    assert policy.config._attn_implementation == "sdpa"


def test_a_model_with_positions_of_its_own_is_found_out():
    policy = family("gpt_neox")
    original = policy.forward
    policy.forward = lambda *args, position_ids=None, **kwargs: original(*args, **kwargs)
    assert "differ" in why_not_packed(policy, "segments")
    with pytest.raises(ValueError, match="which GPTNeoXForCausalLM cannot read: its logits in a packed row differ"):
        trainer("sft", dataset(("demonstrations",)), policy, layout="packed")


def test_recurrent_layers_read_padded_batches():
    config = CONFIG_MAPPING["mamba"](vocab_size=60, hidden_size=32, num_hidden_layers=2, state_size=4, pad_token_id=0)
    policy = AutoModelForCausalLM.from_config(config)
    run = trainer("sft", dataset(("demonstrations",)), policy, layout="auto")
    assert not run.data_collator.collate.packed
    run.train()


def test_prompt_tuning_reads_padded_batches():
    policy = get_peft_model(model(), PromptTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM"))
    run = trainer("sft", dataset(("demonstrations",)), policy)
    assert not run.data_collator.collate.packed
    run.train()


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


@pytest.mark.parametrize("window", [6, 14])  # shorter and longer than what the probe runs
def test_windows_that_attention_is_not_told_of_are_found_out(window):
    config = CONFIG_MAPPING["phimoe"](**SMALL | dict(sliding_window=window, num_local_experts=2))
    policy = AutoModelForCausalLM.from_config(config)
    assert "asks its attention for a window of None" in why_not_packed(policy, "segments")


def test_windows_of_another_name_are_refused():
    config = CONFIG_MAPPING["gpt_neo"](vocab_size=60, hidden_size=32, num_layers=2, num_heads=4, window_size=16,
                                       attention_types=[[["global", "local"], 1]])  # fmt: skip
    policy = AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    with pytest.raises(ValueError, match="its window_size is a window of its own"):
        packing_for(policy)


def test_half_precision_hides_no_mistake(monkeypatch):
    """Positions that are ignored, in bfloat16 and at the weights of a fresh model, of a family that is not tested."""
    monkeypatch.setattr("uft.packing_probe.TESTED", ())
    assert why_not_packed(model().bfloat16(), "segments") is None
    policy = model().bfloat16()
    original = policy.forward
    policy.forward = lambda *args, position_ids=None, **kwargs: original(*args, **kwargs)
    assert "mistakes would show as" in why_not_packed(policy, "segments")


def test_families_believed_in_half_precision_are_those_of_the_tests():
    assert {options["model_type"] for options in FAMILIES.values()} == set(TESTED)


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
    rows = [row for i, e in enumerate(ranked()) for row in rows_of(e, i)]
    for options in (dict(), dict(packed=True), dict(packed=True, prefix_sharing=False)):
        collate = Collator(0, **options)
        assert collate.cost(rows) == collate.batch(rows).input_ids.numel()


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
