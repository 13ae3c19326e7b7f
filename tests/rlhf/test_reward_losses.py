"""Losses of a reward model: arithmetic that fits on the back of an envelope."""

import math

import jaxtyping
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from uft.losses.reward import bradley_terry, centering, cross_entropy, squared_error

finite = st.floats(-20, 20, width=32)


def test_bradley_terry_by_hand():
    chosen, rejected = torch.tensor([1.0, 0.0, 3.0]), torch.tensor([1.0, 2.0, 0.0])
    # −log σ(0) = log 2, −log σ(−2) = log(1 + e²), −log σ(3) = log(1 + e⁻³)
    by_hand = torch.tensor([math.log(2), math.log(1 + math.e**2), math.log(1 + math.e**-3)])
    torch.testing.assert_close(bradley_terry(chosen, rejected), by_hand)


def test_a_margin_is_taken_off_the_difference():
    """r_w − r_l − m = 3 − 1 − 2 = 0, where the loss is log 2; without the margin it is less."""
    chosen, rejected = torch.tensor([3.0]), torch.tensor([1.0])
    torch.testing.assert_close(bradley_terry(chosen, rejected, torch.tensor([2.0])), torch.tensor([math.log(2)]))
    assert bradley_terry(chosen, rejected) < math.log(2)


def test_centering_is_the_square_of_the_sum():
    torch.testing.assert_close(
        centering(torch.tensor([3.0, 1.0]), torch.tensor([1.0, -1.0])), torch.tensor([16.0, 0.0])
    )


def test_regression_by_hand():
    """σ(log 3) = 3/4."""
    reward, target = torch.tensor([math.log(3), math.log(3)]), torch.tensor([1.0, 0.25])
    torch.testing.assert_close(squared_error(reward, target), torch.tensor([0.0625, 0.25]))
    by_hand = torch.tensor([-math.log(0.75), -0.25 * math.log(0.75) - 0.75 * math.log(0.25)])
    torch.testing.assert_close(cross_entropy(reward, target), by_hand)


@given(st.floats(0.05, 0.95))
def test_cross_entropy_is_smallest_where_the_probability_is_the_target(target):
    reward = torch.tensor([math.log(target / (1 - target))], dtype=torch.float64, requires_grad=True)
    (slope,) = torch.autograd.grad(cross_entropy(reward, torch.tensor([target], dtype=torch.float64)).sum(), reward)
    assert abs(slope.item()) < 1e-12


@given(finite, finite, st.floats(0, 5, width=32))
def test_the_two_orders_of_a_pair_have_probabilities_that_add_to_one(a, b, margin):
    a, b, m = (torch.tensor([x], dtype=torch.float64) for x in (a, b, margin))
    first, second = bradley_terry(a, b), bradley_terry(b, a)
    torch.testing.assert_close(torch.exp(-first) + torch.exp(-second), torch.ones(1, dtype=torch.float64))
    assert bradley_terry(a, b, m) >= first  # a margin asks for more


def test_other_shapes_are_refused():
    with pytest.raises(jaxtyping.TypeCheckError):
        bradley_terry(torch.zeros(3), torch.zeros(2))
    with pytest.raises(jaxtyping.TypeCheckError):
        bradley_terry(torch.zeros(3), torch.zeros(3), torch.zeros(1))
