"""token_divergence against its reference in float64."""

import pytest
import torch
from numerics import assert_no_worse
from uft_kernels.token_divergence import BLOCK_V, token_divergence, token_divergence_reference

SHAPES = [(8, 2), (5, 1003), (3, BLOCK_V), (2, 2 * BLOCK_V + 1)]
OPTIONS = pytest.mark.parametrize(
    "options",
    [{}, {"js_weight": 0.5}, {"js_weight": 0.1, "temperature": 0.7}, {"softcap": 20.0, "reference_softcap": 30.0,
     "js_weight": 0.9}],
    ids=str,
)  # fmt: skip


def make_logits(N, V, dtype, device, seed):
    """As for token_logprob: not centred, a heavy last entry, NaN beyond the edge."""
    torch.manual_seed(seed)
    buffer = torch.full((N, V + 3 + seed), float("nan"), device=device, dtype=dtype)
    buffer[:, :V] = 20 * seed + 3 * torch.randn(N, V, device=device)
    buffer[:, V - 1] = buffer[:, :V].logsumexp(-1)
    return buffer[:, :V]


def run(function, policy, reference, upstream, **options):
    policy = policy.detach().requires_grad_()
    found = [value for value in function(policy, reference, **options) if value is not None]
    gradients = [torch.autograd.grad(value, policy, upstream.to(value.dtype), retain_graph=True)[0] for value in found]
    return [*found, *gradients]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@OPTIONS
@pytest.mark.parametrize("N, V", SHAPES)
def test_matches_reference(N, V, dtype, options, form, device):
    policy, reference = (make_logits(N, V, dtype, device, seed) for seed in (0, 1))
    upstream = torch.randn(N, device=device)
    found = run(token_divergence, policy, reference, upstream, **options)
    eager = run(token_divergence_reference, policy, reference, upstream, **options)
    gold = run(token_divergence_reference, policy.double(), reference.double(), upstream, **options)
    assert len(found) == (8 if "js_weight" in options else 6)
    slack = 12.0 if V == 2 else 4.0  # gradients of two entries nearly cancel, in eager by luck
    for each in zip(found, eager, gold):
        assert_no_worse(*(value[None] if value.ndim == 1 else value for value in each), slack=slack)


def test_by_hand():
    p, q = torch.tensor([[0.5, 0.5]]), torch.tensor([[0.25, 0.75]])
    found = token_divergence(p.log(), q.log(), js_weight=0.5)
    log = lambda x: torch.tensor(x, dtype=torch.float64).log().item()
    assert found.kl.item() == pytest.approx(0.5 * log(2.0) + 0.5 * log(2 / 3), rel=1e-6)
    assert found.reverse_kl.item() == pytest.approx(0.25 * log(0.5) + 0.75 * log(1.5), rel=1e-6)
    assert found.entropy.item() == pytest.approx(log(2.0), rel=1e-6)
    halves = 0.5 * (0.5 * log(0.5 / 0.375) + 0.5 * log(0.5 / 0.625))
    halves += 0.5 * (0.25 * log(0.25 / 0.375) + 0.75 * log(0.75 / 0.625))
    assert found.js.item() == pytest.approx(halves, rel=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_zero_for_equal_rows(dtype, form, device):
    logits = make_logits(4, 3001, dtype, device, 1)
    found = token_divergence(logits, logits.clone(), js_weight=0.3)
    for name in ("kl", "reverse_kl", "js"):
        assert getattr(found, name).abs().max() < 2e-6, name


def test_all_gradients_at_once(form, device):
    policy, reference = (make_logits(3, 700, torch.float32, device, seed) for seed in (0, 1))
    leaf = policy.clone().requires_grad_()
    weights = torch.randn(4, 3, device=device)
    found = token_divergence(leaf, reference, js_weight=0.4)
    (together,) = torch.autograd.grad(sum((w * v).sum() for w, v in zip(weights, found)), leaf)
    apart = sum(
        torch.autograd.grad((w * v).sum(), leaf, retain_graph=True)[0]
        for w, v in zip(weights, token_divergence(leaf, reference, js_weight=0.4))
    )
    torch.testing.assert_close(together, apart, rtol=1e-4, atol=1e-6)


def test_a_token_that_only_one_side_can_say(form, device):
    policy = torch.tensor([[0.0, float("-inf"), 1.0]], device=device)
    reference = torch.tensor([[0.0, 2.0, 1.0]], device=device)
    found = token_divergence(policy, reference, js_weight=0.5)
    assert torch.isfinite(found.kl).all() and torch.isfinite(found.js).all() and torch.isinf(found.reverse_kl).all()
    gold = token_divergence_reference(policy.double(), reference.double(), js_weight=0.5)
    torch.testing.assert_close(found.kl.double(), gold.kl, rtol=1e-6, atol=0)
    torch.testing.assert_close(found.js.double(), gold.js, rtol=1e-6, atol=0)


def test_the_reference_gets_no_gradient(form, device):
    policy, reference = (torch.randn(2, 50, device=device, requires_grad=True) for _ in range(2))
    token_divergence(policy, reference).kl.sum().backward()
    assert policy.grad is not None and reference.grad is None


def test_gradcheck():
    policy = torch.randn(3, 7, dtype=torch.float64, requires_grad=True)
    reference = torch.randn(3, 7, dtype=torch.float64)
    for options in ({"js_weight": 0.3}, {"softcap": 2.0, "temperature": 0.6, "js_weight": 0.7}):
        for function in (token_divergence, token_divergence_reference):
            assert torch.autograd.gradcheck(lambda x: tuple(function(x, reference, **options)), policy)  # noqa: B023


def test_what_does_not_fit_is_refused():
    with pytest.raises(ValueError, match=r"\[2, 3\] and \[2, 4\]"):
        token_divergence(torch.zeros(2, 3), torch.zeros(2, 4))
    with pytest.raises(ValueError, match="js_weight is 1"):
        token_divergence(torch.zeros(2, 3), torch.zeros(2, 3), js_weight=1.0)
    with pytest.raises(ValueError, match="softcap is 0"):
        token_divergence(torch.zeros(2, 3), torch.zeros(2, 3), reference_softcap=0.0)
