"""Operations on logits that are there, against the time that reading them takes.

    python kernels/bench/logits.py            part of `make bench-kernels`

Writes  kernels/bench/results/logits-<machine>.{json,md}

The floor is the traffic of an operation (reads and writes of N x V) at the bandwidth that copying the logits reaches.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path[:0] = [str(Path(__file__).resolve().parents[1]), str(Path(__file__).resolve().parent)]

from measure import environment, machine_name, median_and_spread, peak_bytes, times  # noqa: E402
from uft_kernels import token_divergence, token_logprob  # noqa: E402

RESULTS = Path(__file__).parent / "results"
SHAPES = {"cuda": [(8192, 128_256), (8192, 151_936), (4096, 256_000)], "cpu": [(512, 32_768)]}


def eager_logp(logits: Tensor, target: Tensor) -> Tensor:
    return logits.float().log_softmax(-1).gather(-1, target[:, None]).squeeze(-1)


def eager_kl(policy: Tensor, reference: Tensor) -> Tensor:
    log_p, log_q = (logits.float().log_softmax(-1) for logits in (policy, reference))
    return (log_p.exp() * (log_p - log_q)).sum(-1)


def calls(
    logits: Tensor, other: Tensor, target: Tensor, upstream: Tensor
) -> dict[str, tuple[int, dict[str, Callable]]]:
    """case -> (reads and writes of N x V, rival -> call)."""

    def both_ways(operation: Callable[[Tensor], Tensor]) -> Callable[[], Any]:
        def run():
            leaf = logits.detach().requires_grad_()
            return torch.autograd.grad(operation(leaf), leaf, upstream)

        return run

    # in place the gradient stands where the logits were, which a copy made anew each time would hide
    fused = torch.compile(eager_logp, dynamic=False)
    return {
        "log-probability": (
            1,
            {
                "ours": lambda: token_logprob(logits, target),
                "eager": lambda: eager_logp(logits, target),
                "torch.compile": lambda: fused(logits, target),
            },
        ),
        "log-probability, forward + backward": (
            3,
            {
                "ours": both_ways(lambda leaf: token_logprob(leaf, target)),
                "eager": both_ways(lambda leaf: eager_logp(leaf, target)),
                "torch.compile": both_ways(lambda leaf: fused(leaf, target)),
            },
        ),
        "KL (ours: both ways, and the entropy)": (
            2,
            {"ours": lambda: token_divergence(logits, other).kl, "eager": lambda: eager_kl(logits, other)},
        ),
    }


def bench(N: int, V: int, dtype: torch.dtype, device: torch.device, rounds: int) -> list[dict[str, Any]]:
    torch._dynamo.reset()
    torch.manual_seed(0)
    logits, other = (torch.randn(N, V, device=device, dtype=dtype) for _ in range(2))
    target, upstream, spare = torch.randint(0, V, (N,), device=device), torch.randn(N, device=device), logits.clone()
    rows = []
    for case, (passes, rivals) in calls(logits, other, target, upstream).items():
        timed = times({"copy": lambda: spare.copy_(logits), **rivals}, device, rounds)
        one_pass = median_and_spread(timed["copy"])["median"] / 2  # a copy reads and writes
        found = {}
        for name, run in rivals.items():
            time = median_and_spread(timed[name])
            share = one_pass * passes / time["median"]
            found[name] = {"ms": time, "of_bandwidth": share, "extra_bytes": peak_bytes(run, device)}
        bandwidth = logits.nbytes / one_pass / 1e6
        rows.append({"case": case, "N": N, "V": V, "passes": passes, "GB_per_s": bandwidth, "rivals": found})
        told = ", ".join(f"{name} {of['of_bandwidth']:.2f}" for name, of in found.items())
        print(f"{case}, {N} x {V}: {told}", flush=True)
    return rows


def main(words: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", nargs=2, type=int, metavar=("N", "V"), help="this shape alone")
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--output", type=Path, default=RESULTS)
    arguments = parser.parse_args(words)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    about, rows = environment(device), []
    for N, V in [arguments.shape] if arguments.shape else SHAPES[device.type]:
        rows += bench(N, V, dtype, device, arguments.rounds)
    arguments.output.mkdir(parents=True, exist_ok=True)
    path = arguments.output / f"logits-{machine_name(about, device)}.json"
    path.write_text(
        json.dumps({**about, "dtype": str(dtype), "rounds": arguments.rounds, "rows": rows}, indent=1) + "\n"
    )
    path.with_suffix(".md").write_text(table(about, rows))
    print(f"{path} and .md")
    return 0


def table(about: dict[str, Any], rows: list[dict[str, Any]]) -> str:
    names = ("ours", "eager", "torch.compile")
    lines = [
        "# Logits: share of the bandwidth of a copy, and memory beyond the inputs\n",
        f"{about['hardware']}; torch {about['torch']}, triton {about['triton']}; {about['date']}. Goal: 0.85.\n",
        "| case | N x V | GB/s of a copy | " + " | ".join(names) + " |",
        "|---" * (3 + len(names)) + "|",
    ]
    for row in rows:
        cells = []
        for name in names:
            found = row["rivals"].get(name)
            cells.append(f"**{found['of_bandwidth']:.2f}** · {found['extra_bytes'] / 2**20:.0f} MiB" if found else "-")
        lines.append(f"| {row['case']} | {row['N']} x {row['V']} | {row['GB_per_s']:.0f} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.exit(main())
