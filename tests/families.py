"""Small models of every family that is tested with packed rows, and ragged examples of pairs and rankings for them."""

from __future__ import annotations

import numpy as np
import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from uft.feedback import Example, Response

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
