"""Do the terms of an objective pull the same way?  Cosine and ratio of their gradients over a step's data."""

from __future__ import annotations

import itertools
from typing import Any

import torch
from torch import Tensor

from uft.collation import MicroBatches
from uft.loader import SHARDED
from uft.statistics import step_statistics


def check_conflict(trainer: Any) -> None:
    """Raises ValueError where conflicts cannot be measured."""
    if trainer.args.gradient_conflict < 0:
        raise ValueError(f"gradient_conflict is {trainer.args.gradient_conflict}; want a number of steps, or 0")
    if trainer.accelerator.distributed_type in SHARDED:
        raise ValueError("gradient_conflict is on and weights or gradients are in shards; want DDP or one process")


def gradient_conflict(trainer: Any, items: list[MicroBatches], counts: Tensor) -> None:
    """Logs, for each two terms a and b with items in the step, before it is taken:

        conflict/<a>-<b>/cosine    <g_a, g_b> / (|g_a| |g_b|)      -1: what one gains the other loses
        conflict/<a>-<b>/ratio     |g_a| / |g_b|

    g is the gradient of the term's mean over the whole step, by all trained parameters, without the term's weight.

    Nothing that training uses is touched: gradients are returned, not added up in `.grad`, and random numbers go on
    from where they were.  It costs one more forward over the step (and the reference's), a backward per term over the
    passes that it has rows in, and memory for a gradient per term, in float32 at least, beside what training holds.
    The FLOPs are counted as `conflict_flops`, for they are no cost of the method.
    """
    objective, model = trainer.objective, trainer.model
    parameters = [p for p in model.parameters() if p.requires_grad]
    terms = [(term, n) for term, n in zip(objective.terms, counts.tolist()) if n]
    gradients = [
        [torch.zeros_like(p, dtype=torch.promote_types(p.dtype, torch.float32)) for p in parameters] for _ in terms
    ]
    was_training = model.training
    devices = [trainer.args.device] if trainer.args.device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices), torch.enable_grad():
        statistics = step_statistics(trainer, model, lambda: items, update=False)
        model.train()
        for batch in (batch for item in items for batch in item.of_gradient):
            here = [i for i, (term, _) in enumerate(terms) if term.count(batch)]
            _count(trainer, batch, len(here))
            if not here:
                continue
            with trainer.compute_loss_context_manager():
                scored = trainer.scored(model, trainer._prepare_inputs(batch))
                losses = [terms[i][0].loss(scored, statistics.get(terms[i][0].name, {})) / terms[i][1] for i in here]
            for k, (i, loss) in enumerate(zip(here, losses)):
                found = torch.autograd.grad(loss, parameters, retain_graph=k + 1 < len(here), allow_unused=True)
                for total, gradient in zip(gradients[i], found):
                    if gradient is not None:
                        total += gradient
    model.train(was_training)
    if trainer.accelerator.num_processes > 1:
        gradients = [[trainer.accelerator.reduce(g, "mean") for g in each] for each in gradients]
    norms = [_dot(each, each).sqrt() for each in gradients]
    one = torch.tensor(1.0)
    for (i, (a, _)), (j, (b, _)) in itertools.combinations(enumerate(terms), 2):
        if norms[i] > 0 and norms[j] > 0:
            name = f"conflict/{a.name}-{b.name}"
            cosine = _dot(gradients[i], gradients[j]) / (norms[i] * norms[j])
            trainer.run_state.add({f"{name}/cosine": (cosine, one), f"{name}/ratio": (norms[i] / norms[j], one)})


def _dot(a: list[Tensor], b: list[Tensor]) -> Tensor:
    return torch.stack([(x.flatten() @ y.flatten()).double() for x, y in zip(a, b)]).sum()


def _count(trainer: Any, batch: Any, backwards: int) -> None:
    forward = trainer.meter.of_batch(batch, trained=False).flops
    backward = trainer.meter.of_batch(batch).flops - forward
    trainer.run_state.count(conflict_flops=forward + backwards * backward)
