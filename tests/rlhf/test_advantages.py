"""Advantages and policy-gradient losses: by hand and against their definitions."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from uft.losses.policy_gradient import clipped_surrogate, clipped_value, k3
from uft.rlhf.advantages import AdaptiveKL, gae, group_normalised, leave_one_out, token_rewards, whitened

MASK = torch.tensor([[False, True, True, True], [False, True, False, False]])


def test_token_rewards_by_hand():
    log_ratio = torch.tensor([[9.0, 1.0, 2.0, 3.0], [9.0, 4.0, 9.0, 9.0]])
    found = token_rewards(torch.tensor([10.0, 20.0]), log_ratio, MASK, 0.5)
    assert found.tolist() == [[0.0, -0.5, -1.0, 10.0 - 1.5], [0.0, 20.0 - 2.0, 0.0, 0.0]]
    assert token_rewards(torch.tensor([1.0, 2.0]), None, MASK, 0.5).tolist() == [[0, 0, 0, 1], [0, 2, 0, 0]]


def test_gae_by_hand():
    """γ = 0.5, λ = 0.5, rewards 1, 0, 2 and values 0.4, 0.2, 1 of one response."""
    rewards, values = torch.tensor([[1.0, 0.0, 2.0]]), torch.tensor([[0.4, 0.2, 1.0]])
    advantage, returns = gae(rewards, values, torch.ones(1, 3, dtype=torch.bool), 0.5, 0.5)
    third = 2.0 - 1.0
    second = (0.0 + 0.5 * 1.0 - 0.2) + 0.25 * third
    first = (1.0 + 0.5 * 0.2 - 0.4) + 0.25 * second
    torch.testing.assert_close(advantage, torch.tensor([[first, second, third]]))
    torch.testing.assert_close(returns, advantage + values)


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 10_000), st.floats(0.5, 1.0), st.floats(0.0, 1.0))
def test_gae_is_the_sum_that_defines_it(seed, gamma, lam):
    torch.manual_seed(seed)
    T = 6
    first, n = int(torch.randint(0, 3, ())), int(torch.randint(1, 4, ()))
    mask = torch.zeros(1, T, dtype=torch.bool)
    mask[0, first : first + n] = True
    rewards, values = torch.randn(1, T) * mask, torch.randn(1, T)  # values elsewhere must not matter
    advantage, _ = gae(rewards, values, mask, gamma, lam)
    inside = range(first, first + n)
    value = lambda t: float(values[0, t]) if t in inside else 0.0
    for t in inside:
        deltas = [float(rewards[0, u]) + gamma * value(u + 1) - value(u) for u in inside if u >= t]
        wanted = sum((gamma * lam) ** k * delta for k, delta in enumerate(deltas))
        assert float(advantage[0, t]) == pytest.approx(wanted, abs=1e-5)
    assert not advantage[~mask].any()


def test_gae_with_lambda_1_is_the_return_less_the_value():
    torch.manual_seed(0)
    mask = torch.ones(5, 7, dtype=torch.bool)
    rewards, values = torch.randn(5, 7), torch.randn(5, 7)
    _, returns = gae(rewards, values, mask, 1.0, 1.0)
    torch.testing.assert_close(returns, rewards.flip(-1).cumsum(-1).flip(-1))


def test_groups_by_hand():
    reward = torch.tensor([1.0, 2.0, 6.0, 5.0, 5.0, 5.0])
    assert leave_one_out(reward, 3).tolist() == pytest.approx([1 - 4.0, 2 - 3.5, 6 - 1.5, 0, 0, 0])
    deviation = math.sqrt((4 + 1 + 9) / 2) + 1e-4
    assert group_normalised(reward, 3).tolist() == pytest.approx(
        [-2 / deviation, -1 / deviation, 3 / deviation, 0, 0, 0]
    )
    for function in (leave_one_out, group_normalised):
        for samples in (1, 4):
            with pytest.raises(ValueError, match=f"found 6 rewards in groups of {samples}"):
                function(reward, samples)


def test_whitened_over_what_counts():
    found = whitened(torch.tensor([[100.0, 1.0, 2.0, 3.0], [0.0, 6.0, 50.0, 50.0]]), MASK)
    assert found[MASK].mean().abs() < 1e-6 and found[MASK].var() == pytest.approx(1.0)
    assert not found[~MASK].any()


def test_adaptive_coefficient():
    """arXiv:1909.08593: the error is clipped at a fifth."""
    assert AdaptiveKL(0.1, 6.0).after(6.6).coefficient == pytest.approx(0.1 * (1 + 0.1 * 0.1))
    assert AdaptiveKL(0.1, 6.0).after(60.0).coefficient == pytest.approx(0.1 * 1.02)
    assert AdaptiveKL(0.1, 6.0).after(0.0).coefficient == pytest.approx(0.1 * 0.98)


def test_surrogate_by_hand():
    """ρ = 1.5 and 0.5 with both signs of the advantage: clipped only where the objective would grow."""
    logp, old = torch.tensor([1.5, 1.5, 0.5, 0.5]).log(), torch.zeros(4)
    advantage = torch.tensor([1.0, -1.0, 1.0, -1.0])
    assert clipped_surrogate(logp, old, advantage).tolist() == pytest.approx([-1.2, 1.5, -0.5, 0.8])


def test_surrogate_of_the_policy_itself_is_the_policy_gradient():
    logp = torch.randn(6, dtype=torch.float64, requires_grad=True)
    advantage = torch.randn(6, dtype=torch.float64)
    [found] = torch.autograd.grad(clipped_surrogate(logp, logp.detach(), advantage).sum(), logp)
    torch.testing.assert_close(found, -advantage)


def test_value_by_hand():
    value, old, returns = torch.tensor([1.0, 1.0]), torch.tensor([0.0, 0.9]), torch.tensor([2.0, 2.0])
    assert clipped_value(value, old, returns, 0.2).tolist() == pytest.approx([0.5 * 1.8**2, 0.5])
    assert clipped_value(value, old, returns, None).tolist() == pytest.approx([0.5, 0.5])


def test_k3_is_the_kl_in_the_mean():
    torch.manual_seed(0)
    p, q = torch.randn(5, dtype=torch.float64).log_softmax(-1), torch.randn(5, dtype=torch.float64).log_softmax(-1)
    assert (p.exp() * k3(p, q)).sum() == pytest.approx((p.exp() * (p - q)).sum())
    assert (k3(p, q) >= 0).all()


def test_the_gradient_of_k3_is_that_of_the_other_kl():
    """On the policy's own tokens, in the mean: what GRPO descends is KL(π_ref ‖ π)."""
    torch.manual_seed(0)
    z, q = torch.randn(5, dtype=torch.float64, requires_grad=True), torch.randn(5, dtype=torch.float64).log_softmax(-1)
    p = z.log_softmax(-1)
    [found] = torch.autograd.grad((p.detach().exp() * k3(p, q)).sum(), z, retain_graph=True)
    [wanted] = torch.autograd.grad((q.exp() * (q - p)).sum(), z)
    torch.testing.assert_close(found, wanted)
