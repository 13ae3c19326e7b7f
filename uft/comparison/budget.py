"""What an arm may spend over all of its stages: the last stage, or the only one, gets what the others leave."""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from uft.stages import Budget, Stage, steps_within

UNITS = ("flops", "examples", "steps")


@dataclass(frozen=True)
class Total:
    """unit: flops (reference passes included), examples (drawn) or steps (of the optimiser), over all stages."""

    unit: str
    amount: float

    def whole(self, amount: float) -> float:
        """An amount of this unit: steps are whole, and at least one."""
        return max(1, round(amount)) if self.unit == "steps" else amount


def spent(unit: str, record: Mapping[str, Any]) -> float:
    """What a stage cost, by its record."""
    if unit == "steps":
        return record["steps"]
    compute = record["compute"]
    if unit == "examples":
        return sum(amount for name, amount in compute.items() if name.startswith("examples/"))
    return compute.get("flops", 0)


class Ledger:
    """Follows a run from stage to stage, and keeps it within its total.

    arm     for messages
    total   None: each stage trains as long as it says
    """

    def __init__(self, arm: str, total: Total | None):
        self.arm, self.total, self.spent = arm, total, 0.0
        self.names: list[str] = []
        self._trainer: Any = lambda: None

    def stages(self, stages: tuple[Stage, ...]) -> list[Stage]:
        """The stages with budgets that are kept here."""
        self.names = [each.name for each in stages]
        return [replace(each, budget=_Entry(self, each, each is stages[-1])) for each in stages]

    @property
    def trainer(self) -> Any:
        """That of the stage which runs, or has just ended; it is not kept alive."""
        return self._trainer()

    def follow(self, trainer: Any) -> None:
        self._trainer = weakref.ref(trainer)

    def book(self) -> None:
        """At the end of a stage."""
        if self.total is not None:
            self.spent += spent(self.total.unit, self.trainer.record())

    @property
    def left(self) -> float:
        return self.total.amount - self.spent

    def bought(self, trainer: Any) -> float | None:
        """Optimiser steps that what is left would buy of this stage; None where only training can tell."""
        args, objective = trainer.args, trainer.objective
        if self.total.unit == "steps":
            return self.left
        if self.total.unit == "examples":
            return self.left / (args.train_batch_size * args.gradient_accumulation_steps * args.world_size)
        if objective.rests or objective.balancer is not None:
            return None
        return steps_within(trainer, self.left)

    def too_dear(self, stage: str) -> ValueError:
        return ValueError(
            f"arms.{self.arm}: stage {stage!r} would leave nothing of the {self.total.amount:.4g} "
            f"{self.total.unit} of this arm for its last stage; want a shorter stage or a larger budget"
        )


class _Entry(Budget):
    """The budget of a stage; of the last one what is left when it begins."""

    def __init__(self, ledger: Ledger, stage: Stage, last: bool):
        total = ledger.total
        alone = total is not None and len(ledger.names) == 1
        super().__init__(**({total.unit: total.whole(total.amount)} if alone else vars(stage.budget)))
        for name, value in {"ledger": ledger, "stage": stage, "last": last}.items():
            object.__setattr__(self, name, value)  # of a frozen dataclass

    def apply(self, trainer: Any) -> None:
        ledger = self.ledger
        ledger.follow(trainer)
        if ledger.total is not None and self.last:
            if ledger.left <= 0:
                raise ledger.too_dear(self.stage.name)
            Budget(**{ledger.total.unit: ledger.total.whole(ledger.left)}).apply(trainer)
            return
        self.stage.budget.apply(trainer)
        if ledger.total is not None:
            bought = ledger.bought(trainer) if ledger.left > 0 else 0
            if bought is not None and trainer.planned_steps() >= bought:
                raise ledger.too_dear(self.stage.name)
