"""`uft kernels`: whether the kernels are right on this machine, and what they cost beside eager PyTorch.

Errors are of whole vectors or matrices against float64, from the same inputs.  Ours may lose three times what eager
PyTorch loses and two ulps of the output: the rule of the tests.  The benchmarks against other libraries and the bare
products are kernels/bench of a checkout.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from uft_kernels import linear_divergence, linear_logprob
from uft_kernels.backend import uses_triton

from uft.comparison.tables import terminal_table


class Inputs(NamedTuple):
    """A head and what it reads; N tokens, D hidden, V vocabulary.  Those of the reference come last."""

    hidden_ND: Tensor
    weight_VD: Tensor
    target_N: Tensor
    other_hidden_ND: Tensor
    other_weight_VD: Tensor


class Outcome(NamedTuple):
    """What one way gives: value [N] in nats, gradients of hidden states and, where trained, of the head."""

    value: Tensor
    of_hidden: Tensor
    of_head: Tensor | None


def logp_ours(x: Inputs) -> Tensor:
    return linear_logprob(x.hidden_ND, x.weight_VD, x.target_N).logp


def logp_eager(x: Inputs) -> Tensor:
    logits_NV = (x.hidden_ND @ x.weight_VD.T).to(_at_least_float(x.hidden_ND))
    return logits_NV.log_softmax(-1).gather(-1, x.target_N[:, None]).squeeze(-1)


def kl_ours(x: Inputs) -> Tensor:
    found = linear_divergence(x.hidden_ND, x.weight_VD, x.other_hidden_ND, x.other_weight_VD, x.target_N)
    return found.kl


def kl_eager(x: Inputs) -> Tensor:
    dtype = _at_least_float(x.hidden_ND)
    log_p = (x.hidden_ND @ x.weight_VD.T).to(dtype).log_softmax(-1)
    log_q = (x.other_hidden_ND @ x.other_weight_VD.T).to(dtype).log_softmax(-1)
    return (log_p.exp() * (log_p - log_q)).sum(-1)


CASES: dict[str, tuple[Callable[[Inputs], Tensor], Callable[[Inputs], Tensor], bool]] = {
    "log-probability, frozen head": (logp_ours, logp_eager, False),
    "log-probability, trained head": (logp_ours, logp_eager, True),
    "exact KL, frozen head": (kl_ours, kl_eager, False),
    "exact KL, trained head": (kl_ours, kl_eager, True),
}


def parser() -> argparse.ArgumentParser:
    found = argparse.ArgumentParser(
        "uft kernels",
        description="Checks the fused heads against float64 on this machine, and times forward and backward beside "
        "eager PyTorch. Exit code 1 where one is less exact than it must be.",
        epilog="example: uft kernels --tokens 4096 --hidden 2048 --vocabulary 128256 --dtype bfloat16",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    gpu = torch.cuda.is_available()
    add = found.add_argument
    add("--tokens", type=int, default=2048 if gpu else 256, help="that the head sees")
    add("--hidden", type=int, default=2048 if gpu else 128, help="size of hidden states")
    add("--vocabulary", type=int, default=128_256 if gpu else 4096, help="size of the vocabulary")
    add("--dtype", default="bfloat16" if gpu else "float32", choices=("float32", "bfloat16", "float16"))
    add("--device", default="cuda" if gpu else "cpu", help="cpu, cuda, ...")
    add("--rounds", type=int, default=10, help="of which medians are taken")
    return found


def main(words: Sequence[str]) -> int:
    given = parser().parse_args(list(words))
    if min(given.tokens, given.hidden, given.vocabulary, given.rounds) < 1:
        raise ValueError("tokens, hidden, vocabulary and rounds: found one below 1; want whole numbers from 1 on")
    inputs = make_inputs(given.tokens, given.hidden, given.vocabulary, getattr(torch, given.dtype), given.device)
    form = "Triton kernels" if uses_triton(inputs.hidden_ND) else "PyTorch"
    where = torch.cuda.get_device_name(inputs.hidden_ND.device) if inputs.hidden_ND.is_cuda else "CPU"
    print(
        f"{form} on {where}, torch {torch.__version__}; {given.tokens:,} tokens, hidden {given.hidden:,}, vocabulary "
        f"{given.vocabulary:,}, {given.dtype}; forward and backward, median of {given.rounds}\n"
    )
    lines, wrong = [("", "error, ours", "eager", "ms, ours", "eager", "ratio", "memory, ratio")], []
    for name, (ours, eager, trained) in CASES.items():
        errors = measured_errors(ours, eager, inputs, trained)
        wrong += [name] * any(found > allowed for found, _, allowed in errors)
        times = _times([lambda f=f, t=trained: run(f, inputs, t) for f in (ours, eager)], given.rounds, inputs)
        peaks = [_peak(lambda f=f, t=trained: run(f, inputs, t), inputs) for f in (ours, eager)]
        worst = max(errors, key=lambda each: each[0] / each[2])
        lines.append((
            name, f"{worst[0]:.1e}", f"{worst[1]:.1e}", *(f"{t:.2f}" for t in (*times, times[0] / times[1])),
            "–" if None in peaks else f"{peaks[0] / peaks[1]:.2f}",
        ))  # fmt: skip
    print(terminal_table(lines[0], lines[1:]))
    print(f"\nless exact than they must be: {', '.join(wrong)}" if wrong else "\nall as exact as they must be")
    return int(bool(wrong))


def make_inputs(N: int, D: int, V: int, dtype: torch.dtype, device: str) -> Inputs:
    """Logits of standard deviation 3, and a reference a little off."""
    try:
        generator = torch.Generator(device).manual_seed(0)
    except RuntimeError as error:
        raise ValueError(f"device is {device!r}: {str(error).splitlines()[0]}") from None

    def normal(*sizes: int) -> Tensor:
        return torch.randn(*sizes, generator=generator, device=device)

    hidden, weight = 3 * normal(N, D) / D**0.5, normal(V, D)
    other = hidden + 0.5 * normal(N, D) / D**0.5, weight + 0.02 * normal(V, D)
    target = torch.randint(0, V, (N,), generator=generator, device=device)
    return Inputs(hidden.to(dtype), weight.to(dtype), target, *(each.to(dtype) for each in other))


def run(function: Callable[[Inputs], Tensor], inputs: Inputs, trained: bool) -> Outcome:
    hidden = inputs.hidden_ND.detach().requires_grad_()
    weight = inputs.weight_VD.detach().requires_grad_(trained)
    value = function(inputs._replace(hidden_ND=hidden, weight_VD=weight))
    value.mean().backward()
    return Outcome(value.detach(), hidden.grad, weight.grad)


def measured_errors(
    ours: Callable[[Inputs], Tensor], eager: Callable[[Inputs], Tensor], inputs: Inputs, trained: bool
) -> list[tuple[float, float, float]]:
    """Of value and gradients: our relative error, that of eager PyTorch, and what ours may be."""
    exact = run(eager, Inputs(*(x.double() if x.is_floating_point() else x for x in inputs)), trained)
    found, plain = run(ours, inputs, trained), run(eager, inputs, trained)
    errors = []
    for x, y, gold in zip(found, plain, exact):
        if gold is not None:
            lost = _relative(y, gold)
            errors.append((_relative(x, gold), lost, 3 * lost + 2 * torch.finfo(x.dtype).eps))
    return errors


def _relative(found: Tensor, gold: Tensor) -> float:
    error = ((found.double() - gold).norm() / gold.norm().clamp(min=1e-300)).item()
    return error if error == error else float("inf")


def _at_least_float(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def _times(calls: Sequence[Callable[[], Any]], rounds: int, inputs: Inputs) -> list[float]:
    """Milliseconds, medians; in turn, so that all share clocks and weather."""
    cuda = inputs.hidden_ND.is_cuda
    found: list[list[float]] = [[] for _ in calls]
    for k in range(rounds + 2):
        for call, values in zip(calls, found):
            if cuda:
                torch.cuda.synchronize()
            start = time.perf_counter()
            call()
            if cuda:
                torch.cuda.synchronize()
            if k >= 2:  # the first ones compile and warm up
                values.append(1000 * (time.perf_counter() - start))
    return [statistics.median(values) for values in found]


def _peak(call: Callable[[], Any], inputs: Inputs) -> int | None:
    """Bytes that a call holds at most, gradients included; None where there is no count."""
    if not inputs.hidden_ND.is_cuda:
        return None
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before
