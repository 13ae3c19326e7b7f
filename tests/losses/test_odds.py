"""ORPO's odds, where they are hard: a certain response has log-probability 0 and infinite odds."""

import math

import pytest
import torch

from uft.losses import orpo
from uft.losses.odds import log1mexp, log_odds

LOGP = [-1e-12, -1e-9, -1e-6, -1e-3, -0.1, -0.6, -math.log(2), -0.8, -3.0, -20.0, -80.0]


def log1mexp_float64(x: float) -> float:
    return math.log(-math.expm1(x)) if x > -0.5 else math.log1p(-math.exp(x))


@pytest.mark.parametrize("dtype, rel", [(torch.float32, 1e-6), (torch.float64, 1e-14)], ids=["fp32", "fp64"])
@pytest.mark.parametrize("x", LOGP)
def test_log1mexp_to_full_relative_precision(x, dtype, rel):
    leaf = torch.tensor(x, dtype=dtype, requires_grad=True)
    value = log1mexp(leaf)
    value.backward()
    x = leaf.item()  # as rounded to the dtype
    assert value.item() == pytest.approx(log1mexp_float64(x), rel=rel)
    assert leaf.grad.item() == pytest.approx(math.exp(x) / math.expm1(x), rel=rel)


@pytest.mark.parametrize("x", LOGP)
def test_log_odds_in_float32(x):
    leaf = torch.tensor(x, requires_grad=True)
    value = log_odds(leaf)
    value.backward()
    x = leaf.item()
    # the odds of probability ½ are 1: near their logarithm of 0 only the absolute error can be small
    assert value.item() == pytest.approx(x - log1mexp_float64(x), rel=1e-6, abs=1e-7)
    assert leaf.grad.item() == pytest.approx(-1 / math.expm1(x), rel=1e-6)


def test_odds_of_three_quarters():
    # P = ¾: odds 3
    assert log_odds(torch.tensor(math.log(0.75))).item() == pytest.approx(math.log(3), rel=1e-6)


@pytest.mark.parametrize("mean_logp", [0.0, 1e-7], ids=["certain", "rounded above certain"])
def test_certain_responses_have_large_finite_odds(mean_logp):
    """ℓ = −ε² in their place, ε = 2⁻²³: odds of 2⁴⁶."""
    leaf = torch.tensor(mean_logp, requires_grad=True)
    value = log_odds(leaf)
    value.backward()
    assert value.item() == pytest.approx(46 * math.log(2), rel=1e-6)
    assert leaf.grad.item() == 0


@pytest.mark.parametrize("chosen", [0.0, -1e-12, -1.0, -1e4])
@pytest.mark.parametrize("rejected", [0.0, -1e-12, -1.0, -1e4])
@pytest.mark.parametrize("length", [1.0, 3.0, 1000.0])
def test_value_and_gradient_are_finite(chosen, rejected, length):
    """Of summed log-probabilities whose means are these, in float32."""
    logps = [torch.tensor([x * length], requires_grad=True) for x in (chosen, rejected)]
    lengths = torch.tensor([length])
    loss = orpo(*logps, lengths, lengths)
    loss.sum().backward()
    assert loss.isfinite().all() and all(logp.grad.isfinite().all() for logp in logps)
    assert logps[0].grad.item() <= 0 <= logps[1].grad.item()


@pytest.mark.parametrize("chosen", [-1e-10, -1e-3, -1.0, -50.0])
@pytest.mark.parametrize("rejected", [-1e-10, -1e-3, -1.0, -50.0])
def test_float32_agrees_with_float64(chosen, rejected):
    def loss_and_gradients(dtype):
        logps = [torch.tensor([x], dtype=torch.float32).to(dtype).requires_grad_() for x in (chosen, rejected)]
        lengths = torch.ones(1, dtype=dtype)
        loss = orpo(*logps, lengths, lengths)
        return [x.double() for x in (loss, *torch.autograd.grad(loss.sum(), logps))]

    for got, want in zip(loss_and_gradients(torch.float32), loss_and_gradients(torch.float64)):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-30)


def test_by_hand():
    # means log ¾ and log ¼: odds 3 and ⅓, so −log σ(log 9) = log (1 + 1/9); however long the responses are
    for length in (1.0, 2.0):
        logps = [torch.tensor([length * math.log(p)]) for p in (0.75, 0.25)]
        lengths = torch.tensor([length])
        assert orpo(*logps, lengths, lengths).item() == pytest.approx(math.log(10 / 9), rel=1e-6)


def test_equal_responses_lose_ln2():
    logp, length = torch.tensor([-8.0, 0.0]), torch.tensor([4.0, 4.0])
    torch.testing.assert_close(orpo(logp, logp, length, length), torch.full((2,), math.log(2)))
