"""What the transformer itself can reach: the joint objective descended by its exact gradient, without samples.

A run of UnifiedTrainer differs from this by sampling alone, and this differs from the front by the network and its
optimiser alone.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from .lab.enumerable import exact
from .lab.enumerable.paths import Scale, load_base, measured
from .lab.enumerable.policy import enumerated, policy_of
from .lab.enumerable.world import World

STEPS, RATE = 240, 3e-3


def run_limit(world: World, scale: Scale, cache: str, weight: float, steps: int = STEPS) -> dict[str, Any]:
    """Descends (1 - weight) f_SFT + weight f_DPO from the base; a record like those of trained arms."""
    model = load_base(world, scale, Path(cache))
    base = policy_of(model, world)
    optimiser = torch.optim.AdamW(model.parameters(), lr=RATE, betas=(0.9, 0.95), weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, steps)
    measuring = {round(steps * (k / scale.points) ** 2) for k in range(1, scale.points + 1)}
    path = [{"step": 0, **measured(world, base, base, scale.beta)}]
    for step in range(1, steps + 1):
        policy = enumerated(model, world)
        likelihood = exact.sft_loss(world, policy)
        preferences = exact.pairwise_loss(world, policy, base, scale.beta)
        optimiser.zero_grad()
        ((1 - weight) * likelihood + weight * preferences).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        schedule.step()
        if step in measuring:
            path.append({"step": step, **measured(world, policy_of(model, world), base, scale.beta)})
    stage = {"stage": "exact", "learning_rate": RATE, "steps": steps, "path": path, "objective": "exact", "compute": {}}
    return {"seed": 0, "stages": [stage], "compute": {}, "measures": path[-1]}
