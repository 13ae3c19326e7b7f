"""In which order examples come, and which rank gets which: one plan that every rank knows.

accelerate's own sharding gives every rank as many rows by repeating some.  Here an epoch's last step is dealt out as
far as it goes, so that nothing is counted twice, and a rank that gets nothing runs an empty batch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.data_loader import prepare_data_loader
from accelerate.utils import DistributedType
from torch import nn
from torch.utils.data import DataLoader, Sampler
from transformers import TrainingArguments

from uft.collation import Cutter, MicroBatches
from uft.feedback import Need

Shares = list[list[int]]  # per rank, positions in the data set
SHARDED = (DistributedType.FSDP, DistributedType.DEEPSPEED)


class StepSampler(Sampler[list[int]]):
    """The examples of each of this rank's micro-batches.  A batch sampler that knows of the other ranks.

    sampler      the order of all examples; its epochs are set by `set_epoch`
    batch_size   per rank
    cost         of each example; ranks get about as much of it each.  Without it they get consecutive stretches.
    drop_last    leave out what is left over at the end of an epoch
    """

    def __init__(
        self, sampler: Any, batch_size: int, rank: int = 0, world_size: int = 1, cost: Sequence[int] | None = None,
        drop_last: bool = False,
    ):  # fmt: skip
        if not 0 <= rank < world_size or batch_size < 1:
            raise ValueError(f"found rank {rank} of {world_size} and batch size {batch_size}")
        self.sampler, self.batch_size, self.rank, self.world_size = sampler, batch_size, rank, world_size
        self.cost = None if cost is None else np.asarray(cost)
        self.drop_last = drop_last
        if not len(self):
            raise ValueError(f"found {len(sampler)} rows, which make no step of {batch_size * world_size} (drop_last)")

    def __len__(self) -> int:
        whole, left = divmod(len(self.sampler), self.batch_size * self.world_size)
        return whole + bool(left and not self.drop_last)

    def __iter__(self) -> Iterator[list[int]]:
        for shares in self.plan():
            yield shares[self.rank]

    def set_epoch(self, epoch: int) -> None:
        if hasattr(self.sampler, "set_epoch"):
            self.sampler.set_epoch(epoch)

    def plan(self) -> Iterator[Shares]:
        """Each micro-batch of this epoch as every rank's share of it."""
        size = self.batch_size * self.world_size
        order = list(self.sampler)
        for step in range(len(self)):
            yield self._shares(order[step * size : (step + 1) * size])

    def _shares(self, indices: list[int]) -> Shares:
        if self.world_size == 1:
            return [indices]
        if self.cost is None:
            return [indices[r * self.batch_size : (r + 1) * self.batch_size] for r in range(self.world_size)]
        shares: list[list[int]] = [[] for _ in range(self.world_size)]
        spent = [0] * self.world_size
        # the dearest first, each to the rank that has least; places, not values, for a row may come twice
        for place in sorted(range(len(indices)), key=lambda i: -self.cost[indices[i]]):
            r = spent.index(min(spent))
            shares[r].append(place)
            spent[r] += int(self.cost[indices[place]])
        return [[indices[place] for place in sorted(share)] for share in shares]


def make_loader(dataset: Any, batches: StepSampler, collate: Callable, args: TrainingArguments) -> DataLoader:
    """A loader of this rank's micro-batches, left on the CPU: what is counted before a step is counted there."""
    workers = args.dataloader_num_workers
    loader = DataLoader(
        dataset,
        batch_sampler=batches,
        collate_fn=collate,
        num_workers=workers,
        pin_memory=args.dataloader_pin_memory and args.device.type == "cuda",
        persistent_workers=args.dataloader_persistent_workers,
        multiprocessing_context=args.dataloader_multiprocessing_context if workers else None,
        prefetch_factor=args.dataloader_prefetch_factor if workers else None,
        generator=torch.Generator(),  # of its own: the loader draws a seed, and training must not notice
    )
    # as for one process: the sampler has dealt the batches out already
    return prepare_data_loader(loader, args.device, num_processes=1, process_index=0, put_on_device=False)


# ---- passes of several ranks ----


def even_passes(items: list[MicroBatches], cut: Cutter, accelerator: Accelerator) -> list[MicroBatches]:
    """The same micro-batches with empty passes added where ranks must run alike.

    Sharded weights are gathered by all ranks together, so that every rank must run every kind of pass as often.  Other
    ranks only have to take part in the last backward.
    """
    passes = torch.tensor([[len(item.of(needs.__eq__)) for needs in cut.needs] for item in items])
    if accelerator.num_processes > 1 and accelerator.distributed_type in SHARDED and items:
        passes = accelerator.gather(passes.to(accelerator.device)[None]).amax(0).cpu()
    evened = []
    for item, wanted in zip(items, passes.tolist()):
        batches = []
        for need, n in zip(cut.needs, wanted):
            own = item.of(need.__eq__)
            batches += [*own, *(cut.empty(need) for _ in range(n - len(own)))]
        if not any(batch.need.gradient for batch in batches):
            batches.append(cut.empty(Need()))
        evened.append(replace(item, batches=tuple(batches)))
    return evened


def without_sync(accelerator: Accelerator, model: nn.Module) -> AbstractContextManager:
    """A backward whose gradients are not yet added up over ranks."""
    if accelerator.gradient_state.plugin_kwargs.get("sync_each_batch", False):
        return nullcontext()
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        return _no_boundary(accelerator)
    return accelerator.no_sync(model)


@contextmanager
def _no_boundary(accelerator: Accelerator) -> Iterator[None]:
    """DeepSpeed steps in the backward that accelerate says is the last."""
    last = accelerator.gradient_state.sync_gradients
    accelerator.gradient_state._set_sync_gradients(False)
    try:
        yield
    finally:
        accelerator.gradient_state._set_sync_gradients(last)
