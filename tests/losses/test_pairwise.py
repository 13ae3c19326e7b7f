"""Every pairwise loss by hand, and what it promises: finite, differentiable, nothing shared between pairs.

The arguments are filled by name, as the objective fills them.
"""

import inspect
from math import exp, log, log1p

import jaxtyping
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from uft.losses import PAIRWISE, needs_reference, una_bce
from uft.losses.pointwise import apo_zero_unpaired

every_loss = pytest.mark.parametrize("name", PAIRWISE)


def quantities(chosen_logratio, rejected_logratio, beta, lengths=(4.0, 5.0), reference=(-5.0, -7.0), dtype=None):
    """All that a loss may ask for, of pairs with these log π(y | x) / π_ref(y | x).  Everything but beta is a leaf."""
    dtype = dtype or torch.float64
    found = {"beta": beta}
    for side, logratio, length, ref in zip(
        ("chosen", "rejected"), (chosen_logratio, rejected_logratio), lengths, reference
    ):
        logratio = torch.as_tensor(logratio, dtype=dtype).reshape(-1)
        found |= {
            f"{side}_reward": (beta * logratio).requires_grad_(),
            f"{side}_logp": (ref + logratio).requires_grad_(),
            f"{side}_reference_logp": torch.full_like(logratio, ref),
            f"{side}_length": torch.full_like(logratio, length),
        }
    return found


def call(name, found, **options):
    wanted = inspect.signature(PAIRWISE[name]).parameters
    return PAIRWISE[name](**{key: value for key, value in found.items() if key in wanted}, **options)


def gradients(name, found, **options):
    """Of the sum of the loss, with respect to what it takes of (chosen, rejected): rewards or log-probabilities."""
    leaves = [found[f"{side}_{what}"] for side in ("chosen", "rejected") for what in ("reward", "logp")]
    loss = call(name, found, **options)
    grads = torch.autograd.grad(loss.sum(), leaves, allow_unused=True)
    chosen, rejected = ([g for g in side if g is not None] for side in (grads[:2], grads[2:]))
    assert len(chosen) == len(rejected) == 1, f"{name} takes a reward or a log-probability of each side, not both"
    return chosen[0], rejected[0]


# --- by hand ------------------------------------------------------------------------------------------------------


def sigma(x):
    return 1 / (1 + exp(-x))


def softplus(x):
    """−log σ(−x)"""
    return log1p(exp(x))


def odds(p):
    return p / (1 - p)


LN2 = log(2)

# Policy equals reference, so both rewards are 0; β = ½, lengths 4 and 5, log-probabilities −5 and −7.
AT_REFERENCE = {
    "dpo": LN2,
    "cdpo": LN2,  # 0.9 ln 2 + 0.1 ln 2
    "robust_dpo": LN2,  # (0.9 ln 2 − 0.1 ln 2) / 0.8
    "dpo_norm": LN2,
    "dpop": LN2,
    "cpo": softplus(-0.5 * (-5 + 7)),  # reference-free: β (−5 + 7) = 1
    "simpo": softplus(-(0.5 * (-5 / 4 + 7 / 5) - 0.5)),
    "orpo": log(1 + odds(exp(-7 / 5)) / odds(exp(-5 / 4))),  # −log σ(log a/b) = log(1 + b/a)
    "hinge": 1.0,
    "ipo": 1.0,  # (1 / (2 · ½))²
    "exo": log(0.5) - 0.5 * log(0.999 * 0.001),  # ½ [ln ½ − ln 0.999] + ½ [ln ½ − ln 0.001]
    "discopop": 0.5 * LN2 + 0.5,
    "cal_dpo": LN2 + 2.0,  # two squares of 1 / (2β) = 1
    "sppo": 2.0,
    "nca": 2 * LN2,
    "bco_pair": 2 * LN2,
    "apo_zero": 1.0,
    "apo_down": 1.0,
}

# The chosen response is e² times as likely as under the reference, the rejected one e times less likely; β = ½.
# Rewards 1 and −½, margin 1.5; log-probabilities −3 and −8; lengths 4 and 5.
ASYMMETRIC = {
    "dpo": softplus(-1.5),
    "cdpo": 0.9 * softplus(-1.5) + 0.1 * softplus(1.5),
    "robust_dpo": (0.9 * softplus(-1.5) - 0.1 * softplus(1.5)) / 0.8,
    "dpo_norm": softplus(-(1 / 4 + 0.5 / 5)),
    "dpop": softplus(-1.5),  # the chosen response did not lose likelihood: no penalty
    "cpo": softplus(-0.5 * (-3 + 8)),
    "simpo": softplus(-(0.5 * (-3 / 4 + 8 / 5) - 0.5)),
    "orpo": log(1 + odds(exp(-8 / 5)) / odds(exp(-3 / 4))),
    "hinge": 0.0,  # 1.5 is beyond the margin of 1
    "ipo": (2 / 4 + 1 / 5 - 1) ** 2,  # log-ratios per token, and 1 / (2β) = 1
    "exo": sigma(1.5) * log(sigma(1.5) / 0.999) + sigma(-1.5) * log(sigma(-1.5) / 0.001),
    "discopop": sigma(-30) * softplus(-1.5) + sigma(30) * exp(-1.5),  # 1.5 / 0.05 = 30
    "cal_dpo": softplus(-3) + (2 - 1) ** 2 + (-1 + 1) ** 2,  # log-ratios 2 and −1, without β
    "sppo": (2 - 1) ** 2 + (-1 + 1) ** 2,
    "nca": softplus(-1) + 0.5 * softplus(1) + 0.5 * softplus(-0.5),
    "bco_pair": softplus(-1) + softplus(-0.5),
    "apo_zero": sigma(-1) + sigma(-0.5),
    "apo_down": sigma(1) + sigma(-1.5),
}

# The same pair with the roles swapped, and options where a loss has any.  Rewards −½ and 1, margin −1.5;
# log-probabilities −6 and −5; lengths still 4 and 5.
SWAPPED = {
    "dpo": ({"label_smoothing": 0.2}, 0.8 * softplus(1.5) + 0.2 * softplus(-1.5)),
    "cdpo": ({"label_smoothing": 0.0}, softplus(1.5)),
    "robust_dpo": ({"label_smoothing": 0.3}, (0.7 * softplus(1.5) - 0.3 * softplus(-1.5)) / 0.4),
    "dpo_norm": ({}, softplus(0.5 / 4 + 1 / 5)),
    "dpop": ({"penalty": 3.0}, softplus(1.5 + 3 * 0.5)),  # r_w = −½: the penalty is 3 · ½
    "cpo": ({"label_smoothing": 0.2}, 0.8 * softplus(0.5) + 0.2 * softplus(-0.5)),
    "simpo": ({"gamma": 1.0}, softplus(1 - 0.5 * (-6 / 4 + 5 / 5))),
    "orpo": ({}, log(1 + odds(exp(-5 / 5)) / odds(exp(-6 / 4)))),
    "hinge": ({"margin": 2.0}, 3.5),
    "ipo": ({}, (-1 / 4 - 2 / 5 - 1) ** 2),
    "exo": ({"label_smoothing": 0.1}, sigma(-1.5) * log(sigma(-1.5) / 0.9) + sigma(1.5) * log(sigma(1.5) / 0.1)),
    "discopop": ({"tau": 1.0}, sigma(1.5) * softplus(1.5) + sigma(-1.5) * exp(1.5)),
    "cal_dpo": ({"calibration": 0.5}, softplus(3) + 0.5 * ((-1 - 1) ** 2 + (2 + 1) ** 2)),
    "sppo": ({}, (-1 - 1) ** 2 + (2 + 1) ** 2),
    "nca": ({}, softplus(0.5) + 0.5 * softplus(-0.5) + 0.5 * softplus(1)),
    "bco_pair": ({}, softplus(0.5) + softplus(1)),
    "apo_zero": ({}, sigma(0.5) + sigma(1)),
    "apo_down": ({}, sigma(-0.5) + sigma(1.5)),
}


@every_loss
def test_value_while_policy_equals_reference(name):
    assert call(name, quantities(0.0, 0.0, beta=0.5)).item() == pytest.approx(AT_REFERENCE[name], rel=1e-12)


@every_loss
def test_value_of_an_asymmetric_pair(name):
    assert call(name, quantities(2.0, -1.0, beta=0.5)).item() == pytest.approx(ASYMMETRIC[name], rel=1e-12)


@every_loss
def test_value_of_the_swapped_pair_with_options(name):
    options, value = SWAPPED[name]
    assert call(name, quantities(-1.0, 2.0, beta=0.5), **options).item() == pytest.approx(value, rel=1e-12)


PUBLISHED = {"exo": ("label_smoothing", 1e-3), "dpop": ("penalty", 50.0), "discopop": ("tau", 0.05)}


@pytest.mark.parametrize("name", PUBLISHED)
def test_defaults_are_the_published_ones(name):
    option, value = PUBLISHED[name]
    assert inspect.signature(PAIRWISE[name]).parameters[option].default == value


# --- relations between them ---------------------------------------------------------------------------------------

rewards = st.floats(-20, 20)
fast = settings(max_examples=50, deadline=None)


@given(rewards, rewards, st.floats(0, 0.45))
@fast
def test_robust_dpo_is_unbiased(r_w, r_l, eps):
    """Mean over a label flipped with probability ε: the DPO loss of the clean label."""
    right, wrong = quantities(r_w, r_l, beta=1.0), quantities(r_l, r_w, beta=1.0)
    mean = (1 - eps) * call("robust_dpo", right, label_smoothing=eps) + eps * call(
        "robust_dpo", wrong, label_smoothing=eps
    )
    torch.testing.assert_close(mean, call("dpo", right))


@given(rewards, rewards)
@fast
def test_limits_of_label_smoothing(r_w, r_l):
    right, wrong = quantities(r_w, r_l, beta=1.0), quantities(r_l, r_w, beta=1.0)
    for name in ("dpo", "cdpo", "robust_dpo", "cpo"):  # a label that is always right
        plain = "cpo" if name == "cpo" else "dpo"
        torch.testing.assert_close(call(name, right, label_smoothing=0.0), call(plain, right))
    half = call("dpo", right, label_smoothing=0.5), call("dpo", wrong, label_smoothing=0.5)
    torch.testing.assert_close(*half)  # a label that says nothing


@pytest.mark.parametrize("eps", [0.001, 0.1, 0.4])
def test_smoothed_losses_are_smallest_at_the_log_odds_of_the_label(eps):
    """cDPO and EXO are the two KLs between (1 − ε, ε) and the policy's preference: flat at Δ = log (1 − ε)/ε."""
    best = quantities(log((1 - eps) / eps), 0.0, beta=1.0)
    for name in ("dpo", "cdpo", "exo"):
        chosen, rejected = gradients(name, best, label_smoothing=eps)
        assert chosen.item() == pytest.approx(0, abs=1e-12) and rejected.item() == pytest.approx(0, abs=1e-12)
    assert call("exo", best, label_smoothing=eps).item() == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize("name, eps", [("robust_dpo", 0.5), ("robust_dpo", -0.1), ("exo", 0.0), ("exo", 1.0)])
def test_label_smoothing_that_means_nothing_is_refused(name, eps):
    with pytest.raises(ValueError, match=name):
        call(name, quantities(0.0, 0.0, beta=0.1), label_smoothing=eps)


@given(rewards, rewards)
@fast
def test_losses_that_are_each_other(r_w, r_l):
    pair = quantities(r_w, r_l, beta=1.0)
    tokens = quantities(r_w, r_l, beta=1.0, lengths=(1.0, 1.0))
    torch.testing.assert_close(call("dpo_norm", tokens), call("dpo", tokens))
    torch.testing.assert_close(call("simpo", tokens, gamma=0.0), call("cpo", tokens))
    torch.testing.assert_close(call("dpop", pair, penalty=0.0), call("dpo", pair))
    torch.testing.assert_close(call("cal_dpo", pair), call("dpo", pair) + call("sppo", pair))
    chosen, rejected, one = pair["chosen_reward"], pair["rejected_reward"], torch.ones(1, dtype=torch.float64)
    torch.testing.assert_close(call("bco_pair", pair), una_bce(chosen, one) + una_bce(rejected, 0 * one))
    singles = apo_zero_unpaired(chosen, one) + apo_zero_unpaired(rejected, 0 * one)
    torch.testing.assert_close(call("apo_zero", pair), singles)


def test_only_these_need_no_reference():
    assert {name for name, loss in PAIRWISE.items() if not needs_reference(loss)} == {"cpo", "simpo", "orpo"}


# --- what every loss promises -------------------------------------------------------------------------------------


@every_loss
def test_pairs_do_not_mix(name):
    """One number per pair, and each is what the pair alone would give."""
    generator = torch.Generator().manual_seed(0)
    chosen, rejected = torch.randn(2, 5, generator=generator, dtype=torch.float64)
    together = call(name, quantities(chosen, rejected, beta=0.3))
    alone = torch.cat([call(name, quantities(chosen[i], rejected[i], beta=0.3)) for i in range(5)])
    assert together.shape == (5,)
    torch.testing.assert_close(together, alone)


@every_loss
def test_gradcheck(name):
    generator = torch.Generator().manual_seed(1)
    chosen, rejected = torch.randn(2, 6, generator=generator, dtype=torch.float64)
    found = quantities(chosen, rejected, beta=0.7)
    wanted = inspect.signature(PAIRWISE[name]).parameters
    names = [key for key, value in found.items() if key in wanted and key != "beta" and value.requires_grad]

    def loss(*leaves):
        return call(name, found | dict(zip(names, leaves)))

    assert torch.autograd.gradcheck(loss, [found[key] for key in names])


# Down as the chosen reward rises and up as the rejected one does, everywhere.
MONOTONIC = {"dpo", "robust_dpo", "dpo_norm", "dpop", "cpo", "simpo", "orpo", "hinge", "bco_pair", "apo_zero"}
# The others have an optimum that they do not overshoot; the policy starts on the near side of it.
NEAR_REFERENCE = set(PAIRWISE) - {"discopop"}
NEAR_REFERENCE_CHOSEN = NEAR_REFERENCE - {"apo_down"}


@pytest.mark.parametrize("name", sorted(MONOTONIC))
@given(rewards, rewards)
@fast
def test_chosen_up_rejected_down_everywhere(name, r_w, r_l):
    found = quantities(r_w, r_l, beta=1.0, reference=(-25.0, -25.0))
    chosen, rejected = gradients(name, found)
    assert chosen.item() <= 0 <= rejected.item()


@pytest.mark.parametrize("name", sorted(NEAR_REFERENCE))
@given(st.floats(-0.4, 0.4), st.floats(-0.4, 0.4), st.integers(2, 50), st.integers(2, 50))
@fast
def test_chosen_up_rejected_down_near_the_reference(name, r_w, r_l, chosen_length, rejected_length):
    found = quantities(r_w / 0.1, r_l / 0.1, beta=0.1, lengths=(chosen_length, rejected_length), reference=(-9.0, -9.0))
    chosen, rejected = gradients(name, found)
    assert rejected.item() > 0
    if name in NEAR_REFERENCE_CHOSEN:
        assert chosen.item() < 0


def test_apo_down_pushes_both_down():
    """With the chosen reward above its distance to the rejected one, the chosen response loses likelihood too."""
    chosen, rejected = gradients("apo_down", quantities(1.0, -2.0, beta=1.0))
    assert chosen.item() > 0 and rejected.item() > 0


EXTREME = torch.tensor([-1e4, -1e2, -1.0, 0.0, 1.0, 1e2, 1e4])


@every_loss
@pytest.mark.parametrize("beta", [0.1, 1.0])
def test_finite_for_extreme_log_probabilities(name, beta):
    """In float32, value and gradient, for log-ratios of up to ten thousand nats either way."""
    chosen, rejected = torch.cartesian_prod(EXTREME, EXTREME).unbind(-1)
    found = quantities(chosen, rejected, beta, dtype=torch.float32)
    assert call(name, found).isfinite().all()
    for gradient in gradients(name, found):
        assert gradient.isfinite().all()


@every_loss
def test_finite_for_an_empty_response(name):
    found = quantities([0.0, 1.0], [0.0, -1.0], beta=0.1, lengths=(0.0, 0.0))
    assert call(name, found).isfinite().all()


def test_discopop_where_the_exponential_alone_overflows():
    # σ(−200 / 0.05) exp(200) = exp(−4000 + 200): gone; what remains is −log σ(−200) = 200
    found = quantities(-200.0, 0.0, beta=1.0, dtype=torch.float32)
    assert call("discopop", found).item() == pytest.approx(200)


@every_loss
def test_per_token_log_probabilities_are_refused(name):
    found = quantities(torch.zeros(3), torch.zeros(3), beta=0.1)
    for what in ("reward", "logp"):
        found[f"chosen_{what}"] = torch.zeros(3, 3, dtype=torch.float64)
    with pytest.raises(jaxtyping.TypeCheckError):
        call(name, found)


def test_every_loss_is_computed_by_hand():
    assert set(PAIRWISE) == set(AT_REFERENCE) == set(ASYMMETRIC) == set(SWAPPED)
