"""Which tokens of a packed row see which, what attention kernels are told of it, and which models cannot read one."""

import pytest
import torch
from families import FAMILIES, SMALL, family, ranked
from mixed import dataset, model, trainer
from peft import PromptTuningConfig, get_peft_model
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from uft import attention
from uft.attention import packing_for
from uft.collation import Collator
from uft.packing_probe import TESTED, why_not_packed
from uft.segments import Part, Segments


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
