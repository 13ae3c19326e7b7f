"""Does a training step take the memory that `uft.memory` says?

Arms      models from 0.1 M parameters to what fits; full weights with a frozen or cached reference, adapters with the
          adapter-off reference; some with gradient checkpointing, whole logits, SGD, autocast, more tokens
Measured  two optimiser steps of UnifiedTrainer on random tokens (dpo_nll: pairs, and as many tokens of demonstrations,
          in two passes), each in a process of its own.  On a CPU the peak of the resident memory less what was resident
          before the model was made; a tiny model has been trained before that, so that libraries are loaded.  glibc is
          told to map every block of 64 KiB or more by itself (MALLOC_MMAP_THRESHOLD_, which also stops it from raising
          that threshold): what is freed goes back at once, and the peak is that of live tensors.  The peak is VmHWM,
          reset before: ru_maxrss of a child begins with what its parent held.  On a GPU
          torch.cuda.max_memory_allocated
Run       python -m experiments.memory [--only NAME] [--largest BYTES]
Writes    experiments/results/memory/: memory.json, report.md, memory.png; the tables of docs/scaling.md
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, PretrainedConfig, Qwen3Config
from transformers.trainer_callback import PrinterCallback

from uft.collation import MicroBatches
from uft.compute import Cost
from uft.config import UnifiedConfig
from uft.data.mixture import FeedbackDataset
from uft.feedback import Batch, Example, Response
from uft.memory import Memory, Shape, estimate
from uft.record import environment, peak_memory_bytes, reset_peak_memory, write_json
from uft.trainer import UnifiedTrainer

FOLDER = Path(__file__).parent / "results" / "memory"
DOCUMENT = Path(__file__).parent.parent / "docs" / "scaling.md"
GIB = 2**30
MALLOC = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_ARENA_MAX": "1", "OMP_NUM_THREADS": "1"}

SIZES = {
    "0.1M": dict(hidden_size=64, intermediate_size=160, num_hidden_layers=2, num_attention_heads=4, vocab_size=512),
    "1M": dict(hidden_size=128, intermediate_size=384, num_hidden_layers=4, num_attention_heads=4, vocab_size=2048),
    "10M": dict(hidden_size=320, intermediate_size=864, num_hidden_layers=7, num_attention_heads=5, vocab_size=8192),
    "100M": dict(hidden_size=768, intermediate_size=2048, num_hidden_layers=12, num_attention_heads=12),
    "350M": dict(hidden_size=1024, intermediate_size=2816, num_hidden_layers=26, num_attention_heads=16),
    "1B": dict(hidden_size=2048, intermediate_size=5632, num_hidden_layers=22, num_attention_heads=32, tied=False),
}
FROZEN, CACHED, LORA = {"reference": "frozen"}, {"reference": "cached"}, {"reference": "adapter", "lora_r": 16}
CHECKPOINTING = {"gradient_checkpointing": True}
ARMS: list[tuple[str, int, dict[str, Any]]] = [  # size, pairs in a step, what `estimate` is told too
    *((size, 2, method) for size in list(SIZES)[:5] for method in (FROZEN, CACHED, LORA)),
    ("1B", 1, LORA),
    ("10M", 8, FROZEN),
    ("10M", 8, FROZEN | CHECKPOINTING),
    ("100M", 4, FROZEN),
    ("100M", 4, FROZEN | CHECKPOINTING),
    ("100M", 4, LORA),
    ("100M", 4, LORA | CHECKPOINTING),
    ("100M", 2, CACHED | {"optim": "sgd"}),
    ("100M", 4, CACHED | {"fused_head": False}),
    ("100M", 2, CACHED | {"autocast": "bfloat16"}),
    ("350M", 2, CACHED | CHECKPOINTING),
]


def config_of(size: str) -> LlamaConfig:
    options = {"vocab_size": 32000, "tied": True} | SIZES[size]
    tied, heads = options.pop("tied"), options["num_attention_heads"]
    return LlamaConfig(
        **options, num_key_value_heads=max(1, heads // 4) if heads % 4 == 0 else heads, tie_word_embeddings=tied,
        max_position_embeddings=2048, pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip


def arguments(arm: dict[str, Any]) -> dict[str, Any]:
    """What `estimate` is told of an arm."""
    return arm | ({"autocast": getattr(torch, arm["autocast"])} if "autocast" in arm else {})


# ---- one measurement, in a process of its own ----


class Tokenizer:
    """As much of a tokenizer as a trainer on tokens touches."""

    pad_token_id, bos_token_id, eos_token_id = 0, 1, 2

    def save_pretrained(self, folder: str, **kwargs: Any) -> None:
        pass


def random_data(pairs: int, vocabulary: int) -> FeedbackDataset:
    """Per pair, prompt 64 and answers 96 each; and two demonstrations of prompt 32 and answer 96: 256 tokens both."""
    random = np.random.default_rng(0)

    def tokens(n: int) -> np.ndarray:
        return random.integers(3, vocabulary, n).astype(np.int32)

    def pair(i: int) -> Example:
        both = (Response(tokens(96), None, 1.0), Response(tokens(96), None, 0.0))
        return Example("pair", tokens(64), both, ((0, 1),), source="pairs", row=i)

    def demonstration(i: int) -> Example:
        return Example("demonstration", tokens(32), (Response(tokens(96), None, 1.0),), source="demonstrations", row=i)

    return FeedbackDataset(
        {"demonstrations": [demonstration(i) for i in range(2 * pairs)], "pairs": [pair(i) for i in range(pairs)]}
    )


def trained(config: LlamaConfig, pairs: int, arm: dict[str, Any]) -> UnifiedTrainer:
    """Two steps, each over all the data."""
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        args = UnifiedConfig(
            output_dir=folder, max_steps=2, per_device_train_batch_size=3 * pairs, save_strategy="no", report_to="none",
            disable_tqdm=True, logging_steps=1, reference=arm["reference"], use_peft="lora_r" in arm,
            lora_r=arm.get("lora_r", 16), optim=arm.get("optim", "adamw_torch_fused"), bf16="autocast" in arm,
            gradient_checkpointing=arm.get("gradient_checkpointing", False), fused_head=arm.get("fused_head", True),
            use_cpu=not torch.cuda.is_available(),
        )  # fmt: skip
        trainer = UnifiedTrainer(
            AutoModelForCausalLM.from_config(config), "dpo_nll", args, random_data(pairs, config.vocab_size),
            processing_class=Tokenizer(),
        )  # fmt: skip
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    return trainer


def resident_bytes() -> int:
    if torch.cuda.is_available():
        return torch.cuda.memory_allocated()
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def measure(size: str, pairs: int, arm: dict[str, Any]) -> dict[str, Any]:
    trained(config_of("0.1M"), 1, arm)
    gc.collect()
    if sys.platform == "linux":
        ctypes.CDLL("libc.so.6").malloc_trim(0)
    reset_peak_memory()
    before, start = resident_bytes(), time.perf_counter()
    trainer = trained(config_of(size), pairs, arm)
    seconds, peak = time.perf_counter() - start, peak_memory_bytes()
    item: MicroBatches = trainer.data_collator(trainer.train_dataset[:])
    passes = [(batch.input_ids.numel(), len(batch.answers), _shared(batch)) for batch in item.of_gradient]
    return {"peak": peak - before, "before": before, "passes": passes, "seconds": seconds}


def _shared(batch: Batch) -> int:
    return sum(part.length + part.shared for part in batch.segments.parts if part.shared)


def measured(size: str, pairs: int, arm: dict[str, Any]) -> dict[str, Any]:
    """As `measure`, in a fresh process."""
    words = [sys.executable, "-m", "experiments.memory", "--child", json.dumps([size, pairs, arm])]
    found = subprocess.run(words, env=os.environ | MALLOC, capture_output=True, text=True)
    if found.returncode:
        raise RuntimeError(f"{size} {arm} ended with {found.returncode}: {found.stderr[-2000:]}")
    return json.loads(found.stdout.splitlines()[-1])


def said(config: PretrainedConfig, passes: list[tuple[int, int, int]], arm: dict[str, Any]) -> Memory:
    """Of the dearest pass; `passes` are tokens, counted and shared ones.  One of them finds the other's gradients."""
    shape, sizes = Shape.of(config), [dict(zip(("tokens", "counted", "shared"), each)) for each in passes]
    found = [estimate(shape, **size, passes=len(passes), **arguments(arm)) for size in sizes]
    return max(found, key=lambda memory: memory.total)


def with_formula(row: dict[str, Any]) -> dict[str, Any]:
    memory = said(config_of(row["size"]), row["passes"], row["arm"])
    more = {"formula": memory.total, "parts": memory.parts, "moment": memory.moment}
    return row | more | {"error": memory.total / row["peak"] - 1}


# ---- tables and the figure ----


def method_of(arm: dict[str, Any]) -> str:
    words = [f"LoRA {arm['lora_r']}, adapter off" if "lora_r" in arm else f"full, {arm['reference']} reference"]
    words += ["gradient checkpointing"] if arm.get("gradient_checkpointing") else []
    words += ["whole logits"] if not arm.get("fused_head", True) else []
    words += [arm[key] for key in ("optim",) if key in arm] + (["bf16 autocast"] if "autocast" in arm else [])
    return ", ".join(words)


def table(rows: list[dict[str, Any]]) -> str:
    lines = [
        "| model | method | tokens a pass | measured, MiB | formula, MiB | error | peak, says the formula, at |",
        "|---|---|--:|--:|--:|--:|---|",
    ]
    for r in rows:
        mib = [f"{r[key] / 2**20:,.1f}" for key in ("peak", "formula")]
        cells = [r["size"], method_of(r["arm"]), str(max(r["passes"])[0]), *mib, f"{r['error']:+.1%}", r["moment"]]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def figure(rows: list[dict[str, Any]], path: Path) -> None:
    from .figures import MARKERS, plt

    figure, axes = plt.subplots(figsize=(5.6, 4.6))
    kinds = {"full, frozen reference": FROZEN, "full, cached reference": CACHED, "LoRA, adapter off": LORA}
    colours = ("#0072B2", "#D55E00", "#009E73")
    ends = np.array([min(r["peak"] for r in rows) / 2, max(r["peak"] for r in rows) * 2]) / 2**20
    axes.fill_between(ends, ends * 0.85, ends * 1.15, color="#dddddd", lw=0, label="± 15 %")
    axes.plot(ends, ends, color="#999999", lw=0.8)
    for (label, kind), colour, marker in zip(kinds.items(), colours, MARKERS):
        of_kind = [r for r in rows if r["arm"]["reference"] == kind["reference"]]
        x, y = (np.array([r[key] for r in of_kind]) / 2**20 for key in ("peak", "formula"))
        axes.plot(x, y, marker, color=colour, label=label, alpha=0.75, markeredgecolor="white", linestyle="none")
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlabel("measured peak, MiB")
    axes.set_ylabel("formula, MiB")
    axes.set_title("memory of two optimiser steps", loc="left")
    axes.legend(frameon=False, loc="upper left")
    figure.savefig(path, bbox_inches="tight")
    plt.close(figure)


def _qwen(hidden: int, intermediate: int, layers: int, heads: int, tied: bool) -> Qwen3Config:
    return Qwen3Config(
        hidden_size=hidden, intermediate_size=intermediate, num_hidden_layers=layers, num_attention_heads=heads,
        num_key_value_heads=8, head_dim=128, vocab_size=151936, tie_word_embeddings=tied,
    )  # fmt: skip


PUBLISHED = {
    "Qwen3 0.6B": _qwen(1024, 3072, 28, 16, True),
    "Qwen3 1.7B": _qwen(2048, 6144, 28, 16, True),
    "Qwen3 4B": _qwen(2560, 9728, 36, 32, True),
    "Qwen3 8B": _qwen(4096, 12288, 36, 32, False),
    "Qwen3 32B": _qwen(5120, 25600, 64, 64, False),
    "Llama 3.1 70B": LlamaConfig(
        hidden_size=8192, intermediate_size=28672, num_hidden_layers=80, num_attention_heads=64, num_key_value_heads=8,
        vocab_size=128256, tie_word_embeddings=False,
    ),
}  # fmt: skip
SHARDED = {"sharding": "fsdp2", "sync_each_batch": True}
BUDGET, LENGTH, HALF = 8192, 1024, {"autocast": "bfloat16"}
# an assumption, not a measurement: 40 % of the 989 TFLOP/s that an H100's data sheet names for bfloat16
RATE = 0.4 * 989e12


def projected() -> str:
    """Memory and time for published models, from formulas alone."""
    layouts = {
        "full, frozen, 1 GPU": FROZEN | HALF,
        "full, cached, 1 GPU": CACHED | HALF,
        "... with checkpointing": CACHED | HALF | CHECKPOINTING,
        "LoRA, 1 GPU": LORA | HALF | CHECKPOINTING,
        "LoRA, bfloat16 weights": LORA | CHECKPOINTING | {"dtype": torch.bfloat16},
        "full, cached, FSDP2, 8 GPUs": CACHED | HALF | CHECKPOINTING | SHARDED | {"ranks": 8},
        "full, cached, ZeRO-2, 8 GPUs": CACHED | HALF | CHECKPOINTING | {"sharding": "zero2", "ranks": 8},
        "full, cached, FSDP2, 64 GPUs": CACHED | HALF | CHECKPOINTING | SHARDED | {"ranks": 64},
    }
    lines = [
        f"| model | {' | '.join(layouts)} | GPU hours per 100 M tokens: full, frozen; full, cached; LoRA |",
        f"|---|{'--:|' * (len(layouts) + 1)}",
    ]
    for name, config in PUBLISHED.items():
        sizes = [
            estimate(config, tokens=BUDGET, counted=BUDGET // 2, passes=2, **arguments(arm)).total / GIB
            for arm in layouts.values()
        ]
        cells = [f"{size:,.0f}" if size >= 10 else f"{size:.1f}" for size in sizes]
        lines.append(f"| {name} | {' | '.join(cells)} | {hours(config)} |")
    return "\n".join(lines)


def hours(config: PretrainedConfig) -> str:
    """Sequences of LENGTH tokens of which half count; what checkpointing computes again is left out."""
    with torch.device("meta"):
        cost = Cost.of(AutoModelForCausalLM.from_config(config))
    forward, backward = cost.forward(LENGTH, LENGTH // 2), cost.backward(LENGTH, LENGTH // 2)
    only_activations = forward + cost.attention * LENGTH**2  # weights are frozen; adapters' own products are left out
    flops = (2 * forward + backward, forward + backward, 2 * forward + only_activations)
    return "; ".join(f"{n * 1e8 / LENGTH / RATE / 3600:.2g}" for n in flops)


def write(record: dict[str, Any], rows: list[dict[str, Any]]) -> None:
    write_json(FOLDER / "memory.json", {**record, "allocator": MALLOC, "rows": rows})
    hardware = record["hardware"]
    where = ", ".join(hardware.get("gpu", [])) or f"{hardware['cpu']}, one thread"
    head = (
        f"Measured {record['date'][:10]} on {where}, torch {record['versions']['torch']}, transformers "
        f"{record['versions']['transformers']}, commit {record['commit']} (the formula may be of a later one); "
        "float32 where nothing else is said.\n\n"
    )
    report = "# Memory of a training step\n\n" + head + table(rows) + "\n\n![measured and formula](memory.png)\n"
    (FOLDER / "report.md").write_text(report)
    figure(rows, FOLDER / "memory.png")
    if DOCUMENT.exists():
        text = DOCUMENT.read_text()
        for name, content in (("measured", head + table(rows)), ("projected", projected())):
            before, _, rest = text.partition(f"<!-- {name} -->\n")
            _, _, after = rest.partition(f"<!-- end of {name} -->")
            text = f"{before}<!-- {name} -->\n{content}\n<!-- end of {name} -->{after}"
        DOCUMENT.write_text(text)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--child", type=json.loads, help=argparse.SUPPRESS)
    parser.add_argument("--only", help="sizes, with commas between them; nothing is written")
    parser.add_argument("--largest", type=float, default=8 * GIB, help="bytes by the formula; larger arms are left out")
    parser.add_argument("--report", action="store_true", help="tables and figure anew, from what was measured")
    args = parser.parse_args()
    if args.child:
        print(json.dumps(measure(*args.child)))
        return
    if args.report:
        record = json.loads((FOLDER / "memory.json").read_text())
        write(record, [with_formula(row) for row in record.pop("rows")])
        return
    rows = []
    for size, pairs, arm in ARMS:
        passes = [(256 * pairs, 192 * pairs, 0)] * 2
        if (args.only and size not in args.only.split(",")) or said(config_of(size), passes, arm).total > args.largest:
            continue
        rows.append(with_formula({"size": size, "arm": arm} | measured(size, pairs, arm)))
        print(table(rows[-1:]).splitlines()[-1], f"{rows[-1]['seconds']:.0f} s", flush=True)
        if not args.only:
            write(environment(), rows)


if __name__ == "__main__":
    main()
