"""Matrix products as the operations need them: float32 results whatever goes in, and few rows at a time.

Logits rounded to bfloat16 move the margin of a 512-token pair by half a nat and more, so no product here rounds its
result before it is used.  cuBLAS writes float32 from bfloat16 factors; on a CPU the factors are converted slab by slab.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from uft_kernels.backend import accumulation

BUDGET = 512 * 2**20  # bytes of logits in one chunk of tokens
SLAB = 150 * 2**20  # bytes of one slab of the vocabulary in a trained head's backward: see `entry_bytes`
STRIPE = 1024  # tokens of a slab whose float32 logits are there at a time
# logits and their rows in one kernel (`linear_rows`), where nothing else needs the logits: never, always, or, with
# None, where the caller allows it and it was measured to be faster
FUSED: bool | None = None
KEEP = 64 * 2**20  # logits smaller than this are kept for the backward and not computed again
CPU_SLAB = 8192  # rows of a low-precision factor that are converted at a time


def product(a_NK: Tensor, b_KM: Tensor, out_NM: Tensor | None = None) -> Tensor:
    """a @ b in float32 (float64 for float64)."""
    dtype = accumulation(a_NK.dtype)
    if a_NK.dtype == dtype:
        return torch.mm(a_NK, b_KM, out=out_NM)
    if a_NK.is_cuda:
        if out_NM is None:
            return torch.mm(a_NK, b_KM, out_dtype=dtype)
        return torch.mm(a_NK, b_KM, out_dtype=dtype, out=out_NM)
    if out_NM is None:
        out_NM = torch.empty(len(a_NK), b_KM.shape[1], dtype=dtype, device=a_NK.device)
    a_NK = a_NK.to(dtype)
    for columns in slabs(b_KM.shape[1], CPU_SLAB):
        torch.mm(a_NK, b_KM[:, columns].to(dtype), out=out_NM[:, columns])
    return out_NM


def add_product(total_NM: Tensor, a_NK: Tensor, b_KM: Tensor) -> None:
    """total += a @ b, without rounding in between; total is float32 or float64."""
    if a_NK.dtype == total_NM.dtype:
        torch.addmm(total_NM, a_NK, b_KM, out=total_NM)
    elif a_NK.is_cuda:
        torch.addmm(total_NM, a_NK, b_KM, out_dtype=total_NM.dtype, out=total_NM)
    else:
        torch.addmm(total_NM, a_NK.to(total_NM.dtype), b_KM.to(total_NM.dtype), out=total_NM)


def slabs(length: int, size: int) -> Iterator[slice]:
    for start in range(0, length, size):
        yield slice(start, min(start + size, length))


def chunks(N: int, V: int, dtype: torch.dtype) -> Iterator[slice]:
    """Slices of N tokens whose logits fit into the budget; of a multiple of 64 tokens where there is room for it.

    They depend on nothing else: policy and reference that are equal then agree to the bit, whatever wants a gradient.
    """
    rows = max(1, BUDGET // (V * accumulation(dtype).itemsize))
    return slabs(N, rows // 64 * 64 if rows >= 64 else rows)


def entry_bytes(tokens: int, D: int, itemsize: int, *, copies: int = 1, several: bool = False) -> int:
    """What one entry of the vocabulary takes of a slab in a trained head's backward:

        tokens * itemsize + max(STRIPE * copies * 4, D * 4)      or the sum of all three

    tokens    at a time
    itemsize  of the hidden states
    copies    how many float32 logits of a stripe are there at a time
    several   the slab's gradient of the head is summed over several blocks of tokens, and is there beside logits
    """
    wide = max(itemsize, 4)
    stripe, total = min(tokens, STRIPE) * copies * wide, D * wide
    return tokens * itemsize + (stripe + total if several else max(stripe, total))


def slab_entries(V: int, per_entry: int) -> int:
    """Entries in one slab.  Wide slabs read and write the float32 gradient of the hidden states less often."""
    return min(V, max(128, SLAB // per_entry // 128 * 128))


def fits(N: int, V: int, dtype: torch.dtype, budget: int) -> bool:
    return N * V * accumulation(dtype).itemsize <= budget
