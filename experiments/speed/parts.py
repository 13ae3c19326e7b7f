"""Where a step's time goes, the same way for both trainers, and what its tensors take.

data        the next batch, counting it, and moving it to the device
reference   passes without gradient
body        the policy's layers, forward
head        what its forward does behind the layers: log-probabilities of the wanted tokens
backward    of everything, the head's share in it
optimiser   clipping, step, setting gradients to zero
other       the loss from log-probabilities, metrics, logging, callbacks
"""

from __future__ import annotations

import functools
import os
import time
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import torch
from transformers import Trainer, TrainerCallback

from uft.head import causal_model

os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler tells of each start and stop otherwise
PARTS = ("data", "reference", "body", "head", "backward", "optimiser", "other")


class Parts(TrainerCallback):
    """Timers around the parts of a trainer's step; on a GPU each waits for what was started, so that overlap is lost.

    A part's seconds do not hold those of parts inside it.
    """

    def __init__(self, trainer: Trainer, device: torch.device, warmup: int):
        self.device, self.warmup = device, warmup
        self.spent: dict[str, float] = defaultdict(float)
        self._open: list[tuple[str, float, float]] = []  # part, when it began, how long others ran inside it
        for owner, name, part in (
            (trainer, "get_batch_samples", "data"),
            (trainer, "_prepare_inputs", "data"),
            (trainer.accelerator, "backward", "backward"),
            (trainer, "_clip_grad_norm", "optimiser"),
        ):
            setattr(owner, name, self._around(getattr(owner, name), part))
        others = (getattr(trainer, "ref_model", None), getattr(trainer.__dict__.get("reference"), "model", None))
        for model in (trainer.model, *others):
            if isinstance(model, torch.nn.Module):
                self._watch(causal_model(model))
        trainer.add_callback(self)

    def on_train_begin(self, args, state, control, model=None, optimizer=None, **kwargs) -> None:
        for owner, name in ((optimizer, "step"), (model, "zero_grad")):
            setattr(owner, name, self._around(getattr(owner, name), "optimiser"))

    def on_step_end(self, args, state, control, **kwargs) -> None:
        if state.global_step == self.warmup:
            self.spent.clear()

    def seconds(self, whole: float) -> dict[str, float]:
        found = {part: self.spent.get(part, 0.0) for part in PARTS[:-1]}
        return found | {"other": whole - sum(found.values())}

    def _now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    def _enter(self, part: str) -> None:
        self._open.append((part, self._now(), 0.0))

    def _leave(self) -> None:
        part, began, inside = self._open.pop()
        whole = self._now() - began
        self.spent[part] += whole - inside
        if self._open:
            outer, since, nested = self._open[-1]
            self._open[-1] = outer, since, nested + whole

    def _around(self, function: Callable, part: str) -> Callable:
        @functools.wraps(function)
        def timed(*args: Any, **kwargs: Any) -> Any:
            self._enter(part)
            try:
                return function(*args, **kwargs)
            finally:
                self._leave()

        return timed

    def _watch(self, model: torch.nn.Module) -> None:
        """The model's forward, less its layers', is its head's."""
        for module, part in ((model, "head"), (model.base_model, "body")):
            module.register_forward_pre_hook(
                lambda *_, part=part: self._enter(part if torch.is_grad_enabled() else "reference")
            )
            module.register_forward_hook(lambda *_: self._leave(), always_call=True)


def peak_of_tensors(trainer: Trainer) -> int:
    """Bytes that tensors of one more forward and backward take at most beyond what was there before, CPU."""
    items, counted = trainer.get_batch_samples(iter(trainer.get_train_dataloader()), 1, trainer.args.device)
    trainer.model.zero_grad()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        trainer.training_step(trainer.model, items[0], counted)
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak
