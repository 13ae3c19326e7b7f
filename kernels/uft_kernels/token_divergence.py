"""Exact divergences between two next-token distributions over the full vocabulary, from their logits.

    KL(p || q) = sum_v p (log p - log q)               p policy, q reference
    KL(q || p) = sum_v q (log q - log p)
    JS_w       = (1 - w) KL(p || r) + w KL(q || r),    r = (1 - w) p + w q        w = 1/2: Jensen-Shannon
    H          = -sum_v p log p

    dKL(p || q) / dz = p (log p - log q - KL)          z the policy's logits; the reference gets no gradient
    dKL(q || p) / dz = p - q
    dJS_w       / dz = (1 - w) p (log p - log r - KL(p || r))
    dH          / dz = -p (log p + H)

Normalisers, both KLs and the entropy come from one reading of both rows.  With peaks m and k, e = exp(z - m),
s = sum e and the reference's w, f = exp(w - k), t = sum f (z and w with their scales, which in the code stand outside
of the differences, see `raw_logits`),

    KL(p || q) = sum e ((z - m) - (w - k)) / s - (log s - log t)

where all sums are corrected as m and k rise; without the peaks taken off, what two rows differ by as a whole would
cancel only after rounding.  The mixture needs the normalisers first, so JS is a second reading, as is the gradient.

Order of this file: reference, kernels, rows, autograd, public function.  N rows, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from uft_kernels.backend import accumulation, jit, row_blocks, tl, triton, uses_triton
from uft_kernels.raw_logits import (
    check_scales,
    effective,
    load_raw,
    raw,
    scale_in_kernel,
    scale_of,
    slope,
    times,
)
from uft_kernels.token_logprob import onehot_minus

BLOCK_V = 2048
WARPS = 4  # measured, with BLOCK_V: bench/results/tiles-h200.json


class Divergence(NamedTuple):
    """Each [N], in nats.

    kl           KL(policy || reference): large where the policy does what the reference would not
    reverse_kl   KL(reference || policy): large where the policy no longer does what the reference did
    entropy      of the policy
    js           the weighted Jensen-Shannon divergence; None where it was not asked for
    """

    kl: Tensor
    reverse_kl: Tensor
    entropy: Tensor
    js: Tensor | None = None


class Pair(NamedTuple):
    """What the forward keeps of each row: log-probabilities of the target where there is one, peak and log-sum of
    policy and reference, the divergences, and KL(p || r)."""

    logp: Tensor
    reference_logp: Tensor
    peak: Tensor
    log_sum: Tensor
    reference_peak: Tensor
    reference_log_sum: Tensor
    kl: Tensor
    reverse_kl: Tensor
    entropy: Tensor
    js: Tensor
    to_mixture: Tensor


class Scales(NamedTuple):
    """Temperature and softcap of the policy and of the reference, and the weight of the reference in the mixture."""

    temperature: float = 1.0
    softcap: float | None = None
    reference_softcap: float | None = None
    js_weight: float | None = None

    @property
    def of_raw(self) -> tuple[float, float]:
        """Of raw entries of the policy and of the reference."""
        return scale_of(self.temperature, self.softcap), scale_of(self.temperature, self.reference_softcap)


# ---- reference ----


def token_divergence_reference(
    policy_logits_NV: Tensor,
    reference_logits_NV: Tensor,
    *,
    temperature: float = 1.0,
    softcap: float | None = None,
    reference_softcap: float | None = None,
    js_weight: float | None = None,
) -> Divergence:
    """The specification.  Computes in float32, or in float64 if given float64."""
    log_p = effective(policy_logits_NV, temperature, softcap).log_softmax(-1)
    log_q = effective(reference_logits_NV.detach(), temperature, reference_softcap).log_softmax(-1)
    p, q, js = log_p.exp(), log_q.exp(), None
    if js_weight is not None:
        log_r = _log_mixture(log_p, log_q, js_weight)
        js = (1 - js_weight) * _sum(p, log_p - log_r) + js_weight * _sum(q, log_q - log_r)
    return Divergence(_sum(p, log_p - log_q), _sum(q, log_q - log_p), -_sum(p, log_p), js)


def _log_mixture(log_p: Tensor, log_q: Tensor, weight: float) -> Tensor:
    log = torch.tensor([1 - weight, weight], dtype=torch.float64).log().tolist()
    return torch.logaddexp(log_p + log[0], log_q + log[1])


def _sum(p: Tensor, value: Tensor) -> Tensor:
    """sum_v p value.  where, not multiply: a token of probability 0 contributes 0, and 0 * inf is NaN."""
    return torch.where(p > 0, p * value, 0.0).sum(-1)


def _kl(p: Tensor, q: Tensor, log_ratio: Tensor) -> Tensor:
    """KL(p || q); q - p adds nothing to the sum but takes the normalisers' rounding errors out of it."""
    return torch.where(p > 0, p * log_ratio + (q - p), q).sum(-1)


# ---- kernels ----


@jit
def fold_pair(m, s, u, x, k, t, y, z, w, base_2, reference_base_2):
    """One more block of both rows; when a maximum rises, what was summed so far is corrected."""
    m_new = tl.maximum(m, tl.max(z, 0))
    k_new = tl.maximum(k, tl.max(w, 0))
    a = (z - m_new) * base_2
    b = (w - k_new) * reference_base_2
    fall = (m - m_new) * base_2
    fall_reference = (k - k_new) * reference_base_2
    rise = fall_reference - fall
    scale = tl.exp2(fall)
    e = tl.exp2(a)
    # where e is 0 its term is, also at minus infinity
    u = scale * (u + tl.where(s > 0, fall * s, 0.0)) + tl.sum(e * tl.maximum(a, -1.0e4), 0)
    x = scale * (x - tl.where(s > 0, s * rise, 0.0)) + tl.sum(tl.where(e > 0, e * (a - b), 0.0), 0)
    s = scale * s + tl.sum(e, 0)
    scale = tl.exp2(fall_reference)
    f = tl.exp2(b)
    y = scale * (y + tl.where(t > 0, t * rise, 0.0)) + tl.sum(tl.where(f > 0, f * (b - a), 0.0), 0)
    t = scale * t + tl.sum(f, 0)
    return m_new, s, u, x, k_new, t, y


@jit
def _forward_kernel(
    policy_ptr,  # [N, V], rows policy_stride apart
    reference_ptr,  # [N, V], rows reference_stride apart
    target_ptr,  # [N] int64; a negative one stands in no column
    out_ptr,  # [11, N] float32, out: the fields of Pair
    N,
    policy_stride,
    reference_stride,
    V,
    inverse_temperature,
    softcap,
    reference_softcap,
    js_weight,
    CAPPED: tl.constexpr,
    REFERENCE_CAPPED: tl.constexpr,
    WITH_JS: tl.constexpr,
    WITH_TARGET: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    n = tl.program_id(0).to(tl.int64)
    softcap = tl.cast(softcap, tl.float32)
    reference_softcap = tl.cast(reference_softcap, tl.float32)
    js_weight = tl.cast(js_weight, tl.float32)
    scale = scale_in_kernel(inverse_temperature, softcap, CAPPED)
    reference_scale = scale_in_kernel(inverse_temperature, reference_softcap, REFERENCE_CAPPED)
    policy_ptr += n * policy_stride
    reference_ptr += n * reference_stride
    # finite, so that a block of -inf logits does not give (-inf) - (-inf)
    m = -3.0e38
    s = 0.0  # sum of 2^(z - m), both in units of base 2
    u = 0.0  # ... times (z - m)
    x = 0.0  # ... times (z - m) - (w - k)
    k = -3.0e38
    t = 0.0  # sum of 2^(w - k), w the reference's logits
    y = 0.0  # ... times (w - k) - (z - m)
    base_2 = scale * 1.4426950408889634
    reference_base_2 = reference_scale * 1.4426950408889634
    whole = V // BLOCK_V * BLOCK_V
    for start in range(0, whole, BLOCK_V):
        v = start + tl.arange(0, BLOCK_V)
        z = load_raw(policy_ptr, v, V, softcap, CAPPED, MASKED=False)
        w = load_raw(reference_ptr, v, V, reference_softcap, REFERENCE_CAPPED, MASKED=False)
        m, s, u, x, k, t, y = fold_pair(m, s, u, x, k, t, y, z, w, base_2, reference_base_2)
    if whole < V:
        v = whole + tl.arange(0, BLOCK_V)
        z = load_raw(policy_ptr, v, V, softcap, CAPPED, MASKED=True)
        w = load_raw(reference_ptr, v, V, reference_softcap, REFERENCE_CAPPED, MASKED=True)
        m, s, u, x, k, t, y = fold_pair(m, s, u, x, k, t, y, z, w, base_2, reference_base_2)
    u *= 0.6931471805599453  # from base 2
    x *= 0.6931471805599453
    y *= 0.6931471805599453
    log_s = tl.log(s)
    log_t = tl.log(t)
    shift = log_s - log_t  # exactly 0 for equal rows
    if WITH_TARGET:
        at = tl.load(target_ptr + n) + tl.zeros([1], tl.int64)
        z_at = load_raw(policy_ptr, at, V, softcap, CAPPED, MASKED=True)
        w_at = load_raw(reference_ptr, at, V, reference_softcap, REFERENCE_CAPPED, MASKED=True)
        tl.store(out_ptr + n, tl.sum(z_at - m, 0) * scale - log_s)
        tl.store(out_ptr + N + n, tl.sum(w_at - k, 0) * reference_scale - log_t)
    tl.store(out_ptr + 2 * N + n, m)
    tl.store(out_ptr + 3 * N + n, log_s)
    tl.store(out_ptr + 4 * N + n, k)
    tl.store(out_ptr + 5 * N + n, log_t)
    tl.store(out_ptr + 6 * N + n, x / s - shift)
    tl.store(out_ptr + 7 * N + n, y / t + shift)
    tl.store(out_ptr + 8 * N + n, log_s - u / s)
    if WITH_JS:
        to_mixture = 0.0
        from_reference = 0.0
        for start in range(0, V, BLOCK_V):
            v = start + tl.arange(0, BLOCK_V)
            z = load_raw(policy_ptr, v, V, softcap, CAPPED, MASKED=True)
            w = load_raw(reference_ptr, v, V, reference_softcap, REFERENCE_CAPPED, MASKED=True)
            log_p = (z - m) * scale - log_s
            log_q = (w - k) * reference_scale - log_t
            log_r = log_mixture(log_p, log_q, js_weight)
            p = tl.exp(log_p)
            q = tl.exp(log_q)
            to_mixture += tl.sum(tl.where(p > 0, p * (log_p - log_r), 0.0), 0)
            from_reference += tl.sum(tl.where(q > 0, q * (log_q - log_r), 0.0), 0)
        tl.store(out_ptr + 9 * N + n, (1 - js_weight) * to_mixture + js_weight * from_reference)
        tl.store(out_ptr + 10 * N + n, to_mixture)


@jit
def log_mixture(log_p, log_q, weight):
    """log((1 - weight) p + weight q); -inf where both are 0."""
    top = tl.maximum(tl.maximum(log_p, log_q), -3.0e38)
    return top + tl.log((1 - weight) * tl.exp(log_p - top) + weight * tl.exp(log_q - top))


@jit
def _backward_kernel(
    policy_ptr,  # [N, V], rows policy_stride apart
    reference_ptr,  # [N, V], rows reference_stride apart
    target_ptr,  # [N] int64; a negative one stands in no column
    pair_ptr,  # [11, N] float32
    grad_ptr,  # [5, N] float32: of logp, kl, reverse_kl, entropy, js
    gradient_ptr,  # [N, V], rows gradient_stride apart, out; may be the policy's logits
    N,
    policy_stride,
    reference_stride,
    gradient_stride,
    V,
    inverse_temperature,
    softcap,
    reference_softcap,
    js_weight,
    CAPPED: tl.constexpr,
    REFERENCE_CAPPED: tl.constexpr,
    WITH_JS: tl.constexpr,
    WITH_TARGET: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    n = tl.program_id(0).to(tl.int64)
    v = tl.program_id(1) * BLOCK_V + tl.arange(0, BLOCK_V)
    softcap = tl.cast(softcap, tl.float32)
    reference_softcap = tl.cast(reference_softcap, tl.float32)
    js_weight = tl.cast(js_weight, tl.float32)
    scale = scale_in_kernel(inverse_temperature, softcap, CAPPED)
    reference_scale = scale_in_kernel(inverse_temperature, reference_softcap, REFERENCE_CAPPED)
    policy_ptr += n * policy_stride
    reference_ptr += n * reference_stride
    z = load_raw(policy_ptr, v, V, softcap, CAPPED, MASKED=True)
    w = load_raw(reference_ptr, v, V, reference_softcap, REFERENCE_CAPPED, MASKED=True)
    log_p = (z - tl.load(pair_ptr + 2 * N + n)) * scale - tl.load(pair_ptr + 3 * N + n)
    log_q = (w - tl.load(pair_ptr + 4 * N + n)) * reference_scale - tl.load(pair_ptr + 5 * N + n)
    p = tl.exp(log_p)
    kl = tl.load(pair_ptr + 6 * N + n)
    entropy = tl.load(pair_ptr + 8 * N + n)
    inside = tl.load(grad_ptr + N + n) * (log_p - log_q - kl) - tl.load(grad_ptr + 3 * N + n) * (log_p + entropy)
    if WITH_JS:
        log_r = log_mixture(log_p, log_q, js_weight)
        to_mixture = tl.load(pair_ptr + 10 * N + n)
        inside += tl.load(grad_ptr + 4 * N + n) * (1 - js_weight) * (log_p - log_r - to_mixture)
    dz = tl.where(p > 0, p * inside, 0.0) + tl.load(grad_ptr + 2 * N + n) * (p - tl.exp(log_q))
    if WITH_TARGET:
        dz += tl.load(grad_ptr + n) * (tl.where(v == tl.load(target_ptr + n), 1.0, 0.0) - p)
    dz *= slope(z, inverse_temperature, CAPPED)
    tl.store(gradient_ptr + n * gradient_stride + v, dz.to(gradient_ptr.dtype.element_ty), mask=v < V)


# ---- rows: what the operations on hidden states share ----


def forward_pair(policy_NV: Tensor, reference_NV: Tensor, target_N: Tensor | None, scales: Scales) -> Pair:
    """Everything about each pair of rows; log-probabilities are 0 without targets."""
    N, V = policy_NV.shape
    if uses_triton(policy_NV):
        out = torch.zeros(len(Pair._fields), N, dtype=torch.float32, device=policy_NV.device)
        if N:
            _forward_kernel[(N,)](
                policy_NV, reference_NV, out if target_N is None else target_N, out, N, policy_NV.stride(0),
                reference_NV.stride(0), *_arguments(V, scales, target_N), num_warps=WARPS,
            )  # fmt: skip
        return Pair(*out)
    pair = Pair(*torch.empty(len(Pair._fields), N, dtype=accumulation(policy_NV.dtype), device=policy_NV.device))
    for block in row_blocks(policy_NV):
        at = None if target_N is None else target_N[block]
        for whole_N, value_N in zip(pair, _forward_block(policy_NV[block], reference_NV[block], at, scales)):
            whole_N[block] = value_N
    return pair


def _forward_block(policy_NV: Tensor, reference_NV: Tensor, target_N: Tensor | None, scales: Scales) -> Pair:
    z, w = raw(policy_NV, scales.softcap), raw(reference_NV, scales.reference_softcap)
    m, k = z.amax(-1, keepdim=True), w.amax(-1, keepdim=True)
    scale, reference_scale = scales.of_raw
    z_m, w_k = times(z - m, scale), times(w - k, reference_scale)
    log_s, log_t = (row.exp().sum(-1, keepdim=True).log() for row in (z_m, w_k))
    log_p, log_q = z_m - log_s, w_k - log_t
    at = [torch.zeros_like(m) if target_N is None else row.gather(-1, target_N[:, None]) for row in (log_p, log_q)]
    found = [at[0].squeeze(-1), at[1].squeeze(-1), m.squeeze(-1), log_s.squeeze(-1), k.squeeze(-1), log_t.squeeze(-1)]
    p, q, log_ratio = log_p.exp(), log_q.exp(), log_p - log_q
    found += [_kl(p, q, log_ratio), _kl(q, p, -log_ratio), -_sum(p, log_p)]
    if scales.js_weight is None:
        return Pair(*found, *torch.zeros_like(torch.stack(found[:2])))
    log_r = _log_mixture(log_p, log_q, scales.js_weight)
    to_mixture, from_reference = _sum(p, log_p - log_r), _sum(q, log_q - log_r)
    return Pair(*found, (1 - scales.js_weight) * to_mixture + scales.js_weight * from_reference, to_mixture)


def backward_pair(
    policy_NV: Tensor, reference_NV: Tensor, target_N: Tensor | None, pair: Pair, grads: Sequence[Tensor | None],
    scales: Scales, out_NV: Tensor,
) -> Tensor:  # fmt: skip
    """Writes the gradient with respect to the policy's logits to `out_NV`, which may be those, and returns it.

    grads   upstream gradients [N] of logp, kl, reverse_kl, entropy, js; None is 0
    """
    N, V = policy_NV.shape
    zero, reverse = torch.zeros_like(pair.kl), grads[2] is not None
    grads = torch.stack([zero if g is None else g.to(zero.dtype) for g in grads])
    if uses_triton(policy_NV):
        if N:
            *arguments, block = _arguments(V, scales, target_N)
            _backward_kernel[(N, triton.cdiv(V, block))](
                policy_NV, reference_NV, grads if target_N is None else target_N, torch.stack(list(pair)),
                grads, out_NV, N, policy_NV.stride(0),
                reference_NV.stride(0), out_NV.stride(0), *arguments, block, num_warps=WARPS,
            )  # fmt: skip
        return out_NV
    for block in row_blocks(policy_NV):
        at, here = None if target_N is None else target_N[block], Pair(*(value_N[block] for value_N in pair))
        upstream = grads[:, block]
        out_NV[block] = _backward_block(policy_NV[block], reference_NV[block], at, here, upstream, scales, reverse)
    return out_NV


def _backward_block(
    policy_NV: Tensor, reference_NV: Tensor, target_N: Tensor | None, pair: Pair, grads: Tensor, scales: Scales,
    reverse: bool,
) -> Tensor:  # fmt: skip
    z, w = raw(policy_NV, scales.softcap), raw(reference_NV, scales.reference_softcap)
    scale, reference_scale = scales.of_raw
    log_p = times(z - pair.peak[:, None], scale) - pair.log_sum[:, None]
    log_q = times(w - pair.reference_peak[:, None], reference_scale) - pair.reference_log_sum[:, None]
    p, (to_logp, to_kl, to_reverse, to_entropy, to_js) = log_p.exp(), grads[:, :, None]
    inside = to_kl * (log_p - log_q - pair.kl[:, None]) - to_entropy * (log_p + pair.entropy[:, None])
    if scales.js_weight is not None:
        log_r = _log_mixture(log_p, log_q, scales.js_weight)
        inside += to_js * (1 - scales.js_weight) * (log_p - log_r - pair.to_mixture[:, None])
    dz = torch.where(p > 0, p * inside, 0.0)
    if reverse:
        dz += to_reverse * (p - log_q.exp())
    if target_N is not None:
        dz += to_logp * onehot_minus(p, target_N)
    if scales.softcap is not None:
        dz *= (1 - z) * (1 + z)
    return dz / scales.temperature


def _arguments(V: int, scales: Scales, target_N: Tensor | None) -> tuple:
    """The arguments both kernels end with."""
    return (
        V, 1 / scales.temperature, scales.softcap or 1.0, scales.reference_softcap or 1.0, scales.js_weight or 0.0,
        scales.softcap is not None, scales.reference_softcap is not None, scales.js_weight is not None,
        target_N is not None, min(BLOCK_V, triton.next_power_of_2(V)),
    )  # fmt: skip


# ---- autograd ----


class _TokenDivergence(torch.autograd.Function):
    @staticmethod
    def forward(ctx, policy_NV, reference_NV, scales):
        pair = forward_pair(policy_NV, reference_NV, None, scales)
        ctx.save_for_backward(policy_NV, reference_NV, *pair)
        ctx.scales = scales
        ctx.set_materialize_grads(False)
        return pair.kl, pair.reverse_kl, pair.entropy, pair.js

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, *grads):
        if all(grad is None for grad in grads):
            return None, None, None
        policy_NV, reference_NV, *pair = ctx.saved_tensors
        out_NV = torch.empty(policy_NV.shape, dtype=policy_NV.dtype, device=policy_NV.device)
        backward_pair(policy_NV, reference_NV, None, Pair(*pair), (None, *grads), ctx.scales, out_NV)
        return out_NV, None, None


# ---- public ----


def token_divergence(
    policy_logits_NV: Tensor,
    reference_logits_NV: Tensor,
    *,
    temperature: float = 1.0,
    softcap: float | None = None,
    reference_softcap: float | None = None,
    js_weight: float | None = None,
) -> Divergence:
    """Exact KL both ways, the policy's entropy and, with `js_weight`, the weighted Jensen-Shannon divergence, per row.

    policy_logits_NV, reference_logits_NV   [N, V], any float dtype, rows any distance apart; gradients go to the
                                            policy only; the arithmetic is float32, or float64 if given it
    temperature          divides both rows; > 0
    softcap, reference_softcap   c in c tanh(z / c); > 0 or None
    js_weight            w in (0, 1), the share of the reference in the mixture
    returns              Divergence of [N] tensors, float32 or float64

    Raises ValueError where shapes, temperature, softcap or weight do not fit.
    """
    if policy_logits_NV.ndim != 2 or policy_logits_NV.shape != reference_logits_NV.shape:
        raise ValueError(f"want [N, V] twice, got {[*policy_logits_NV.shape]} and {[*reference_logits_NV.shape]}")
    check_scales(temperature, softcap)
    check_scales(temperature, reference_softcap)
    check_weight(js_weight)
    rows = [t if t.stride(-1) == 1 else t.contiguous() for t in (policy_logits_NV, reference_logits_NV.detach())]
    scales = Scales(temperature, softcap, reference_softcap, js_weight)
    kl, reverse_kl, entropy, js = _TokenDivergence.apply(*rows, scales)
    return Divergence(kl, reverse_kl, entropy, js if js_weight is not None else None)


def check_weight(js_weight: float | None) -> None:
    if js_weight is not None and not 0 < js_weight < 1:
        raise ValueError(f"js_weight is {js_weight}; want a number between 0 and 1, or None")
