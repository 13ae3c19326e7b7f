"""The suite during training: the same measures, logged beside the trainer's own, against where training began."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from accelerate.utils import broadcast_object_list
from torch import nn
from transformers import TrainerCallback
from transformers.utils import logging

from uft.evaluation.config import EvaluationConfig
from uft.evaluation.data import read_data
from uft.evaluation.report import NAME, Report
from uft.evaluation.suite import as_reference, evaluate
from uft.models import Reference

logger = logging.get_logger(__name__)

RANKS = ("all", "main")


class EvaluationCallback(TrainerCallback):
    """Measures when training begins and then at every evaluation, or every `every` steps:

        trainer.add_callback(EvaluationCallback(trainer, EvaluationConfig.read("eval.yaml")))

    trainer     a `UnifiedTrainer`, whose layout, head and precision are used
    config      what is measured
    every       steps between two measurements; by default they are taken at evaluations, after the trainer's own
    reference   a model or `Reference`; by default the trainer's, or the base model under an adapter
    ranks       "all": every rank runs the whole suite, which sharded models need; "main": one runs it while the others
                wait.  Either way all are told the numbers of the main one

    Metrics are logged with `eval_` in front, so that trackers and `metric_for_best_model` have them; reports, with what
    was found sample by sample, are in `output_dir/evaluation/step-N/`.  Those of step 0 are what later ones are
    compared with, also when a run is resumed.  Training goes on as if nothing had been measured: modes and random
    numbers are put back.

    Raises ValueError for an unknown `ranks`, an `every` below 1, and a divergence without a reference.
    """

    def __init__(
        self,
        trainer: Any,
        config: EvaluationConfig,
        every: int | None = None,
        reference: nn.Module | Reference | None = None,
        ranks: str = "all",
    ):
        if ranks not in RANKS:
            raise ValueError(f"ranks is {ranks!r}; want {' or '.join(RANKS)}")
        if every is not None and every < 1:
            raise ValueError(f"every is {every}; want at least 1, or None for every evaluation")
        self.trainer, self.config, self.every, self.ranks = trainer, config, every, ranks
        given = trainer.reference if reference is None else reference
        self.reference = as_reference(trainer.model, given)
        if config.divergence and self.reference is None:
            raise ValueError(
                "divergence needs a reference, and the trainer has none but perhaps cached numbers; want one given"
            )
        self.data = read_data(config, trainer.processing_class)
        self.start: Report | None = None
        self._measured: tuple[int, dict[str, float]] | None = None  # (step, metrics) of the last time

    # ---- when ----

    def on_train_begin(self, args, state, control, **kwargs) -> None:
        if state.global_step == 0:
            self.start = None
            self._log(self._measure())
            return
        path = self._folder(0) / f"{NAME}.json"
        if path.exists():
            self.start = Report.of(path)
        else:
            logger.warning(f"{path} is not there: measures of this run are not compared with its start")

    def on_evaluate(self, args, state, control, metrics=None, **kwargs) -> None:
        # with several evaluation data sets this is called for each
        if self.every is None and self.trainer.is_in_train:
            fresh = self._measured is None or self._measured[0] != state.global_step
            found = self._measure() if fresh else self._measured[1]
            if metrics is not None:
                metrics.update(found)
            if fresh:
                self._log(found)

    def on_step_end(self, args, state, control, **kwargs) -> None:
        if self.every is not None and state.global_step % self.every == 0:
            self._log(self._measure())

    # ---- what ----

    def _measure(self) -> dict[str, float]:
        trainer, step = self.trainer, self.trainer.state.global_step
        found: list[Any] = [None]
        if self.ranks == "all" or trainer.args.process_index == 0:
            with trainer.compute_loss_context_manager():  # the precision of training
                report = evaluate(
                    trainer.model, trainer.processing_class, self.config, self.reference, self.start, data=self.data,
                    collate=replace(trainer.data_collator.collate, reference_logps=None),
                )  # fmt: skip
            if trainer.args.process_index == 0:
                report.write(self._folder(step))
            if step == 0:
                self.start = report
            found = [{f"eval_{name}": value for name, value in report.metrics.items()}]
        if trainer.args.world_size > 1:
            found = broadcast_object_list(found)
        self._measured = (step, found[0])
        return found[0]

    def _log(self, metrics: dict[str, float]) -> None:
        control = self.trainer.control
        due = control.should_log  # logging takes it for done, and the trainer's own log may be to come
        self.trainer.log(dict(metrics))
        control.should_log = due

    def _folder(self, step: int) -> Path:
        return Path(self.trainer.args.output_dir) / NAME / f"step-{step}"
