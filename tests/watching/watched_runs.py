"""Tiny runs to watch: demonstrations and pairs as text, with a tokenizer that can answer."""

from __future__ import annotations

from pathlib import Path

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tiny import tiny_model, tiny_tokenizer

from uft.config import UnifiedConfig
from uft.data.mixture import load_feedback
from uft.trainer import UnifiedTrainer

PROMPTS = ["say:", "say a b c:", "hello:", "the cat on the mat:", "1 + 2 =", "good:"]
GOOD = [" hello world", " the cat sat on the mat", " c", " good bye", " 3", " bye bye bye"]
BAD = [" mat the on", " b", " a b c d e f g 1 2 3", " hello", " the cat sat", " g"]
DEMONSTRATIONS = [{"prompt": p, "completion": c} for p, c in zip(PROMPTS, GOOD)]
PAIRS = [{"prompt": p, "chosen": c, "rejected": r} for p, c, r in zip(PROMPTS, GOOD, BAD)]
DATA = {"instructions": DEMONSTRATIONS, "preferences": PAIRS}
HELD_OUT = {"instructions": DEMONSTRATIONS[:4], "preferences": PAIRS[:4]}


def config(folder, **changes) -> UnifiedConfig:
    defaults = dict(
        output_dir=str(folder), use_cpu=True, max_steps=6, logging_steps=1, eval_strategy="steps", eval_steps=3,
        per_device_train_batch_size=4, learning_rate=1e-3, save_strategy="no", disable_tqdm=True, report_to="none",
        max_length=64, samples_max_new_tokens=6,
    )  # fmt: skip
    return UnifiedConfig(**defaults | changes)


def trainer(folder, objective="dpo_nll", data=None, held_out=HELD_OUT, callbacks=None, **changes) -> UnifiedTrainer:
    tokenizer = tiny_tokenizer()
    return UnifiedTrainer(
        model=tiny_model(tokenizer, seed=0), objective=objective, args=config(folder, **changes),
        train_dataset=data or DATA, eval_dataset=held_out, processing_class=tokenizer, callbacks=callbacks,
    )  # fmt: skip


def read_data(data):
    return load_feedback(data, tiny_tokenizer(), 64)[0]


def tensorboard(folder) -> EventAccumulator:
    """What TensorBoard shows of the one run below a folder."""
    (events,) = {path.parent for path in Path(folder).rglob("events.out.tfevents.*")}
    return EventAccumulator(str(events)).Reload()


def journal(*metrics: dict, begin: dict | None = None, every: int = 10) -> list[dict]:
    """Entries as a run writes them: a log each `every` steps and seconds."""
    first = {"event": "begin", "time": 1000.0, "step": 0, "max_steps": 100, "plane": [["loss/sft"], ["loss/dpo"]]}
    logs = [
        {"event": "log", "time": 1000.0 + every * i, "step": every * i, **each} for i, each in enumerate(metrics, 1)
    ]
    return [first | (begin or {}), *logs]
