"""TensorBoard with tags in groups (`uft.watching.tags`), the objective and the settings as text, and hyperparameters.

A resumed run goes on in the folder of the one that was interrupted, and hides there what that had logged behind the
checkpoint.
"""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Any

from transformers.integrations import TensorBoardCallback
from transformers.integrations.integration_utils import default_logdir
from transformers.utils import logging

from uft.watching.facts import known_sources, splits_of
from uft.watching.tags import tag

logger = logging.get_logger(__name__)


class GroupedTensorBoard(TensorBoardCallback):
    """See the top of the file.  It takes the place of transformers' own; only the main process writes."""

    def __init__(self, trainer: Any):
        super().__init__()
        self.trainer = trainer
        self._purge_from: int | None = None

    def on_train_begin(self, args, state, control, **kwargs) -> None:
        if not state.is_world_process_zero:
            return
        if state.global_step and self.logging_dir is None and not state.is_hyper_param_search:
            newest = _newest(Path(args.output_dir) / Path(default_logdir()).parent)
            if newest is not None:
                self.logging_dir, self._purge_from = str(newest), state.global_step + 1
        super().on_train_begin(args, state, control, **kwargs)
        if self.tb_writer is not None:
            self._describe(args)

    def _init_summary_writer(self, args) -> None:
        self.tb_writer = self._SummaryWriter(log_dir=self.logging_dir, purge_step=self._purge_from)
        self._purge_from = None

    def on_log(self, args, state, control, logs=None, **kwargs) -> None:
        if not state.is_world_process_zero:
            return
        if self.tb_writer is None:
            self._init_summary_writer(args)
        sources, splits = known_sources(self.trainer), splits_of(self.trainer)
        for name, value in (logs or {}).items():
            if isinstance(value, (int, float)):
                self.tb_writer.add_scalar(tag(name, sources, splits), value, state.global_step)
            elif isinstance(value, str):
                self.tb_writer.add_text(tag(name, sources, splits), value, state.global_step)
            else:
                logger.warning(f"metric {name!r} is a {type(value).__name__}; want a number or a string")
        self.tb_writer.flush()

    # ---- what the run is ----

    def _describe(self, args: Any) -> None:
        objective = getattr(self.trainer, "objective", None)
        changed = {
            field.name: getattr(args, field.name)
            for field in dataclasses.fields(args)
            if field.init and field.name in SHOWN | _changed(args)
        }
        self.tb_writer.add_text("settings", _table(("key", "value"), changed.items()))
        hyper: dict[str, Any] = {name: getattr(args, name) for name in SHOWN}
        losses = ["loss/train", "loss/eval"]
        if objective is not None:
            terms = objective.describe()
            columns = list(dict.fromkeys(key for term in terms for key in term))
            rows = [[term.get(key, "") for key in columns] for term in terms]
            self.tb_writer.add_text("objective", f"**{objective.name}**\n\n" + _table(columns, rows))
            hyper["objective"] = objective.name
            for term in terms:
                hyper |= {f"{term['name']}.{key}": term[key] for key in ("loss", "weight", "beta") if key in term}
            losses += [f"loss/{term['name']}" for term in terms]
            self.tb_writer.add_custom_scalars({"training and evaluation": _together(losses)})
        self._hyperparameters(hyper, losses)

    def _hyperparameters(self, values: dict[str, Any], metrics: list[str]) -> None:
        """For the tab HPARAMS, with the run's own scalars as metrics."""
        from torch.utils.tensorboard.summary import hparams
        from torch.utils.tensorboard.writer import SummaryWriter

        if isinstance(self.tb_writer, SummaryWriter):
            known = {k: v if isinstance(v, (int, float, str, bool)) else str(v) for k, v in values.items()}
            for summary in hparams(known, dict.fromkeys(metrics, 0)):
                self.tb_writer.file_writer.add_summary(summary)


SHOWN = {"learning_rate", "per_device_train_batch_size", "gradient_accumulation_steps", "max_steps", "seed"}
_PRIVATE = re.compile(r"token$|key$|password")


def _changed(args: Any) -> set[str]:
    """Fields that differ from their defaults."""
    found = set()
    for field in dataclasses.fields(args):
        default = field.default_factory() if callable(field.default_factory) else field.default
        if field.init and getattr(args, field.name) != default and not _PRIVATE.search(field.name):
            found.add(field.name)
    return found


def _table(columns: Any, rows: Any) -> str:
    """In Markdown."""
    lines = [[str(cell).replace("|", "\\|").replace("\n", " ") for cell in row] for row in (columns, *rows)]
    lines.insert(1, ["---"] * len(lines[0]))
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _together(losses: list[str]) -> dict[str, list]:
    """A chart for each loss with training and evaluation in it; tags are regular expressions here."""
    both = {"loss": ["loss/train", "loss/eval.*"]}
    both |= {name.removeprefix("loss/"): [rf"{re.escape(name)}( \(.*\))?"] for name in losses[2:]}
    return {name: ["Multiline", [f"^{each}$" for each in tags]] for name, tags in both.items()}


def _newest(folder: Path) -> Path | None:
    """The folder of event files that was written to last."""
    files = sorted(folder.glob("*/events.out.tfevents.*"), key=lambda path: path.stat().st_mtime)
    return files[-1].parent if files else None
