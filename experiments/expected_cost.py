"""How many steps a number of FLOPs buys where weights decide in training what a step costs.

`uft.stages.Budget` counts exactly, and refuses such objectives.  Here the cost of a step is its mean over the run:

    schedules          over progress
    ALRIGHT            over its draws
    MAXRIGHT           as if every term were trained equally often, which is not known before; its refreshing added
    forgetting budget  every term trained in every step; its measurements added

What was really spent is in the record of every run.
"""

from __future__ import annotations

import numpy as np
from torch import nn

from uft.balance import Alright, Maxright
from uft.compute import Meter
from uft.data.mixture import FeedbackDataset
from uft.objective import Objective

PLACES = 64  # of progress


def expected_steps(
    model: nn.Module, objective: Objective, data: FeedbackDataset, batch_size: int, flops: float,
    measured: FeedbackDataset | None = None,
) -> int:  # fmt: skip
    """`measured` is what a balancer evaluates on."""
    meter, balancer = Meter(model, objective, reference_runs=True), objective.balancer
    draws = np.multiply(data.sizes, data.weights)

    def of_step(weights: dict[str, float], trained: bool = True) -> float:
        under = meter.under(objective.at(weights))
        per_draw = [
            under.of_examples(data.examples[name], trained).flops / size for name, size in zip(data.sources, data.sizes)
        ]
        return batch_size * float(np.average(per_draw, weights=draws))

    names = [term.name for term in objective.terms]
    alone = {name: of_step({other: float(other == name) for other in names}) for name in names}
    if isinstance(balancer, Alright):
        cost = np.average([alone[name] for name in names], weights=list(objective.weights(0.0).values()))
    elif isinstance(balancer, Maxright):
        everything = dict.fromkeys(names, 1.0)
        cost = np.mean(list(alone.values())) + of_step(everything, trained=False) / balancer.refresh
    elif balancer is not None:
        cost = of_step(dict.fromkeys(names, 1.0))
        if measured is not None:
            cost += meter.of_examples(measured, trained=False).flops / balancer.every
    else:
        known: dict[tuple[str, ...], float] = {}  # which terms train -> cost
        costs = []
        for progress in (np.arange(PLACES) + 0.5) / PLACES:
            weights = objective.weights(float(progress))
            training = tuple(name for name, weight in weights.items() if weight)
            if training not in known:
                known[training] = of_step(weights)
            costs.append(known[training])
        cost = np.mean(costs)
    return max(1, round(flops / cost))
