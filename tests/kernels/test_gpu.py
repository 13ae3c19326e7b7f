"""What only a GPU can show: real sizes, memory, tensor descriptors, compiled graphs, a training step."""

import pytest
import torch
from mixed import dataset, trainer
from numerics import assert_no_worse
from uft_kernels import linear_logprob, token_logprob
from uft_kernels.linear_rows import fused_rows
from uft_kernels.token_logprob import forward_rows

pytestmark = pytest.mark.gpu
N, D, V = 8192, 4096, 128_256


def head(n, dtype=torch.bfloat16):
    torch.manual_seed(0)
    hidden = torch.randn(n, D, device="cuda", dtype=dtype)
    weight = torch.randn(V, D, device="cuda", dtype=dtype) * 3 / D**0.5
    return hidden, weight, torch.randint(0, V, (n,), device="cuda")


def test_more_entries_than_32_bits_count():
    rows = 2**31 // V + 64
    logits = torch.randn(rows, V, device="cuda", dtype=torch.bfloat16)
    target = torch.randint(0, V, (rows,), device="cuda")
    last = slice(rows - 32, rows)
    leaf = logits.requires_grad_()
    found = token_logprob(leaf, target)
    wanted = logits[last].detach().double().log_softmax(-1).gather(-1, target[last, None]).squeeze(-1)
    torch.testing.assert_close(found[last].double(), wanted, rtol=1e-5, atol=1e-5)
    [gradient] = torch.autograd.grad(found[last].sum(), leaf)
    assert gradient[last].any(-1).all() and not gradient[: rows - 32].any()


def test_memory_of_a_trained_head():
    """At most 300 MB beyond the gradients themselves."""
    hidden, weight, target = head(N)
    hidden, weight = hidden.requires_grad_(), weight.requires_grad_()
    linear_logprob(hidden[:64], weight, target[:64]).logp.sum().backward()  # cuBLAS asks for memory of its own
    hidden.grad = weight.grad = None
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    linear_logprob(hidden, weight, target, kept=N).logp.sum().backward()
    extra = torch.cuda.max_memory_allocated() - before - hidden.grad.nbytes - weight.grad.nbytes
    assert extra <= 300e6, f"{extra / 1e6:.0f} MB"


@pytest.mark.parametrize("softcap", [None, 30.0])
@pytest.mark.parametrize("entropy", [False, True])
def test_rows_from_one_kernel_at_real_sizes(entropy, softcap):
    hidden, weight, target = head(300)
    found = fused_rows(hidden, weight, None, target, entropy=entropy, softcap=softcap)
    gold = forward_rows(hidden.double() @ weight.double().T, target, softcap=softcap)
    # tensor cores round sums in another way than float32 products do
    eager = forward_rows(torch.mm(hidden, weight.T, out_dtype=torch.float32), target, softcap=softcap)
    for name in ("logp", *(["entropy"] if entropy else [])):
        assert_no_worse(*(getattr(rows, name)[None] for rows in (found, eager, gold)), slack=8.0)


@pytest.mark.parametrize("eps", [0.0, 2.0**-12])
def test_gradients_at_real_sizes(eps):
    hidden, weight, target = head(512)
    hidden = (hidden * 0.3 + weight[target] * 1.5).detach()  # sure of itself
    leaves = hidden.requires_grad_(), weight.requires_grad_()
    found = torch.autograd.grad(linear_logprob(*leaves, target, filter_eps=eps).logp.sum(), leaves)
    exact = (t.detach().float().requires_grad_() for t in leaves)
    exact = tuple(exact)
    logp = (exact[0] @ exact[1].T).log_softmax(-1).gather(-1, target[:, None])
    for mine, truth in zip(found, torch.autograd.grad(logp.sum(), exact)):
        assert (mine.float() - truth).norm() <= (0.02 if eps == 0.0 else 0.1) * truth.norm()


def test_compiles_around_triton_kernels():
    hidden, weight, target = head(256)

    def function(hidden):
        return linear_logprob(2 * hidden, weight, target, kept=256).logp.sum()

    leaf = hidden.requires_grad_()
    compiled = torch.compile(function, fullgraph=True)
    for found, wanted in zip(
        (compiled(leaf), *torch.autograd.grad(compiled(leaf), leaf)),
        (function(leaf), *torch.autograd.grad(function(leaf), leaf)),
    ):
        torch.testing.assert_close(found, wanted)


def test_a_step_of_training(tmp_path):
    run = trainer("dpo_nll", dataset(("demonstrations", "pairs")), output_dir=tmp_path, use_cpu=False, bf16=True)
    run.train()
    assert run.state.log_history[0]["rewards/margins"] == 0.0
    assert all(p.is_cuda for p in run.model.parameters())
