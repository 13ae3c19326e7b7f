"""`uft compare --config FILE --dry-run`: every arm with the budget it would be given, before anything is trained."""

from __future__ import annotations

import dataclasses

from uft.comparison.budget import Ledger, Total
from uft.comparison.compare import Prepared, total_for
from uft.comparison.recipe import Arm, Comparison
from uft.comparison.summary import unequal
from uft.comparison.tables import terminal_table
from uft.presets import make_objective
from uft.stages import Budget, part_of


@dataclasses.dataclass(frozen=True)
class Expected:
    """What a stage of an arm would take, by `uft.cli.dry_run.expectation`: expected, not exact."""

    stage: str
    steps: int
    examples: float
    flops: float


def expected(prepared: Prepared, arm: Arm, total: Total | None) -> list[Expected]:
    """Raises ValueError where the stages before the last would leave nothing of the total."""
    from uft.cli.dry_run import expectation, skeleton
    from uft.loading import usable

    plan, found = arm.plan, []
    model = skeleton(plan.model, plan.args)
    data = prepared.shelf.of(plan.train_dataset, plan)
    bos, ledger = prepared.shelf.tokenizer.bos_token_id, Ledger(arm.name, total)
    stages = arm.stages
    for position, stage in enumerate(stages):
        args = dataclasses.replace(plan.args, **stage.args) if stage.args else plan.args
        objective = make_objective(stage.objective)
        part = usable(part_of(data, stage.on), objective, args.max_length, bos)
        budget = stage.budget
        if total is not None and position == len(stages) - 1:
            left = total.amount - sum(getattr(each, total.unit) for each in found)
            if left <= 0:
                raise ledger.too_dear(found[-1].stage)
            budget = Budget(**{total.unit: total.whole(left)})
        each = expectation(model, objective, part, args, budget)
        found.append(Expected(stage.name, each.steps, sum(each.draws.values()), float(each.tally.flops)))
    return found


def expected_of_all(prepared: Prepared) -> dict[str, list[Expected]]:
    """Every arm, in the order of the recipe.  Raises ValueError where an arm would have nothing left."""
    plan, found = prepared.plan, {}
    decided: Total | None = None
    for arm in plan.order:
        total = total_for(plan, arm, None)
        if arm.total is None and plan.decider not in (None, arm.name):
            total = decided
        found[arm.name] = expected(prepared, arm, total)
        if arm.name == plan.decider:
            decided = Total(plan.unit, sum(getattr(each, plan.unit) for each in found[arm.name]))
    return {arm.name: found[arm.name] for arm in plan.arms}


def described(prepared: Prepared) -> str:
    from uft.cli.dry_run import describe

    plan, costs = prepared.plan, expected_of_all(prepared)
    lines: list[str] = []
    for arm in plan.arms:
        lines += [f"══ arm {arm.name} " + "═" * max(0, 71 - len(arm.name)), ""]
        lines += [describe(_as_planned(arm, costs[arm.name]), prepared.shelf.tokenizer), ""]
    rows = [
        [f"{name}: {each.stage}", f"{each.steps:,}", f"{each.examples:,.0f}", f"{each.flops:.3g}"]
        for name, stages in costs.items()
        for each in stages
    ]
    lines += ["══ the comparison " + "═" * 62, "", terminal_table(["stage", "steps", "examples", "FLOPs"], rows), ""]
    return "\n".join([*lines, *_said(plan, costs)])


def _as_planned(arm: Arm, costs: list[Expected]):
    """The arm's recipe with the length that its last stage would have."""
    plan = arm.plan
    steps = Budget(steps=costs[-1].steps)
    args = dataclasses.replace(plan.args, output_dir=f"{plan.args.output_dir}/{arm.name}/seed0")
    if not plan.stages:
        return dataclasses.replace(plan, args=dataclasses.replace(args, max_steps=steps.steps))
    stages = (*plan.stages[:-1], dataclasses.replace(plan.stages[-1], budget=steps))
    return dataclasses.replace(plan, stages=stages, args=args)


def _said(plan: Comparison, costs: dict[str, list[Expected]]) -> list[str]:
    flops = sum(each.flops for stages in costs.values() for each in stages) * len(plan.seeds)
    budget = "no budget: arms may differ in cost"
    if plan.decider:
        budget = f"equal {plan.unit}: {plan.decider} decides, and the last stage of every other arm gets what is left"
    elif plan.total:
        budget = f"{plan.total.amount:.4g} {plan.total.unit} for every arm"
    own = unequal(plan)
    apart = f"; not made equal, with a budget of their own: {', '.join(own)}" if own else ""
    pairs = ", ".join(f"{a} − {b}" for a, b in plan.contrasts)
    return [
        f"{len(plan.arms)} arms × {len(plan.seeds)} seeds = {len(plan.arms) * len(plan.seeds)} runs, {flops:.3g} FLOPs",
        f"budget: {budget}{apart}; exact costs are counted when the runs are made",
        f"contrasts: {pairs}, in {' and '.join(plan.outcomes)}",
        f"output: {plan.output_dir}",
        "Nothing was trained or written: --dry-run.",
    ]
