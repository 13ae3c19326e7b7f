"""The base model: trained from scratch on the world's documents.

Run     python -m experiments.lab.base --seed 0
Writes  experiments/lab/base_models/seed0
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shutil
import time
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from uft.collation import Collator

from .data import documents, examples
from .tokenizer import lab_tokenizer
from .world import TEST, World, make_world

BASE_MODELS = Path(__file__).parent / "base_models"
STEPS, BATCH, LR, WARMUP, WEIGHT_DECAY = 1600, 64, 3e-3, 100, 0.01
WIDTH, HEAD = 96, 24  # hidden size of the shipped models, and of a head


def lab_config(width: int = WIDTH) -> LlamaConfig:
    tokenizer = lab_tokenizer()
    return LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=8 * width // 3,
        num_hidden_layers=3,
        num_attention_heads=width // HEAD,
        max_position_embeddings=64,
        tie_word_embeddings=True,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )


def load_base(seed: int, width: int = WIDTH, cache: Path | None = None) -> LlamaForCausalLM:
    """The base model of this seed, in float32, ready to be trained.

    That of the usual width is shipped; one of another width is trained when it is first asked for, and kept in `cache`.
    """
    if width != WIDTH:
        path = Path(cache or "runs/bases") / f"width{width}-seed{seed}"
        if not path.exists():
            _made(path, seed, width)
        return LlamaForCausalLM.from_pretrained(path, dtype=torch.float32)
    path = BASE_MODELS / f"seed{seed}"
    if not path.exists():
        raise ValueError(f"no base model for seed {seed}; make it with: python -m experiments.lab.base --seed {seed}")
    return LlamaForCausalLM.from_pretrained(path, dtype=torch.float32)


def _made(path: Path, seed: int, width: int) -> None:
    """Written aside and renamed; when two processes arrive at once the later finds it there."""
    # wider models take smaller steps
    model = train_base(make_world(seed), seed, lr=LR * min(1.0, WIDTH / width), width=width)
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    model.to(torch.float16).save_pretrained(aside)
    try:
        aside.rename(path)
    except OSError:
        if not path.exists():
            raise
        shutil.rmtree(aside)


def train_base(
    world: World, seed: int, steps: int = STEPS, batch_size: int = BATCH, lr: float = LR, width: int = WIDTH
):
    torch.manual_seed(seed)
    model = LlamaForCausalLM(lab_config(width))
    collate = Collator(pad_token_id=model.config.pad_token_id)
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, 0.95), weight_decay=WEIGHT_DECAY)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda t: _warmup_then_cosine(t, steps))
    start = time.perf_counter()
    for step in range(steps):
        batch = collate(examples(documents(world, batch_size, seed=step)))
        logits = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits[:, :-1]
        targets = batch.input_ids[:, 1:].masked_fill(~batch.shifted, -100)
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if step % 200 == 199:
            print(f"step {step + 1}  loss {loss.item():.4f}  {time.perf_counter() - start:.0f} s", flush=True)
    return model


def _warmup_then_cosine(step: int, steps: int) -> float:
    if step < WARMUP:
        return (step + 1) / WARMUP
    return 0.5 * (1 + math.cos(math.pi * (step - WARMUP) / (steps - WARMUP)))


def main() -> None:
    from .measures import fact_recall, skill_accuracy  # measures load base models

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--output", type=Path, help="instead of base_models/seed<seed>")
    arguments = parser.parse_args()
    world, start = make_world(arguments.seed), time.perf_counter()
    model = train_base(world, arguments.seed, arguments.steps)
    seconds = time.perf_counter() - start
    record = {
        "seed": arguments.seed,
        "steps": arguments.steps,
        "batch_size": BATCH,
        "lr": LR,
        "seconds": round(seconds, 1),
        "parameters": sum(p.numel() for p in model.parameters()),
        "fact_recall": fact_recall(model, world.facts),
        "skill": skill_accuracy(model, TEST)["skill"],
    }
    output = arguments.output or BASE_MODELS / f"seed{arguments.seed}"
    model.to(torch.float16).save_pretrained(output)
    (output / "record.json").write_text(json.dumps(record, indent=2) + "\n")
    print(json.dumps(record))


if __name__ == "__main__":
    main()
