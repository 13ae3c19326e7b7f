"""Rows from one kernel, through pointers and through tensor descriptors, against the rows of whole logits."""

import sys

import pytest
import torch
from numerics import assert_no_worse
from uft_kernels import form, linear_logprob, products
from uft_kernels.linear_rows import fused_rows
from uft_kernels.token_logprob import IGNORE, forward_rows

MODULE = sys.modules["uft_kernels.linear_rows"]
TILES = {"pointers": None, "Hopper": 9, "Blackwell": 10}


@pytest.fixture(params=TILES)
def tiles(request, monkeypatch):
    """As on a GPU of this kind; in the interpreter only pointers and tile sizes differ between them."""
    if not torch.cuda.is_available():
        monkeypatch.setattr(MODULE, "_descriptors", lambda *_: TILES[request.param])
    monkeypatch.setattr(MODULE, "TOKENS", 150)  # several chunks
    with form("triton"):
        yield request.param


def make(N, D, V, device):
    torch.manual_seed(0)
    hidden, weight, bias = torch.randn(N, D), torch.randn(V, D) * 3 / D**0.5, torch.randn(V)
    bias[-1] = 8.0  # mass at the edge
    target = torch.randint(0, V, (N,))
    target[:2] = V - 1
    target[3::5] = IGNORE
    return *(t.to(device, torch.bfloat16) for t in (hidden, weight, bias)), target.to(device)


@pytest.mark.parametrize("entropy", [False, True])
@pytest.mark.parametrize("scales", [{}, {"temperature": 0.7, "softcap": 9.0}], ids=["plain", "scaled"])
@pytest.mark.parametrize("biased", [False, True])
def test_rows(biased, scales, entropy, tiles, device):
    N, D, V = 165, 72, 331
    hidden, weight, bias, target = make(N, D, V, device)
    bias = bias if biased else None
    found = fused_rows(hidden, weight, bias, target, entropy=entropy, **scales)

    def whole(dtype):
        logits = hidden.to(dtype) @ weight.to(dtype).T
        return forward_rows(logits if bias is None else logits + bias.to(dtype), target, **scales)

    with form("torch"):
        eager, gold = whole(torch.float32), whole(torch.float64)
    for name in ("logp", "peak", "log_sum", *(["entropy"] if entropy else [])):
        each = (getattr(rows, name)[None] for rows in (found, eager, gold))
        assert_no_worse(*each, slack=4.0)
        assert not getattr(found, name)[target == IGNORE].any()


def test_a_token_does_not_depend_on_its_neighbours(tiles, device):
    hidden, weight, bias, target = make(165, 72, 331, device)
    whole = fused_rows(hidden, weight, bias, target).logp
    assert torch.equal(fused_rows(hidden[7:40].contiguous(), weight, bias, target[7:40]).logp, whole[7:40])


def test_it_serves_passes_that_need_rows_alone(tiles, device, monkeypatch):
    hidden, weight, bias, target = make(40, 72, 331, device)
    plain = linear_logprob(hidden, weight, target, bias).logp
    monkeypatch.setattr(products, "FUSED", True)
    monkeypatch.setattr(products, "KEEP", 0)
    fused = linear_logprob(hidden, weight, target, bias).logp
    torch.testing.assert_close(fused, plain, rtol=1e-5, atol=1e-5)
    trained = weight.clone().requires_grad_()
    again = linear_logprob(hidden, trained, target, bias).logp
    assert torch.equal(again, fused)  # and its backward uses these rows
    again.sum().backward()
    exact = weight.clone().requires_grad_()
    monkeypatch.setattr(products, "FUSED", False)
    linear_logprob(hidden, exact, target, bias).logp.sum().backward()
    torch.testing.assert_close(trained.grad, exact.grad, rtol=2e-2, atol=2e-2)


def test_no_tokens(tiles, device):
    hidden, weight, bias, target = make(5, 72, 331, device)
    assert fused_rows(hidden[:0], weight, bias, target[:0]).logp.shape == (0,)
