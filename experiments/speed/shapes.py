"""The models that are timed: shapes of well-known ones with random weights, and small ones for a CPU."""

from __future__ import annotations

from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from ..real.base import BOS, EOS, PAD, make_tokenizer

# of the smallest vocabulary; token ids stay below it, whatever a shape's own is
VOCABULARY = 4096


def _shape(architecture: str, vocabulary: int, hidden: int, inner: int, layers: int, heads: int, kv: int, tied: bool):
    return {
        "model_type": architecture, "vocab_size": vocabulary, "hidden_size": hidden, "intermediate_size": inner,
        "num_hidden_layers": layers, "num_attention_heads": heads, "num_key_value_heads": kv,
        "tie_word_embeddings": tied,
    }  # fmt: skip


SHAPES: dict[str, dict[str, Any]] = {
    "toy": _shape("llama", VOCABULARY, 64, 128, 2, 4, 2, True),
    "small": _shape("llama", VOCABULARY, 192, 768, 4, 6, 3, True),  # a quarter of it is the head, as in Qwen2.5-0.5B
    "0.5b": _shape("qwen2", 151_936, 896, 4864, 24, 14, 2, True),  # Qwen2.5-0.5B
    "1.5b": _shape("qwen2", 151_936, 1536, 8960, 28, 12, 2, True),  # Qwen2.5-1.5B
    "8b": _shape("llama", 128_256, 4096, 14_336, 32, 32, 8, False),  # Llama-3.1-8B
}


def make_model(shape: str, device: torch.device, dtype: torch.dtype, longest: int, seed: int = 0) -> PreTrainedModel:
    """Random weights, made where they will be used.  Dropout is 0, attention is PyTorch's."""
    options = dict(SHAPES[shape])
    special = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    config = AutoConfig.for_model(options.pop("model_type"), max_position_embeddings=longest, **special, **options)
    torch.manual_seed(seed)
    with device:
        return AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation="sdpa")


def make_plain_tokenizer() -> PreTrainedTokenizerFast:
    """What both trainers ask for special tokens; the data are token ids already."""
    tokenizer = make_tokenizer([], 300)
    assert [tokenizer.convert_tokens_to_ids(name) for name in (PAD, BOS, EOS)] == [0, 1, 2]
    return tokenizer
