"""Log-probability of one token per row of logits, and the row's entropy, without forming the log-softmax.

    z'[n, v] = k r[n, v]                       r = z, k = 1 / T; with a softcap c:  r = tanh(z / c), k = c / T
    l[n]     = k (r[n, t[n]] - m[n]) - log s[n],   m = max_v r,    s = sum_v exp(k (r - m))
    H[n]     = log s[n] - sum_v p[n, v] k (r[n, v] - m[n]),        p = exp(k (r - m)) / s

    dl / dz'[v] = 1[v = t] - p[v]        dH / dz'[v] = -p[v] (log p[v] + H)        dz' / dz = (1 - tanh^2) / T

Rows whose target is IGNORE have l = 0 and H = 0 and no gradient.  m and log s stay apart: their sum, rounded, would
cost a near-certain token all its digits; for k's place see `raw_logits`.

The forward reads the logits once and keeps a few float32 per row; the backward reads them once more and writes the
gradient, over the logits themselves where that is asked for.  The reference keeps an N x V log-softmax in between.

Order of this file: reference, kernels, rows, autograd, public function.  N rows, V vocabulary.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from uft_kernels.backend import accumulation, jit, row_blocks, tl, triton, uses_triton
from uft_kernels.raw_logits import (
    check_scales,
    effective,
    entropy_slope,
    load_raw,
    logp_slope,
    raw,
    scale_in_kernel,
    scale_of,
    slope,
    times,
)

IGNORE = -100
BLOCK_V = 4096
WARPS = 4  # measured, with BLOCK_V: bench/results/tiles-h200.json
ENTRIES = 128  # of a block whose largest logit is kept where that is asked for


class TokenLogprob(NamedTuple):
    """Each [N], in nats: log-probability of the target, entropy of the row."""

    logp: Tensor
    entropy: Tensor


class Rows(NamedTuple):
    """What the forward keeps of each row, [N] each, in float32 (float64 for float64 logits)."""

    logp: Tensor
    entropy: Tensor
    peak: Tensor  # m, before the scale
    log_sum: Tensor  # log s


# ---- reference ----


def token_logprob_reference(
    logits_NV: Tensor, target_N: Tensor, *, temperature: float = 1.0, softcap: float | None = None
) -> TokenLogprob:
    """The specification.  Computes in float32, or in float64 if given float64."""
    ignored_N = target_N == IGNORE
    log_p_NV = effective(logits_NV, temperature, softcap).log_softmax(-1)
    logp_N = log_p_NV.gather(-1, target_N.masked_fill(ignored_N, 0)[:, None]).squeeze(-1)
    # where, not multiply: a token of probability 0 contributes 0, and 0 * inf is NaN
    p_NV = log_p_NV.exp()
    entropy_N = -torch.where(p_NV > 0, p_NV * log_p_NV, 0.0).sum(-1)
    return TokenLogprob(logp_N.masked_fill(ignored_N, 0.0), entropy_N.masked_fill(ignored_N, 0.0))


# ---- kernels ----


@jit
def fold(m, s, u, r, base_2, WITH_ENTROPY: tl.constexpr):
    """One more block: its maximum, sum of 2^x and sum of 2^x x, x = base_2 (r - m).

    When the maximum rises, what was summed so far is rescaled (arXiv:1805.02867).
    """
    m_new = tl.maximum(m, tl.max(r, 0))
    x = (r - m_new) * base_2
    e = tl.exp2(x)
    fall = (m - m_new) * base_2
    scale = tl.exp2(fall)
    if WITH_ENTROPY:
        # where e is 0 its term is, also at minus infinity
        u = scale * (u + tl.where(s > 0, fall * s, 0.0)) + tl.sum(e * tl.maximum(x, -1.0e4), 0)
    s = scale * s + tl.sum(e, 0)
    return m_new, s, u


@jit
def store_maxima(maxima_ptr, n, start, z, V, ENTRIES: tl.constexpr, BLOCK_V: tl.constexpr):
    b = start // ENTRIES + tl.arange(0, BLOCK_V // ENTRIES)
    blocks = tl.cdiv(V, ENTRIES)
    largest = tl.max(tl.reshape(z, [BLOCK_V // ENTRIES, ENTRIES]), 1)
    tl.store(maxima_ptr + n * blocks + b, largest, mask=b < blocks)


@jit
def _forward_kernel(
    logits_ptr,  # [N, V], rows row_stride apart
    target_ptr,  # [N] int64
    logp_ptr,  # [N] float32, out; so the following three
    entropy_ptr,
    peak_ptr,
    log_sum_ptr,
    maxima_ptr,  # [N, B] float32, out: the largest r of each block; or unused
    row_stride,
    V,
    inverse_temperature,
    softcap,
    CAPPED: tl.constexpr,
    WITH_MAXIMA: tl.constexpr,
    WITH_ENTROPY: tl.constexpr,
    IGNORED: tl.constexpr,
    ENTRIES: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    # int64: 16k rows of a 150k vocabulary are more than 2^31 elements
    n = tl.program_id(0).to(tl.int64)
    softcap = tl.cast(softcap, tl.float32)
    k = scale_in_kernel(inverse_temperature, softcap, CAPPED)
    base_2 = k * 1.4426950408889634
    logits_ptr += n * row_stride
    target = tl.load(target_ptr + n)
    if target == IGNORED:
        tl.store(logp_ptr + n, 0.0)
        tl.store(entropy_ptr + n, 0.0)
        tl.store(peak_ptr + n, 0.0)
        tl.store(log_sum_ptr + n, 0.0)
        return

    # m starts finite, so that a block of -inf logits does not give (-inf) - (-inf)
    m = -3.0e38
    s = 0.0
    u = 0.0
    whole = V // BLOCK_V * BLOCK_V
    for start in range(0, whole, BLOCK_V):
        v = start + tl.arange(0, BLOCK_V)
        r = load_raw(logits_ptr, v, V, softcap, CAPPED, MASKED=False)  # [BLOCK_V]
        if WITH_MAXIMA:
            store_maxima(maxima_ptr, n, start, r, V, ENTRIES, BLOCK_V)
        m, s, u = fold(m, s, u, r, base_2, WITH_ENTROPY)
    if whole < V:
        v = whole + tl.arange(0, BLOCK_V)
        r = load_raw(logits_ptr, v, V, softcap, CAPPED, MASKED=True)
        if WITH_MAXIMA:
            store_maxima(maxima_ptr, n, whole, r, V, ENTRIES, BLOCK_V)
        m, s, u = fold(m, s, u, r, base_2, WITH_ENTROPY)
    log_s = tl.log(s)
    inside = (target >= 0) & (target < V)
    at = tl.where(inside, target, 0) + tl.zeros([1], tl.int64)
    r_target = load_raw(logits_ptr, at, V, softcap, CAPPED, MASKED=True)
    # a target that is no entry has no log-probability
    tl.store(logp_ptr + n, tl.where(inside, tl.sum(r_target - m, 0) * k - log_s, float("nan")))
    tl.store(entropy_ptr + n, log_s - u / s * 0.6931471805599453)
    tl.store(peak_ptr + n, m)
    tl.store(log_sum_ptr + n, log_s)


@jit
def _backward_kernel(
    logits_ptr,  # [N, V], rows row_stride apart
    target_ptr,  # [N] int64
    entropy_ptr,  # [N] float32; so the following two
    peak_ptr,
    log_sum_ptr,
    grad_logp_ptr,  # [N] float32
    grad_entropy_ptr,  # [N] float32
    gradient_ptr,  # [N, V], rows gradient_stride apart, out; may be the logits
    row_stride,
    gradient_stride,
    V,
    inverse_temperature,
    softcap,
    CAPPED: tl.constexpr,
    WITH_ENTROPY: tl.constexpr,
    IGNORED: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    n = tl.program_id(0).to(tl.int64)
    v = tl.program_id(1) * BLOCK_V + tl.arange(0, BLOCK_V)
    softcap = tl.cast(softcap, tl.float32)
    k = scale_in_kernel(inverse_temperature, softcap, CAPPED)
    logits_ptr += n * row_stride
    gradient_ptr += n * gradient_stride
    target = tl.load(target_ptr + n)
    if target == IGNORED:
        tl.store(gradient_ptr + v, tl.zeros([BLOCK_V], gradient_ptr.dtype.element_ty), mask=v < V)
        return

    r = load_raw(logits_ptr, v, V, softcap, CAPPED, MASKED=True)
    log_p = (r - tl.load(peak_ptr + n)) * k - tl.load(log_sum_ptr + n)
    p = tl.exp(log_p)
    dz = tl.load(grad_logp_ptr + n) * logp_slope(p, v == target)
    if WITH_ENTROPY:
        entropy = tl.load(entropy_ptr + n)
        dz -= tl.load(grad_entropy_ptr + n) * entropy_slope(p, log_p, entropy)
    dz *= slope(r, inverse_temperature, CAPPED)
    tl.store(gradient_ptr + v, dz.to(gradient_ptr.dtype.element_ty), mask=v < V)


# ---- rows: what the operations on hidden states share ----


def forward_rows(
    logits_NV: Tensor, target_N: Tensor, *, temperature: float = 1.0, softcap: float | None = None,
    maxima_NB: Tensor | None = None, entropy: bool = True,
) -> Rows:  # fmt: skip
    """Everything about each row that one reading of the logits gives, the entropy where it is asked for; `maxima_NB`
    is filled with the largest entry of each block of ENTRIES, if given."""
    N, V = logits_NV.shape
    rows = Rows(*torch.empty(4, N, dtype=accumulation(logits_NV.dtype), device=logits_NV.device))
    if not uses_triton(logits_NV):
        for block in row_blocks(logits_NV):
            raw_NV = raw(logits_NV[block], softcap)
            found = _forward_block(raw_NV, target_N[block], scale_of(temperature, softcap))
            if maxima_NB is not None:
                beyond = maxima_NB.shape[1] * ENTRIES - V
                padded_NV = torch.nn.functional.pad(raw_NV, (0, beyond), value=float("-inf"))
                maxima_NB[block] = padded_NV.unflatten(1, (-1, ENTRIES)).amax(-1)
            for whole_N, value_N in zip(rows, found):
                whole_N[block] = value_N
    elif N:
        block = min(BLOCK_V, triton.next_power_of_2(V))
        _forward_kernel[(N,)](
            logits_NV, target_N, *rows, rows.logp if maxima_NB is None else maxima_NB, logits_NV.stride(0), V,
            1 / temperature, softcap or 1.0, CAPPED=softcap is not None, WITH_MAXIMA=maxima_NB is not None,
            WITH_ENTROPY=entropy, IGNORED=IGNORE, ENTRIES=ENTRIES, num_warps=WARPS,
            BLOCK_V=block if maxima_NB is None else max(block, ENTRIES),
        )  # fmt: skip
    return rows


def _forward_block(raw_NV: Tensor, target_N: Tensor, scale: float) -> Rows:
    ignored_N = target_N == IGNORE
    m_N = raw_NV.amax(-1)
    shifted_NV = times(raw_NV - m_N[:, None], scale)
    at_target_N = shifted_NV.gather(-1, target_N.masked_fill(ignored_N, 0)[:, None]).squeeze(-1)
    e_NV = shifted_NV.exp()
    s_N = e_NV.sum(-1)
    # where e is 0 its term is, also at minus infinity
    u_N = e_NV.mul_(shifted_NV.clamp_(min=torch.finfo(raw_NV.dtype).min)).sum(-1)
    found = Rows(at_target_N - s_N.log(), s_N.log() - u_N / s_N, m_N, s_N.log())
    return Rows(*(value.masked_fill(ignored_N, 0.0) for value in found))


def backward_rows(
    logits_NV: Tensor, target_N: Tensor, rows: Rows, grad_logp_N: Tensor | None, grad_entropy_N: Tensor | None,
    out_NV: Tensor, *, temperature: float = 1.0, softcap: float | None = None,
) -> Tensor:  # fmt: skip
    """Writes the gradient with respect to the logits to `out_NV`, which may be the logits, and returns it."""
    N, V = logits_NV.shape
    zero_N = torch.zeros_like(rows.logp)
    grad_logp_N = zero_N if grad_logp_N is None else grad_logp_N.to(zero_N.dtype).contiguous()
    if uses_triton(logits_NV):
        if N:
            block = min(BLOCK_V, triton.next_power_of_2(V))
            _backward_kernel[(N, triton.cdiv(V, block))](
                logits_NV, target_N, rows.entropy, rows.peak, rows.log_sum, grad_logp_N,
                zero_N if grad_entropy_N is None else grad_entropy_N.float().contiguous(), out_NV,
                logits_NV.stride(0), out_NV.stride(0), V, 1 / temperature, softcap or 1.0,
                CAPPED=softcap is not None, WITH_ENTROPY=grad_entropy_N is not None, IGNORED=IGNORE, BLOCK_V=block,
                num_warps=WARPS,
            )  # fmt: skip
        return out_NV
    for block in row_blocks(logits_NV):
        here, target = Rows(*(value_N[block] for value_N in rows)), target_N[block]
        raw_NV = raw(logits_NV[block], softcap)
        log_p_NV = times(raw_NV - here.peak[:, None], scale_of(temperature, softcap)).sub_(here.log_sum[:, None])
        p_NV = log_p_NV.exp() if grad_entropy_N is not None else log_p_NV.exp_()
        dz_NV = onehot_minus(p_NV, target).mul_(grad_logp_N[block, None])
        if grad_entropy_N is not None:
            term_NV = torch.where(p_NV > 0, p_NV * (log_p_NV + here.entropy[:, None]), 0.0)
            dz_NV -= grad_entropy_N[block, None].to(dz_NV.dtype) * term_NV
        if softcap is not None:
            dz_NV *= (1 - raw_NV) * (1 + raw_NV)
        dz_NV.masked_fill_((target == IGNORE)[:, None], 0.0)  # whatever its logits are
        out_NV[block] = dz_NV if temperature == 1.0 else dz_NV.div_(temperature)
    return out_NV


def onehot_minus(p_NV: Tensor, target_N: Tensor) -> Tensor:
    """1[v = t] - p.  A negative target stands in no column: it belongs to another slab of the vocabulary."""
    at_N1 = target_N.clamp(min=0)[:, None]
    here_N1 = p_NV.gather(-1, at_N1)
    return (-p_NV).scatter_(-1, at_N1, torch.where(target_N[:, None] >= 0, 1 - here_N1, -here_N1))


# ---- autograd ----


class _TokenLogprob(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits_NV, target_N, temperature, softcap, inplace):
        rows = forward_rows(logits_NV, target_N, temperature=temperature, softcap=softcap)
        ctx.save_for_backward(logits_NV, target_N, *rows)
        ctx.options, ctx.inplace, ctx.spent = {"temperature": temperature, "softcap": softcap}, inplace, False
        ctx.set_materialize_grads(False)
        return rows.logp, rows.entropy

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_logp_N, grad_entropy_N):
        if grad_logp_N is None and grad_entropy_N is None:
            return None, None, None, None, None
        if ctx.spent:
            raise RuntimeError("inplace=True: the first backward has overwritten the logits")
        logits_NV, target_N, *rows = ctx.saved_tensors
        if ctx.inplace:
            ctx.spent = True
            out_NV = logits_NV.detach()
        else:
            # a fresh tensor: what forward saved stays as it was, so backward may run twice
            out_NV = torch.empty(logits_NV.shape, dtype=logits_NV.dtype, device=logits_NV.device)
        backward_rows(logits_NV, target_N, Rows(*rows), grad_logp_N, grad_entropy_N, out_NV, **ctx.options)
        if ctx.inplace:
            torch.autograd.graph.increment_version(logits_NV)  # whoever else kept the logits is told
        return out_NV, None, None, None, None


# ---- public ----


def token_logprob(
    logits_NV: Tensor,
    target_N: Tensor,
    *,
    temperature: float = 1.0,
    softcap: float | None = None,
    entropy: bool = False,
    inplace: bool = False,
) -> Tensor | TokenLogprob:
    """Log-probability of each row's target, in nats; with `entropy` also the rows' entropies.

    logits_NV     [N, V], any float dtype, rows any distance apart; the arithmetic is float32, or float64 if given it
    target_N      [N], int64 in [0, V); IGNORE gives 0 and no gradient
    temperature   divides the (capped) logits; > 0
    softcap       c in c tanh(z / c), as in Gemma; > 0 or None
    inplace       the backward writes the gradient over the logits, which saves N x V and can run once
    returns       [N] float32 (float64 for float64), or a TokenLogprob of two such

    Raises ValueError where shapes, temperature or softcap do not fit.
    """
    if logits_NV.ndim != 2 or target_N.shape != logits_NV.shape[:1]:
        raise ValueError(f"want [N, V] and [N], got {[*logits_NV.shape]} and {[*target_N.shape]}")
    check_scales(temperature, softcap)
    if logits_NV.stride(-1) != 1:
        if inplace:
            raise ValueError("inplace=True wants the entries of a row next to each other")
        logits_NV = logits_NV.contiguous()
    found = TokenLogprob(*_TokenLogprob.apply(logits_NV, target_N.contiguous(), temperature, softcap, inplace))
    return found if entropy else found.logp
