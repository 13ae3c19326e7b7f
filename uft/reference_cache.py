"""The reference as numbers on disk: log-probabilities computed once, before the first step, by all ranks together.

They are computed in the micro-batches that training will run, so that policy and reference agree to the bit where
they are the same model and every margin starts at exactly 0; or, where args.reference_cache_exact is off, in large
batches that no seed and no batch size decides.  The file is kept under a fingerprint of weights, tokenised data,
objective rows and batch layout; a run with the same fingerprint reads it instead.
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers.utils import logging

from uft.collation import Cutter, MicroBatches
from uft.feedback import Batch, Example
from uft.head import has_fused_head, is_peft
from uft.loader import StepSampler, even_passes
from uft.logps import Logps
from uft.models import adapter_is_identity, score
from uft.objective import Objective

logger = logging.get_logger(__name__)


# of configurations: what says where a model came from, and not what it computes.  Saving a model fills in the
# architecture, and transformers takes over special tokens from the tokenizer when training begins.
NAMES = (
    "_name_or_path", "base_model_name_or_path", "transformers_version", "use_cache", "dtype", "torch_dtype", "revision",
    "inference_mode", "peft_version", "architectures", "pad_token_id", "bos_token_id", "eos_token_id",
)  # fmt: skip


def weights_fingerprint(model: nn.Module) -> str:
    """sha256 over everything that decides what a model computes: its parameters, its config, its adapters'; but for
    an adapter that changes nothing yet."""
    digest = hashlib.sha256()
    config = {k: v for k, v in model.config.to_dict().items() if k not in NAMES}
    nothing = is_peft(model) and adapter_is_identity(model)
    adapters = (
        {}
        if nothing
        else {
            name: sorted((k, sorted(v) if isinstance(v, set) else v) for k, v in vars(adapter).items())
            for name, adapter in getattr(model, "peft_config", {}).items()
        }
    )
    attention = getattr(model.config, "_attn_implementation", None)
    digest.update(repr((sorted(config.items()), adapters, attention)).encode())
    for name, parameter in sorted(model.state_dict().items()):
        if nothing and ".lora_" in name:
            continue
        digest.update(f"{name} {parameter.dtype} {tuple(parameter.shape)}".encode())
        digest.update(parameter.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def combined(*parts: object) -> str:
    """One short fingerprint of several."""
    return hashlib.sha256("\n".join(str(part) for part in parts).encode()).hexdigest()[:24]


@torch.no_grad()
def compute_logps(
    score_batch: Callable[[Batch], Tensor],
    plan: Iterable[Sequence[Sequence[Example]]],
    rank: int,
    cut: Cutter,
    even: Callable[[MicroBatches], MicroBatches],
    needed: Mapping[str, np.ndarray],
    found: Logps,
) -> Logps:
    """log pi_ref(y | x) of the responses of the `needed` examples; this rank's share of them is filled in.

    plan          each micro-batch as every rank's share of it, until all that is needed has come
    score_batch   log-probabilities of a batch's responses, float [R]
    even          adds the passes that other ranks run, see `uft.loader.even_passes`
    needed        by source, bool [examples]
    """
    to_come = {name: mask.copy() for name, mask in needed.items()}
    left = sum(int(mask.sum()) for mask in to_come.values())
    bar = tqdm(total=left, desc="reference log-probabilities", unit="rows", disable=left < 1000)
    for shares in plan if left else ():
        fresh = {(e.source, e.index) for share in shares for e in share if to_come[e.source][e.index]}
        for source, index in fresh:
            to_come[source][index] = False
        if fresh:
            for batch in even(cut(shares[rank])).of(lambda need: need.reference):
                values = score_batch(batch).float().cpu().tolist()
                for source, index, k, value in zip(
                    *(batch[name].tolist() for name in ("source", "index", "response")), values
                ):
                    name = cut.sources[source]
                    if (name, index) in fresh:
                        found.values[name][found.first[name][index] + k] = value
        bar.update(len(fresh))
        left -= len(fresh)
        if not left:
            break
    bar.close()
    return found


LARGE = 16384  # tokens of a batch that is run without gradient, where its layout is free


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
            trainer.data_collator = self.cutter(trainer.train_dataset, training=True)

    def cutter(self, data: Any, *, training: bool) -> Cutter:
        """Cached numbers differ between training and evaluation data, which may share names and row numbers."""
        if not self.wanted:
            return self.trainer.data_collator
        logps = self._logps.get((data.fingerprint, training))
        if logps is None:
            raise ValueError("reference 'cached' knows only the data sets the trainer was made with")
        kinds = self.trainer.objective.kinds_with_reference
        cut = self.trainer.data_collator
        return replace(cut, collate=replace(cut.collate, reference_logps=logps, reference_kinds=kinds))

    def _of(self, data: Any, training: bool) -> Logps:
        trainer, args = self.trainer, self.trainer.args
        kinds = trainer.objective.kinds_with_reference
        cut = trainer.data_collator
        cut = replace(cut, collate=replace(cut.collate, reference_logps=None))
        # whole logits are rounded to the dtype of the model, a fused head's are not
        layout = [args.bf16, args.fp16, args.device.type, has_fused_head(trainer.model)]
        layout += [_scored(trainer.objective, kind) for kind in sorted(kinds)]
        if args.reference_cache_exact:
            batches = trainer.batches_of(data, training=training)
            layout += [batches.batch_size, batches.world_size, training, args.seed, args.data_seed, data.weights]
            layout += [args.padding_side, args.pad_to_multiple_of, args.token_budget, cut.collate.packed]
            layout += [args.prefix_sharing, [need for need in cut.needs if need.reference]]
            plan = _planned(data, batches, training)
        else:
            cut = replace(cut, token_budget=max(LARGE, args.token_budget or 0))
            plan = _sorted(data, kinds, args.world_size)
        name = combined(self.weights, data.fingerprint, sorted(kinds), layout)
        # hubs are not sent what begins with an underscore
        path = Path(args.reference_cache or args.output_dir) / f"_reference-{name}.npz"
        needed = {name: part.are(kinds) for name, part in data.examples.items()}
        found = _kept(path, needed)
        if not _all_agree(found is not None, trainer.accelerator):
            was_training = trainer.model.training
            trainer.model.eval()
            # in the precision of training, which accelerate wraps around the policy only when training begins
            with trainer.accelerator.autocast():
                found = compute_logps(
                    lambda batch: score(trainer.model, trainer._prepare_inputs(batch)).logp,
                    plan, args.process_index, cut,
                    lambda item: even_passes([item], cut, trainer.accelerator)[0], needed, Logps.of(data),
                )  # fmt: skip
            trainer.model.train(was_training)
            found = _gathered(found, trainer.accelerator)
            if args.should_save:
                found.save(path)
            trainer.accelerator.wait_for_everyone()
        if training and args.process_index == 0:  # counters of ranks are added up
            forwards, flops = self.cost(data)
            trainer.run_state.count(reference_forwards=forwards, flops=flops)
        return found

    def cost(self, data: Any) -> tuple[int, int]:
        """(passes, FLOPs) of the reference over these data; also where another run paid them and left the file."""
        if not self.wanted:
            return 0, 0
        kinds = self.trainer.objective.kinds_with_reference
        passes, flops, block = 0, 0, 4096  # whose examples are held at once
        for start in range(0, len(data), block):
            responses = [(e, r) for e in data[start : start + block] if e.kind in kinds for r in e.responses]
            passes += len(responses)
            flops += self.trainer.meter.of_reference(responses)
        return passes, flops


def _scored(objective: Objective, kind: str) -> list[bool]:
    """Which responses of such examples are scored, by whether they are chosen and rejected."""
    needs = (objective.need(kind, chosen, rejected) for chosen in (False, True) for rejected in (False, True))
    return [need is not None and need.reference for need in needs]


def _planned(data: Any, batches: StepSampler, training: bool) -> Iterator[list[list[Example]]]:
    """The examples of each micro-batch that will be run, by rank, epoch after epoch."""
    for epoch in itertools.count() if training else (0,):
        batches.set_epoch(epoch)
        for shares in batches.plan():
            yield [[data[i] for i in share] for share in shares]


def _sorted(data: Any, kinds: frozenset[str], ranks: int) -> Iterator[list[list[Example]]]:
    """All examples that are needed, those of about one length together, in as large batches as are run at once."""
    needed = np.concatenate([part.are(kinds) for part in data.examples.values()])
    lengths = [(int(data.lengths[i]), int(i)) for i in np.flatnonzero(needed)]
    step: list[list[Example]] = [[]]
    room = LARGE
    for tokens, i in sorted(lengths, reverse=True):
        if tokens > room and step[-1]:
            if len(step) == ranks:
                yield step
                step = []
            step.append([])
            room = LARGE
        step[-1].append(data[i])
        room -= tokens
    if step[-1]:
        yield [*step, *([] for _ in range(ranks - len(step)))]


def _all_agree(yes: bool, accelerator: Accelerator) -> bool:
    """A file may have become visible to one rank before another looked."""
    return bool(
        accelerator.reduce(torch.tensor(float(yes), device=accelerator.device), "sum") == accelerator.num_processes
    )


def _gathered(own: Logps, accelerator: Accelerator) -> Logps:
    """The shares of all ranks, those of lower ranks first: a row that several had is the first one's."""
    if accelerator.num_processes == 1:
        return own
    found, *others = gather_object([own])
    for share in others:
        found.fill(share)
    return found


def _kept(path: Path, needed: Mapping[str, np.ndarray]) -> Logps | None:
    """What is on disk, or None where it has to be computed: the file is missing, or, with a warning, damaged."""
    try:
        found = Logps.load(path)
        for source, wanted in needed.items() if found is not None else ():
            if source not in found.first or len(found.first[source]) != len(wanted) + 1:
                raise ValueError(f"{path}: found no log-probabilities of {source!r}, or of another number of rows")
            if (lacking := wanted & ~found.known(source)).any():
                raise ValueError(f"{path}: found nothing for row {int(lacking.argmax())} of {source!r}")
        return found
    except ValueError as error:
        logger.warning(f"{error}; computing it again")
        return None
