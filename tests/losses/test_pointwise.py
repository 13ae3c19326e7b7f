"""Every pointwise loss by hand, and what it promises."""

import inspect
from math import exp, log, log1p

import jaxtyping
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from uft.losses import POINTWISE, RunningMean, apo_zero_unpaired, bco, kto, needs_reference, una_bce, una_mse

every_loss = pytest.mark.parametrize("name", POINTWISE)
fast = settings(max_examples=50, deadline=None)


def call(name, reward, target, kl=2.0, delta=0.4, beta=0.5, **options):
    reward = torch.as_tensor(reward)
    found = {
        "reward": reward,
        "target": torch.as_tensor(target, dtype=reward.dtype).expand_as(reward),
        "kl": torch.tensor(kl, dtype=reward.dtype),
        "delta": torch.tensor(delta, dtype=reward.dtype),
        "beta": beta,
    }
    wanted = inspect.signature(POINTWISE[name]).parameters
    return POINTWISE[name](**{key: value for key, value in found.items() if key in wanted}, **options)


def sigma(x):
    return 1 / (1 + exp(-x))


def softplus(x):
    """−log σ(−x)"""
    return log1p(exp(x))


LN2 = log(2)
TWO_TO_ONE = {"desirable_weight": 2.0, "undesirable_weight": 0.5}

# name -> (reward, target, options, value); kl = 2 nats, delta = 0.4, β = ½, so that KTO shifts the reward by 1
BY_HAND = {
    "una_mse": [
        (0.0, 1.0, {}, 0.25),  # policy equals reference: σ = ½
        (0.0, 0.5, {}, 0.0),  # a score of ½ asks for just that
        (1.5, 0.8, {}, (sigma(1.5) - 0.8) ** 2),
        (-1.0, 0.0, {}, sigma(-1) ** 2),
    ],
    "una_bce": [
        (0.0, 1.0, {}, LN2),
        (0.0, 0.3, {}, LN2),
        (1.5, 0.8, {}, 0.8 * softplus(-1.5) + 0.2 * softplus(1.5)),
        (-1.0, 0.0, {}, softplus(-1)),
    ],
    "kto": [
        (1.0, 1.0, {}, 0.5),  # the reward of the average response
        (2.5, 1.0, TWO_TO_ONE, 2 * (1 - sigma(1.5))),
        (2.5, 0.0, TWO_TO_ONE, 0.5 * (1 - sigma(-1.5))),
        (0.0, 0.5, {}, 1 - sigma(-1)),  # a score of ½ is desirable
        (0.0, 0.49, {}, 1 - sigma(1)),
    ],
    "bco": [
        (0.4, 1.0, {}, LN2),
        (1.4, 1.0, TWO_TO_ONE, 2 * softplus(-1)),
        (1.4, 0.0, TWO_TO_ONE, 0.5 * softplus(1)),
        (0.0, 0.5, {}, softplus(0.4)),
        (0.0, 0.49, {}, softplus(-0.4)),
    ],
    "apo_zero_unpaired": [
        (0.0, 1.0, {}, 0.5),
        (1.0, 0.5, {}, sigma(-1)),
        (1.0, 0.49, {}, sigma(1)),
        (1.5, 1.0, TWO_TO_ONE, 2 * sigma(-1.5)),
        (1.5, 0.0, TWO_TO_ONE, 0.5 * sigma(1.5)),
    ],
}


@every_loss
def test_values(name):
    for reward, target, options, value in BY_HAND[name]:
        loss = call(name, torch.tensor([reward], dtype=torch.float64), target, **options)
        assert loss.item() == pytest.approx(value, rel=1e-12, abs=1e-15), (reward, target, options)


def test_kto_takes_a_negative_divergence_for_zero():
    reward = torch.tensor([0.7])
    torch.testing.assert_close(call("kto", reward, 1.0, kl=-3.0), call("kto", reward, 1.0, kl=0.0))


@pytest.mark.parametrize("loss, statistic", [(kto, "kl"), (bco, "delta")])
def test_no_gradient_through_the_statistic(loss, statistic):
    value = torch.tensor(0.3, requires_grad=True)
    beta = {"beta": 0.1} if loss is kto else {}
    result = loss(torch.zeros(2, requires_grad=True), torch.tensor([1.0, 0.0]), **{statistic: value}, **beta)
    result.sum().backward()
    assert value.grad is None


@given(st.floats(-20, 20), st.sampled_from([0.0, 1.0]))
@fast
def test_losses_that_are_each_other(reward, target):
    reward, zero = torch.tensor([reward], dtype=torch.float64), torch.zeros((), dtype=torch.float64)
    target = torch.full_like(reward, target)
    torch.testing.assert_close(bco(reward, target, zero), una_bce(reward, target))
    torch.testing.assert_close(kto(reward, target, zero, 0.1), apo_zero_unpaired(reward, target))
    torch.testing.assert_close(apo_zero_unpaired(reward, target).square(), una_mse(reward, target))


# --- what every loss promises -------------------------------------------------------------------------------------


@every_loss
@given(st.floats(-15, 15))
@fast
def test_desired_up_undesired_down(name, reward):
    for target, sign in ((1.0, -1), (0.0, 1)):
        leaf = torch.tensor([reward], dtype=torch.float64, requires_grad=True)
        call(name, leaf, target).sum().backward()
        assert sign * leaf.grad.item() > 0


@pytest.mark.parametrize("loss", [una_mse, una_bce])
@given(st.floats(0.05, 0.95))
@fast
def test_scores_are_met_at_their_log_odds(loss, score):
    """The gradient vanishes where σ(r) is the score: a score above ½ makes a response likelier, rejected or not."""
    reward = torch.tensor([log(score / (1 - score))], dtype=torch.float64, requires_grad=True)
    loss(reward, torch.full_like(reward, score).detach()).sum().backward()
    assert reward.grad.item() == pytest.approx(0, abs=1e-12)


@every_loss
@pytest.mark.parametrize("target", [0.0, 0.3, 0.7, 1.0])
def test_finite_for_extreme_rewards(name, target):
    reward = torch.tensor([-1e4, -1e2, -1.0, 0.0, 1.0, 1e2, 1e4], requires_grad=True)
    loss = call(name, reward, target)
    loss.sum().backward()
    assert loss.isfinite().all() and reward.grad.isfinite().all()


@every_loss
def test_gradcheck(name):
    reward = torch.linspace(-3, 3, 8, dtype=torch.float64, requires_grad=True)
    target = torch.tensor([1.0, 0.0, 0.3, 0.7] * 2, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda r: call(name, r, target), [reward])


@every_loss
def test_responses_do_not_mix(name):
    reward, target = torch.linspace(-2, 2, 4), torch.tensor([1.0, 0.0, 1.0, 0.0])
    together = call(name, reward, target)
    alone = torch.cat([call(name, reward[i : i + 1], target[i : i + 1]) for i in range(4)])
    assert together.shape == (4,)
    torch.testing.assert_close(together, alone)


@every_loss
def test_other_shapes_are_refused(name):
    with pytest.raises(jaxtyping.TypeCheckError):
        call(name, torch.zeros(3, 3), torch.ones(3, 3))


def test_all_of_them_need_a_reference():
    assert all(needs_reference(loss) for loss in POINTWISE.values())


def test_every_loss_is_computed_by_hand():
    assert set(POINTWISE) == set(BY_HAND)


# --- BCO's running mean -------------------------------------------------------------------------------------------


@given(st.lists(st.floats(-100, 100), min_size=1, max_size=20), st.data())
@fast
def test_running_mean_does_not_depend_on_the_cut(values, data):
    cut = data.draw(st.integers(0, len(values)))
    mean = RunningMean()
    for part in (values[:cut], values[cut:]):
        mean = mean.updated(sum(part), len(part))
    assert mean.mean == pytest.approx(sum(values) / len(values), abs=1e-9) and mean.count == len(values)


def test_running_mean_by_hand():
    mean = RunningMean().updated(total=6.0, count=3)  # three values of mean 2
    assert mean == RunningMean(2.0, 3)
    assert mean.updated(total=10.0, count=1) == RunningMean(4.0, 4)  # (6 + 10) / 4
    assert mean.updated(total=0.0, count=0) is mean


def test_running_mean_survives_a_restart():
    mean = RunningMean().updated(1.0, 3).updated(0.1, 7)
    assert RunningMean(**mean.state_dict()) == mean
