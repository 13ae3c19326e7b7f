"""Checkpoints that are whole or absent, and finding the newest whole one."""

from __future__ import annotations

import contextlib
import json
import math
import os
import re
import shutil
from pathlib import Path

from safetensors import SafetensorError
from transformers import Trainer
from transformers.trainer_callback import TrainerState
from transformers.trainer_utils import TrainOutput
from transformers.utils import logging

from uft.manifest import damage, write_manifest
from uft.metrics import RunState
from uft.run_identity import check_identity, write_identity

logger = logging.get_logger(__name__)

_NAME = re.compile(r"checkpoint-(\d+)")
RECORD = "run.json"
ASIDE = "partial"  # a checkpoint is written in this folder, flushed to disk, and renamed


def publish(aside: Path, final: Path) -> None:
    """Makes a directory written aside visible under its final name, in one step, after flushing it to disk."""
    for path in [*(p for p in aside.rglob("*") if p.is_file()), aside]:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    os.rename(aside, final)
    descriptor = os.open(final.parent, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def remove(checkpoint: Path, aside: Path) -> None:
    """Takes a checkpoint away in one step, so that a kill does not leave half of it under its name."""
    if checkpoint.exists():
        aside.mkdir(exist_ok=True)
        os.rename(checkpoint, aside / f"removed-{checkpoint.name}")


def superfluous(folder: Path, limit: int, best: Path | None, written: Path | None = None) -> list[Path]:
    """All but the newest `limit` checkpoints.  The best one stays too, in place of the oldest but not of the newest.

    written   the checkpoint that was just written, by default that of the highest number; higher ones are torn, or of
              an older run, and count as the oldest
    """
    numbered = _numbered(folder)
    last = max((n for n, path in numbered if written in (None, path)), default=0)
    found = [path for _, _, path in sorted((n <= last, n, path) for n, path in numbered)]
    kept = found[-limit:]
    if best in found and best not in kept:
        kept = [best, *(kept[1:] or kept)]
    return [path for path in found if path not in kept]


def _numbered(folder: Path) -> list[tuple[int, Path]]:
    return [(int(m.group(1)), p) for p in folder.iterdir() if (m := _NAME.fullmatch(p.name)) and p.is_dir()]


def is_whole(path: Path) -> bool:
    """Whether everything that was written is still there."""
    return damage(path) is None


def last_checkpoint(output_dir: str | os.PathLike) -> str | None:
    """The newest whole checkpoint of a run, or None.  Torn ones are passed over, with a warning."""
    folder = Path(output_dir)
    if not folder.is_dir():
        return None
    for _, path in sorted(_numbered(folder), reverse=True):
        if (problem := damage(path)) is None:
            return str(path)
        logger.warning(f"passed over a torn checkpoint: {problem}")
    return None


def check_whole(checkpoint: Path) -> None:
    """Raises ValueError for a torn checkpoint, and says which one may take its place."""
    if problem := damage(checkpoint):
        other = last_checkpoint(checkpoint.parent)
        raise ValueError(f"cannot resume: {problem}; " + (f"{other} is whole" if other else "no other one is whole"))


def check_writable(folder: str | os.PathLike) -> None:
    """Raises OSError where nothing can be written into a folder, before hours are spent on what should go there."""
    probe = Path(folder) / f".writable.{os.getpid()}"
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
        probe.write_bytes(b"x")
        probe.unlink()
    except OSError as error:
        with contextlib.suppress(OSError):
            probe.unlink(missing_ok=True)
        raise OSError(f"{folder}: cannot be written to ({error.strerror}); want a folder for checkpoints") from error


class WholeCheckpoints(Trainer):
    """A Trainer whose checkpoints appear under their name only when everything in them is on disk."""

    identity: dict  # see `run_identity`
    saved: Path | None = None  # the checkpoint that was written last
    _aside: Path | None = None

    def _get_output_dir(self, trial) -> str:
        return str(self._aside or super()._get_output_dir(trial))

    def _save_checkpoint(self, model, trial) -> None:
        """Written aside by transformers, flushed, and renamed: a kill at any moment leaves it whole or absent."""
        run_dir = Path(super()._get_output_dir(trial))
        name = f"checkpoint-{self.state.global_step}"
        pushes, self.args.push_to_hub = self.args.push_to_hub, False
        self._aside = run_dir / ASIDE
        try:
            if self.args.should_save:
                shutil.rmtree(self._aside, ignore_errors=True)
            self.accelerator.wait_for_everyone()  # or what another rank writes there goes too
            super()._save_checkpoint(model, trial)
            if self.state.best_global_step:  # transformers looked for it under the name aside
                best = run_dir / f"checkpoint-{self.state.best_global_step}"
                self.state.best_model_checkpoint = str(best)
            if self.args.should_save:
                self.state.save_to_json(str(self._aside / name / "trainer_state.json"))
            self.accelerator.wait_for_everyone()
            if self.args.should_save:
                write_identity(self.identity, self._aside / name)
                write_manifest(self._aside / name)
                remove(run_dir / name, self._aside)
                publish(self._aside / name, run_dir / name)
                shutil.rmtree(self._aside, ignore_errors=True)
        except (OSError, RuntimeError, SafetensorError) as error:  # what a full disk is depends on who writes
            if self.args.should_save:
                shutil.rmtree(self._aside, ignore_errors=True)
            whole = last_checkpoint(run_dir)
            raise OSError(
                f"{run_dir / name}: the checkpoint could not be written ({' '.join(str(error).split())}); "
                + (f"{whole} is the newest whole one" if whole else "there is no earlier one")
            ) from error
        finally:
            self._aside, self.args.push_to_hub = None, pushes
        if self.args.should_save and self.args.save_total_limit:
            best = self.state.best_model_checkpoint
            for path in superfluous(run_dir, self.args.save_total_limit, Path(best) if best else None, run_dir / name):
                remove(path, run_dir / ASIDE)
            shutil.rmtree(run_dir / ASIDE, ignore_errors=True)
        self.saved = run_dir / name
        if pushes:
            self._push_from_checkpoint(str(run_dir / name))

    def check_folders(self, checkpoint: str | None) -> None:
        """Raises where checkpoints cannot be written, or the one to go on from is torn."""
        if self.args.should_save:
            check_writable(self.args.output_dir)
        if checkpoint:
            check_whole(Path(checkpoint))

    def check_resumable(self, checkpoint: str) -> None:
        """Raises ValueError for a checkpoint of a run that would not have gone on as this one will."""
        check_identity(self.identity, Path(checkpoint), self.args.resume_despite or ())

    def planned_steps(self) -> int:
        """Optimiser steps from the first to the last, as transformers counts them."""
        if self.args.max_steps > 0:
            return self.args.max_steps
        passes = len(self.batches_of(self.train_dataset, training=True))
        return math.ceil(self.args.num_train_epochs * max(1, -(-passes // self.args.gradient_accumulation_steps)))

    def load_finished(self, checkpoint: str) -> TrainOutput | None:
        """Loads a checkpoint of the last step, and None for an earlier one: transformers would go a step further.
        The last is also one at which a callback ended this run, as its run.json says.

        Raises ValueError for one that is beyond the run's end.
        """
        state = TrainerState.load_from_json(str(Path(checkpoint) / "trainer_state.json"))
        planned, ended = self.planned_steps(), False
        if planned < state.global_step:
            steps = f"{checkpoint}: is of step {state.global_step} and this run ends at step {planned}"
            raise ValueError(f"{steps}; want as many steps, or an earlier checkpoint")
        with contextlib.suppress(OSError, ValueError):
            record = json.loads((Path(checkpoint).parent / RECORD).read_text())
            ended = (record.get("steps"), record.get("planned_steps")) == (state.global_step, planned)
        if state.global_step < planned and not ended:
            if state.max_steps not in (0, planned):
                logger.warning(
                    f"{checkpoint} is of a run of {state.max_steps} steps and this one has {planned}: the learning "
                    "rate goes another way, and the end is that of neither"
                )
            return None
        best = state.best_model_checkpoint if self.args.load_best_model_at_end else None
        self._load_from_checkpoint(best if best and Path(best).is_dir() else checkpoint)
        self.state = state
        for callback in self.callback_handler.callbacks:
            if isinstance(callback, RunState):
                callback.on_train_begin(self.args, state, self.control)
        return TrainOutput(state.global_step, float("nan"), {})
