"""A dry run: a model of two layers, a dozen rows in the columns of the hub's data sets, and local lm-eval tasks.

Everything else is what a real run does: the same recipes, arms, stages, metrics and report.  Nothing is downloaded.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import MistralConfig, MistralForCausalLM, PreTrainedTokenizerFast

from .tasks import TASKS, Task

TASK_FILES = Path(__file__).parent / "dry_tasks"
SHOTS = 2  # at most, of the few rows there are
TEXT = "Question: what is the colour of the sea ? Answer: the sea is blue. User: Assistant: #### 1 2 3 4 5 6 7 8 9 0"
SUBJECTS = ("sea", "sky", "grass", "snow", "coal", "lemon")
COLOURS = ("blue", "grey", "green", "white", "black", "yellow")


def dry_tasks() -> tuple[Task, ...]:
    """The columns and metrics of the real table, on local rows."""
    return tuple(replace(task, name=f"dry_{task.column}", shots=min(task.shots, SHOTS)) for task in TASKS)


WORDS = (
    "--max_steps=2", "--gradient_accumulation_steps=2", "--max_length=128", "--bf16=false", "--use_cpu=true",
    "--gradient_checkpointing=false", "--disable_tqdm=true", "--report_to=none", "--logging_steps=1", "--lora_r=2",
    "--lora_alpha=20000",  # so that two small steps can be seen in scores
)  # fmt: skip


def build(folder: Path) -> tuple[str, dict[str, str]]:
    """Writes model and data; returns the model's folder, and the files that stand for the hub's data sets."""
    model = folder / "model"
    if not (model / "config.json").exists():
        tokenizer = _tokenizer()
        tokenizer.save_pretrained(model)
        _model(tokenizer).save_pretrained(model)
    files = {name: _write(folder / f"{name.split('/')[1]}.jsonl", rows) for name, rows in _rows().items()}
    return str(model), {name: str(path) for name, path in files.items()}


def _write(path: Path, rows: Sequence[Mapping[str, Any]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def _rows() -> dict[str, list[dict[str, Any]]]:
    """In the columns of ultrachat_200k, HelpSteer2 and HelpSteer2-DPO."""
    ask = [f"what is the colour of the {subject} ?" for subject in SUBJECTS]
    good = [f"the {subject} is {colour}." for subject, colour in zip(SUBJECTS, COLOURS)]
    bad = [f"the {subject} is {colour}." for subject, colour in zip(SUBJECTS, COLOURS[1:] + COLOURS[:1])]
    told = [
        [{"role": "user", "content": q}, {"role": "assistant", "content": a}, {"role": "user", "content": "sure ?"},
         {"role": "assistant", "content": f"yes, {a}"}]
        for q, a in zip(ask, good)
    ]  # fmt: skip
    scores = {
        True: {"helpfulness": 4, "correctness": 4, "coherence": 4, "complexity": 1, "verbosity": 1},
        False: {"helpfulness": 1, "correctness": 0, "coherence": 3, "complexity": 1, "verbosity": 1},
    }
    return {
        "HuggingFaceH4/ultrachat_200k": [
            {"prompt": q, "prompt_id": str(k), "messages": m} for k, (q, m) in enumerate(zip(ask, told))
        ],
        "nvidia/HelpSteer2": [
            {"prompt": q, "response": answer, **scores[is_good]}
            for q, a, b in zip(ask, good, bad)
            for answer, is_good in ((a, True), (b, False))
        ],
        "Atsunori/HelpSteer2-DPO": [
            {"prompt": q, "chosen_response": a, "rejected_response": b} for q, a, b in zip(ask, good, bad)
        ],
    }


def _tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level, so that every text has tokens."""
    bpe = Tokenizer(models.BPE(unk_token="<unk>"))
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    bpe.train_from_iterator(
        [TEXT, *SUBJECTS, *COLOURS] * 20,
        trainers.BpeTrainer(
            vocab_size=400, special_tokens=["<unk>", "<s>", "</s>"], show_progress=False,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        ),
    )  # fmt: skip
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe, unk_token="<unk>", bos_token="<s>", eos_token="</s>", pad_token="</s>"
    )


def _model(tokenizer: PreTrainedTokenizerFast) -> MistralForCausalLM:
    config = MistralConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, max_position_embeddings=256, sliding_window=None,
        initializer_range=0.2,  # ten times the usual: predictions that are far from uniform
        pad_token_id=tokenizer.pad_token_id, bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return MistralForCausalLM(config)
