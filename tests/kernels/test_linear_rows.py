"""Rows from one kernel, through pointers and through tensor descriptors, against the rows of whole logits."""

import sys

import pytest
import torch
from numerics import assert_no_worse
from uft_kernels import form, linear_logprob, products
from uft_kernels.linear_rows import fused_gradient, fused_rows
from uft_kernels.token_logprob import IGNORE, backward_rows, forward_rows

MODULE = sys.modules["uft_kernels.linear_rows"]
TILES = {"pointers": 0, "Hopper": 9, "Blackwell": 10}


@pytest.fixture(params=TILES)
def tiles(request, monkeypatch):
    """As on a GPU of this kind; in the interpreter only pointers and tile sizes differ between them."""
    if not torch.cuda.is_available():
        monkeypatch.setattr(MODULE, "_capability", lambda _: TILES[request.param])
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


def products_of(hidden, weight, dtype):
    """Logits; in float32 on a GPU those of its tensor cores, which round sums in their own way."""
    if hidden.is_cuda and dtype == torch.float32:
        return torch.mm(hidden, weight.T, out_dtype=dtype)
    return hidden.to(dtype) @ weight.to(dtype).T


@pytest.mark.parametrize("entropy", [False, True])
@pytest.mark.parametrize("scales", [{}, {"temperature": 0.7, "softcap": 9.0}], ids=["plain", "scaled"])
@pytest.mark.parametrize("biased", [False, True])
def test_rows(biased, scales, entropy, tiles, device):
    N, D, V = 165, 72, 331
    hidden, weight, bias, target = make(N, D, V, device)
    bias = bias if biased else None
    found = fused_rows(hidden, weight, bias, target, entropy=entropy, **scales)

    def whole(dtype):
        logits = products_of(hidden, weight, dtype)
        return forward_rows(logits if bias is None else logits + bias.to(dtype), target, **scales)

    with form("torch"):
        eager, gold = whole(torch.float32), whole(torch.float64)
    for name in ("logp", "peak", "log_sum", *(["entropy"] if entropy else [])):
        each = (getattr(rows, name)[None] for rows in (found, eager, gold))
        assert_no_worse(*each, slack=4.0)
        assert not getattr(found, name)[target == IGNORE].any()


@pytest.mark.parametrize("entropy", [False, True])
@pytest.mark.parametrize("scales", [{}, {"temperature": 0.7, "softcap": 9.0}], ids=["plain", "scaled"])
@pytest.mark.parametrize("biased", [False, True])
def test_gradient_of_some_entries(biased, scales, entropy, tiles, device):
    """Of a slab that holds some targets and not others, as `backward_rows` has it of whole logits."""
    N, D, V, slab = 165, 72, 331, slice(131, 331)
    hidden, weight, bias, target = make(N, D, V, device)
    bias = bias if biased else None
    grads = torch.randn(2, N, device=device)
    local = torch.where(target >= slab.start, target - slab.start, -1)

    def whole(dtype):
        logits = products_of(hidden, weight, dtype)
        logits = logits if bias is None else logits + bias.to(dtype)
        rows = forward_rows(logits, target.clamp(min=0), **scales)
        upstream = [grads[0].to(dtype), grads[1].to(dtype) if entropy else None]
        return rows, backward_rows(logits[:, slab], local, rows, *upstream, torch.empty_like(logits[:, slab]), **scales)

    with form("torch"):
        (_, eager), (_, gold) = whole(torch.float32), whole(torch.float64)
    eager = eager.bfloat16()  # as it leaves the chip
    rows = fused_rows(hidden, weight, bias, target.clamp(min=0), **scales)
    out = torch.full((N, V - slab.start), float("nan"), device=device, dtype=torch.bfloat16)
    part = None if bias is None else bias[slab]
    found = fused_gradient(
        hidden, weight[slab], part, local, rows, grads[0], grads[1] if entropy else None, out, **scales
    )
    assert_no_worse(found, eager, gold, slack=4.0)


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
