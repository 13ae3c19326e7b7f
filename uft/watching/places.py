"""The stages of a run as watching sees them, before the first begins: names, expected cost, one plane of losses."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from torch import nn

from uft.compute import Meter
from uft.config import UnifiedConfig
from uft.data.mixture import FeedbackDataset, MixtureSampler
from uft.feedback import Example
from uft.objective import Objective
from uft.presets import make_objective
from uft.watching.facts import Place, axes_of, joined

ASKED = 32  # examples of a source whose cost stands for all


def places_of(
    policy: nn.Module, stages: Sequence[Any], data: Any, args: UnifiedConfig, part: Callable[[Any, Any], Any]
) -> list[Place]:
    """The place of each stage.  Costs are estimates, for the time that is left; they are unknown for data not yet read.

    part   the data of a stage: part(data, names)
    """
    objectives = [make_objective(stage.objective) for stage in stages]
    parts = [part(data, stage.on) for stage in stages]
    costs = None
    if all(isinstance(each, FeedbackDataset) for each in parts):
        costs = tuple(_flops(policy, *each, args) for each in zip(stages, objectives, parts))
    axes = joined([axes_of(objective, each) for objective, each in zip(objectives, parts)])
    names = tuple(stage.name for stage in stages)
    return [Place(names, position, costs, axes) for position in range(len(stages))]


def _flops(policy: nn.Module, stage: Any, objective: Objective, data: FeedbackDataset, args: UnifiedConfig) -> float:
    """What a stage is expected to cost, its reference included."""
    budget = stage.budget
    if budget.flops is not None:
        return float(budget.flops)
    own = {name: getattr(args, name) for name in _OF_STEPS} | {k: v for k, v in stage.args.items() if k in _OF_STEPS}
    batch = own["per_device_train_batch_size"] * own["gradient_accumulation_steps"] * args.world_size
    per_epoch = sum(MixtureSampler(data.sizes, data.weights).draws)
    steps = budget.steps or (own["max_steps"] if own["max_steps"] > 0 and budget.epochs is None else None)
    if budget.examples is not None:
        draws = float(budget.examples)
    elif steps is not None:
        draws = float(steps * batch)
    else:
        draws = per_epoch * float(budget.epochs or own["num_train_epochs"])
    return draws * _per_draw(policy, objective, data)


_OF_STEPS = ("per_device_train_batch_size", "gradient_accumulation_steps", "max_steps", "num_train_epochs")


def _per_draw(policy: nn.Module, objective: Objective, data: FeedbackDataset) -> float:
    meter = Meter(policy, objective, objective.needs_reference)
    draws = MixtureSampler(data.sizes, data.weights).draws
    means = [meter.of_examples(some := _spread(each)).flops / len(some) for each in data.examples.values()]
    return float(np.average(means, weights=draws))


def _spread(examples: Sequence[Example]) -> list[Example]:
    n = len(examples)
    return [examples[int(i)] for i in np.unique(np.linspace(0, n - 1, min(n, ASKED)).astype(int))]
