"""The backward of a linear head over the parts of the vocabulary that matter.

A trained model gives nearly all of its probability to a few entries.  The forward keeps the largest logit of each block
of 128 entries, [N, V / 128] values.  The backward takes the pairs of token and block

    active = { (n, b): max over v in b of p[n, v] > eps,  or t[n] in b },    n with an upstream gradient of 0 left out

and computes logits, their gradient and both products for these alone; every other entry counts as p = 0:

    dz[n, v] = g[n] (1[v = t] - p[n, v]) for (n, b(v)) active, else 0          |error of dz| <= |g[n]| eps per entry

P active pairs cost 3 * 2 * 128 P D flops, where the whole backward costs 3 * 2 N V D.  Pairs are sorted by block, so
that a block of the head is read once for all its tokens; sums run in a fixed order, without atomics.  Where more than
DENSE of all pairs are active there is nothing to save, and the whole backward runs instead.

Order of this file: pairs, kernels, gradients.  N tokens, D hidden, V vocabulary, B blocks, P pairs.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from uft_kernels.backend import accumulation, jit, tl, triton, uses_triton
from uft_kernels.products import add_product, product
from uft_kernels.raw_logits import entropy_slope, logp_slope, scale_in_kernel, slope, tanh
from uft_kernels.token_logprob import ENTRIES, Rows, backward_rows

DENSE = 0.3
PAIR_BYTES = 512 * 2**20  # that the kernels may hold for all pairs
WARPS = 8
WIDTH = 64  # the fewest columns of hidden states whose contributions are held at a time


class Pairs(NamedTuple):
    """Active pairs of token and block, sorted by block and then by token."""

    token_P: Tensor  # int64
    block_P: Tensor
    count_B: Tensor  # pairs of each block


def active_pairs(
    maxima_NB: Tensor, rows: Rows, target_N: Tensor, grads: tuple[Tensor | None, ...], eps: float, scale: float
) -> Pairs | None:
    """None where there are too many to be worth it, or to be held.  Asks the device how many there are."""
    active_NB = (maxima_NB - rows.peak[:, None]) * scale - rows.log_sum[:, None] > math.log(eps)
    active_NB.scatter_(1, (target_N // ENTRIES)[:, None], True)
    wanted_N = sum((grad_N != 0).int() for grad_N in grads if grad_N is not None) > 0
    block_P, token_P = (active_NB & wanted_N[:, None]).T.nonzero(as_tuple=True)
    per_pair = ENTRIES * 4 + WIDTH * 8  # the gradient of its logits, and two copies of what it adds to WIDTH columns
    too_many = uses_triton(maxima_NB) and len(block_P) * per_pair > PAIR_BYTES
    if len(block_P) > DENSE * active_NB.numel() or too_many:
        return None
    return Pairs(token_P, block_P, torch.bincount(block_P, minlength=maxima_NB.shape[1]))


def tile_of(dtype: torch.dtype) -> dict[str, Any]:
    """What the kernels are built with.  float32 products are exact, in registers, and get by with narrower tiles."""
    wide = dtype == torch.float32
    return {
        "PRECISION": "ieee" if wide else "tf32",  # tf32 concerns float32 alone
        "ENTRIES": ENTRIES,
        "BLOCK_P": 64,  # pairs in a tile
        "BLOCK_D": 32 if wide else 64,
    }


def step_of(dtype: torch.dtype) -> dict[str, Any]:
    """The same for the gradient of the head, which sums over pairs."""
    tile = tile_of(dtype)
    return {**tile, "BLOCK_P": 32 if dtype == torch.float32 else 64}


# ---- kernels ----


@jit
def _logit_gradient_kernel(
    hidden_ptr,  # [N, D], rows hidden_stride apart
    weight_ptr,  # [V, D], rows weight_stride apart
    bias_ptr,  # [V], or unused
    target_ptr,  # [N] int64
    rows_ptr,  # [3, N] float32: entropy, peak, log-sum
    grads_ptr,  # [2, N] float32: of log-probability and entropy
    token_ptr,  # [P] int64
    tile_ptr,  # [tiles, 3] int64: block, first pair, pair after the last
    dz_ptr,  # [P, ENTRIES], out
    hidden_stride,
    weight_stride,
    N,
    V,
    D,
    inverse_temperature,
    softcap,
    CAPPED: tl.constexpr,
    BIASED: tl.constexpr,
    WITH_ENTROPY: tl.constexpr,
    PRECISION: tl.constexpr,
    ENTRIES: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    softcap = tl.cast(softcap, tl.float32)
    k = scale_in_kernel(inverse_temperature, softcap, CAPPED)
    tile = tl.program_id(0)
    block = tl.load(tile_ptr + 3 * tile)
    pair = tl.load(tile_ptr + 3 * tile + 1) + tl.arange(0, BLOCK_P)
    here = pair < tl.load(tile_ptr + 3 * tile + 2)
    n = tl.load(token_ptr + pair, mask=here, other=0)
    v = block * ENTRIES + tl.arange(0, ENTRIES)
    z = tl.zeros([BLOCK_P, ENTRIES], tl.float32)
    for start in range(0, D, BLOCK_D):
        d = start + tl.arange(0, BLOCK_D)
        h = tl.load(hidden_ptr + n[:, None] * hidden_stride + d[None], mask=here[:, None] & (d < D)[None], other=0.0)
        w = tl.load(weight_ptr + v[None] * weight_stride + d[:, None], mask=(v < V)[None] & (d < D)[:, None], other=0.0)
        z = tl.dot(h, w, z, input_precision=PRECISION)
    if BIASED:
        z += tl.load(bias_ptr + v, mask=v < V, other=0.0).to(tl.float32)[None]
    if CAPPED:
        z = tanh(z / softcap)
    peak, log_sum = tl.load(rows_ptr + N + n), tl.load(rows_ptr + 2 * N + n)
    log_p = (z - peak[:, None]) * k - log_sum[:, None]
    hit = v[None] == tl.load(target_ptr + n)[:, None]
    p = tl.exp(log_p)
    dz = tl.load(grads_ptr + n)[:, None] * logp_slope(p, hit)
    if WITH_ENTROPY:
        entropy = tl.load(rows_ptr + n)[:, None]
        dz -= tl.load(grads_ptr + N + n)[:, None] * entropy_slope(p, log_p, entropy)
    dz = tl.where((v < V)[None], dz * slope(z, inverse_temperature, CAPPED), 0.0)
    at = pair.to(tl.int64)[:, None] * ENTRIES + tl.arange(0, ENTRIES)[None]
    tl.store(dz_ptr + at, dz.to(dz_ptr.dtype.element_ty), mask=here[:, None])


@jit
def _weight_gradient_kernel(
    hidden_ptr,  # [N, D], rows hidden_stride apart
    dz_ptr,  # [P, ENTRIES]
    token_ptr,  # [P] int64
    first_ptr,  # [B + 1] int64: the first pair of each block
    gradient_ptr,  # [V, D] contiguous, out
    hidden_stride,
    V,
    D,
    PRECISION: tl.constexpr,
    ENTRIES: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    block = tl.program_id(0)
    d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    entry = tl.arange(0, ENTRIES)
    total = tl.zeros([ENTRIES, BLOCK_D], tl.float32)
    end = tl.load(first_ptr + block + 1)
    for start in range(tl.load(first_ptr + block), end, BLOCK_P):
        pair = start + tl.arange(0, BLOCK_P)
        here = pair < end
        n = tl.load(token_ptr + pair, mask=here, other=0)
        dz = tl.load(dz_ptr + pair[None].to(tl.int64) * ENTRIES + entry[:, None], mask=here[None], other=0.0)
        h = tl.load(hidden_ptr + n[:, None] * hidden_stride + d[None], mask=here[:, None] & (d < D)[None], other=0.0)
        total = tl.dot(dz, h, total, input_precision=PRECISION)
    v = block.to(tl.int64) * ENTRIES + entry
    inside = (v < V)[:, None] & (d < D)[None]
    tl.store(gradient_ptr + v[:, None] * D + d[None], total.to(gradient_ptr.dtype.element_ty), mask=inside)


@jit
def _contribution_kernel(
    dz_ptr,  # [P, ENTRIES]
    weight_ptr,  # [V, D], rows weight_stride apart
    tile_ptr,  # [tiles, 3] int64
    out_ptr,  # [P, columns] float32, out
    weight_stride,
    V,
    first_column,
    columns,
    PRECISION: tl.constexpr,
    ENTRIES: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    tile = tl.program_id(0)
    block = tl.load(tile_ptr + 3 * tile)
    pair = tl.load(tile_ptr + 3 * tile + 1) + tl.arange(0, BLOCK_P)
    here = pair < tl.load(tile_ptr + 3 * tile + 2)
    d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    total = tl.zeros([BLOCK_P, BLOCK_D], tl.float32)
    for start in range(0, ENTRIES, BLOCK_D):
        entry = start + tl.arange(0, BLOCK_D)
        v = block * ENTRIES + entry
        dz = tl.load(dz_ptr + pair[:, None].to(tl.int64) * ENTRIES + entry[None], mask=here[:, None], other=0.0)
        inside = (v < V)[:, None] & (d < columns)[None]
        w = tl.load(weight_ptr + v[:, None] * weight_stride + first_column + d[None], mask=inside, other=0.0)
        total = tl.dot(dz, w, total, input_precision=PRECISION)
    at = pair[:, None].to(tl.int64) * columns + d[None]
    tl.store(out_ptr + at, total, mask=here[:, None] & (d < columns)[None])


# ---- gradients ----


def pair_gradients(
    hidden_ND: Tensor, weight_VD: Tensor, bias_V: Tensor | None, target_N: Tensor, rows: Rows, pairs: Pairs,
    grads: tuple[Tensor | None, Tensor | None], wanted: tuple[bool, ...], scales: dict[str, Any],
) -> tuple[Tensor | None, ...]:  # fmt: skip
    """Gradients of hidden states, weight and bias from the active pairs, as `slab_gradients` gives them from all."""
    form = _by_kernels if uses_triton(hidden_ND) else _by_blocks
    return form(hidden_ND, weight_VD, bias_V, target_N, rows, pairs, grads, wanted, scales)


def _by_blocks(hidden_ND, weight_VD, bias_V, target_N, rows, pairs, grads, wanted, scales):
    dtype = accumulation(hidden_ND.dtype)
    grad_hidden = hidden_ND.new_zeros(hidden_ND.shape, dtype=dtype) if wanted[0] else None
    grad_weight = torch.zeros_like(weight_VD, memory_format=torch.contiguous_format) if wanted[1] else None
    grad_bias = hidden_ND.new_zeros(len(weight_VD), dtype=dtype) if wanted[2] else None
    for block, token_K in enumerate(pairs.token_P.split(pairs.count_B.tolist())):
        if not len(token_K):
            continue
        slab = slice(block * ENTRIES, min((block + 1) * ENTRIES, len(weight_VD)))
        part_KD, local_K = hidden_ND[token_K], target_N[token_K] - slab.start
        local_K = local_K.masked_fill((local_K < 0) | (local_K >= slab.stop - slab.start), -1)
        logits_KE = product(part_KD, weight_VD[slab].T)
        if bias_V is not None:
            logits_KE += bias_V[slab]
        dz_KE = torch.empty_like(logits_KE, dtype=hidden_ND.dtype)
        of_pairs = (None if grad_N is None else grad_N[token_K] for grad_N in grads)
        backward_rows(logits_KE, local_K, Rows(*(value[token_K] for value in rows)), *of_pairs, dz_KE, **scales)
        if wanted[0]:
            grad_hidden.index_add_(0, token_K, product(dz_KE, weight_VD[slab]))  # each token once
        if wanted[1]:
            total_ED = hidden_ND.new_zeros(slab.stop - slab.start, hidden_ND.shape[1], dtype=dtype)
            add_product(total_ED, dz_KE.T, part_KD)
            grad_weight[slab] = total_ED
        if wanted[2]:
            grad_bias[slab] = dz_KE.sum(0, dtype=dtype)
    return (
        None if grad_hidden is None else grad_hidden.to(hidden_ND.dtype),
        grad_weight,
        None if grad_bias is None else grad_bias.to(bias_V.dtype),
    )


def _by_kernels(hidden_ND, weight_VD, bias_V, target_N, rows, pairs, grads, wanted, scales):
    (N, D), (V, _), P = hidden_ND.shape, weight_VD.shape, len(pairs.token_P)
    common = {**tile_of(hidden_ND.dtype), "num_warps": WARPS}
    weight_VD = weight_VD if weight_VD.stride(1) == 1 else weight_VD.contiguous()
    first = torch.nn.functional.pad(pairs.count_B.cumsum(0), (1, 0))
    tiles = _tiles(pairs.count_B, first, common["BLOCK_P"])
    dz_PE = hidden_ND.new_empty(P, ENTRIES)
    zero_N = torch.zeros_like(rows.logp)
    upstream = torch.stack([zero_N if grad_N is None else grad_N.float() for grad_N in grads])
    if P:
        _logit_gradient_kernel[(len(tiles),)](
            hidden_ND, weight_VD, weight_VD if bias_V is None else bias_V, target_N, torch.stack(list(rows[1:])),
            upstream, pairs.token_P, tiles, dz_PE, hidden_ND.stride(0), weight_VD.stride(0), N, V, D,
            1 / scales["temperature"], scales["softcap"] or 1.0, CAPPED=scales["softcap"] is not None,
            BIASED=bias_V is not None, WITH_ENTROPY=grads[1] is not None, **common,
        )  # fmt: skip
    grad_hidden = grad_weight = grad_bias = None
    if wanted[1]:
        grad_weight = torch.empty(V, D, dtype=weight_VD.dtype, device=weight_VD.device)
        _weight_gradient_kernel[(len(pairs.count_B), triton.cdiv(D, common["BLOCK_D"]))](
            hidden_ND, dz_PE, pairs.token_P, first, grad_weight, hidden_ND.stride(0), V, D,
            **step_of(hidden_ND.dtype), num_warps=WARPS,
        )  # fmt: skip
    if wanted[2]:
        summed = torch.segment_reduce(dz_PE.float(), "sum", lengths=pairs.count_B, axis=0, initial=0)
        grad_bias = summed.flatten()[:V].to(bias_V.dtype)
    if wanted[0]:
        grad_hidden = _hidden_gradient(dz_PE, weight_VD, tiles, pairs, N, common)
    return grad_hidden, grad_weight, grad_bias


def _hidden_gradient(
    dz_PE: Tensor, weight_VD: Tensor, tiles: Tensor, pairs: Pairs, N: int, common: dict[str, Any]
) -> Tensor:
    """Each pair's contribution, then their sum per token, some columns at a time."""
    (V, D), P = weight_VD.shape, len(dz_PE)
    order_P = pairs.token_P.argsort(stable=True)
    of_token_N = torch.bincount(pairs.token_P, minlength=N)
    grad_ND = dz_PE.new_zeros(N, D)
    width = max(WIDTH, (PAIR_BYTES // 2) // max(1, 8 * P) // WIDTH * WIDTH)
    for start in range(0, D if P else 0, width):
        columns = min(width, D - start)
        parts = torch.empty(P, columns, dtype=torch.float32, device=dz_PE.device)
        _contribution_kernel[(len(tiles), triton.cdiv(columns, common["BLOCK_D"]))](
            dz_PE, weight_VD, tiles, parts, weight_VD.stride(0), V, start, columns, **common
        )
        grad_ND[:, start : start + columns] = torch.segment_reduce(
            parts[order_P], "sum", lengths=of_token_N, axis=0, initial=0
        )
    return grad_ND


def _tiles(count_B: Tensor, first: Tensor, size: int) -> Tensor:
    """[tiles, 3] int64: block, first pair and the pair after the last, of at most `size` pairs of one block."""
    tiles_B = (count_B + size - 1) // size
    block = torch.repeat_interleave(torch.arange(len(count_B), device=count_B.device), tiles_B)
    within = torch.arange(len(block), device=count_B.device) - (tiles_B.cumsum(0) - tiles_B)[block]
    start = first[block] + within * size
    return torch.stack([block, start, torch.minimum(start + size, first[block + 1])], dim=1).contiguous()
