"""What ends an optimiser step otherwise than planned: a number that is not finite, or a signal to stop.

Both are decided once per step, between the last backward pass and the optimiser: one number is read from the device,
after one reduction where there are several ranks, so that all ranks do the same at the same step.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import TrainerCallback
from transformers.utils import logging

from uft.checkpoint import WholeCheckpoints
from uft.models import Scored
from uft.signals import SIGNALS, Interrupted, StopSignals, Terminated

logger = logging.get_logger(__name__)

IN_A_ROW = 10  # steps that are skipped before the weights themselves must be to blame
SHOWN = 8  # rows of a source that a message names


class NonFiniteStep(FloatingPointError):
    """A loss or a gradient that is NaN or infinite; the weights are those before the step."""


class Seen(NamedTuple):
    """What is kept of a micro-batch until its step is taken; tensors on their device, without their graph."""

    loss: Tensor  # []
    logp: Tensor  # [responses]
    source: Tensor  # [responses]
    row: Tensor  # [responses]


class StepGuard(TrainerCallback):
    """Looks at every optimiser step before it changes a weight."""

    def __init__(self, trainer: Any):
        self.trainer = trainer
        self.signals = StopSignals()
        self.stop: int | None = None  # the signal that all ranks have agreed to follow
        self._seen: list[Seen] = []
        self._in_a_row = 0  # steps that were not finite

    def begin(self) -> None:
        """Before anything of a step is computed or counted."""
        self._seen = []
        self._before = self.trainer.run_state.snapshot()
        self._loss_before = self.trainer._tr_loss.clone()

    def saw(self, loss: Tensor, scored: Scored) -> None:
        """A micro-batch of the step, by its loss."""
        self._seen.append(Seen(loss.detach(), scored.logp.detach(), scored.batch.source, scored.batch.row))

    def on_pre_optimizer_step(self, args, state, control, **kwargs) -> None:
        trainer = self.trainer
        norm = trainer.grad_norm
        norm = torch.as_tensor(norm.full_tensor() if hasattr(norm, "full_tensor") else norm, device=args.device)
        bad = ~torch.stack([seen.loss.float() for seen in self._seen]).isfinite().all()
        if trainer.accelerator.scaler is None:  # which looks for infinite gradients itself, and finds some
            bad = bad | ~norm.isfinite()
        # three flags in one tensor, read by the host once
        flags = torch.cat([bad.float()[None], torch.tensor(self._signalled(), device=args.device)])
        if args.world_size > 1:
            flags = trainer.accelerator.reduce(flags, "sum")
        bad, *signalled = flags.tolist()
        self.stop = next((number for number, n in zip(SIGNALS, signalled) if n), None)
        self._in_a_row = self._in_a_row + 1 if bad else 0
        if bad:
            self._not_finite(args, state, float(norm))
        self._seen = []

    def _signalled(self) -> list[float]:
        return [float(self.signals.received == number) for number in SIGNALS]

    def agreed_stop(self) -> int | None:
        """The signal that some rank has got, asked on all of them."""
        flags = torch.tensor(self._signalled(), device=self.trainer.args.device)
        if self.trainer.args.world_size > 1:
            flags = self.trainer.accelerator.reduce(flags, "sum")
        return next((number for number, n in zip(SIGNALS, flags.tolist()) if n), None)

    # ---- numbers that are not finite ----

    def _not_finite(self, args: Any, state: Any, norm: float) -> None:
        trainer, step = self.trainer, state.global_step + 1
        losses = [float(seen.loss) for seen in self._seen]
        wrong = [x for x in losses if not _is_finite(x)]
        rows, wrong = trainer._gather([_rows(self._seen, trainer.data_collator.sources)]), trainer._gather(wrong)
        # where some micro-batch has a bad loss, those of the others are not to blame
        worst = max(severity for severity, _ in rows)
        where = _named(row for severity, found in rows if severity == worst for row in found)
        what = f"the loss is {wrong[0]}" if wrong else f"the loss is finite, but the norm of its gradient is {norm}"
        skip = args.on_non_finite == "skip" and self._in_a_row < IN_A_ROW
        if self._in_a_row == IN_A_ROW:
            what += f", the {IN_A_ROW}th such step in a row"
        trainer.run_state.restore(self._before, counters=not skip)
        trainer._tr_loss = self._loss_before
        trainer.model_wrapped.zero_grad()  # without gradients the optimiser changes neither weights nor its state
        if skip:
            if args.process_index == 0:
                trainer.run_state.count(skipped_steps=1)
            logger.warning(f"step {step} is skipped: {what}; {where}")
            return
        raise NonFiniteStep(f"step {step}: {what}; {where}; {self._last_good(state.global_step)}")

    def _last_good(self, step: int) -> str:
        if not step:
            return "no step was taken before it"
        try:
            return f"the state before it is in {self.trainer.save_now()}"
        except OSError as error:
            return f"the state before it could not be saved: {error}"


def _is_finite(x: float) -> bool:
    return abs(x) < float("inf")


def _rows(micro_batches: list[Seen], sources: Iterable[str]) -> tuple[int, list[tuple[str, int]]]:
    """The rows to blame, as closely as they are known: 2 where their own log-probability is not finite, 1 where the
    loss of their micro-batch is not, 0 where only the gradient of the step is not."""
    sources, found = list(sources), {0: [], 1: [], 2: []}
    for seen in micro_batches:
        severity = 0 if _is_finite(float(seen.loss)) else 1
        for code, row, logp in zip(seen.source.tolist(), seen.row.tolist(), seen.logp.tolist()):
            found[severity if _is_finite(logp) else 2].append((sources[code], row))
    severity = max((s for s in found if found[s]), default=0)
    return severity, found[severity]


def _named(rows: Iterable[tuple[str, int]]) -> str:
    by_source: dict[str, list[int]] = {}
    for source, row in sorted(set(rows)):
        by_source.setdefault(source, []).append(row)
    parts = []
    for source, numbers in by_source.items():
        more = f" and {len(numbers) - SHOWN} more" if len(numbers) > SHOWN else ""
        parts.append(f"data set {source!r}, row {', '.join(map(str, numbers[:SHOWN]))}{more}")
    return "; ".join(parts)


class GuardedTrainer(WholeCheckpoints):
    """A Trainer that stops between steps when it is told to, and does not take a step that would spoil the weights."""

    guard: StepGuard
    grad_norm: Tensor | float = 0.0

    def _get_grad_norm(self, model, grad_norm=None):
        self.grad_norm = super()._get_grad_norm(model, grad_norm=grad_norm)
        return self.grad_norm

    def _maybe_log_save_evaluate(self, tr_loss, grad_norm, model, *args, **kwargs) -> None:
        super()._maybe_log_save_evaluate(tr_loss, grad_norm, model, *args, **kwargs)
        if self.guard.stop is not None:
            checkpoint = self.save_now()
            # as at the end of training: trackers close their files
            self.control = self.callback_handler.on_train_end(self.args, self.state, self.control)
            self._stop(self.guard.stop, checkpoint)

    def save_now(self) -> Path:
        """The checkpoint of the last step taken; saved unless it has been."""
        checkpoint = Path(self.args.output_dir) / f"checkpoint-{self.state.global_step}"
        if self.saved != checkpoint:
            self._save_checkpoint(self.model, None)
            self.control = self.callback_handler.on_save(self.args, self.state, self.control)
        return checkpoint

    def _stop(self, number: int, checkpoint: Path) -> None:
        self.is_in_train = False
        name = "Ctrl-C" if number == SIGNALS[0] else "SIGTERM"
        onward = "weights alone (save_only_model)" if self.args.save_only_model else "resuming goes on from there"
        steps = f"stopped by {name} after step {self.state.global_step} of {self.state.max_steps}"
        message = f"{steps}; checkpoint in {checkpoint}, {onward}"
        raise (Interrupted if number == SIGNALS[0] else Terminated)(message)

    def guarded_train(self, *args: Any, **kwargs: Any) -> Any:
        """transformers' train, which a signal ends between two steps."""
        self.guard.stop = self.saved = None
        with self.guard.signals:
            output = super().train(*args, **kwargs)
            # a signal behind the last step: what would come next is not begun
            if (number := self.guard.agreed_stop()) is not None:
                # where the best weights have been loaded, those of the last step are not there to be saved
                best = self.state.best_model_checkpoint if self.args.load_best_model_at_end else None
                self._stop(number, self.saved or Path(best) if best else self.save_now())
        return output
