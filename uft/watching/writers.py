"""The TensorBoard writer of a trainer, where it has one."""

from __future__ import annotations

from typing import Any

from transformers.integrations import TensorBoardCallback


def tensorboard_of(trainer: Any) -> Any | None:
    """A `SummaryWriter` that is open; None on processes that do not write, and where nothing is reported there."""
    found = (c for c in trainer.callback_handler.callbacks if isinstance(c, TensorBoardCallback))
    return next((c.tb_writer for c in found if c.tb_writer is not None), None)
