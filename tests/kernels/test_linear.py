"""The operations on hidden states against their references in float64: values, gradients, tiling, frozen heads."""

import sys

import pytest
import torch
import torch.nn.functional as F
from numerics import assert_no_worse
from uft_kernels import products
from uft_kernels.linear_divergence import linear_divergence, linear_divergence_reference
from uft_kernels.linear_logprob import linear_logprob, linear_logprob_reference
from uft_kernels.linear_preference_loss import linear_preference_loss, linear_preference_loss_reference
from uft_kernels.token_logprob import IGNORE

LOGPROB = sys.modules["uft_kernels.linear_logprob"]
SHAPES = [(37, 24, 301), (8, 8, 2), (0, 8, 50)]
SCALES = [{}, {"temperature": 0.7, "softcap": 5.0, "logit_scale": 0.5}]
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
HEADS = pytest.mark.parametrize("trained", [False, True], ids=["frozen head", "trained head"])
OUTPUTS = ("logp", "kl", "reverse_kl", "entropy", "js")


@pytest.fixture
def pieces(monkeypatch):
    """Several chunks of tokens, several slabs of the vocabulary, nothing kept."""
    in_pieces(monkeypatch)


def in_pieces(monkeypatch):
    monkeypatch.setattr(products, "BUDGET", 15_000)
    monkeypatch.setattr(products, "SLAB", 15_000)
    monkeypatch.setattr(products, "KEEP", 0)
    monkeypatch.setattr(LOGPROB, "TOKENS", 16)
    monkeypatch.setattr(products, "STRIPE", 5)


def make(N, D, V, dtype, device, seed=0):
    """Hidden states, a head, its bias and targets, a fifth of them IGNORE; the last entry is a target."""
    torch.manual_seed(seed)
    hidden, weight, bias = torch.randn(N, D), torch.randn(V, D) * 3 / D**0.5, torch.randn(V)
    target = torch.randint(0, V, (N,))
    target[:1] = V - 1
    target[3::5] = IGNORE
    return *(t.to(device, dtype) for t in (hidden, weight, bias)), target.to(device)


def leaves(tensors, dtype, trained):
    return [t.detach().to(dtype).requires_grad_(k == 0 or trained) for k, t in enumerate(tensors)]


def gradients(loss, tensors):
    wanted = [t for t in tensors if t.requires_grad]
    return list(torch.autograd.grad(loss, wanted))


def whole(value):
    """A vector counts as one row."""
    return value.reshape(1, -1) if value.ndim < 2 else value


def compare(run, dtype):
    """`run(function kind, dtype)` -> tensors; the kernel against eager at its dtype and float64."""
    found, eager, gold = run("kernel", dtype), run("reference", dtype), run("reference", torch.float64)
    assert len(found) == len(eager) == len(gold)
    for each in zip(found, eager, gold):
        if gold and each[0].numel():
            assert_no_worse(*map(whole, each), slack=4.0)
    return found


@DTYPES
@HEADS
@pytest.mark.parametrize("scales", SCALES, ids=["plain", "scaled"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_logprob(shape, scales, trained, dtype, form, device, pieces):
    *tensors, target = make(*shape, dtype, device)
    upstream = torch.randn(2, shape[0], device=device)
    if not trained and shape[2] == 2:
        upstream[1] = 0  # of two entries both gradients nearly cancel, and a frozen head rounds each apart

    def run(kind, dtype):
        hidden, weight, bias = leaves(tensors, dtype, trained)
        if kind == "kernel":
            found = linear_logprob(hidden, weight, target, bias, entropy=True, top1=True, **scales)
        else:
            found = linear_logprob_reference(hidden, weight, target, bias, **scales)
        loss = (upstream[0] * found.logp + upstream[1] * found.entropy).sum()
        return [found.logp, found.entropy, *gradients(loss, (hidden, weight, bias))]

    compare(run, dtype)
    found = linear_logprob(*tensors[:2], target, tensors[2], top1=True, **scales)
    wanted = linear_logprob_reference(*tensors[:2], target, tensors[2], **scales)
    assert torch.equal(found.top1, wanted.top1) and found.entropy is None


@DTYPES
@HEADS
@pytest.mark.parametrize("scales", [{}, {"temperature": 0.7, "softcap": 5.0, "reference_softcap": 9.0,
                                         "logit_scale": 0.5, "reference_logit_scale": 0.8}],
                         ids=["plain", "scaled"])  # fmt: skip
@pytest.mark.parametrize("shape", [SHAPES[0], SHAPES[-1]], ids=str)
def test_divergence(shape, scales, trained, dtype, form, device, pieces):
    (N, _, V), E = shape, 20
    *tensors, target = make(*shape, dtype, device)
    other, other_weight, other_bias, _ = make(N, E, V, dtype, device, seed=1)
    upstream = torch.randn(5, N, device=device)

    def run(kind, dtype):
        hidden, weight, bias = leaves(tensors, dtype, trained)
        reference = [t.to(dtype) for t in (other, other_weight)]
        rest = {"reference_bias_V": other_bias.to(dtype), "js_weight": 0.3, **scales}
        if kind == "kernel":
            found = linear_divergence(hidden, weight, *reference, target, bias, differentiable=OUTPUTS, **rest)
        else:
            found = linear_divergence_reference(hidden, weight, *reference, target, bias, **rest)
        loss = sum((g * getattr(found, name)).sum() for g, name in zip(upstream, OUTPUTS))
        return [*found, *gradients(loss, (hidden, weight, bias))]

    compare(run, dtype)


def dpo(logp):
    """A pairwise loss, and one that couples all sequences."""
    return -F.logsigmoid(0.1 * (logp[0] - logp[1])).sum() + 0.01 * (logp - logp.mean()).square().sum()


@DTYPES
@HEADS
@pytest.mark.parametrize("share", [0.0, 0.4, 1.0], ids=["nothing kept", "some kept", "all kept"])
@pytest.mark.parametrize("scales", SCALES, ids=["plain", "scaled"])
def test_preference_loss(scales, share, trained, dtype, form, device, pieces):
    N, D, V = 37, 24, 301
    *tensors, target = make(N, D, V, dtype, device)
    sequence = torch.arange(N, device=device) // 10
    keep = int(share * N * V * dtype.itemsize)

    def run(kind, dtype):
        hidden, weight, bias = leaves(tensors, dtype, trained)
        if kind == "kernel":
            found = linear_preference_loss(hidden, weight, target, sequence, 4, dpo, bias, keep=keep, **scales)
        else:
            found = linear_preference_loss_reference(hidden, weight, target, sequence, 4, dpo, bias, **scales)
        return [found.loss, found.logp, *gradients(1.5 * found.loss, (hidden, weight, bias))]

    compare(run, dtype)


@HEADS
def test_one_piece_is_many_pieces(trained, device, monkeypatch):
    *tensors, target = make(37, 24, 301, torch.float64, device)
    other, other_weight, other_bias, _ = make(37, 20, 301, torch.float64, device, seed=1)
    sequence = torch.arange(37, device=device) // 10

    def everything():
        h, w, b = leaves(tensors, torch.float64, trained)
        one = linear_logprob(h, w, target, b, entropy=True)
        two = linear_divergence(h, w, other, other_weight, target, b, other_bias, js_weight=0.3)
        three = linear_preference_loss(h, w, target, sequence, 4, dpo, b)
        return [*one[:2], *two, *three, *gradients(one.logp.sum() + two.kl.sum() + three.loss, (h, w, b))]

    at_once = everything()
    in_pieces(monkeypatch)
    for a, b in zip(at_once, everything()):
        torch.testing.assert_close(a, b)


@HEADS
def test_bitwise_the_same_twice(trained, form, device, pieces):
    *tensors, target = make(37, 24, 301, torch.float32, device)

    def once():
        hidden, weight, bias = leaves(tensors, torch.float32, trained)
        found = linear_logprob(hidden, weight, target, bias, entropy=True)
        return [*found[:2], *gradients((found.logp * found.entropy).sum(), (hidden, weight, bias))]

    assert all(torch.equal(a, b) for a, b in zip(once(), once()))


def test_kept_given_by_the_caller_changes_nothing(form, device):
    hidden, weight, bias, target = make(37, 24, 301, torch.float32, device)
    kept = int((target != IGNORE).sum())
    a, b = (linear_logprob(hidden, weight, target, bias, kept=k).logp for k in (None, kept))
    assert torch.equal(a, b) and not a[target == IGNORE].any()


def test_ignored_tokens_cost_nothing(monkeypatch, device):
    hidden, weight, bias, target = make(50, 24, 301, torch.float32, device)
    hidden[target == IGNORE] = float("nan")
    seen = []
    product = products.product
    monkeypatch.setattr(LOGPROB, "product", lambda a, *rest: seen.append(len(a)) or product(a, *rest))
    hidden = hidden.requires_grad_()
    linear_logprob(hidden, weight, target, bias).logp.sum().backward()
    assert max(seen) == int((target != IGNORE).sum())
    assert not hidden.grad[target == IGNORE].any() and torch.isfinite(hidden.grad).all()


def test_an_equal_reference_has_no_divergence(form, device):
    hidden, weight, bias, target = make(37, 24, 301, torch.bfloat16, device)
    found = linear_divergence(hidden, weight, hidden.clone(), weight, target, bias, bias, js_weight=0.5)
    assert torch.equal(found.logp, found.reference_logp)
    for name in ("kl", "reverse_kl", "js"):
        assert getattr(found, name).abs().max() < 2e-6, name


def test_outputs_not_asked_for_have_no_gradient(device):
    hidden, weight, bias, target = make(5, 8, 30, torch.float32, device)
    hidden.requires_grad_()
    found = linear_divergence(hidden, weight, hidden.detach() + 1, weight, target, bias, bias)
    assert found.logp.requires_grad and found.kl.requires_grad
    assert not (found.reverse_kl.requires_grad or found.entropy.requires_grad or found.reference_logp.requires_grad)


def test_autocast_takes_its_dtype(device):
    hidden, weight, bias, target = make(37, 24, 301, torch.float32, device)
    hidden.requires_grad_(), weight.requires_grad_()
    with torch.autocast(device, dtype=torch.bfloat16):
        logp = linear_logprob(hidden, weight, target, bias).logp
    logp.sum().backward()
    low = linear_logprob(hidden.bfloat16(), weight.bfloat16(), target, bias.bfloat16()).logp
    assert torch.equal(logp, low) and logp.dtype == torch.float32
    assert hidden.grad.dtype == weight.grad.dtype == torch.float32


def test_an_adapter_on_the_head_is_a_wider_product(device):
    """W + s B A, by appending s h A^T to the hidden states and B to the head's columns."""
    hidden, weight, bias, target = make(37, 24, 301, torch.float64, device)
    a, b = torch.randn(4, 24, dtype=torch.float64), torch.randn(301, 4, dtype=torch.float64, requires_grad=True)
    a, b = a.to(device).requires_grad_(), b.detach().to(device).requires_grad_()
    wide = linear_logprob(torch.cat([hidden, 0.5 * hidden @ a.T], -1), torch.cat([weight, b], -1), target, bias).logp
    merged = linear_logprob_reference(hidden, weight + 0.5 * b @ a, target, bias).logp
    torch.testing.assert_close(wide, merged)
    for found, wanted in zip(torch.autograd.grad(wide.sum(), (a, b)), torch.autograd.grad(merged.sum(), (a, b))):
        torch.testing.assert_close(found, wanted)


def test_not_contiguous_hidden_states_and_head(form, device):
    hidden, weight, bias, target = make(37, 24, 301, torch.float32, device)
    apart = torch.randn(37, 48, device=device)
    apart[:, ::2] = hidden
    found = linear_logprob(apart[:, ::2], weight.T.contiguous().T, target, bias).logp
    torch.testing.assert_close(found, linear_logprob(hidden, weight, target, bias).logp)


def test_gradcheck_of_the_operations():
    hidden, weight, bias, target = make(6, 5, 11, torch.float64, "cpu")
    other, other_weight, _, _ = make(6, 4, 11, torch.float64, "cpu", seed=1)
    sequence = torch.tensor([0, 0, 1, 1, 2, 2])
    for trained in (False, True):
        inputs = leaves((hidden, weight, bias), torch.float64, trained)
        operations = (
            lambda h, w, b: linear_logprob(h, w, target, b, entropy=True, softcap=3.0)[:2],
            lambda h, w, b: tuple(linear_divergence(h, w, other, other_weight, target, b, js_weight=0.3,
                                                    differentiable=OUTPUTS)),
            lambda h, w, b: linear_preference_loss(h, w, target, sequence, 3, dpo, b).loss,
        )  # fmt: skip
        for operation in operations:
            assert torch.autograd.gradcheck(operation, inputs)


@HEADS
@pytest.mark.parametrize("operation", ["logprob", "divergence"])
def test_compiles_without_a_graph_break(operation, trained, device):
    """Where the caller says how many tokens count; otherwise their number is data, and dynamo breaks there."""
    hidden, weight, _, target = make(20, 24, 301, torch.float32, device)
    target = target.clamp(min=0)

    def function(hidden, weight):
        if operation == "logprob":
            return linear_logprob(2 * hidden, weight, target, kept=20).logp.sum()
        found = linear_divergence(2 * hidden, weight, hidden.detach(), weight.detach(), target, kept=20)
        return (found.logp + found.kl).sum()

    def run(function):
        hidden_, weight_ = leaves((hidden, weight), torch.float32, trained)
        loss = function(hidden_, weight_)
        return [loss, *gradients(loss, (hidden_, weight_))]

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    for found, wanted in zip(run(compiled), run(function), strict=True):
        torch.testing.assert_close(found, wanted)


@HEADS
def test_forms_agree_to_the_bit(trained, form, device, pieces):
    """Whatever wants a gradient: rewards of an unchanged policy are exactly 0."""
    hidden, weight, bias, target = make(37, 24, 301, torch.bfloat16, device)
    without = linear_logprob(hidden, weight, target, bias).logp
    inputs = leaves((hidden, weight, bias), torch.bfloat16, trained)
    assert torch.equal(linear_logprob(*inputs[:2], target, inputs[2]).logp, without)
    found = linear_divergence(*inputs[:2], hidden, weight, target, inputs[2], bias)
    assert torch.equal(found.reference_logp, found.logp)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"weight_VD": torch.zeros(7, 5)}, r"hidden \[3, 4\], weight \[7, 5\]"),
        ({"bias_V": torch.zeros(6)}, r"bias \[V\], got \[6\]"),
        ({"target_N": torch.zeros(2, dtype=torch.int64)}, r"target \[2\]"),
        ({"weight_VD": torch.zeros(7, 4, dtype=torch.bfloat16)}, "one dtype"),
        ({"softcap": -1.0}, "softcap is -1"),
    ],
)
def test_what_does_not_fit_is_refused(change, message):
    inputs = {"hidden_ND": torch.zeros(3, 4), "weight_VD": torch.zeros(7, 4),
              "target_N": torch.zeros(3, dtype=torch.int64)}  # fmt: skip
    with pytest.raises(ValueError, match=message):
        linear_logprob(**inputs | change)


def test_names_and_vocabularies_that_do_not_fit_are_refused():
    h, w, y = torch.zeros(3, 4), torch.zeros(7, 4), torch.zeros(3, dtype=torch.int64)
    with pytest.raises(ValueError, match="7 and 8 entries"):
        linear_divergence(h, w, h, torch.zeros(8, 4), y)
    for name in ("js", "kl_divergence"):
        with pytest.raises(ValueError, match=f"differentiable names '{name}'"):
            linear_divergence(h, w, h, w, y, differentiable=(name,))
    with pytest.raises(ValueError, match=r"sequence \[N\]"):
        linear_preference_loss(h, w, y, y[:2], 1, torch.sum)
