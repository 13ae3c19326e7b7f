"""Small mixed data and models for the tests: every kind of feedback, random tokens, ragged lengths."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence

import numpy as np
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from uft.config import UnifiedConfig
from uft.data.mixture import FeedbackDataset
from uft.feedback import Example, Response
from uft.trainer import UnifiedTrainer

VOCABULARY = 60
KINDS = ("demonstrations", "pairs", "labels", "scores", "documents")


class Tokenizer:
    """As much of a tokenizer as a trainer on tokenised data touches."""

    pad_token_id, bos_token_id, eos_token_id = 0, 1, 2

    def save_pretrained(self, folder, **kwargs):
        pass


def examples(kind: str, n: int = 8, seed: int = 0) -> list[Example]:
    """`n` examples of one kind ("pairs", ...) with lengths that differ."""
    random = np.random.default_rng([seed, KINDS.index(kind)])

    def tokens(k: int) -> np.ndarray:
        return random.integers(3, VOCABULARY, k).astype(np.int32)

    def one(i: int) -> Example:
        prompt, answer = tokens(3 + i % 4), tokens(2 + 3 * (i % 5))
        if kind == "documents":
            return Example("document", tokens(0), (Response(answer),), source=kind, row=i)
        if kind == "demonstrations":
            in_loss = random.random(len(answer)) < 0.8  # as in a conversation of several turns
            in_loss[-1] = True
            return Example("demonstration", prompt, (Response(answer, in_loss, 1.0),), source=kind, row=i)
        if kind == "pairs":
            both = (Response(answer, None, 1.0), Response(tokens(3 + i % 3), None, 0.0))
            return Example("pair", prompt, both, ((0, 1),), source=kind, row=i)
        target = float(i % 3 == 0) if kind == "labels" else float(random.random())
        return Example(kind[:-1], prompt, (Response(answer, None, target),), source=kind, row=i)

    return [one(i) for i in range(n)]


def dataset(kinds: Sequence[str] = KINDS, n: int = 8, **weights: float) -> FeedbackDataset:
    return FeedbackDataset({kind: examples(kind, n) for kind in kinds}, weights=weights or None)


def model(seed: int = 0, **overrides) -> torch.nn.Module:
    torch.manual_seed(seed)
    config = dict(
        vocab_size=VOCABULARY, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=128, pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    return AutoModelForCausalLM.from_config(LlamaConfig(**config | overrides))


def trainer(objective, data, policy=None, *, output_dir=None, callbacks=None, peft_config=None, **args):
    defaults = dict(
        use_cpu=True, per_device_train_batch_size=8, max_steps=2, logging_steps=1, save_strategy="no",
        disable_tqdm=True, learning_rate=1e-2, report_to="none", max_grad_norm=0.0,
    )  # fmt: skip
    eval_dataset = args.pop("eval_dataset", None)
    reference_model = args.pop("reference_model", None)
    return UnifiedTrainer(
        model=policy or model(),
        objective=objective,
        args=UnifiedConfig(output_dir=str(output_dir or tempfile.mkdtemp(prefix="uft-test-")), **defaults | args),
        train_dataset=data,
        eval_dataset=eval_dataset,
        processing_class=Tokenizer(),
        reference=reference_model,
        callbacks=callbacks,
        peft_config=peft_config,
    )


def parameters(policy: torch.nn.Module) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in policy.parameters()])
