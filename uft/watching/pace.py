"""How fast a run is, and how long it has to go, as the process sees it that trains."""

from __future__ import annotations

import time
from typing import Any

from transformers import TrainerCallback

from uft.record import peak_memory_bytes
from uft.watching.rates import time_left


class Speed(TrainerCallback):
    """Adds `tokens_per_second` and `peak_memory_gib` to training logs, for whoever is told of them after it.

    They are no part of the history of a run, which is the same to the bit however often the run was interrupted.
    Tokens are those of all processes (`num_tokens`), seconds those in which steps were taken: neither evaluations nor
    checkpoints, nor what other callbacks did at these.  Memory is the main process's peak since training began: of the
    GPU where there is one, else resident.
    """

    def __init__(self, trainer: Any):
        self.trainer = trainer
        self.began, self.first = time.perf_counter(), 0
        self._mark = self.began
        self._seconds = 0.0
        self._tokens: float | None = None

    def left(self, step: int, total: int) -> tuple[float | None, float | None]:
        """See `time_left`, from what this process has seen of the run."""
        place = self.trainer.watched.place
        costs = (place.costs, place.position) if place else (None, 0)
        return time_left(time.perf_counter() - self.began, step - self.first, total - step, total, *costs)

    def on_train_begin(self, args, state, control, **kwargs) -> None:
        self.began, self.first, self._seconds = time.perf_counter(), state.global_step, 0.0
        # a resumed run goes on counting from what other processes had counted as well, which its first log says
        self._tokens = None if state.global_step else 0.0
        self._mark = self.began

    def on_step_end(self, args, state, control, **kwargs) -> None:
        now = time.perf_counter()
        self._seconds, self._mark = self._seconds + now - self._mark, now

    def on_log(self, args, state, control, logs=None, **kwargs) -> None:
        if logs is not None and "num_tokens" in logs and "loss" in logs:
            if self._tokens is not None and self._seconds > 0:
                logs["tokens_per_second"] = (logs["num_tokens"] - self._tokens) / self._seconds
            self._tokens, self._seconds = logs["num_tokens"], 0.0
            logs["peak_memory_gib"] = peak_memory_bytes() / 2**30
        self._mark = time.perf_counter()

    def on_evaluate(self, args, state, control, **kwargs) -> None:
        self._mark = time.perf_counter()

    on_save = on_evaluate
