"""How many products of 2NVD flops each scheme spends, and how much it holds at a time."""

import pytest
import torch
from largest import LargestTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode
from uft_kernels import linear_divergence, linear_logprob, linear_preference_loss, products

N, D, V = 256, 32, 4096
UNIT = 2 * N * V * D


def squares(logp):
    return logp.square().sum()


def run(operation, wants_hidden, wants_head, keep=2**40):
    torch.manual_seed(0)
    hidden = torch.randn(N, D, requires_grad=wants_hidden)
    weight = torch.randn(V, D, requires_grad=wants_head)
    target, sequence = torch.randint(0, V, (N,)), torch.arange(N) // 64
    other = torch.randn(N, D), torch.randn(V, D)
    if operation == "logprob":
        loss = linear_logprob(hidden, weight, target).logp.sum()
    elif operation == "logprob and entropy":
        found = linear_logprob(hidden, weight, target, entropy=True)
        loss = (found.logp + found.entropy).sum()
    elif operation == "divergence":
        loss = linear_divergence(hidden, weight, *other, target, differentiable=("kl",)).kl.sum()
    else:
        loss = linear_preference_loss(hidden, weight, target, sequence, 4, squares, keep=keep).loss
    if loss.requires_grad:
        loss.backward()


@pytest.mark.parametrize(
    "operation, wants_hidden, wants_head, expected",
    [
        ("logprob", False, False, 1),
        ("logprob", True, False, 2),  # TRL 1.16 spends 3
        ("logprob", True, True, 4),
        ("logprob and entropy", True, False, 3),
        ("divergence", False, False, 2),
        ("divergence", True, False, 3),  # TRL 1.16 spends 5
        ("divergence", True, True, 6),
        ("preference loss", False, False, 1),
        ("preference loss", True, True, 3),
    ],
)
def test_products(operation, wants_hidden, wants_head, expected, monkeypatch):
    monkeypatch.setattr(products, "KEEP", 0)
    with FlopCounterMode(display=False) as counter:
        run(operation, wants_hidden, wants_head)
    assert counter.get_total_flops() / UNIT == pytest.approx(expected, abs=0.01)


@pytest.mark.parametrize("operation, expected", [("logprob", 3), ("divergence", 4)])
def test_few_logits_are_kept(operation, expected):
    with FlopCounterMode(display=False) as counter:
        run(operation, True, True)
    assert counter.get_total_flops() / UNIT == pytest.approx(expected, abs=0.01)


def test_what_does_not_fit_is_computed_again():
    half = N // 2 * V * 4
    with FlopCounterMode(display=False) as counter:
        run("preference loss", True, True, keep=half)
    assert counter.get_total_flops() / UNIT == pytest.approx(3.5, abs=0.01)


@pytest.mark.parametrize("operation", ["logprob", "divergence"])
@pytest.mark.parametrize("wants_head", [False, True])
def test_no_tensor_of_all_logits(operation, wants_head, monkeypatch):
    monkeypatch.setattr(products, "BUDGET", N * V * 4 // 8)
    monkeypatch.setattr(products, "SLAB", N * V * 4 // 8)
    monkeypatch.setattr(products, "KEEP", 0)
    with LargestTensor() as largest:
        run(operation, True, wants_head)
    assert largest.elements <= max(N * V // 7, V * D)


@pytest.mark.parametrize("operation, tokens", [("logprob", 8), ("logprob", N), ("preference loss", N)])
def test_no_float32_copy_of_the_gradient_of_the_head(operation, tokens, monkeypatch):
    """Also where a slab holds few logits, because the tokens are few or their probabilities were kept."""
    monkeypatch.setattr(products, "SLAB", V * D * 4 // 8)
    monkeypatch.setattr(products, "KEEP", 0)
    torch.manual_seed(0)
    hidden = torch.randn(tokens, D, dtype=torch.bfloat16, requires_grad=True)
    weight = torch.randn(V, D, dtype=torch.bfloat16, requires_grad=True)
    target, sequence = torch.randint(0, V, (tokens,)), torch.arange(tokens) // 64
    seen = []

    class Float32(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            out = function(*args, **(kwargs or {}))
            # sums begin with zeros or with a product; a CPU also converts the head for its products
            if (
                any(word in function.name() for word in ("zeros", "empty"))
                and out.dtype == torch.float32
                and out.shape[-1:] == (D,)
            ):
                seen.append(len(out))
            return out

    with Float32():
        if operation == "logprob":
            linear_logprob(hidden, weight, target).logp.sum().backward()
        else:
            linear_preference_loss(hidden, weight, target, sequence, 4, squares).loss.backward()
    assert 0 < max(seen) <= max(V // 4, tokens)
