"""A head whose vocabulary is shared by ranks: the same rows, and the same gradients, as from the whole."""

import itertools
import os

import pytest
import torch
import torch.multiprocessing as mp
from uft_kernels.linear_logprob import linear_logprob
from uft_kernels.token_logprob import IGNORE, forward_rows
from uft_kernels.vocabulary_parallel import merged

N, D, V = 11, 8, 50
CUTS = (0, 13, 17, 50)


@pytest.mark.parametrize("scale", [1.0, 30.0])
def test_rows_of_shards_merge_to_those_of_the_whole(scale):
    torch.manual_seed(0)
    logits, target = torch.randn(N, V, dtype=torch.float64) * scale, torch.randint(0, V, (N,))
    logits[0] -= 1000.0  # far from 0
    logits[1, :13] = float("-inf")  # a shard without mass
    logits[1, 3] = -1e4
    target[1] = 20
    parts = []
    for first, last in itertools.pairwise(CUTS):
        owned = (target >= first) & (target < last)
        rows = forward_rows(logits[:, first:last].contiguous(), torch.where(owned, target - first, 0))
        parts.append(torch.stack([*rows, owned.double()]))
    for found, wanted in zip(merged(torch.stack(parts)), forward_rows(logits, target)):
        torch.testing.assert_close(found, wanted)


def inputs():
    torch.manual_seed(0)
    hidden, weight, bias = torch.randn(N, D).double(), torch.randn(V, D).double(), torch.randn(V).double()
    target = torch.randint(0, V, (N,))
    target[::4] = IGNORE
    return hidden, weight, bias, target, torch.randn(2, N).double()


def run(hidden, weight, bias, target, upstream, trained, **shard):
    hidden = hidden.clone().requires_grad_()
    weight, bias = (t.clone().requires_grad_(trained) for t in (weight, bias))
    found = linear_logprob(hidden, weight, target, bias, entropy=True, softcap=5.0, **shard)
    (upstream[0] * found.logp + upstream[1] * found.entropy).sum().backward()
    return [found.logp.detach(), found.entropy.detach(), hidden.grad, weight.grad, bias.grad]


def one_rank(rank, store):
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    for trained in (False, True):
        hidden, weight, bias, target, upstream = inputs()
        here = (slice(0, 30), slice(30, V))[rank]
        group = torch.distributed.group.WORLD
        found = run(hidden, weight[here], bias[here], target, upstream, trained, group=group, first=here.start)
        wanted = run(hidden, weight, bias, target, upstream, trained)
        for value, whole in zip(found[:3], wanted[:3]):
            torch.testing.assert_close(value, whole)
        for value, whole in zip(found[3:], wanted[3:]):
            assert (value is None) == (not trained)
            if trained:
                torch.testing.assert_close(value, whole[here])
    torch.distributed.destroy_process_group()


@pytest.mark.skipif(not torch.distributed.is_available(), reason="torch has no distributed")
def test_two_ranks_give_what_one_gives(tmp_path, monkeypatch):
    here = os.path.dirname(__file__)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([here, os.environ.get("PYTHONPATH", "")]))
    mp.spawn(one_rank, (str(tmp_path / "store"),), nprocs=2)


@pytest.mark.parametrize("options", [{"top1": True}, {"filter_eps": 0.1}])
def test_what_shards_cannot_do_is_refused(options):
    with pytest.raises(ValueError, match="in shards"):
        linear_logprob(
            torch.zeros(2, 3), torch.zeros(5, 3), torch.zeros(2, dtype=torch.int64), group=object(), **options
        )
