"""Likelihood losses and the sums they are made of, by hand."""

import math
import runpy
import sys

import jaxtyping
import pytest
import torch

import uft.typing
from uft.losses import LIKELIHOOD, dft, implicit_reward, needs_reference, response_logp, sequence_mean_nll, token_nll

# two responses of two tokens and one; the other positions are prompt or padding, where anything may stand
NAN, INF = math.nan, math.inf
TOKEN_LOGP = torch.tensor([[NAN, -1.0, -2.0, -INF], [-0.5, NAN, -INF, INF]])
IN_RESPONSE = torch.tensor([[False, True, True, False], [True, False, False, False]])


def test_response_logp_sums_the_response_only():
    torch.testing.assert_close(response_logp(TOKEN_LOGP, IN_RESPONSE), torch.tensor([-3.0, -0.5]))


def test_what_is_masked_gets_no_gradient():
    token_logp = TOKEN_LOGP.clone().requires_grad_()
    response_logp(token_logp, IN_RESPONSE).sum().backward()
    assert torch.equal(token_logp.grad, IN_RESPONSE.float())


def test_implicit_reward():
    # 0.1 · (−3 − (−5)) = 0.2: the policy finds the response e² times as likely as the reference does
    logp, reference_logp = torch.tensor([-3.0, -7.0]), torch.tensor([-5.0, -7.0])
    torch.testing.assert_close(implicit_reward(logp, reference_logp, beta=0.1), torch.tensor([0.2, 0.0]))


def test_token_nll():
    torch.testing.assert_close(token_nll(torch.tensor([[-1.0, 0.0]])), torch.tensor([[1.0, 0.0]]))


def test_sequence_mean_nll_weighs_every_response_alike():
    # (1 + 2) / 2 tokens, and 0.5 / 1 token
    torch.testing.assert_close(sequence_mean_nll(TOKEN_LOGP, IN_RESPONSE), torch.tensor([1.5, 0.5]))


def test_sequence_mean_nll_of_an_empty_response_is_zero():
    token_logp = torch.tensor([[-1.0, -2.0]], requires_grad=True)
    loss = sequence_mean_nll(token_logp, torch.zeros(1, 2, dtype=torch.bool))
    loss.sum().backward()
    assert loss.item() == 0 and torch.equal(token_logp.grad, torch.zeros(1, 2))


def test_dft():
    # a token of probability ¼: value ¼ · ln 4, and its gradient is −¼, not −1 as for the likelihood
    token_logp = torch.tensor([math.log(0.25)], requires_grad=True)
    loss = dft(token_logp)
    loss.sum().backward()
    assert loss.item() == pytest.approx(0.25 * math.log(4))
    assert token_logp.grad.item() == pytest.approx(-0.25)


def test_dft_forgets_what_the_model_finds_impossible():
    token_logp = torch.tensor([-1e4], requires_grad=True)
    loss = dft(token_logp)
    loss.sum().backward()
    assert loss.item() == 0 and token_logp.grad.item() == 0


def test_likelihoods_need_no_reference():
    assert not any(needs_reference(loss) for loss in LIKELIHOOD.values())


@pytest.mark.parametrize(
    "logp, reference_logp",
    [(torch.zeros(3, 3), torch.zeros(3)), (torch.zeros(3), torch.zeros(1)), (torch.zeros(3).long(), torch.zeros(3))],
    ids=["per token", "one for all", "integers"],
)
def test_other_shapes_and_dtypes_are_refused(logp, reference_logp):
    """Per-token and per-response log-probabilities would broadcast when batch == time."""
    with pytest.raises(jaxtyping.TypeCheckError):
        implicit_reward(logp, reference_logp, beta=0.1)


def test_annotations_without_jaxtyping(monkeypatch):
    monkeypatch.setitem(sys.modules, "jaxtyping", None)
    names = runpy.run_path(uft.typing.__file__)
    assert all(names[name][torch.Tensor, " pairs"] is torch.Tensor for name in ("Float", "Bool", "Int"))
