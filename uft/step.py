"""An optimiser step before its first pass: which terms train on it and with what weights, what is counted over it, and
which of its passes are run.  Decided once, and the same on all ranks."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from transformers import TrainerCallback

from uft.balance import Moment
from uft.collation import MicroBatches
from uft.conflict import check_conflict, gradient_conflict
from uft.entropy import summed_entropy
from uft.feedback import Batch
from uft.loader import even_passes
from uft.metrics import once
from uft.objective import Objective
from uft.statistics import step_statistics
from uft.terms import Sums


@dataclass(frozen=True)
class Step:
    """What must be known of an optimiser step before its first micro-batch.

    counts       float64 [terms], items per term over the step, divided by the number of ranks (which DDP averages over)
    statistics   per term, what its loss asks for beyond the micro-batch
    passes       forward and backward passes that this rank runs
    objective    the terms that train, with their weights in this step; None stands for all of them
    """

    counts: Tensor
    statistics: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    passes: int = 1
    objective: Objective | None = None


class StepPlanner(TrainerCallback):
    """Plans the steps of a trainer.  What its balancer remembers is in the trainer's `RunState`.

    Raises ValueError where the balancer or the measurement of conflicts cannot work with this trainer.
    """

    def __init__(self, trainer: Any):
        self.trainer = trainer
        self.balancer = trainer.objective.balancer
        self.meter = trainer.meter  # of the terms that train in this step
        self._cost: Mapping[str, float] | None = None  # of measuring the balancer's quantity once
        self._losses: Tensor | None = None  # float64 [terms, 2], (sum, count) over this rank's part of the step
        if self.balancer and self.balancer.quantity:
            _split(trainer.eval_dataset, self.balancer.quantity)
        if trainer.args.gradient_conflict:
            check_conflict(trainer)

    def plan(self, items: list[MicroBatches]) -> tuple[list[MicroBatches], Step]:
        """The passes of a step, of what the loader gave, and what they have in common."""
        trainer, objective = self.trainer, self.trainer.objective
        counts = torch.zeros(len(objective.terms), dtype=torch.float64)
        for batch in (batch for item in items for batch in item.of_gradient):
            counts += objective.counts(batch)
        counts = trainer.accelerator.reduce(counts.to(trainer.args.device), "sum") / trainer.accelerator.num_processes
        every = trainer.args.gradient_conflict
        if every and trainer.state.global_step % every == 0:
            gradient_conflict(trainer, items, counts)
        weights = self._weights(items, counts)
        of_step = objective.at(weights)
        trainer.run_state.add({f"weight/{name}": once(weight) for name, weight in weights.items()})
        self.meter = trainer.meter
        if not all(weights.values()):
            counts = counts[[i for i, term in enumerate(objective.terms) if weights[term.name]]]
            items = [_less_the_resting(item, of_step) for item in items]
            self.meter = trainer.meter.under(of_step)
        for item in items:
            self._count(item)
        items = even_passes(items, trainer.data_collator, trainer.accelerator)
        statistics = step_statistics(trainer, trainer.model_wrapped, lambda: items, update=True, objective=of_step)
        return items, Step(counts, statistics, sum(len(item.of_gradient) for item in items), of_step)

    def _count(self, item: MicroBatches) -> None:
        """Adds a micro-batch to the run's counters (tokens, passes, FLOPs, examples per source)."""
        state = self.trainer.run_state
        for batch in item.batches:
            state.count(**vars(self.meter.of_batch(batch)), tokens_run=batch.input_ids.numel())
        state.count(**{f"examples/{name}": n for name, n in item.examples.items()})

    # ---- weights ----

    def _weights(self, items: list[MicroBatches], counts: Tensor) -> dict[str, float]:
        trainer = self.trainer
        own = trainer.objective.weights(trainer.progress)
        if self.balancer is None:
            return own
        self._losses = torch.zeros(len(own), 2, dtype=torch.float64, device=trainer.args.device)
        now = Moment(
            step=trainer.state.global_step,
            seed=trainer.args.seed,
            weights=own,
            present=tuple(name for (name, weight), n in zip(own.items(), counts.tolist()) if weight and n),
            losses=lambda: self._measured_losses(items, trainer.objective.at(own)),
            measure=self._measured_quantity,
            entropy=lambda on: self._measured_entropy(items, on),
        )
        memory = trainer.run_state.balance
        weights = self.balancer.weights(now, memory)
        logged = self.balancer.logged(now, memory)
        trainer.run_state.add({f"balance/{name}": once(value) for name, value in logged.items()})
        return weights

    @torch.no_grad()
    def _measured_losses(self, items: list[MicroBatches], objective: Objective) -> dict[str, float]:
        """The mean loss of each term over the step, before it; a forward pass over all that is trained on."""
        trainer, model = self.trainer, self.trainer.model_wrapped
        was_training = model.training
        model.eval()
        items = even_passes(items, trainer.data_collator, trainer.accelerator)
        statistics = step_statistics(trainer, model, lambda: items, update=False, objective=objective)
        meter, ones = trainer.meter.under(objective), torch.ones(len(objective.terms))
        self._losses.zero_()
        for batch in (batch for item in items for batch in item.of_gradient):
            trainer.run_state.count(**vars(meter.of_batch(batch, trained=False)))
            with trainer.compute_loss_context_manager():
                scored = trainer.scored(model, trainer._prepare_inputs(batch), objective)
                self.saw(objective(scored, ones, statistics)[1])
        model.train(was_training)
        return self._take_losses()

    @torch.no_grad()
    def _measured_entropy(self, items: list[MicroBatches], on: str) -> float | None:
        """See `Moment.entropy`; a forward pass over all that is trained on."""
        trainer, model, cost = self.trainer, self.trainer.model_wrapped, self.trainer.meter.cost
        was_training = model.training
        model.eval()
        found = torch.zeros(2, dtype=torch.float64, device=trainer.args.device)
        items = even_passes(items, trainer.data_collator, trainer.accelerator)
        for batch in (batch for item in items for batch in item.of_gradient):
            n = batch.length.numpy().astype("int64")
            trainer.run_state.count(policy_forwards=len(n), flops=int(cost.forward(n).sum()))
            with trainer.compute_loss_context_manager():
                found += torch.stack(summed_entropy(model, trainer._prepare_inputs(batch), on)).to(found)
        model.train(was_training)
        total, n = trainer.accelerator.reduce(found, "sum").tolist()
        return total / n if n else None

    def _measured_quantity(self, quantity: str) -> dict[str, float]:
        """Metrics of the evaluation data that `quantity` is of, by an evaluation that logs nothing."""
        trainer = self.trainer
        prefix, data = _split(trainer.eval_dataset, quantity)
        if self._cost is None:
            self._cost = vars(trainer.meter.of_examples(data, trained=False))
        if trainer.args.process_index == 0:  # counters of ranks are added up
            trainer.run_state.count(**self._cost)
        loader = trainer.get_eval_dataloader(data)
        metrics = trainer.evaluation_loop(loader, "Balance", metric_key_prefix=prefix).metrics
        # which closes the progress bar and is no evaluation to early stopping and trackers
        trainer.control = trainer.callback_handler.on_predict(trainer.args, trainer.state, trainer.control, metrics)
        return metrics

    # ---- what the terms' losses were ----

    def saw(self, metrics: Sums) -> None:
        """The metrics of a micro-batch."""
        if self.balancer is not None and self.balancer.watches:
            for i, term in enumerate(self.trainer.objective.terms):
                for k, value in enumerate(metrics.get(f"loss/{term.name}", ())):
                    self._losses[i, k] += value.double()

    def on_step_end(self, args, state, control, **kwargs) -> None:
        """After the step and before any checkpoint of it."""
        if self.balancer is not None and self.balancer.watches:
            losses = self._take_losses()
            if torch.tensor([*losses.values()]).isfinite().all():  # or the step was skipped
                self.balancer.saw(losses, self.trainer.run_state.balance)

    def _take_losses(self) -> dict[str, float]:
        sums = self.trainer.accelerator.reduce(self._losses, "sum").tolist()
        self._losses = torch.zeros_like(self._losses)
        return {term.name: total / n for term, (total, n) in zip(self.trainer.objective.terms, sums) if n}


def _less_the_resting(item: MicroBatches, objective: Objective) -> MicroBatches:
    """Without the passes that no term of the objective has a row or a statistic in."""
    statistics = {term.name for term in objective.statistic_terms}

    def used(batch: Batch) -> bool:
        trained = batch.need.gradient and bool(objective.used_rows(batch).any())
        return trained or not statistics.isdisjoint(batch.need.statistics)

    return replace(item, batches=tuple(batch for batch in item.batches if used(batch)))


def _split(data: Any, quantity: str) -> tuple[str, Any]:
    """The prefix of the metrics of the evaluation data that a quantity is of, and these data."""
    splits = {f"eval_{name}": part for name, part in data.items()} if isinstance(data, Mapping) else {"eval": data}
    found = [name for name, part in splits.items() if part is not None and quantity.startswith(f"{name}_")]
    if not found:
        known = ", ".join(f"{name}_..." for name, part in splits.items() if part is not None) or "no evaluation data"
        raise ValueError(f"balance: quantity is {quantity!r}, and there is {known}; want a metric of eval_dataset")
    prefix = max(found, key=len)
    return prefix, splits[prefix]
