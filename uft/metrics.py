"""Metrics and counters of a run, exact across micro-batches, ranks and resumption."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import TrainerCallback
from transformers.trainer_callback import ExportableState

from uft.models import Scored
from uft.terms import Sums


def by_source(scored: Scored, names: Sequence[str]) -> Sums:
    """Per source: negative log-likelihood per token of what is to be imitated, and the share of its pairs whose chosen
    response has the higher implicit reward.  `names` are those that the codes in `Batch.source` stand for."""
    batch, found = scored.batch, {}
    imitated = ~(batch.target < 0.5)
    for code in batch.source.unique().tolist():
        rows = (batch.source == code) & imitated
        found[f"{names[code]}/nll"] = (-scored.logp[rows].detach().sum(), scored.length[rows].sum())
    if scored.reference_logp is not None:
        better, worse = batch.preferences.unbind(-1)
        ratio = (scored.logp - scored.reference_logp).detach()
        gain = ratio[better] - ratio[worse]
        known = ~gain.isnan()  # the pairs whose reference was asked for
        right = (gain > 0).float() + 0.5 * (gain == 0).float()  # a tie is half right
        for code in batch.source[better][known].unique().tolist():
            here = known & (batch.source[better] == code)
            found[f"{names[code]}/accuracy"] = (right[here].sum(), here.sum())
    return found


def once(value: Any) -> tuple[Tensor, Tensor]:
    """A metric that a step has once."""
    return torch.tensor(float(value), dtype=torch.float64), torch.tensor(1.0)


class RunState(TrainerCallback, ExportableState):
    """What a run must not lose when it is resumed and transformers does not keep.

    pending     metric -> [sum, count] since the last log
    counters    totals since the start: tokens, passes, FLOPs, examples per source, seconds
    statistics  per term, what outlives a step (BCO's running mean)
    balance     what the objective's balancer remembers
    ranks       pending and counters of each rank when the last checkpoint was saved: one rank writes the state of all
    """

    def __init__(
        self,
        pending: dict | None = None,
        counters: dict | None = None,
        statistics: dict | None = None,
        ranks: list[dict[str, dict]] | None = None,
        balance: dict | None = None,
    ):
        self.pending = pending or {}
        self.counters = counters or {}
        self.statistics = statistics or {}
        self.ranks = ranks or []
        self.balance = balance or {}
        self._fresh: dict[str, list[Tensor]] = {}

    def state(self) -> dict[str, Any]:
        self._settle()
        names = ("pending", "counters", "statistics", "balance", "ranks")
        return {"args": copy.deepcopy({name: getattr(self, name) for name in names}), "attributes": {}}

    def collect(self, gather: Callable[[list], list]) -> None:
        """Before a checkpoint is saved, on every rank."""
        self._settle()
        self.ranks = gather([{"pending": self.pending, "counters": self.counters}])

    def on_train_begin(self, args, state, control, **kwargs) -> None:
        # transformers restores callbacks only where it is asked to; counters must never start again
        saved = state.stateful_callbacks.get(type(self).__name__)
        if not (state.global_step and saved):
            return
        saved = copy.deepcopy(saved["args"])
        if ranks := saved.get("ranks"):
            if len(ranks) != args.world_size:  # the sums of all, on the first
                ranks = [_added(ranks)] + [{"pending": {}, "counters": {}}] * args.world_size
            saved |= copy.deepcopy(ranks[args.process_index])
        vars(self).update(saved)

    def snapshot(self) -> dict[str, Any]:
        """What `restore` takes back; the device is not asked for anything."""
        return {name: copy.copy(value) for name, value in vars(self).items()} | {
            name: copy.deepcopy(getattr(self, name)) for name in ("statistics", "balance")
        }

    def restore(self, snapshot: dict[str, Any], *, counters: bool = True) -> None:
        """As it was.  Without `counters`, what was computed since stays counted, though it came to nothing."""
        vars(self).update({name: value for name, value in snapshot.items() if counters or name != "counters"})

    def add(self, sums: Sums) -> None:
        """Adds a micro-batch's metrics; they stay on their device until somebody asks."""
        for name, (total, count) in sums.items():
            fresh = torch.stack([total.detach().double(), count.detach().double().to(total.device)])
            self._fresh[name] = self._fresh[name] + fresh if name in self._fresh else fresh

    def count(self, **amounts: float) -> None:
        for name, amount in amounts.items():
            self.counters[name] = self.counters.get(name, 0) + amount

    def _settle(self) -> None:
        for name, fresh in self._fresh.items():
            total, count = fresh.tolist()
            before = self.pending.get(name, [0.0, 0.0])
            self.pending[name] = [before[0] + total, before[1] + count]
        self._fresh = {}

    def take(self, gather: Callable[[list], list] = list) -> dict[str, float]:
        """The means since the last call.  `gather` collects a list of one object per rank from all ranks."""
        self._settle()
        totals = _added_pending(gather([self.pending]))
        self.pending = {}
        return {name: total / count for name, (total, count) in sorted(totals.items()) if count > 0}


def added_counters(counters: Iterable[dict[str, float]]) -> dict[str, float]:
    totals: dict[str, float] = {}
    for each in counters:
        for name, amount in each.items():
            # seconds pass on every rank at once
            totals[name] = max(totals.get(name, 0), amount) if name == "seconds" else totals.get(name, 0) + amount
    return totals


def _added_pending(pending: Iterable[dict[str, list[float]]]) -> dict[str, list[float]]:
    totals: dict[str, list[float]] = {}
    for each in pending:
        for name, (total, count) in each.items():
            before = totals.get(name, (0.0, 0.0))
            totals[name] = [before[0] + total, before[1] + count]
    return totals


def _added(ranks: list[dict[str, dict]]) -> dict[str, dict]:
    return {
        "pending": _added_pending(rank["pending"] for rank in ranks),
        "counters": added_counters(rank["counters"] for rank in ranks),
    }
