"""What makes a trainer visible: callbacks in the places of transformers' own, and those that write files to follow."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from transformers import ProgressCallback
from transformers.integrations import TensorBoardCallback

from uft.watching.bar import Progress
from uft.watching.facts import Place
from uft.watching.journal import Journal
from uft.watching.pace import Speed
from uft.watching.plane import LossPlane
from uft.watching.tensorboard import GroupedTensorBoard


@dataclass
class Watched:
    """What the callbacks of a trainer share; `place` is set where it trains one of several stages."""

    speed: Speed
    place: Place | None = None


def watch(trainer: Any, samples: bool = False) -> Watched:
    """Adds the callbacks to a trainer that transformers has set up.

    TensorBoard's and the progress bar are put in the places of transformers', where it has these.  The others come
    first, in this order: answers to samples, speed (which is not to count them, and tells those behind it), the
    journal, and the plane of losses that is drawn from it.
    """
    args, handler = trainer.args, trainer.callback_handler
    watched = Watched(Speed(trainer))
    first = [watched.speed]
    if args.logging_strategy != "no" or args.eval_strategy != "no":
        first.append(Journal(trainer))
        wanted = getattr(args, "loss_plane", None)
        if wanted or (wanted is None and args.report_to):
            first.append(LossPlane(trainer))
    if samples:
        from uft.watching.samples import SampleAnswers

        first.insert(0, SampleAnswers(trainer))
    for i, callback in enumerate(handler.callbacks):
        if type(callback) is TensorBoardCallback and "tensorboard" in args.report_to and callback.tb_writer is None:
            handler.callbacks[i] = GroupedTensorBoard(trainer)
        elif type(callback) is ProgressCallback:
            handler.callbacks[i] = Progress(trainer)
    handler.callbacks[:0] = first
    return watched
