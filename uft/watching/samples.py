"""samples.jsonl: what the policy answers to the same few held-out prompts, at every evaluation.

    {"step": 100, "place": 0, "source": "pairs", "kind": "pair", "row": 17,
     "prompt": ..., "answer": ..., "ended": true, "reference": ...}

`reference` is the demonstration, the chosen answer of a pair, or an answer that is said to be good; null where none is.
Answers are greedy, so that they differ by the policy alone.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from transformers import TrainerCallback
from transformers.utils import logging

from uft.data.mixture import FeedbackDataset
from uft.feedback import Example
from uft.head import causal_model
from uft.loader import SHARDED
from uft.responding import respond
from uft.undisturbed import undisturbed
from uft.watching.lines import SAMPLES, append, parsed
from uft.watching.writers import tensorboard_of

logger = logging.get_logger(__name__)

LOOKED_AT = 4  # examples of a source for each one that is wanted, to find other prompts


def has_prompts(data: Any) -> bool:
    """Whether there is something to answer: documents have no prompt."""
    return any(kinds - {"document"} for part in _parts(data) for kinds in part.kinds().values())


def chosen(data: Any, n: int, room: int | None = None) -> list[Example]:
    """n examples with different prompts of at most `room` tokens, or as many as are found: turn by turn of each data
    set and kind, spread evenly over its rows.  A function of the data alone."""
    queues = [
        queue
        for part in _parts(data)
        for examples in part.examples.values()
        for queue in _by_kind(examples, n, room).values()
    ]
    found, seen = [], set()
    while queues and len(found) < n:
        for queue in list(queues):
            fresh = next((e for e in queue if e.prompt.tobytes() not in seen), None)
            if fresh is None:
                queues.remove(queue)
            elif len(found) < n:
                seen.add(fresh.prompt.tobytes())
                found.append(fresh)
    return found


def must_have_prompts(samples: int, data: Any) -> None:
    """Raises ValueError where there is nothing held out that could be answered."""
    if data is None or not has_prompts(data):
        there = "no eval_dataset" if data is None else "an eval_dataset without prompts"
        raise ValueError(f"samples is {samples} and there is {there}; want held-out prompts, or samples: 0")


class SampleAnswers(TrainerCallback):
    """Answers `args.samples` prompts of the evaluation data at every evaluation, each rank its share of them.

    Nothing of training changes.  Raises ValueError where there is nothing to answer, no room for an answer, or weights
    are in shards.
    """

    def __init__(self, trainer: Any):
        args, self.trainer = trainer.args, trainer
        if trainer.accelerator.distributed_type in SHARDED:
            raise ValueError(
                f"samples is {args.samples} and weights are in shards ({trainer.accelerator.distributed_type}); want 0"
            )
        must_have_prompts(args.samples, trainer.eval_dataset)
        own = getattr(causal_model(trainer.model).config.get_text_config(), "max_position_embeddings", None)
        room = None if own is None else own - args.samples_max_new_tokens
        self.examples = chosen(trainer.eval_dataset, args.samples, room)
        if not self.examples:
            raise ValueError(
                f"samples_max_new_tokens is {args.samples_max_new_tokens}; want room for it behind some prompt of "
                f"eval_dataset, in the model's {own} positions"
            )
        self._answered: int | None = None  # the step

    def on_train_begin(self, args, state, control, **kwargs) -> None:
        self._answered = None
        if state.is_world_process_zero:
            _keep_until(Path(args.output_dir) / SAMPLES, state.global_step)

    def on_evaluate(self, args, state, control, **kwargs) -> None:
        if self._answered == state.global_step:  # of several data sets, each is an evaluation
            return
        self._answered = state.global_step
        answers = self._answers()
        if state.is_world_process_zero:
            self._write(Path(args.output_dir) / SAMPLES, state.global_step, answers)

    def _answers(self) -> dict[int, tuple[list[int], bool]]:
        """place -> tokens, and whether the answer ended by itself; all of them on every rank."""
        trainer, args = self.trainer, self.trainer.args
        own = range(args.process_index, len(self.examples), args.world_size)
        found: dict[int, tuple[list[int], bool]] = {}
        with undisturbed(trainer.model), trainer.compute_loss_context_manager():
            if own:
                written = respond(
                    trainer.model, trainer.processing_class, [self.examples[i].prompt.tolist() for i in own],
                    max_new_tokens=args.samples_max_new_tokens, batch_size=args.eval_batch_size,
                )  # fmt: skip
                found = dict(zip(own, written))
        if args.world_size > 1:
            from accelerate.utils import gather_object

            found = {place: answer for each in gather_object([found]) for place, answer in each.items()}
        return found

    def _write(self, path: Path, step: int, answers: Mapping[int, tuple[list[int], bool]]) -> None:
        writer, decode = tensorboard_of(self.trainer), self._text
        for place, example in enumerate(self.examples):
            tokens, ended = answers[place]
            reference = _reference(example)
            entry = {
                "step": step, "place": place, "source": example.source, "kind": example.kind, "row": example.row,
                "prompt": decode(example.prompt), "answer": decode(tokens), "ended": ended,
                "reference": None if reference is None else decode(reference),
            }  # fmt: skip
            try:
                append(path, entry)
            except OSError as error:  # a full disk is for checkpoints to complain about
                logger.warning(f"{path}: cannot be written to ({error.strerror})")
                return
            if writer is not None:
                writer.add_text(f"samples/{place} {example.source}", _markdown(entry), step)

    def _text(self, tokens: Any) -> str:
        ids = [int(t) for t in tokens]
        return self.trainer.processing_class.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)


def _parts(data: Any) -> list[FeedbackDataset]:
    return list(data.values()) if isinstance(data, Mapping) else [data]


def _by_kind(examples: Any, n: int, room: int | None) -> dict[str, Iterator[Example]]:
    """An iterator over the usable examples of each kind; a source has one kind nearly always."""
    spread = np.linspace(0, len(examples) - 1, n).astype(int).tolist()
    others = range(0, len(examples), max(1, len(examples) // (LOOKED_AT * n)))
    order = list(dict.fromkeys([*spread, *others]))

    def of(kind: str) -> Iterator[Example]:
        for i in order:
            example = examples[i]
            fits = len(example.prompt) > 0 and (room is None or len(example.prompt) <= room)
            if example.kind == kind and fits:
                yield example

    return {kind: of(kind) for kind in sorted(examples.kinds - {"document", "mismatched"})}


def _reference(example: Example) -> np.ndarray | None:
    own = [response for response in example.responses if not response.mismatched]
    if example.preferences:
        worse = {b for _, b in example.preferences}
        best = next((a for a, _ in example.preferences if a not in worse), example.preferences[0][0])
        return example.responses[best].tokens
    good = max(own, key=lambda r: -1.0 if np.isnan(r.target) else r.target, default=None)
    return None if good is None or good.target < 0.5 else good.tokens


def _keep_until(path: Path, step: int) -> None:
    """Takes away what an earlier run, or this one behind the checkpoint it goes on from, has written."""
    if not path.exists():
        return
    if not step:
        path.unlink()
        return
    kept = [entry for entry in parsed(path.read_bytes()) if entry.get("step", 0) <= step]
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    aside.unlink(missing_ok=True)
    aside.touch()
    for entry in kept:
        append(aside, entry)
    os.replace(aside, path)


def _markdown(entry: Mapping[str, Any]) -> str:
    parts = [("prompt", entry["prompt"]), ("answer", entry["answer"])]
    parts += [("reference", entry["reference"])] if entry["reference"] is not None else []
    # indented, so that nothing in it is read as Markdown
    blocks = [(name, "\n".join(f"    {line}" for line in text.split("\n"))) for name, text in parts]
    return "\n\n".join(f"**{name}**\n\n{block}" for name, block in blocks)
