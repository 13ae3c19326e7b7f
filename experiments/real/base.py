"""The base model: a byte-level BPE learnt from running text, and a small Llama pretrained on it."""

from __future__ import annotations

import contextlib
import os
import random
import shutil
from dataclasses import asdict
from functools import cache
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from uft.data import Source, Template, load_feedback
from uft.stages import Budget

from .. import runs
from .files import Place, fingerprint, key_of, read
from .settings import Base, Scale

PAD, BOS, EOS = "<pad>", "<bos>", "<eos>"


def make_tokenizer(texts: list[str], vocabulary: int) -> PreTrainedTokenizerFast:
    """Byte-level BPE with <bos> in front; no chat template."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=vocabulary,
            special_tokens=[PAD, BOS, EOS],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    bos = tokenizer.token_to_id(BOS)
    tokenizer.post_processor = processors.TemplateProcessing(single=f"{BOS} $A", special_tokens=[(BOS, bos)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token=PAD, bos_token=BOS, eos_token=EOS)


@cache
def load_tokenizer(place: Place, scale: Scale) -> PreTrainedTokenizerFast:
    """From the cache, or learnt from a fixed sample of the text: it is the same for every seed."""
    base = scale.base
    at = place.made / "tokenizers" / key_of([base.vocabulary, base.tokenizer_characters, fingerprint(place.data)])
    if not at.exists():
        texts = sample(read(place.data, "pretrain"), base.tokenizer_characters, seed=0)
        aside = at.with_name(f".{at.name}.{os.getpid()}")
        make_tokenizer(texts, base.vocabulary).save_pretrained(aside)
        with contextlib.suppress(OSError):  # another run was first
            aside.rename(at)
        shutil.rmtree(aside, ignore_errors=True)
    return PreTrainedTokenizerFast.from_pretrained(at)


def sample(rows: list[dict[str, Any]], characters: int, seed: int) -> list[str]:
    """Documents in random order, as many as it takes."""
    rows = random.Random(seed).sample(rows, len(rows))
    taken, size = [], 0
    for row in rows:
        if size >= characters:
            break
        taken.append(row["text"])
        size += len(row["text"])
    return taken


def llama(base: Base, tokenizer: PreTrainedTokenizerFast, max_length: int) -> LlamaForCausalLM:
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=base.hidden_size,
            intermediate_size=base.intermediate_size,
            num_hidden_layers=base.layers,
            num_attention_heads=base.heads,
            max_position_embeddings=2 * max_length,
            tie_word_embeddings=True,
            pad_token_id=tokenizer.pad_token_id,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
        )
    )


def base_folder(place: Place, scale: Scale, seed: int) -> Path:
    return place.made / "bases" / key_of([asdict(scale.base), scale.max_length, fingerprint(place.data), seed])


def load_base(place: Place, scale: Scale, seed: int) -> LlamaForCausalLM:
    """The pretrained base of this seed, in float32; made first where it is not yet."""
    at = base_folder(place, scale, seed)
    if not (at / "record.json").exists():
        pretrain(place, scale, seed)
    return LlamaForCausalLM.from_pretrained(at, dtype=torch.float32)


def pretrain(place: Place, scale: Scale, seed: int) -> dict[str, Any]:
    """Trains and keeps the base of a seed: its own initial weights, its own sample of the text.  Returns the record."""
    base, tokenizer = scale.base, load_tokenizer(place, scale)
    # more than enough: a token of this vocabulary is less than six characters on average
    texts = sample(read(place.data, "pretrain"), 6 * base.tokens, seed + 1)
    data, _ = load_feedback(
        Source("text", data=[{"text": text} for text in texts], kind="document", on_bad_row="drop"),
        Template(tokenizer, scale.max_length),
    )
    torch.manual_seed(seed)
    model = llama(base, tokenizer, scale.max_length)
    batch = max(1, base.batch_tokens // scale.max_length)
    steps = Budget(steps=max(1, base.tokens // base.batch_tokens))
    trainer = runs.fit(
        model, "sft", data, tokenizer, steps, learning_rate=base.learning_rate, batch_size=batch, seed=seed,
        weight_decay=0.1,
    )  # fmt: skip
    found = trainer.record()
    record = {
        "seed": seed,
        "parameters": found["model"]["parameters"],
        "steps": found["steps"],
        "compute": found["compute"],
        "loss": [(entry["step"], entry["loss"]) for entry in found["metrics"] if "loss" in entry],
    }
    runs.keep(base_folder(place, scale, seed), trainer.model, record)
    return record
