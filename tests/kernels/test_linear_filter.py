"""The filtered backward: exactly the gradient of the active blocks, and everything when eps is small enough."""

import pytest
import torch
from numerics import assert_no_worse
from torch.utils.flop_counter import FlopCounterMode
from uft_kernels import linear_filter, linear_logprob, products
from uft_kernels.token_logprob import ENTRIES, IGNORE

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
SCALES = [{}, {"temperature": 0.7, "softcap": 9.0, "logit_scale": 0.8}]


def peaked(N, D, V, dtype, device):
    """Tokens that are sure of themselves, of something else, and of nothing; a fifth is IGNORE."""
    torch.manual_seed(0)
    weight, bias, target = torch.randn(V, D), torch.randn(V) * 0.1, torch.randint(0, V, (N,))
    target[:2] = V - 1
    favourite = torch.where(torch.arange(N) % 3 == 0, torch.randint(0, V, (N,)), target)
    hidden = weight[favourite] * (8 / weight[favourite].square().sum(-1, keepdim=True))
    hidden[4::7] *= 0.05
    target[3::5] = IGNORE
    return *(t.to(device, dtype) for t in (hidden, weight, bias)), target.to(device)


def gradients(function, tensors, trained, dtype):
    leaves = [t.detach().to(dtype).requires_grad_(k == 0 or trained) for k, t in enumerate(tensors)]
    return torch.autograd.grad(function(*leaves), [t for t in leaves if t.requires_grad])


def reference(target, upstream, eps, dtype, temperature=1.0, softcap=None, logit_scale=1.0):
    """dz computed from whole logits, masked by block, and given to autograd as it is."""

    def loss(hidden, weight, bias):
        z = (hidden.to(dtype) @ weight.to(dtype).T + bias.to(dtype)) * logit_scale
        z = z if softcap is None else softcap * torch.tanh(z / softcap)
        log_p = (z / temperature).log_softmax(-1)
        p = log_p.detach().exp()
        beyond = -p.shape[1] % ENTRIES
        blocks = torch.nn.functional.pad(p, (0, beyond)).unflatten(1, (-1, ENTRIES))
        kept = target != IGNORE
        active = blocks.amax(-1) > eps
        active.scatter_(1, (target.clamp(min=0) // ENTRIES)[:, None], True)
        mask = active.repeat_interleave(ENTRIES, 1)[:, : p.shape[1]] & kept[:, None]
        entropy = -(p * log_p.detach()).sum(-1, keepdim=True)
        onehot = torch.zeros_like(p).scatter_(1, target.clamp(min=0)[:, None], 1.0)
        g = upstream.to(dtype)[:, :, None]
        dz = (g[0] * (onehot - p) - g[1] * p * (log_p.detach() + entropy)) * mask
        return (z / temperature * dz).sum()

    return loss


@DTYPES
@pytest.mark.parametrize("trained", [False, True], ids=["frozen head", "trained head"])
@pytest.mark.parametrize("scales", SCALES, ids=["plain", "scaled"])
@pytest.mark.parametrize("eps", [1e-30, 1e-3])
def test_gradient_of_the_active_blocks(eps, scales, trained, dtype, form, device, monkeypatch):
    monkeypatch.setattr(linear_filter, "DENSE", 2.0)
    monkeypatch.setattr(linear_filter, "WIDTH", 16)
    monkeypatch.setattr(products, "BUDGET", 15_000)
    N, D, V = 37, 24, 700
    *tensors, target = peaked(N, D, V, dtype, device)
    upstream = torch.randn(2, N, device=device)

    def ours(hidden, weight, bias):
        found = linear_logprob(hidden, weight, target, bias, entropy=True, filter_eps=eps, **scales)
        return (upstream[0] * found.logp + upstream[1] * found.entropy).sum()

    found = gradients(ours, tensors, trained, dtype)
    gold = gradients(reference(target, upstream, eps, torch.float64, **scales), tensors, trained, torch.float64)
    eager = gradients(reference(target, upstream, eps, dtype, **scales), tensors, trained, dtype)
    for each in zip(found, eager, gold, strict=True):
        # a row of the head that no active pair touches is exactly 0
        assert_no_worse(*(t.reshape(1, -1) if t.ndim == 1 else t for t in each), slack=6.0)


def test_values_are_not_filtered(form, device):
    hidden, weight, bias, target = peaked(37, 24, 700, torch.float32, device)
    whole = linear_logprob(hidden, weight, target, bias, entropy=True)
    found = linear_logprob(hidden.requires_grad_(), weight, target, bias, entropy=True, filter_eps=0.1)
    assert torch.equal(found.logp, whole.logp) and torch.equal(found.entropy, whole.entropy)


def log_probabilities(target, eps, upstream=1.0):
    """The sum of log-probabilities under a filter, as a function of hidden states, head and bias."""
    return lambda h, w, b: (upstream * linear_logprob(h, w, target, b, filter_eps=eps).logp).sum()


def test_the_error_is_what_was_left_out(device):
    *tensors, target = peaked(200, 24, 3000, torch.float32, device)
    exact, *rest = (
        gradients(log_probabilities(target, eps), tensors, False, torch.float32)[0] for eps in (0.0, 1e-6, 1e-3, 1e-1)
    )
    errors = [float((found - exact).norm() / exact.norm()) for found in rest]
    assert errors[0] < 1e-3 and errors[0] <= errors[1] <= errors[2]


def test_dense_distributions_take_the_whole_backward(device, monkeypatch):
    *tensors, target = peaked(40, 24, 700, torch.float32, device)
    monkeypatch.setattr(linear_filter, "DENSE", 0.0)
    both = (gradients(log_probabilities(target, eps), tensors, True, torch.float32) for eps in (1e-3, 0.0))
    for found, exact in zip(*both, strict=True):
        torch.testing.assert_close(found, exact)


def test_no_gradient_upstream_costs_nothing(form, device):
    """As behind a clipped ratio: a token whose upstream gradient is 0 has no pair."""
    *tensors, target = peaked(40, 24, 700, torch.float32, device)
    nothing = torch.zeros(40, device=device)
    for found in gradients(log_probabilities(target, 1e-3, nothing), tensors, True, torch.float32):
        assert not found.any()


def test_products_on_peaked_inputs():
    N, D, V = 256, 256, 8192
    hidden, weight, _, target = peaked(N, D, V, torch.float32, "cpu")
    hidden, weight = hidden.requires_grad_(), weight.requires_grad_()
    with FlopCounterMode(display=False) as counter:
        linear_logprob(hidden, weight, target, filter_eps=1e-3).logp.sum().backward()
    assert counter.get_total_flops() / (2 * N * V * D) < 1.2  # of 4 without a filter


@pytest.mark.parametrize("eps", [-0.1, 1.0])
def test_an_eps_that_is_no_probability_is_refused(eps):
    with pytest.raises(ValueError, match="filter_eps is"):
        linear_logprob(torch.zeros(2, 3), torch.zeros(5, 3), torch.zeros(2, dtype=torch.int64), filter_eps=eps)
