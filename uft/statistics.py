"""What some losses ask for beyond their own rows, over a whole step: KTO's KL, BCO's mean reward."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from uft.collation import MicroBatches
from uft.models import score
from uft.objective import Objective
from uft.terms import Sums


@torch.no_grad()
def step_statistics(
    trainer: Any,
    model: nn.Module,
    items: Callable[[], Iterable[MicroBatches]],
    *,
    update: bool,
    objective: Objective | None = None,
) -> dict[str, dict[str, Tensor]]:
    """Per term, what its loss asks for; by one pass without gradient over all micro-batches of all ranks.

    update      whether what outlives the step (BCO's running mean) takes this one in; evaluation does not change it
    objective   that of the step, by default the trainer's
    """
    found = {}
    for term in (objective or trainer.objective).statistic_terms:
        sums: Sums = {}
        # BCO's mean is that of the training so far
        for item in items() if update or term.statistics_on == "mismatched" else ():
            for batch in item.of(lambda need, name=term.name: name in need.statistics):
                with trainer.compute_loss_context_manager():
                    gathered = term.gather(score(model, trainer._prepare_inputs(batch), trainer.reference))
                for name, (total, n) in gathered.items():
                    before = sums.get(name, (0.0, 0.0))
                    sums[name] = (before[0] + total.double(), before[1] + n.double())
        name = "kl" if term.statistics_on == "mismatched" else "delta"
        zero = torch.zeros((), dtype=torch.float64, device=trainer.args.device)
        pair = torch.stack([torch.as_tensor(v, device=zero.device) + zero for v in sums.get(name, (0.0, 0.0))])
        total, n = trainer.accelerator.reduce(pair, "sum").float().unbind()
        state = trainer.run_state.statistics.setdefault(term.name, {})
        found[term.name] = term.statistics({name: (total, n)}, state, update=update)
        if update:
            key = f"kl/{term.name}" if name == "kl" else f"rewards/{name}"
            trainer.run_state.add({key: (found[term.name][name], zero + 1)})
    return found
