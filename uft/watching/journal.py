"""progress.jsonl: a line when training begins, a line per log, a line when it ends.  See `uft.watching.lines`."""

from __future__ import annotations

import contextlib
import os
import socket
import time
from pathlib import Path
from typing import Any

from transformers import TrainerCallback
from transformers.utils import logging

from uft.watching.facts import axes_of
from uft.watching.lines import PROGRESS, append

logger = logging.get_logger(__name__)


class Journal(TrainerCallback):
    """Writes on the main process; where that cannot be done it warns once and leaves it."""

    def __init__(self, trainer: Any):
        self.trainer = trainer
        self.path: Path | None = None

    def on_train_begin(self, args, state, control, **kwargs) -> None:
        if not state.is_world_process_zero:
            return
        trainer, place = self.trainer, self.trainer.watched.place
        objective = getattr(trainer, "objective", None)
        self.path = Path(args.output_dir) / PROGRESS
        if state.global_step == 0:
            with contextlib.suppress(OSError):
                self.path.unlink(missing_ok=True)  # of an earlier run, as its run.json
        stages = place and {"names": place.names, "position": place.position, "costs": place.costs}
        self._write(
            event="begin",
            step=state.global_step,
            max_steps=state.max_steps,
            trainer=type(trainer).__name__,
            objective=getattr(objective, "name", None) or getattr(args, "advantage", None),
            plane=place.axes if place else axes_of(objective, trainer.train_dataset),
            stages=stages,
            host=socket.gethostname(),
            pid=os.getpid(),
        )

    def on_log(self, args, state, control, logs=None, **kwargs) -> None:
        self._write(**{"event": "log", "step": state.global_step, "epoch": state.epoch, **(logs or {})})

    def on_train_end(self, args, state, control, **kwargs) -> None:
        stopped = getattr(getattr(self.trainer, "guard", None), "stop", None)
        early = "ended early" if state.global_step < state.max_steps else "finished"
        self._write(event="end", step=state.global_step, reason="stopped" if stopped else early)

    def _write(self, **entry: Any) -> None:
        if self.path is None:
            return
        try:
            append(self.path, {"time": round(time.time(), 3), **entry})
        except OSError as error:  # a full disk is for checkpoints to complain about
            logger.warning(f"{self.path}: cannot be written to ({error.strerror}); this run cannot be watched")
            self.path = None
