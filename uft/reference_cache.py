"""The reference as numbers on disk: log-probabilities computed once, before the first step.

They are computed in the micro-batches that training will run, so that policy and reference agree to the bit where
they are the same model and every margin starts at exactly 0.  The file is kept under a fingerprint of weights,
tokenised data, objective rows and batch layout; a run with the same fingerprint reads it instead.
"""

from __future__ import annotations

import hashlib
import itertools
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers.utils import logging

from uft.feedback import KINDS, Batch, Collator, Example
from uft.head import has_fused_head
from uft.models import score

logger = logging.get_logger(__name__)

Logps = dict[tuple[str, int], list[float]]


def weights_fingerprint(model: nn.Module) -> str:
    """sha256 over everything that decides what a model computes: its parameters, its config, its adapters'."""
    digest = hashlib.sha256()
    config = {k: v for k, v in model.config.to_dict().items() if k not in ("_name_or_path", "transformers_version")}
    adapters = {
        name: sorted((k, sorted(v) if isinstance(v, set) else v) for k, v in vars(adapter).items())
        for name, adapter in getattr(model, "peft_config", {}).items()
    }
    attention = getattr(model.config, "_attn_implementation", None)
    digest.update(repr((sorted(config.items()), adapters, attention)).encode())
    for name, parameter in sorted(model.state_dict().items()):
        digest.update(f"{name} {parameter.dtype} {tuple(parameter.shape)}".encode())
        digest.update(parameter.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def combined(*parts: object) -> str:
    """One short fingerprint of several."""
    return hashlib.sha256("\n".join(str(part) for part in parts).encode()).hexdigest()[:24]


@torch.no_grad()
def compute_logps(
    model: nn.Module,
    batches: Iterable[Sequence[Example]],
    collate: Callable[[Sequence[Example]], Batch],
    prepare: Callable[[Batch], Batch],
    rows_of: Callable[[Batch], Tensor],
    needed: set[tuple[str, int]],
) -> Logps:
    """log pi_ref(y | x) of every response of the `needed` examples, by (source, row).

    rows_of   which responses of a batch the reference scores; those, and nothing else, form its forward pass, as in
              training.  Mismatched responses run apart, as in training too.
    """
    was_training = model.training
    model.eval()
    logps: Logps = {}
    bar = tqdm(total=len(needed), desc="reference log-probabilities", unit="rows", disable=len(needed) < 1000)
    for examples in batches:
        if needed <= logps.keys():
            break
        fresh = {(e.source, e.row) for e in examples} & needed - logps.keys()
        if not fresh:
            continue
        batch = prepare(collate(examples))
        found = torch.full((len(batch.kind),), float("nan"))
        extra = batch.kind == KINDS.index("mismatched")
        for rows in (rows_of(batch) & ~extra, extra):
            if rows.any():
                part = batch.select(rows)
                found[rows.cpu()] = score(model, part).logp.float().cpu()
        owners = [(e.source, e.row) for e in examples for _ in e.responses]
        new: Logps = {}
        for owner, value in zip(owners, found.tolist()):
            if owner in fresh:
                new.setdefault(owner, []).append(value)
        logps.update(new)
        bar.update(len(new))
    bar.close()
    model.train(was_training)
    return logps


def save_logps(path: Path, logps: Logps) -> None:
    """Written aside and renamed, so that the file is whole or absent."""
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{path.name}.{os.getpid()}.npz")
    try:
        with open(aside, "wb") as file:
            np.savez(
                file,
                source=np.array([source for source, _ in logps]),
                row=np.array([row for _, row in logps], dtype=np.int64),
                count=np.array([len(values) for values in logps.values()], dtype=np.int64),
                logp=np.array([v for values in logps.values() for v in values], dtype=np.float32),
            )
            file.flush()
            os.fsync(file.fileno())
        os.replace(aside, path)
    except OSError as error:
        aside.unlink(missing_ok=True)
        raise OSError(f"{path}: the reference's log-probabilities could not be written ({error.strerror})") from error


def load_logps(path: Path) -> Logps | None:
    """What `save_logps` wrote, or None where there is no such file.  Raises ValueError for a damaged one."""
    if not path.exists():
        return None
    try:
        with np.load(path, allow_pickle=False) as file:
            ends = np.cumsum(file["count"])
            values = np.split(file["logp"].astype(np.float64), ends[:-1])
            keys = zip(file["source"].tolist(), file["row"].tolist())
            return {key: value.tolist() for key, value in zip(keys, values)}
    except Exception as error:
        raise ValueError(f"{path}: not a readable cache of reference log-probabilities ({error})") from error


class ReferenceCache:
    """The cached reference of a trainer: per data set, log-probabilities of the policy before the first step.

    Does nothing unless `wanted`, that is where the objective needs a reference and args.reference is "cached".
    """

    def __init__(self, trainer: Any, *, wanted: bool):
        self.trainer, self.wanted = trainer, wanted
        self._logps: dict[tuple[str, bool], Logps] = {}  # by fingerprint of the data, and whether for training
        self.weights: str | None = None  # fingerprint of the model that they are of

    def prepare(self) -> None:
        """Computes, or reads from disk, what training and evaluation data need; once."""
        if not self.wanted or self._logps:
            return
        trainer = self.trainer
        self.weights = weights_fingerprint(trainer.model)
        evaluation = trainer.eval_dataset
        evaluation = list(evaluation.values()) if isinstance(evaluation, Mapping) else [evaluation]
        for data, training in [(trainer.train_dataset, True), *((data, False) for data in evaluation)]:
            if data is not None:
                self._logps[data.fingerprint, training] = self._of(data, training)
        if trainer.train_dataset is not None:
            trainer.data_collator = self.collator(trainer.train_dataset, training=True)

    def collator(self, data: Any, *, training: bool) -> Collator:
        """Cached numbers differ between training and evaluation data, which may share names and row numbers."""
        if not self.wanted:
            return self.trainer.data_collator
        logps = self._logps.get((data.fingerprint, training))
        if logps is None:
            raise ValueError("reference 'cached' knows only the data sets the trainer was made with")
        kinds = self.trainer.objective.kinds_with_reference
        return replace(self.trainer.data_collator, reference_logps=logps, reference_kinds=kinds)

    def _of(self, data: Any, training: bool) -> Logps:
        trainer, args = self.trainer, self.trainer.args
        size = args.per_device_train_batch_size if training else args.per_device_eval_batch_size
        kinds = trainer.objective.kinds_with_reference
        layout = [size, training, args.seed, args.data_seed, data.weights, args.padding_side, args.pad_to_multiple_of]
        # whole logits are rounded to the dtype of the model, a fused head's are not
        layout += [args.bf16, args.fp16, args.device.type, has_fused_head(trainer.model)]
        name = combined(self.weights, data.fingerprint, sorted(kinds), layout)
        # hubs are not sent what begins with an underscore
        path = Path(args.reference_cache or args.output_dir) / f"_reference-{name}.npz"
        # in the precision of training, which accelerate wraps around the policy only when training begins
        with trainer.accelerator.main_process_first(), trainer.accelerator.autocast():
            needed = {(e.source, e.row) for e in data if e.kind in kinds}
            found = _kept(path, needed)
            if found is None:
                found = compute_logps(
                    trainer.model,
                    _planned_batches(data, size, trainer._get_train_sampler(data) if training else None),
                    replace(trainer.data_collator, reference_logps=None),
                    lambda batch: Batch(trainer._prepare_inputs(batch)),
                    trainer.objective.reference_rows,
                    needed,
                )
                save_logps(path, found)
        if training:
            forwards, flops = self.cost(data)
            trainer.run_state.count(reference_forwards=forwards, flops=flops)
        return found

    def cost(self, data: Any) -> tuple[int, int]:
        """(passes, FLOPs) of the reference over these data; also where another run paid them and left the file."""
        if not self.wanted:
            return 0, 0
        kinds = self.trainer.objective.kinds_with_reference
        responses = [(e, r) for e in data if e.kind in kinds for r in e.responses]
        return len(responses), self.trainer.meter.of_reference(responses)


def _kept(path: Path, needed: set[tuple[str, int]]) -> Logps | None:
    """What is on disk, or None where it has to be computed: the file is missing, or, with a warning, damaged."""
    try:
        found = load_logps(path)
        if found is not None and (lacking := needed - found.keys()):
            source, row = min(lacking)
            raise ValueError(f"{path}: found {len(found)} rows, but not row {row} of {source!r}")
        return found
    except ValueError as error:
        logger.warning(f"{error}; computing it again")
        return None


def _planned_batches(data: Any, size: int, sampler: Any) -> Iterator[list[Example]]:
    """The examples of each micro-batch that will be run, epoch after epoch; without a sampler in the data's order."""
    for epoch in itertools.count():
        if sampler is not None:
            sampler.set_epoch(epoch)
        indices = range(len(data)) if sampler is None else list(sampler)
        for start in range(0, len(indices), size):
            yield [data[i] for i in indices[start : start + size]]
