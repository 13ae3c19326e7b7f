"""token_logprob against its reference in float64, on inputs on which a bug would show."""

import pytest
import torch
import uft_kernels
from numerics import assert_no_worse
from uft_kernels.token_logprob import BLOCK_V, IGNORE, token_logprob, token_logprob_reference

SHAPES = [
    (8, 2),  # smallest
    (5, 1003),  # one ragged block
    (3, BLOCK_V),  # exactly one block
    (2, 2 * BLOCK_V + 1),  # a last block holding one logit
]
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
OPTIONS = pytest.mark.parametrize(
    "options", [{}, {"temperature": 0.7}, {"softcap": 30.0}, {"softcap": 5.0, "temperature": 1.3}], ids=str
)


def make_logits(N, V, dtype, device, center=100.0):
    """Not centred, half of each row's mass on the last entry, and sliced out of a wider buffer of NaN, so that a
    missing mask or a wrong stride is loud."""
    torch.manual_seed(0)
    buffer = torch.full((N, V + 7), float("nan"), device=device, dtype=dtype)
    buffer[:, : V - 1] = center + 3 * torch.randn(N, V - 1, device=device)
    buffer[:, V - 1] = buffer[:, : V - 1].logsumexp(-1)
    return buffer[:, :V]


def run(function, logits, target, upstream, **options):
    logits = logits.detach().requires_grad_()
    found = function(logits, target, **options)
    gradients = [torch.autograd.grad(value, logits, upstream.to(value.dtype), retain_graph=True)[0] for value in found]
    return [*found, *gradients]


@DTYPES
@OPTIONS
@pytest.mark.parametrize("N, V", SHAPES)
def test_matches_reference(N, V, dtype, options, form, device):
    logits = make_logits(N, V, dtype, device, 0.0 if "softcap" in options else 100.0)
    target, upstream = torch.randint(0, V, (N,), device=device), torch.randn(N, device=device)
    target[0] = V - 1
    found = run(token_logprob, logits, target, upstream, entropy=True, **options)
    eager = run(token_logprob_reference, logits, target, upstream, **options)
    gold = run(token_logprob_reference, logits.double(), target, upstream, **options)
    assert found[0].dtype == torch.float32 and found[2].dtype == dtype
    for each in zip(found, eager, gold):
        assert_no_worse(*(value[None] if value.ndim == 1 else value for value in each))


def test_ignored_rows_are_zero_and_get_no_gradient(form, device):
    logits = make_logits(4, 300, torch.float32, device)
    logits[1] = float("nan")
    target = torch.tensor([3, IGNORE, 0, IGNORE], device=device)
    logp, entropy, *gradients = run(token_logprob, logits, target, torch.ones(4, device=device), entropy=True)
    assert torch.equal(logp[1::2], torch.zeros(2, device=device)) and torch.equal(entropy[1::2], logp[1::2])
    for gradient in gradients:
        assert torch.equal(gradient[1::2], torch.zeros_like(gradient[1::2])) and gradient[::2].abs().sum() > 0


@pytest.mark.parametrize("extreme", [1e4, -1e4, 3e38])
def test_extreme_logits(extreme, form, device):
    logits = torch.tensor([[extreme, 0.0, 1.0], [0.0, extreme / 2, extreme]], device=device)
    target = torch.tensor([0, 1], device=device)
    found = run(token_logprob, logits, target, torch.ones(2, device=device), entropy=True)
    gold = run(token_logprob_reference, logits.double(), target, torch.ones(2, device=device))
    for value, wanted in zip(found, gold):
        torch.testing.assert_close(value.double(), wanted, rtol=1e-5, atol=1e-6)


def test_impossible_tokens_cost_nothing(form, device):
    """Logits of -inf, a whole block of them first: probability 0, no gradient, no NaN."""
    logits = torch.randn(2, 2 * BLOCK_V, device=device)
    logits[:, :BLOCK_V] = float("-inf")
    target = torch.tensor([BLOCK_V, 2 * BLOCK_V - 1], device=device)
    found = run(token_logprob, logits, target, torch.ones(2, device=device), entropy=True)
    gold = run(token_logprob_reference, logits[:, BLOCK_V:].double(), target - BLOCK_V, torch.ones(2, device=device))
    torch.testing.assert_close(found[0].double(), gold[0])
    torch.testing.assert_close(found[1].double(), gold[1])
    for gradient, wanted in zip(found[2:], gold[2:]):
        assert not gradient[:, :BLOCK_V].any()
        torch.testing.assert_close(gradient[:, BLOCK_V:].double(), wanted, rtol=1e-4, atol=1e-6)


def test_gradient_of_a_near_certain_token(form, device):
    """One minus its probability, e^-20, must not cancel."""
    logits = torch.tensor([[20.0, 0.0]], device=device)
    _, gradient = run(lambda *a, **k: (token_logprob(*a, **k),), logits, torch.tensor([0], device=device),
                         torch.ones(1, device=device))  # fmt: skip
    assert gradient[0, 1].item() == pytest.approx(-(2.718281828**-20), rel=1e-3)


def test_sum_upstream_and_a_second_backward(form, device):
    """The gradient of .sum() is one number expanded over the rows; forward's tensors stay as they were."""
    logits = make_logits(3, 100, torch.float32, device).clone().requires_grad_()
    loss = token_logprob(logits, torch.tensor([1, 99, 5], device=device)).sum()
    (first,) = torch.autograd.grad(loss, logits, retain_graph=True)
    (second,) = torch.autograd.grad(loss, logits)
    assert torch.equal(first, second)
    torch.testing.assert_close(first.sum(-1), torch.zeros(3, device=device), atol=1e-5, rtol=0)


def test_in_place_writes_over_the_logits_once(form, device):
    logits = make_logits(3, 100, torch.float32, device).clone()
    target = torch.tensor([1, 99, 5], device=device)
    leaf = logits.clone().requires_grad_()
    (wanted,) = torch.autograd.grad(token_logprob(leaf, target).sum(), leaf)
    leaf = logits.clone().requires_grad_()
    work = leaf * 1.0
    loss = token_logprob(work, target, inplace=True).sum()
    (found,) = torch.autograd.grad(loss, leaf, retain_graph=True)
    assert torch.equal(found, wanted) and torch.equal(work.detach(), wanted)
    with pytest.raises(RuntimeError, match=r"overwritten|modified by an inplace"):
        torch.autograd.grad(loss, leaf)


def test_no_rows(form, device):
    logits = torch.zeros(0, 10, device=device, requires_grad=True)
    logp = token_logprob(logits, torch.zeros(0, dtype=torch.int64, device=device))
    logp.sum().backward()
    assert logp.shape == (0,) and logits.grad.shape == (0, 10)


def test_entries_apart(form, device):
    """Columns of a transposed tensor are not next to each other."""
    logits = torch.randn(50, 4, device=device).T
    target = torch.tensor([0, 1, 2, 49], device=device)
    torch.testing.assert_close(token_logprob(logits, target), logits.log_softmax(-1)[torch.arange(4), target])


def test_gradcheck():
    logits, target = torch.randn(3, 7, dtype=torch.float64, requires_grad=True), torch.tensor([0, 6, IGNORE])
    for options in ({}, {"softcap": 2.0, "temperature": 0.6}):
        function = lambda x: tuple(token_logprob(x, target, entropy=True, **options))  # noqa: B023
        assert torch.autograd.gradcheck(function, logits)
        reference = lambda x: tuple(token_logprob_reference(x, target, **options))  # noqa: B023
        assert torch.autograd.gradcheck(reference, logits)


@pytest.mark.parametrize(
    "logits, target, options, message",
    [
        (torch.zeros(2, 3, 4), torch.zeros(2, dtype=torch.int64), {}, r"\[2, 3, 4\]"),
        (torch.zeros(2, 3), torch.zeros(3, dtype=torch.int64), {}, r"\[3\]"),
        (torch.zeros(2, 3), torch.zeros(2, dtype=torch.int64), {"temperature": 0.0}, "temperature is 0.0"),
        (torch.zeros(2, 3), torch.zeros(2, dtype=torch.int64), {"softcap": -1.0}, "softcap is -1.0"),
        (torch.zeros(3, 2).T, torch.zeros(2, dtype=torch.int64), {"inplace": True}, "next to each other"),
    ],
)
def test_what_does_not_fit_is_refused(logits, target, options, message):
    with pytest.raises(ValueError, match=message):
        token_logprob(logits, target, **options)


def test_a_target_that_is_no_entry_has_no_log_probability(device):
    logits, target = torch.randn(3, 50, device=device), torch.tensor([-1, 50, 3], device=device)
    with uft_kernels.form("triton"):
        found = token_logprob(logits, target)
    assert found.isnan().tolist() == [True, True, False]
