"""Can a user say beforehand how much may be forgotten?

Arms      DPO after the shared supervised stage, with a replayed term that gets the weight lambda / (1 + lambda) and DPO
          1 / (1 + lambda): lambda constant, or the multiplier of a forgetting budget (uft/balance.py), measured every
          few steps: likelihood of demonstrations on strings that training never draws, that of facts on facts which
          the replayed documents hold too, as pretraining did
Budgets   two, each a rise above what the supervised stage ends with: held-out likelihood of demonstrations, kept by
          replaying demonstrations; likelihood of facts that were known before, kept by replaying documents
Equal     base weights, seeds, data, draws.  What measuring costs is in the table of FLOPs
Judged    whether the budget is kept on every seed, to within 10 % of the rise; and alignment beside that of the best
          constant weight that keeps it on every seed, which only trying all of them finds
Run       python -m experiments.forgetting_budget [--quick]        48 runs
Writes    runs/forgetting_budget/{report.md, summary.json, forgetting_budget.png}
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from .arms import REPLAY
from .lab.training import PRIOR, LabStage, Plan, Scale
from .report import markdown_table
from .runs import DEMONSTRATIONS
from .sequential_vs_unified import TOY, VARIANTS
from .study import Point, Study, main, supervised

RISE = {DEMONSTRATIONS: 0.05, PRIOR: 0.2}  # nats per token above the supervised stage's end
CONSTANT = (0.0, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0)
EVERY = 5  # steps
TOLERANCE = 0.1  # of the rise
FASTER = 4.0  # times the tuned rate, at which DPO alone keeps either budget by itself
MEASURES = ("alignment", "accuracy_logp", "accuracy_reward")


def points(chosen: Mapping[str, Any], scale: Scale) -> list[Point]:
    return [
        Point(f"{LABELS[quantity]} kept", name, partial(_plan, chosen, quantity, weights, scale))
        for quantity in RISE
        for name, weights in {
            "budget": _budget(quantity, 1 if scale == TOY else EVERY),
            **{f"constant {c:g}": _constant(c) for c in CONSTANT},
        }.items()
    ]


LABELS = {DEMONSTRATIONS: "demonstrations", PRIOR: "facts"}


def _budget(quantity: str, every: int) -> dict[str, Any]:
    rule = {"quantity": f"eval_{quantity}_loss/sft", "rise": RISE[quantity], "every": every}
    return {"sft_weight": 0.0, "balance": {"method": "forgetting_budget", **rule}}


def _constant(multiplier: float) -> dict[str, Any]:
    return {"sft_weight": multiplier / (1 + multiplier), "preference_weight": 1 / (1 + multiplier)}


def _plan(chosen: Mapping[str, Any], quantity: str, weights: Mapping[str, Any], scale: Scale, seed: int) -> Plan:
    tuned = chosen["sft_dpo_replay"]
    objective = {"preset": "dpo_nll", "beta": tuned["beta"], **weights}
    replayed = {"demonstrations": REPLAY} if quantity == DEMONSTRATIONS else {"documents": REPLAY}
    last = LabStage("dpo", objective, FASTER * tuned["learning_rate"], preferences=1.0, **replayed)
    return Plan((supervised(chosen), last), seed, VARIANTS[0], scale)


def rises(runs: Sequence[Mapping[str, Any]], quantity: str) -> list[float]:
    """How far each seed's quantity has risen over the last stage, in nats per token."""
    return [run["stages"][-1]["watched"][quantity] - run["stages"][-2]["watched"][quantity] for run in runs]


def judged(
    points: Sequence[Point], records: Sequence[Sequence[Mapping[str, Any]]]
) -> tuple[list[str], list[dict[str, Any]]]:
    """For each budget: is it kept, and what does the best constant weight that keeps it reach?"""
    lines, kept = [], []
    for quantity, rise in RISE.items():
        line, rows = f"{LABELS[quantity]} kept", []
        found = {point.x: runs for point, runs in zip(points, records) if point.line == line}
        summary = {
            name: {
                "rises": rises(runs, quantity),
                **{m: [run["measures"][m] for run in runs] for m in MEASURES},
            }
            for name, runs in found.items()
        }
        keeps = {name: max(s["rises"]) <= (1 + TOLERANCE) * rise for name, s in summary.items()}
        constant = [name for name in summary if name != "budget" and keeps[name]]
        best = max(constant, key=lambda name: sum(summary[name]["alignment"]), default=None)
        for name, s in summary.items():
            marks = "yes" if keeps[name] else "no"
            rows.append(
                [f"{name}{' (best constant that keeps it)' if name == best else ''}",
                 *(f"{x:+.3f}" for x in s["rises"]), marks,
                 *(f"{sum(s[m]) / len(s[m]):.3f}" for m in MEASURES)]
            )  # fmt: skip
        seeds = [f"rise, seed {run['seed']}" for run in next(iter(found.values()))]
        header = ["weight", *seeds, "kept to within 10 % on every seed", "alignment", "pair acc. (logp)",
                  "pair acc. (reward)"]  # fmt: skip
        lines += [
            f"Budget: {LABELS[quantity]} may rise by {rise:g} nats per token.",
            "",
            markdown_table(header, rows),
            "",
        ]
        kept.append({"quantity": quantity, "rise": rise, "arms": summary, "keeps": keeps, "best_constant": best})
    return lines, kept


STUDY = Study(
    name="forgetting_budget",
    question="Can a user say beforehand how much may be forgotten?",
    points=points,
    axis="weight of the replayed term",
    kind="dots",
    equal="base weights, seeds, data, draws",
    note="Beta is that tuned for SFT → DPO with replay of demonstrations, the rate of the last stage four times the "
    "tuned one: at the tuned rate DPO alone keeps both budgets.",
    more=judged,
)

if __name__ == "__main__":
    raise SystemExit(main(STUDY, description=__doc__))
