"""What the constants of the kernels should be on this GPU: chunks, rows and tiles, each against the bare product.

    python kernels/bench/tiles.py --output FOLDER         a GPU, a minute

Three tables, in milliseconds for all N tokens and as a ratio to one bfloat16 product of the whole:
    chunks   float32 logits by cuBLAS for some tokens at a time, the row kernel on them, and both together
    rows     the row kernels with other widths and warps, as a share of the bandwidth of a copy
    tiles    logits and rows in one kernel, with other tiles
Writes  FOLDER/tiles-<machine>.json
"""

from __future__ import annotations

import argparse
import json
import sys
from functools import partial
from itertools import product as combinations
from pathlib import Path
from typing import Any

import torch

sys.path[:0] = [str(Path(__file__).resolve().parents[1]), str(Path(__file__).resolve().parent)]

import uft_kernels  # noqa: E402, F401
from measure import environment, machine_name, median_and_spread, times  # noqa: E402
from uft_kernels.products import product, slabs  # noqa: E402
from uft_kernels.token_logprob import IGNORE, Rows, forward_rows  # noqa: E402

# functions of the package bear the names of these modules
ROWS, LOGPROB, DIVERGENCE = (
    sys.modules[f"uft_kernels.{name}"] for name in ("linear_rows", "token_logprob", "token_divergence")
)

ROUNDS = 6
# tokens, entries, hidden; warps, stages, group
TILES = ((128, 256, 64, 8, 3, 8), (128, 256, 64, 8, 4, 8), (128, 256, 64, 8, 3, 16), (256, 128, 64, 8, 3, 8),
         (256, 128, 64, 8, 4, 8), (256, 128, 64, 8, 3, 4), (128, 128, 64, 4, 4, 8), (128, 128, 64, 8, 4, 8),
         (128, 128, 128, 8, 3, 8))  # fmt: skip
ENTRIES = 4736  # of a slab


def median(run, device: torch.device) -> float:
    return median_and_spread(times({"it": run}, device, ROUNDS)["it"])["median"]


def of_chunks(hidden, weight, target, device) -> list[dict[str, Any]]:
    found = []
    for rows in (256, 512, 1024, 2048, 4096):
        out = torch.empty(rows, len(weight), device=device)

        def products(rows=rows, out=out):
            for part in slabs(len(hidden), rows):
                product(hidden[part], weight.T, out)

        def both(rows=rows, out=out):
            for part in slabs(len(hidden), rows):
                product(hidden[part], weight.T, out)
                forward_rows(out, target[part])

        found.append({"rows": rows, "products": median(products, device), "with rows": median(both, device)})
        print(found[-1], flush=True)
    return found


def of_rows(N: int, V: int, dtype: torch.dtype, device) -> list[dict[str, Any]]:
    logits = torch.randn(N, V, device=device, dtype=torch.float32).to(dtype)
    target = torch.randint(0, V, (N,), device=device)
    spare, other, found = torch.empty_like(logits), torch.randn_like(logits), []
    rows = forward_rows(logits, target)
    out = torch.empty(N, V, device=device, dtype=torch.bfloat16)
    one_pass = median(lambda: spare.copy_(logits), device) / 2
    ones, pair = torch.ones_like(rows.logp), torch.zeros(11, N, device=device)
    written = 2 / logits.element_size()  # bfloat16 gradients, in passes
    for block, warps in combinations((2048, 4096, 8192), (2, 4, 8, 16)):

        def forward(block=block, warps=warps, entropy=False):
            LOGPROB._forward_kernel[(N,)](
                logits, target, *rows, rows.logp, logits.stride(0), V, 1.0, 1.0, CAPPED=False, WITH_MAXIMA=False,
                WITH_ENTROPY=entropy, IGNORED=IGNORE, ENTRIES=128, BLOCK_V=block, num_warps=warps,
            )  # fmt: skip

        def backward(block=block, warps=warps):
            LOGPROB._backward_kernel[(N, -(-V // block))](
                logits, target, rows.entropy, rows.peak, rows.log_sum, ones, ones, out, logits.stride(0), out.stride(0),
                V, 1.0, 1.0, CAPPED=False, WITH_ENTROPY=False, IGNORED=IGNORE, BLOCK_V=block, num_warps=warps,
            )  # fmt: skip

        def divergence(block=block, warps=warps):
            DIVERGENCE._forward_kernel[(N,)](
                logits, other, target, pair, N, logits.stride(0), other.stride(0), V, 1.0, 1.0, 1.0, 0.5, CAPPED=False,
                REFERENCE_CAPPED=False, WITH_JS=False, WITH_TARGET=True, BLOCK_V=block, num_warps=warps,
            )  # fmt: skip

        share = {"forward": one_pass / median(forward, device)}
        if block <= 4096 and dtype == torch.float32:
            share["divergence"] = 2 * one_pass / median(divergence, device)
        share["entropy"] = one_pass / median(partial(forward, entropy=True), device)
        share["backward"] = one_pass * (1 + written) / median(backward, device)
        found.append({"dtype": str(dtype), "N": N, "block": block, "warps": warps, **share})
        told = ", ".join(f"{name} {value:.2f}" for name, value in share.items())
        print(f"{dtype} {N} x {V} block {block} warps {warps}: {told}", flush=True)
    return found


def of_tiles(hidden, weight, target, device, G: float) -> list[dict[str, Any]]:
    """Rows of the whole vocabulary, and the gradient of the logits of a slab of it."""
    found, (N, V) = [], (len(hidden), len(weight))
    slab = weight[: ENTRIES // 128 * 128]
    local, room = target.masked_fill(target >= len(slab), -1), hidden.new_empty(N, len(slab))
    one = Rows(*torch.ones(4, N, device=device))
    for what, (block_n, block_v, block_d, warps, stages, group) in combinations(("rows", "gradient"), TILES):
        tile = {"DESCRIPTORS": True, "BLOCK_N": block_n, "BLOCK_V": block_v, "BLOCK_D": block_d, "GROUP": group}
        ROWS.tile_of = ROWS.gradient_tile_of = lambda *_, tile=tile: tile
        ROWS.WARPS, ROWS.STAGES = warps, stages
        name = f"{what}: {block_n} x {block_v} x {block_d}, {warps} warps, {stages} stages, group {group}"
        try:
            if what == "rows":
                ms = median(partial(ROWS.fused_rows, hidden, weight, None, target, entropy=False), device)
            else:
                run = partial(ROWS.fused_gradient, hidden, slab, None, local, one, one.logp, None, room)
                ms = median(run, device) * V / len(slab)
            print(f"{name}: {ms:.2f} ms, {ms / G:.3f}", flush=True)
        except Exception as error:  # a tile that does not fit is a result too
            ms = None
            print(f"{name}: {type(error).__name__} {str(error)[:80]}", flush=True)
        found.append({**tile, "what": what, "warps": warps, "stages": stages, "ms": ms})
    return found


def main(words: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", nargs=3, type=int, metavar=("N", "D", "V"), default=(8192, 4096, 128_256))
    parser.add_argument("--parts", nargs="+", choices=("chunks", "rows", "tiles"), default=["chunks", "rows", "tiles"])
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results")
    arguments = parser.parse_args(words)
    if not torch.cuda.is_available():
        parser.error("tiles are measured on a GPU")
    device, (N, D, V) = torch.device("cuda"), arguments.shape
    torch.manual_seed(0)
    hidden = torch.randn(N, D, device=device, dtype=torch.bfloat16)
    weight = torch.randn(V, D, device=device, dtype=torch.bfloat16) * 3 / D**0.5
    target = torch.randint(0, V, (N,), device=device)
    whole = torch.empty(N, V, device=device, dtype=torch.bfloat16)
    G = median(partial(torch.mm, hidden, weight.T, out=whole), device)
    del whole
    print(f"one product: {G:.2f} ms, {2 * N * V * D / G / 1e9:.0f} TFLOP/s", flush=True)
    record: dict[str, Any] = {**environment(device), "shape": [N, D, V], "G": G}
    if "chunks" in arguments.parts:
        record["chunks"] = of_chunks(hidden, weight, target, device)
    if "tiles" in arguments.parts:
        record["tiles"] = of_tiles(hidden, weight, target, device, G)
    if "rows" in arguments.parts:
        record["rows"] = of_rows(1024, V, torch.float32, device) + of_rows(N, V, torch.bfloat16, device)
    arguments.output.mkdir(parents=True, exist_ok=True)
    path = arguments.output / f"tiles-{machine_name(record, device)}.json"
    path.write_text(json.dumps(record, indent=1) + "\n")
    print(path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
