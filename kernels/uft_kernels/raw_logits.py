"""What every operation does to a logit before the softmax, and to a gradient after it.

    z' = k r        r = z, k = 1 / T; with a softcap c:  r = tanh(z / c), k = c / T        T temperature

k stands outside of differences: k (r - m) is exact where r = m, and a compiler that contracts k r - m into one rounding
would leave there what m, rounded before, was off by.
"""

from __future__ import annotations

import torch
from torch import Tensor

from uft_kernels.backend import accumulation, jit, tl

# ---- in PyTorch ----


def scale_of(temperature: float, softcap: float | None) -> float:
    """k: what the raw entries are multiplied by."""
    return (1.0 if softcap is None else softcap) / temperature


def raw(logits_NV: Tensor, softcap: float | None) -> Tensor:
    """r: logits before the scale, in float32 or float64."""
    logits_NV = logits_NV.to(accumulation(logits_NV.dtype))
    return logits_NV if softcap is None else torch.tanh(logits_NV / softcap)


def times(x: Tensor, k: float) -> Tensor:
    """k x, over x; nothing is read where k is 1, as it mostly is."""
    return x if k == 1.0 else x.mul_(k)


def effective(logits_NV: Tensor, temperature: float = 1.0, softcap: float | None = None) -> Tensor:
    """z': capped and divided by the temperature, in float32 or float64."""
    logits_NV = logits_NV.to(accumulation(logits_NV.dtype))
    if softcap is not None:
        logits_NV = softcap * torch.tanh(logits_NV / softcap)
    return logits_NV if temperature == 1.0 else logits_NV / temperature


def check_scales(temperature: float, softcap: float | None, *logit_scales: float) -> None:
    if not temperature > 0:
        raise ValueError(f"temperature is {temperature}; want a number > 0")
    if softcap is not None and not softcap > 0:
        raise ValueError(f"softcap is {softcap}; want a number > 0, or None")
    for logit_scale in logit_scales:
        if not logit_scale > 0:
            raise ValueError(f"logit_scale is {logit_scale}; want a number > 0")


# ---- in kernels ----


@jit
def tanh(x):
    # libdevice has one, the interpreter has not; near 0 the exponential form would cancel, so a polynomial stands in
    # (minimax coefficients of Cephes' tanhf, Moshier)
    z = x * x
    small = -5.70498872745e-3 * z + 2.06390887954e-2
    small = (small * z - 5.37397155531e-2) * z + 1.33314422036e-1
    small = (small * z - 3.33332819422e-1) * z * x + x
    wide = 1 - 2 / (tl.exp(2 * tl.abs(x)) + 1)
    return tl.where(tl.abs(x) < 0.625, small, tl.where(x < 0, -wide, wide))


@jit
def load_raw(pointer, v, V, softcap, CAPPED: tl.constexpr, MASKED: tl.constexpr):
    """r [BLOCK_V] in float32, -inf beyond the edge; where blocks are whole nothing is compared."""
    if MASKED:
        r = tl.load(pointer + v, mask=v < V, other=float("-inf")).to(tl.float32)
    else:
        r = tl.load(pointer + v).to(tl.float32)
    if CAPPED:
        r = tanh(r / softcap)
        if MASKED:
            r = tl.where(v < V, r, float("-inf"))
    return r


@jit
def scale_in_kernel(inverse_temperature, softcap, CAPPED: tl.constexpr):
    """k in float32; a compiled graph hands numbers over in float64."""
    k = tl.cast(inverse_temperature, tl.float32)
    if CAPPED:
        k *= tl.cast(softcap, tl.float32)
    return k


@jit
def slope(r, inverse_temperature, CAPPED: tl.constexpr):
    """dz' / dz of the raw entries."""
    k = tl.cast(inverse_temperature, tl.float32)
    if CAPPED:
        return (1 - r) * (1 + r) * k  # r * r would be rounded before it cancels
    else:
        return k


@jit
def logp_slope(p, hit):
    """dl / dz': 1[v = t] - p before anything is rounded, for what a certain token is short of one must not cancel."""
    return tl.where(hit, 1.0, 0.0) - p


@jit
def entropy_slope(p, log_p, entropy):
    """-dH / dz'; 0 where p is."""
    return tl.where(p > 0, p * (log_p + entropy), 0.0)
