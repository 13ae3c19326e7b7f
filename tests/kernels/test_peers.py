"""The same numbers as TRL, Liger and cut-cross-entropy, whose kernels the interpreter runs where there is no GPU.

Peers are compared in float32, where all of them are exact up to rounding, with float64 as the judge of both.
"""

import math
import os

os.environ.setdefault("CCE_AUTOTUNE", "0")  # whose autotuner wants a GPU

import pytest
import torch
import torch.nn.functional as F
from numerics import assert_no_worse, worst_row_error
from uft_kernels import linear_divergence, linear_logprob, linear_preference_loss
from uft_kernels.backend import jit, tl

pytestmark = pytest.mark.peers
N, D, V = 24, 64, 517


@pytest.fixture
def inputs(device):
    """hidden, weight, target, reference's hidden and weight, upstream."""
    torch.manual_seed(0)
    hidden, weight = torch.randn(N, D) * 0.7, torch.randn(V, D) * 0.4
    other = hidden + 0.3 * torch.randn(N, D), weight + 0.1 * torch.randn(V, D)
    target = torch.randint(0, V, (N,))
    target[0] = V - 1
    return [t.to(device) for t in (hidden, weight, target, *other, torch.randn(N))]


def both(function, hidden, weight):
    """[value, d hidden, d weight] of a function of a trained head."""
    hidden, weight = (t.detach().clone().requires_grad_() for t in (hidden, weight))
    value = function(hidden, weight)
    return [value.detach().reshape(1, -1), *torch.autograd.grad(value.sum(), (hidden, weight))]


def agree(ours, theirs, gold):
    """Both are right, and ours is not worse than theirs by more than a little."""
    for mine, other, truth in zip(ours, theirs, gold, strict=True):
        assert worst_row_error(other, truth) < 2e-4  # rows of small gradients cancel
        assert_no_worse(mine, other, truth, slack=4.0)


def in_float64(function, *tensors):
    return both(function, *(t.double() for t in tensors))


def gold_logp(target, upstream):
    return lambda h, w: upstream.double() * (h @ w.T).log_softmax(-1).gather(-1, target[:, None]).squeeze(-1)


def trl_kernels(triton, monkeypatch):
    from trl.kernels import chunked_divergence, chunked_logprob

    for module in (chunked_logprob, chunked_divergence):
        monkeypatch.setattr(module, "_use_triton", lambda device: triton)
    return chunked_logprob.ChunkedLogProbFunction, chunked_divergence.ChunkedDivergenceFunction


@pytest.mark.parametrize("triton", [False, True], ids=["torch", "triton"])
def test_trl_log_probability(inputs, triton, monkeypatch):
    hidden, weight, target, _, _, g = inputs
    theirs, _ = trl_kernels(triton, monkeypatch)
    agree(
        both(lambda h, w: g * linear_logprob(h, w, target).logp, hidden, weight),
        both(lambda h, w: g * theirs.apply(h, w, None, target, 1.0, 256)[0], hidden, weight),
        in_float64(gold_logp(target, g), hidden, weight),
    )


@pytest.mark.parametrize("output, beta", [("reverse_kl", 0.0), ("kl", 1.0), ("js", 0.3)])
@pytest.mark.parametrize("triton", [False, True], ids=["torch", "triton"])
def test_trl_divergence(inputs, output, beta, triton, monkeypatch):
    """TRL's student is our policy; its divergence at 0 is KL(teacher || student)."""
    hidden, weight, target, *other, g = inputs
    _, theirs = trl_kernels(triton, monkeypatch)

    def gold(h, w):
        log_p = (h @ w.T).log_softmax(-1)
        log_q = (other[0].double() @ other[1].double().T).log_softmax(-1)
        if output == "kl":
            return g.double() * (log_p.exp() * (log_p - log_q)).sum(-1)
        if output == "reverse_kl":
            return g.double() * (log_q.exp() * (log_q - log_p)).sum(-1)
        log_m = torch.logaddexp(log_p + math.log(1 - beta), log_q + math.log(beta))
        first, second = ((x.exp() * (x - log_m)).sum(-1) for x in (log_p, log_q))
        return g.double() * ((1 - beta) * first + beta * second)

    js_weight = beta if output == "js" else None

    def ours(h, w):
        return g * getattr(linear_divergence(h, w, *other, target, js_weight=js_weight), output)

    agree(
        both(ours, hidden, weight),
        both(lambda h, w: g * theirs.apply(h, w, None, *other, None, beta)[0], hidden, weight),
        in_float64(gold, hidden, weight),
    )  # fmt: skip


def test_liger_log_probability(inputs):
    from liger_kernel.ops.fused_linear_cross_entropy import LigerFusedLinearCrossEntropyFunction as theirs

    hidden, weight, target, _, _, g = inputs
    target[3] = -100
    gold = in_float64(
        lambda h, w: -g.double() * F.cross_entropy(h @ w.T, target, ignore_index=-100, reduction="none"), hidden, weight
    )
    agree(
        both(lambda h, w: g * linear_logprob(h, w, target).logp, hidden, weight),
        both(lambda h, w: -g * theirs.apply(h, w, target, None, None, -100, 0.0, 0.0, "none")[0], hidden, weight),
        gold,
    )


def test_liger_dpo(inputs):
    from liger_kernel.chunked_loss import LigerFusedLinearDPOLoss

    hidden, weight, target, other, other_weight, _ = inputs
    pairs = (4, N // 4)  # chosen first, then rejected
    sequence = torch.arange(4, device=hidden.device).repeat_interleave(N // 4)

    def dpo(reference):
        return lambda logp: -F.logsigmoid(0.1 * ((logp - reference)[:2] - (logp - reference)[2:])).mean()

    def summed(token_logp):
        return torch.zeros(4, dtype=token_logp.dtype, device=token_logp.device).index_add(0, sequence, token_logp)

    def theirs(h, w):
        loss, _ = LigerFusedLinearDPOLoss(compiled=False)(
            w, h.view(*pairs, D), target.view(pairs), None, other.view(*pairs, D), other_weight, None
        )
        return loss

    def ours(h, w):
        reference = summed(linear_logprob(other, other_weight, target).logp)
        return linear_preference_loss(h, w, target, sequence, 4, dpo(reference)).loss

    def gold(h, w):
        one = torch.ones(N, dtype=torch.float64)
        reference = summed(gold_logp(target, one)(other.double(), other_weight.double()))
        return dpo(reference)(summed(gold_logp(target, one)(h, w)))

    agree(*(both(f, hidden, weight) for f in (ours, theirs)), in_float64(gold, hidden, weight))


@jit
def _log1p(x):
    return tl.log(1.0 + x)


@jit
def _tanh(x):
    return 2.0 * tl.sigmoid(2.0 * x) - 1.0


def test_cut_cross_entropy(inputs, monkeypatch):
    if not torch.cuda.is_available():
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda *_, **__: True)
        # libdevice's functions return nothing under the interpreter
        import cut_cross_entropy.tl_utils as functions

        monkeypatch.setattr(functions, "tl_log1p", _log1p)
        monkeypatch.setattr(functions, "tl_tanh", _tanh)
    from cut_cross_entropy import linear_cross_entropy

    hidden, weight, target, _, _, g = inputs
    theirs = linear_cross_entropy(hidden, weight, target, impl="cce", reduction="none")
    ours = linear_logprob(hidden, weight, target).logp
    gold = gold_logp(target, torch.ones_like(g))(hidden.double(), weight.double())
    assert worst_row_error(-theirs[None], gold[None]) < 2e-5
    assert_no_worse(ours[None], -theirs[None], gold[None], slack=4.0)
