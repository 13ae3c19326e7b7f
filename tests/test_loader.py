"""Which rank gets which rows, what is left over at the end of an epoch, and how many passes each rank runs."""

import itertools
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from accelerate.utils import DistributedType
from mixed import dataset, examples, trainer

from uft.collation import Collator, Cutter
from uft.data.mixture import MixtureSampler
from uft.feedback import Need
from uft.loader import StepSampler, even_passes

# ---- shares ----


def test_every_row_goes_to_exactly_one_rank():
    order = [*np.random.default_rng(0).permutation(23).tolist(), 3]  # one of them twice
    cost = np.arange(23) % 7 + 1
    for world in (1, 2, 3, 4):
        samplers = [StepSampler(order, 3, rank, world, cost) for rank in range(world)]
        steps = [list(sampler) for sampler in samplers]
        assert {len(each) for each in steps} == {len(samplers[0])}
        for k, shares in enumerate(zip(*steps)):
            assert sorted(itertools.chain(*shares)) == sorted(order[k * 3 * world : (k + 1) * 3 * world])


def test_ranks_differ_by_no_more_than_the_cheapest_row_of_the_one_that_has_most():
    """Which a split into as many rows for each does not achieve in any of these steps."""
    cost = np.random.default_rng(0).integers(1, 100, 64)

    def is_even(shares) -> bool:
        spent = [cost[share].sum() for share in shares]
        return max(spent) - min(spent) <= cost[shares[int(np.argmax(spent))]].min()

    assert [is_even(shares) for shares in StepSampler(range(64), 4, 0, 4, cost).plan()] == [True] * 4
    assert [is_even(shares) for shares in StepSampler(range(64), 4, 0, 4).plan()] == [False] * 4


def test_shares_by_hand():
    """The dearest rows first, in the order of the epoch within a share."""
    plan = StepSampler(range(8), 4, 0, 2, cost=[1, 12, 1, 1, 6, 1, 1, 1]).plan()
    assert list(plan) == [[[1], [0, 2, 3, 4, 5, 6, 7]]]
    plan = StepSampler(range(8), 4, 0, 2, cost=[9, 9, 1, 1, 1, 1, 1, 1]).plan()
    assert list(plan) == [[[0, 2, 4, 6], [1, 3, 5, 7]]]
    assert list(StepSampler([5], 4, 0, 2, cost=[1] * 6).plan()) == [[[5], []]]


# ---- the end of an epoch ----


def test_what_is_left_over_is_a_short_step_or_left_out():
    ranks = [[[0, 1], [4, 5], [8, 9]], [[2, 3], [6, 7], [10]]]
    for rank, steps in enumerate(ranks):
        kept, dropped = (StepSampler(range(11), 2, rank, 2, drop_last=drop) for drop in (False, True))
        assert list(kept) == steps and len(kept) == 3
        assert list(dropped) == steps[:2] and len(dropped) == 2
    assert list(StepSampler(range(8), 2, 0, 2, drop_last=True)) == ranks[0][:2]  # nothing is left over


def test_each_epoch_leaves_out_other_rows():
    batches = StepSampler(MixtureSampler([7], [1.0], seed=0), 3, drop_last=True)
    seen = []
    for epoch in range(8):
        batches.set_epoch(epoch)
        seen.append(frozenset(itertools.chain(*batches)))
        assert len(seen[-1]) == 6
    assert len(set(seen)) > 1


def test_rows_that_make_no_step_are_refused():
    assert list(StepSampler(range(3), 2, 1, 2)) == [[2]]
    with pytest.raises(ValueError, match=r"found 3 rows, which make no step of 4 \(drop_last\)"):
        StepSampler(range(3), 2, 1, 2, drop_last=True)


def test_a_trainer_drops_rows_of_training_and_none_of_evaluation():
    run = trainer(
        "sft", dataset(("demonstrations",)), eval_dataset=dataset(("demonstrations",), n=5),
        per_device_train_batch_size=3, per_device_eval_batch_size=3, max_steps=-1, num_train_epochs=1,
        dataloader_drop_last=True,
    )  # fmt: skip
    run.train()
    assert run.state.global_step == 2
    assert run.counters()["examples/demonstrations"] == 6
    assert sum(item.examples.total() for item in run.get_eval_dataloader()) == 5


# ---- passes of several ranks ----

PAIRS, PLAIN, STATISTICS = Need(reference=True), Need(), Need(gradient=False, statistics=("kto",))
NEEDS = {"pair": PAIRS, "demonstration": PLAIN, "label": STATISTICS}
CUT = Cutter(Collator(0, ("pairs", "demonstrations", "labels")), lambda kind, *sides: NEEDS[kind], (*NEEDS.values(),))


class Ranks:
    """An accelerator on one of two ranks; the other tells `theirs`, its passes [micro-batch][need]."""

    num_processes, device = 2, torch.device("cpu")

    def __init__(self, theirs, own_rank: int = 0, distributed_type=DistributedType.FSDP):
        self.theirs, self.own_rank, self.distributed_type = torch.tensor(theirs), own_rank, distributed_type
        self.told = []

    def gather(self, own):
        self.told.append(own.tolist())
        return torch.cat([own, self.theirs[None]] if self.own_rank == 0 else [self.theirs[None], own])


def needs_of(item):
    """(need, responses) of each batch, in order."""
    return [(batch.need, len(batch.kind)) for batch in item.batches]


@pytest.mark.parametrize("own_rank", [0, 1])
@pytest.mark.parametrize("kind", [DistributedType.FSDP, DistributedType.DEEPSPEED])
def test_sharded_ranks_run_every_kind_of_pass_as_often_as_the_one_that_has_most(kind, own_rank):
    ranks = Ranks([[2, 1, 1], [0, 2, 0]], own_rank, kind)
    items = [CUT(examples("demonstrations", 3)), CUT([*examples("pairs", 2), *examples("labels", 1)])]
    first, second = even_passes(items, CUT, ranks)
    assert ranks.told == [[[[0, 1, 0], [1, 0, 1]]]]  # asked once, of the whole step
    # in the order of the needs, which is that of the other rank too
    assert needs_of(first) == [(PAIRS, 0), (PAIRS, 0), (PLAIN, 3), (STATISTICS, 0)]
    assert needs_of(second) == [(PAIRS, 4), (PLAIN, 0), (PLAIN, 0), (STATISTICS, 1)]
    assert first.batches[2] is items[0].batches[0] and second.batches[0] is items[1].batches[0]
    assert [item.examples for item in (first, second)] == [item.examples for item in items]


def test_own_passes_come_before_the_empty_ones():
    cut = Cutter(CUT.collate, CUT.need, CUT.needs, token_budget=1)  # a batch for each example
    (item,) = even_passes([cut(examples("demonstrations", 2))], cut, Ranks([[0, 3, 0]]))
    assert needs_of(item) == [(PLAIN, 1), (PLAIN, 1), (PLAIN, 0)]


@pytest.mark.parametrize("kind", [DistributedType.MULTI_GPU, DistributedType.MULTI_CPU])
def test_ranks_with_whole_weights_only_take_part_in_a_backward(kind):
    ranks = Ranks([[2, 2, 2]], distributed_type=kind)
    for rows, expected in (
        ([], [(PLAIN, 0)]),
        (examples("labels", 2), [(STATISTICS, 2), (PLAIN, 0)]),
        (examples("pairs", 2), [(PAIRS, 4)]),
    ):
        (item,) = even_passes([CUT(rows)], CUT, ranks)
        assert needs_of(item) == expected
    assert ranks.told == []


def test_one_rank_and_no_micro_batch_ask_nobody():
    alone = SimpleNamespace(num_processes=1, distributed_type=DistributedType.FSDP)  # has nothing to gather with
    (item,) = even_passes([CUT(examples("labels", 1))], CUT, alone)
    assert needs_of(item) == [(STATISTICS, 1), (PLAIN, 0)]
    ranks = Ranks([])
    assert even_passes([], CUT, ranks) == ranks.told == []
