"""UnifiedTrainer: transformers.Trainer for a joint objective over several kinds of feedback.

    UnifiedTrainer(
        model="Qwen/Qwen3-0.6B-Base",
        objective="dpo_nll",
        train_dataset={"instructions": demonstrations, "preferences": pairs},
        args=UnifiedConfig(output_dir="runs/first", max_steps=1000),
    ).train()

What differs from transformers.Trainer: an optimiser step is counted before it is taken (every term's denominator is
the whole step's), the reference runs beside the policy, evaluation losses are exact means, and a checkpoint is whole
or absent.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase, TrainingArguments, set_seed
from transformers.trainer_utils import EvalLoopOutput
from transformers.utils import logging

from uft.checkpoint import RECORD, last_checkpoint
from uft.collation import MicroBatches
from uft.compute import Meter
from uft.config import UnifiedConfig
from uft.data.mixture import FeedbackDataset, MixtureSampler, load_feedback
from uft.faults import GuardedTrainer, StepGuard
from uft.feedback import Batch
from uft.from_trl import config_of, kinds_of, objective_of, with_trl_arguments
from uft.loader import StepSampler, even_passes, make_loader, without_sync
from uft.loading import (
    cutter_for,
    idle_terms,
    lay_out,
    prepared_policy,
    reference_for,
    sources_of,
    tokenizer_of,
    usable,
)
from uft.metrics import RunState, added_counters, by_source
from uft.models import FrozenReference, Reference, Scored, score
from uft.objective import Objective
from uft.presets import make_objective
from uft.record import reset_peak_memory, run_record, write_json
from uft.reference_cache import ReferenceCache
from uft.run_identity import run_identity
from uft.sharding import placed, reduce_each_pass
from uft.sharing import SharingTrainer
from uft.statistics import step_statistics
from uft.step import Step, StepPlanner
from uft.terms import Sums
from uft.trl_data import are_splits, data_with, is_one_data_set, tokenizer_with
from uft.watching.attach import watch

logger = logging.get_logger(__name__)

# what transformers.Trainer takes and this trainer would silently leave unused
MEANINGLESS = {
    "compute_loss_func": "the loss is the objective; a loss of your own is a term of it",
    "compute_metrics": "evaluation holds no logits; it reports every term's exact mean, and callbacks may measure more",
    "preprocess_logits_for_metrics": "evaluation holds no logits",
    "data_collator": "batches hold several kinds of feedback and are put together by uft.feedback.Collator",
}


class UnifiedTrainer(SharingTrainer, GuardedTrainer):
    """Trains one policy on any mixture of demonstrations, pairs, labels, scores and documents.

    model           hub id, path, config (fresh weights) or model
    objective       a preset's name, a mapping of terms, or an `Objective`; by default what TRL's names in args say
                    (beta, loss_type, ...), or what suits the kinds of data: sft, dpo, kto, una, of several uft_nll
    train_dataset   {name: source} (source: path, hub id, list of rows, datasets.Dataset, `Source`, or a mapping with
                    `path` and options), a single such source, or a `FeedbackDataset`
    eval_dataset    the same, or {split name: FeedbackDataset}, or {split name: rows} where train_dataset is rows
    reference       a model or `Reference`; by default the policy as it is now, in the form args.reference says.  TRL's
                    name for it, ref_model, is one too
    peft_config     a peft configuration; by default the one that args.lora_* describe when args.use_peft is set
    formatting_func what makes a text of each row, of one data set

    Raises ValueError for data that no term of the objective uses, and `DataError` for bad rows.
    """

    # transformers >= 5.19 reads this; before, `model_accepts_loss_kwargs` says the same (set in __init__)
    loss_is_scaled_for_ga = True

    def __init__(
        self,
        model: Any = None,
        objective: str | Mapping[str, Any] | Objective | None = None,
        args: UnifiedConfig | TrainingArguments | None = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        reference: nn.Module | Reference | None = None,
        peft_config: Any = None,
        formatting_func: Any = None,
        **kwargs: Any,
    ):
        args = config_of(args)
        objective, reference = with_trl_arguments(objective, reference, kwargs, args)
        self.objective = None if objective is None else make_objective(objective)
        self.objective_from = None  # what it follows from, where it was not given
        if model is None:
            raise ValueError("model is missing; want a hub id, a path, a config or a model")
        for name in MEANINGLESS:
            if kwargs.get(name) is not None:
                raise ValueError(f"{name} has no meaning here: {MEANINGLESS[name]}")
        processing_class = tokenizer_with(processing_class or tokenizer_of(model, args), args.from_trl)
        self.reports: dict[str, Any] = {}
        self.formatting_func, self._in_splits = formatting_func, is_one_data_set(train_dataset)
        if self.objective is None:
            train_dataset = self._read(train_dataset, processing_class, args, "train")
            self.objective, self.objective_from = objective_of(kinds_of(train_dataset), args.from_trl)
            logger.warning(f"objective is {self.objective.name!r}, from {self.objective_from}")
        train_dataset = self._usable(train_dataset, processing_class, args, "train")
        self.idle_terms = idle_terms(self.objective, train_dataset) if train_dataset is not None else []
        eval_dataset = self._usable(eval_dataset, processing_class, args, "eval")

        set_seed(args.seed)  # fresh weights and adapters are the seed's, whatever was drawn before
        policy = prepared_policy(model, args, peft_config)
        self._totals: dict[str, float] = {}
        self.reference = reference_for(policy, reference, self.objective, args, processing_class)
        super().__init__(
            model=policy,
            args=args,
            data_collator=cutter_for(self.objective, processing_class, args, sources_of(train_dataset, eval_dataset)),
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            **kwargs,
        )
        self.model_accepts_loss_kwargs = True
        reduce_each_pass(self.accelerator, args.accelerator_config.gradient_accumulation_kwargs)
        self.add_callback(RunState())
        self.guard = StepGuard(self)
        self.add_callback(self.guard)
        if lay_out(self.model, self.reference, args):
            self.data_collator = self.data_collator.packed()
        cached = self.objective.needs_reference and self.reference is None
        frozen = self.reference.model if isinstance(self.reference, FrozenReference) else None
        self.meter = Meter(policy, self.objective, self.objective.needs_reference and not cached, frozen)
        if frozen is not None:  # only now: what is in shards can neither be tried out nor counted
            self.reference.model = placed(frozen, self.accelerator)
        self.reference_cache = ReferenceCache(self, wanted=cached)
        self.planner = StepPlanner(self)
        self.add_callback(self.planner)
        self.watched = watch(self, samples=args.samples > 0)
        self._clock = time.perf_counter()

    # ---- data ----

    def _usable(self, data: Any, tokenizer: Any, args: UnifiedConfig, split: str) -> Any:
        """What is read of `data` (None, a source, a data set, or several by name) and checked against the objective."""
        if data is None:
            return None
        splits = split == "eval" and self._in_splits and are_splits(data)
        if splits or (isinstance(data, Mapping) and all(isinstance(each, FeedbackDataset) for each in data.values())):
            return {name: self._usable(each, tokenizer, args, f"{split} {name}") for name, each in data.items()}
        data = self._read(data, tokenizer, args, split)
        return usable(data, self.objective, args.max_length, tokenizer.bos_token_id)

    def _read(self, data: Any, tokenizer: Any, args: UnifiedConfig, split: str) -> FeedbackDataset | None:
        if data is None or isinstance(data, FeedbackDataset):
            return data
        data, self.reports[split] = load_feedback(
            data_with(data, self.formatting_func, args.from_trl), tokenizer, max_length=args.max_length,
            on_bad_row=args.on_bad_row, cache=args.data_cache,
        )  # fmt: skip
        return data

    def _get_train_sampler(self, train_dataset: Any = None) -> MixtureSampler:
        data = train_dataset or self.train_dataset
        seed = self.args.seed if self.args.data_seed is None else self.args.data_seed
        return MixtureSampler(data.sizes, data.weights, seed)

    def batches_of(self, data: FeedbackDataset, *, training: bool) -> StepSampler:
        """Which examples make up each of this rank's micro-batches."""
        args = self.args
        sampler = self._get_train_sampler(data) if training else range(len(data))
        size = args.train_batch_size if training else args.eval_batch_size
        cost = data.lengths if args.world_size > 1 else None
        drop_last = args.dataloader_drop_last and training
        return StepSampler(sampler, size, args.process_index, args.world_size, cost, drop_last)

    def get_train_dataloader(self):
        if self.train_dataset is None:
            raise ValueError("train_dataset is missing; want data to train on")
        batches = self.batches_of(self.train_dataset, training=True)
        return make_loader(self.train_dataset, batches, self.data_collator, self.args)

    def get_eval_dataloader(self, eval_dataset: Any = None):
        data = self.eval_dataset if eval_dataset is None else eval_dataset
        data = self.eval_dataset[data] if isinstance(data, str) else data
        if not isinstance(data, FeedbackDataset):
            raise ValueError(f"found {type(data).__name__} to evaluate on; want a FeedbackDataset (uft.load_feedback)")
        own = self.eval_dataset.values() if isinstance(self.eval_dataset, Mapping) else [self.eval_dataset]
        if not any(data is each for each in own):
            data = self._usable(data, self.processing_class, self.args, "eval")
            if unknown := set(data.sources) - set(self.data_collator.sources):
                raise ValueError(f"data set {min(unknown)!r} is none of those the trainer was made with")
        self.reference_cache.prepare()
        cut = self.reference_cache.cutter(data, training=False)
        return make_loader(data, self.batches_of(data, training=False), cut, self.args)

    get_test_dataloader = get_eval_dataloader

    # ---- a run and its record ----

    def train(self, resume_from_checkpoint: str | bool | None = None, **kwargs: Any):
        if resume_from_checkpoint is True:
            resume_from_checkpoint = last_checkpoint(self.args.output_dir)
            if resume_from_checkpoint is None:
                raise ValueError(f"no whole checkpoint in {self.args.output_dir!r} to resume from")
        if self.train_dataset is None:
            raise ValueError("train_dataset is missing; want data to train on")
        self.check_folders(resume_from_checkpoint)
        self.reference_cache.prepare()
        self.identity = self.run_identity()
        if resume_from_checkpoint:
            self.check_resumable(resume_from_checkpoint)
        if resume_from_checkpoint and (output := self.load_finished(resume_from_checkpoint)):
            return output
        if self.args.should_save:
            (Path(self.args.output_dir) / RECORD).unlink(missing_ok=True)  # of an earlier run
        self._clock = time.perf_counter()
        reset_peak_memory()
        output = self.guarded_train(resume_from_checkpoint=resume_from_checkpoint, **kwargs)
        self.run_state.count(seconds=self._elapsed())
        self.write_record()
        return output

    def run_identity(self) -> dict[str, Any]:
        """What a checkpoint must agree with to be resumed by this trainer."""
        return run_identity(self)

    def record(self, counters: Mapping[str, float] | None = None) -> dict[str, Any]:
        """See `uft.record.run_record`.  To be called on every rank, which add up their counters, unless given."""
        return run_record(self, self.counters() if counters is None else counters)

    def write_record(self) -> None:
        """run.json of the output folder."""
        record = self.record()  # on every rank, for it adds up their counters
        if self.args.should_save:
            write_json(Path(self.args.output_dir) / RECORD, record)

    # ---- the step ----

    @property
    def run_state(self) -> RunState:
        # transformers replaces stateful callbacks by new ones when it resumes, so this one is looked up
        return next(c for c in self.callback_handler.callbacks if isinstance(c, RunState))

    @property
    def progress(self) -> float:
        return self.state.global_step / max(self.state.max_steps, 1)

    def get_batch_samples(self, epoch_iterator, num_batches: int, device: torch.device):
        """The step's micro-batches, and what has to be counted over all of them before the first is run."""
        self.guard.begin()
        return self.planner.plan(list(itertools.islice(epoch_iterator, num_batches)))

    def training_step(self, model, inputs: MicroBatches, num_items_in_batch: Step | None = None):
        """Forward and backward of each pass; gradients of several ranks meet after the last one."""
        loss = torch.zeros((), device=self.args.device)
        *others, last = inputs.of_gradient
        for batch in others:
            with without_sync(self.accelerator, model):
                loss += super().training_step(model, batch, num_items_in_batch)
        return loss + super().training_step(model, last, num_items_in_batch)

    def _prepare_inputs(self, inputs: Batch) -> Batch:
        return Batch(inputs).to(self.args.device, non_blocking=True)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch: Step | None = None):
        batch = Batch(inputs)
        step = num_items_in_batch or Step(self.objective.counts(batch))
        objective = step.objective or self.objective
        scored = self.scored(model, batch, objective)
        loss, metrics = objective(scored, step.counts.to(batch.kind.device), step.statistics, self.progress)
        if self.is_in_train and model.training:
            metrics = {name: value for name, value in metrics.items() if not name.startswith("weight/")}  # the step's
            self.guard.saw(loss, scored)
            self.planner.saw(metrics)
            one_step = loss.new_tensor(1.0 / step.passes)
            self.run_state.add(metrics | self.by_source(scored) | {"loss": (loss.detach(), one_step)})
        return (loss, {"loss": loss}) if return_outputs else loss

    def scored(self, model: nn.Module, batch: Batch, objective: Objective | None = None) -> Scored:
        """Log-probabilities of a batch, and the reference's where its responses need one.

        `objective` is that of the step, by default the trainer's."""
        objective = objective or self.objective
        need = batch.get("need")
        compared = objective.needs_reference and (need is None or need.reference)
        return score(
            model,
            batch,
            self.reference if compared else None,
            divergence=objective.needs_divergence and compared,
            differentiable=objective.differentiable,
        )

    def by_source(self, scored: Scored) -> Sums:
        """What is logged of each data set."""
        return by_source(scored, self.data_collator.sources)

    def floating_point_ops(self, inputs: MicroBatches) -> int:
        return sum(self.planner.meter.of_batch(batch).flops for batch in inputs.batches)

    def _track_num_input_tokens(self, inputs: MicroBatches) -> None:
        pass  # transformers' way to count reads one batch; see num_tokens in the log

    # ---- logging ----

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs:  # a training log: ours are exact over the step and survive resumption
            taken = self.run_state.take(self._gather)
            if "loss" not in taken:  # every step since the last log was skipped; transformers would say 0
                del logs["loss"]
            logs.update(taken)
            self.run_state.count(seconds=self._elapsed())
            counters = self.counters()
            logs["num_tokens"] = counters.get("tokens", 0)
            if "skipped_steps" in counters:
                logs["skipped_steps"] = counters["skipped_steps"]
        super().log(logs, start_time)

    def _gather(self, objects: list) -> list:
        from accelerate.utils import gather_object

        return gather_object(objects) if self.args.world_size > 1 else objects

    def counters(self) -> dict[str, float]:
        """Totals over all ranks since the start of the run; resumption keeps them."""
        totals = added_counters(self._gather([self.run_state.counters]))
        self._totals = dict(sorted(totals.items()))
        return self._totals

    # ---- evaluation: exact means, whatever the batch size ----

    @torch.no_grad()
    def evaluation_loop(
        self, dataloader, description, prediction_loss_only=None, ignore_keys=None, metric_key_prefix="eval"
    ) -> EvalLoopOutput:
        model = self._wrap_model(self.model, training=False)
        if len(self.accelerator._models) == 0 and model is self.model:
            model = self.accelerator.prepare_model(model, evaluation_mode=True)
        was_training = model.training
        model.eval()
        self.callback_handler.eval_dataloader = dataloader

        def items() -> Iterator[MicroBatches]:
            for item in dataloader:
                yield from even_passes([item], self.data_collator, self.accelerator)

        statistics = step_statistics(self, model, items, update=False)

        counts = torch.ones(len(self.objective.terms), dtype=torch.float64, device=self.args.device)
        gathered, examples = RunState(), 0
        for item in items():
            for batch in map(self._prepare_inputs, item.of_gradient):
                with self.compute_loss_context_manager():
                    scored = self.scored(model, batch)
                    _, metrics = self.objective(scored, counts, statistics, self.progress)
                gathered.add(metrics | self.by_source(scored))
            examples += item.examples.total()
            self.control = self.callback_handler.on_prediction_step(self.args, self.state, self.control)
        model.train(was_training)
        means = gathered.take(self._gather)
        means["loss"] = sum(
            means[f"weight/{t.name}"] * means[f"loss/{t.name}"]
            for t in self.objective.terms
            if f"loss/{t.name}" in means
        )
        named = {
            f"{metric_key_prefix}_{name}": value for name, value in means.items() if not name.startswith("weight/")
        }
        examples = sum(self._gather([examples]))
        return EvalLoopOutput(predictions=None, label_ids=None, metrics=named, num_samples=examples)

    def _save_checkpoint(self, model, trial) -> None:
        self.run_state.count(seconds=self._elapsed())
        self.run_state.collect(self._gather)
        super()._save_checkpoint(model, trial)

    def _elapsed(self) -> float:
        """Seconds since the last call."""
        now = time.perf_counter()
        elapsed, self._clock = now - self._clock, now
        return elapsed
