"""Rows of a linear head from one kernel: the logits never leave the chip.

    part m[n, j] = max over v in tile j of r[n, v],     x = k (r - m),     s[n, j] = sum e^x,     u[n, j] = sum e^x x

A program computes tiles of BLOCK_N tokens by BLOCK_V entries, keeps a tile's logits in registers and writes three
numbers per token; the tile that holds a token's target writes its logit.  Nothing is added up across programs while
they run, so there are no atomics and no locks, and the parts are merged in a fixed order:

    M = max_j m,   d_j = k (m_j - M),   s = sum_j s_j e^d_j,   u = sum_j e^d_j (u_j + s_j d_j),   H = log s - u / s

with r and k as in `raw_logits`.

Hopper and later read through tensor descriptors (TMA), others, AMD's among them, through pointers.

On an H200 this takes 1.05 times the bare product at 8192 x 4096 x 128256, cuBLAS and a row kernel 1.2 times, so it is
used there where the caller allows it.  It sums in another order than they do: a policy with a frozen head, which needs
its logits, and a reference that goes through here would agree to rounding only.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from uft_kernels import products
from uft_kernels.backend import jit, tl, triton, uses_triton
from uft_kernels.products import slabs
from uft_kernels.raw_logits import entropy_slope, logp_slope, scale_in_kernel, scale_of, slope, tanh
from uft_kernels.token_logprob import IGNORE, Rows

TOKENS = 8192  # whose parts are held at a time: 12 bytes per token and tile
WARPS = 8


def tile_of(descriptors: int | None, entropy: bool, capped: bool) -> dict[str, Any]:
    """What the kernel is built with.  `descriptors` is the major compute capability where they are used.

    Only Hopper's registers hold a tile of 256 by 128, and not beside softcap's epilogue.  Measured on an H200:
    bench/results/tiles-h200.json.
    """
    tall = descriptors == 9 and not (entropy or capped)
    return {"DESCRIPTORS": descriptors is not None, "BLOCK_N": 256 if tall else 128, "BLOCK_V": 128, "BLOCK_D": 64,
            "GROUP": 8}  # fmt: skip


def gradient_tile_of(descriptors: int | None, entropy: bool, capped: bool) -> dict[str, Any]:
    """The same for the gradient of the logits."""
    tile = tile_of(descriptors, entropy, capped)
    return {**tile, "GROUP": 4} if tile["BLOCK_N"] == 256 else tile


STAGES = 3


@jit
def _place(tile, tiles_n, tiles_v, GROUP: tl.constexpr):
    """(tile of tokens, tile of entries): GROUP tiles of tokens share a tile of the head while it is in the cache."""
    first = tile // (GROUP * tiles_v) * GROUP
    size = tl.minimum(tiles_n - first, GROUP)
    return first + tile % (GROUP * tiles_v) % size, tile % (GROUP * tiles_v) // size


@jit
def _tile_logits(
    hidden_ptr, weight_ptr, bias_ptr, hidden, weight, hidden_stride, weight_stride, i, j, N, V, D,
    BIASED: tl.constexpr, DESCRIPTORS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_V: tl.constexpr,
    BLOCK_D: tl.constexpr,
):  # fmt: skip
    """[BLOCK_N, BLOCK_V] float32: hidden @ weight.T + bias; beyond the edges whatever is there."""
    n = i * BLOCK_N + tl.arange(0, BLOCK_N)
    v = j * BLOCK_V + tl.arange(0, BLOCK_V)
    z = tl.zeros([BLOCK_N, BLOCK_V], tl.float32)
    for start in range(0, D, BLOCK_D):
        if DESCRIPTORS:
            h = hidden.load([i * BLOCK_N, start])
            w = weight.load([j * BLOCK_V, start])
        else:
            d = start + tl.arange(0, BLOCK_D)
            h_at = n[:, None].to(tl.int64) * hidden_stride + d[None]
            w_at = v[:, None].to(tl.int64) * weight_stride + d[None]
            h = tl.load(hidden_ptr + h_at, mask=(n < N)[:, None] & (d < D)[None], other=0.0)
            w = tl.load(weight_ptr + w_at, mask=(v < V)[:, None] & (d < D)[None], other=0.0)
        z = tl.dot(h, tl.trans(w), z)
    if BIASED:
        z += tl.load(bias_ptr + v, mask=v < V, other=0.0).to(tl.float32)[None]
    return z


@jit
def _tile_kernel(
    hidden_ptr,  # [N, D], rows hidden_stride apart
    weight_ptr,  # [V, D], rows weight_stride apart
    bias_ptr,  # [V], or unused
    target_ptr,  # [N] int64
    part_ptr,  # [3, J, N] float32, out: m, s, u
    logit_ptr,  # [N] float32, out: r of the target
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
    DESCRIPTORS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_D: tl.constexpr,
    GROUP: tl.constexpr,
):
    softcap = tl.cast(softcap, tl.float32)
    k = scale_in_kernel(inverse_temperature, softcap, CAPPED)
    tiles_n = tl.cdiv(N, BLOCK_N)
    tiles_v = tl.cdiv(V, BLOCK_V)
    hidden = hidden_ptr
    weight = weight_ptr
    if DESCRIPTORS:
        hidden = tl.make_tensor_descriptor(hidden_ptr, [N, D], [hidden_stride, 1], [BLOCK_N, BLOCK_D])
        weight = tl.make_tensor_descriptor(weight_ptr, [V, D], [weight_stride, 1], [BLOCK_V, BLOCK_D])
    for tile in tl.range(tl.program_id(0), tiles_n * tiles_v, tl.num_programs(0), flatten=DESCRIPTORS):
        i, j = _place(tile, tiles_n, tiles_v, GROUP)
        n = i * BLOCK_N + tl.arange(0, BLOCK_N)
        v = j * BLOCK_V + tl.arange(0, BLOCK_V)
        z = _tile_logits(
            hidden_ptr, weight_ptr, bias_ptr, hidden, weight, hidden_stride, weight_stride, i, j, N, V, D, BIASED,
            DESCRIPTORS, BLOCK_N, BLOCK_V, BLOCK_D,
        )  # fmt: skip
        if CAPPED:
            z = tanh(z / softcap)
        z = tl.where((v < V)[None], z, float("-inf"))
        target = tl.load(target_ptr + n, mask=n < N, other=-1)
        here = (target - j * BLOCK_V).to(tl.int32)
        at_target = tl.sum(tl.where(tl.arange(0, BLOCK_V)[None] == here[:, None], z, 0.0), 1)
        # finite, so that a tile of -inf logits does not give (-inf) - (-inf)
        m = tl.maximum(tl.max(z, 1), -3.0e38)
        s = tl.sum(tl.exp((z - m[:, None]) * k), 1)
        at = j.to(tl.int64) * N + n
        plane = tiles_v.to(tl.int64) * N
        tl.store(part_ptr + at, m, mask=n < N)
        tl.store(part_ptr + plane + at, s, mask=n < N)
        if WITH_ENTROPY:
            shifted = tl.maximum((z - m[:, None]) * k, -1.0e4)  # where e is 0
            u = tl.sum(tl.exp(shifted) * shifted, 1)
            tl.store(part_ptr + 2 * plane + at, u, mask=n < N)
        tl.store(logit_ptr + n, at_target, mask=(n < N) & (target // BLOCK_V == j))


@jit
def _gradient_kernel(
    hidden_ptr,  # [N, D], rows hidden_stride apart
    weight_ptr,  # [V, D], rows weight_stride apart
    bias_ptr,  # [V], or unused
    target_ptr,  # [N] int64, within these entries; a negative one stands in no column
    entropy_ptr,  # [N] float32; so the following two
    peak_ptr,
    log_sum_ptr,
    grad_logp_ptr,  # [N] float32
    grad_entropy_ptr,  # [N] float32
    gradient_ptr,  # [N, V] contiguous, out
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
    DESCRIPTORS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_D: tl.constexpr,
    GROUP: tl.constexpr,
):
    softcap = tl.cast(softcap, tl.float32)
    k = scale_in_kernel(inverse_temperature, softcap, CAPPED)
    tiles_n = tl.cdiv(N, BLOCK_N)
    tiles_v = tl.cdiv(V, BLOCK_V)
    hidden = hidden_ptr
    weight = weight_ptr
    if DESCRIPTORS:
        hidden = tl.make_tensor_descriptor(hidden_ptr, [N, D], [hidden_stride, 1], [BLOCK_N, BLOCK_D])
        weight = tl.make_tensor_descriptor(weight_ptr, [V, D], [weight_stride, 1], [BLOCK_V, BLOCK_D])
        gradient = tl.make_tensor_descriptor(gradient_ptr, [N, V], [V, 1], [BLOCK_N, BLOCK_V])
    for tile in tl.range(tl.program_id(0), tiles_n * tiles_v, tl.num_programs(0), flatten=DESCRIPTORS):
        i, j = _place(tile, tiles_n, tiles_v, GROUP)
        n = i * BLOCK_N + tl.arange(0, BLOCK_N)
        v = j * BLOCK_V + tl.arange(0, BLOCK_V)
        z = _tile_logits(
            hidden_ptr, weight_ptr, bias_ptr, hidden, weight, hidden_stride, weight_stride, i, j, N, V, D, BIASED,
            DESCRIPTORS, BLOCK_N, BLOCK_V, BLOCK_D,
        )  # fmt: skip
        peak = tl.load(peak_ptr + n, mask=n < N, other=0.0)
        log_sum = tl.load(log_sum_ptr + n, mask=n < N, other=0.0)
        grad = tl.load(grad_logp_ptr + n, mask=n < N, other=0.0)
        here = (tl.load(target_ptr + n, mask=n < N, other=-1) - j * BLOCK_V).to(tl.int32)
        if CAPPED:
            z = tanh(z / softcap)
        log_p = (z - peak[:, None]) * k - log_sum[:, None]
        p = tl.exp(log_p)
        dz = grad[:, None] * logp_slope(p, tl.arange(0, BLOCK_V)[None] == here[:, None])
        if WITH_ENTROPY:
            entropy = tl.load(entropy_ptr + n, mask=n < N, other=0.0)
            grad_entropy = tl.load(grad_entropy_ptr + n, mask=n < N, other=0.0)
            dz -= grad_entropy[:, None] * entropy_slope(p, log_p, entropy[:, None])
        dz *= slope(z, inverse_temperature, CAPPED)
        if DESCRIPTORS:
            gradient.store([i * BLOCK_N, j * BLOCK_V], dz.to(gradient_ptr.dtype.element_ty))
        else:
            at = n[:, None].to(tl.int64) * V + v[None]
            tl.store(gradient_ptr + at, dz.to(gradient_ptr.dtype.element_ty), mask=(n < N)[:, None] & (v < V)[None])


def fusible(hidden_ND: Tensor, weight_VD: Tensor, allowed: bool) -> bool:
    """Half precision alone: exact float32 products belong to cuBLAS."""
    half = hidden_ND.dtype in (torch.bfloat16, torch.float16)
    if products.FUSED is False or not (half and uses_triton(hidden_ND) and weight_VD.stride(1) == 1):
        return False
    return products.FUSED or (allowed and _capability(hidden_ND) == 9)


def fused_rows(
    hidden_ND: Tensor, weight_VD: Tensor, bias_V: Tensor | None, target_N: Tensor, *, temperature: float = 1.0,
    softcap: float | None = None, entropy: bool = True,
) -> Rows:  # fmt: skip
    """The rows that `forward_rows` gives of hidden @ weight.T + bias, entropies only where asked for."""
    (N, D), V = hidden_ND.shape, len(weight_VD)
    descriptors = _descriptors(hidden_ND, weight_VD)
    tile = tile_of(descriptors, entropy, softcap is not None)
    rows = Rows(*torch.empty(4, N, dtype=torch.float32, device=hidden_ND.device))
    for tokens in slabs(N, TOKENS):
        count = len(rows.logp[tokens])
        tiles = triton.cdiv(count, tile["BLOCK_N"]) * triton.cdiv(V, tile["BLOCK_V"])
        parts = torch.zeros(3, triton.cdiv(V, tile["BLOCK_V"]), count, dtype=torch.float32, device=hidden_ND.device)
        # a target that is no entry has no log-probability
        logit_N = torch.full((count,), float("nan"), dtype=torch.float32, device=hidden_ND.device)
        _tile_kernel[(tiles if descriptors is None else min(tiles, _processors(hidden_ND)),)](
            hidden_ND[tokens], weight_VD, weight_VD if bias_V is None else bias_V, target_N[tokens], parts, logit_N,
            hidden_ND.stride(0), weight_VD.stride(0), count, V, D, 1 / temperature, softcap or 1.0,
            CAPPED=softcap is not None, BIASED=bias_V is not None, WITH_ENTROPY=entropy, **tile,
            num_warps=WARPS, num_stages=STAGES,
        )  # fmt: skip
        for whole_N, value_N in zip(rows, _merged(parts, logit_N, scale_of(temperature, softcap))):
            whole_N[tokens] = value_N.masked_fill(target_N[tokens] == IGNORE, 0.0)
    return rows


def fused_gradient(
    hidden_ND: Tensor, weight_SD: Tensor, bias_S: Tensor | None, target_N: Tensor, rows: Rows,
    grad_logp_N: Tensor | None, grad_entropy_N: Tensor | None, out_NS: Tensor, *, temperature: float = 1.0,
    softcap: float | None = None,
) -> Tensor:  # fmt: skip
    """What `backward_rows` writes of the logits of some entries of the vocabulary, which stay on the chip.

    target_N   within these entries; a negative one stands in no column
    out_NS     contiguous
    """
    (N, D), S = hidden_ND.shape, len(weight_SD)
    zero_N = torch.zeros_like(rows.logp)
    descriptors, entropy = _descriptors(hidden_ND, weight_SD, out_NS), grad_entropy_N is not None
    tile = gradient_tile_of(descriptors, entropy, softcap is not None)
    tiles = triton.cdiv(N, tile["BLOCK_N"]) * triton.cdiv(S, tile["BLOCK_V"])
    if N:
        _gradient_kernel[(tiles if descriptors is None else min(tiles, _processors(hidden_ND)),)](
            hidden_ND, weight_SD, weight_SD if bias_S is None else bias_S, target_N, rows.entropy, rows.peak,
            rows.log_sum, *(zero_N if g is None else g.float().contiguous() for g in (grad_logp_N, grad_entropy_N)),
            out_NS, hidden_ND.stride(0), weight_SD.stride(0), N, S, D, 1 / temperature, softcap or 1.0,
            CAPPED=softcap is not None, BIASED=bias_S is not None, WITH_ENTROPY=entropy, **tile,
            num_warps=WARPS, num_stages=STAGES,
        )  # fmt: skip
    return out_NS


def _merged(parts: Tensor, logit_N: Tensor, k: float) -> Rows:
    peak, total, moment = parts  # [J, N] each
    top_N = peak.amax(0)
    fallen = (peak - top_N) * k
    scale = fallen.exp()
    sum_N = (scale * total).sum(0)
    log_sum_N = sum_N.log()
    moment_N = (scale * (moment + torch.where(total > 0, total * fallen, 0.0))).sum(0)
    return Rows((logit_N - top_N) * k - log_sum_N, log_sum_N - moment_N / sum_N, top_N, log_sum_N)


def _descriptors(*tensors: Tensor) -> int | None:
    """The major compute capability, if tensor descriptors can be used: TMA wants 9 or more, and rows that begin at
    multiples of 16 bytes."""
    major = _capability(tensors[0])
    aligned = all(t.data_ptr() % 16 == 0 and t.stride(0) * t.itemsize % 16 == 0 and t.stride(1) == 1 for t in tensors)
    return major if major >= 9 and aligned else None


def _capability(tensor: Tensor) -> int:
    """Major, of an NVIDIA GPU; else 0."""
    if not tensor.is_cuda or torch.version.hip:
        return 0
    # descriptors are built on the device, in memory that triton asks for
    triton.set_allocator(lambda size, _alignment, _stream: torch.empty(size, dtype=torch.int8, device="cuda"))
    return torch.cuda.get_device_capability(tensor.device)[0]


def _processors(tensor: Tensor) -> int:
    return torch.cuda.get_device_properties(tensor.device).multi_processor_count if tensor.is_cuda else 3
