"""A loss of sequence log-probabilities and its gradients in one operation, for a head that is trained.

    l[s] = sum of log p(t[n] | h[n]) over the tokens n of sequence s,      L = loss(l),      g = dL / dl

    dL / dh[n] = g[s(n)] U[n],   U[n] = (e_t - p) W          dL / dW = sum_n (e_t - p)[n]^T  g[s(n)] h[n]

An operation that hands log-probabilities out does not know g when it has the probabilities at hand, and computes them
again when g arrives: 4 products.  Here the loss is inside, so e_t - p is formed once, kept in the dtype of the hidden
states for as many tokens as `keep` bytes hold (K of N), used for U at once and for dW when g is known:
3 products for these, 4 for the others, whose logits are computed again.  g scales h and U, never an N x V tensor.

`loss` is an ordinary scalar function of l, such as those of `uft.losses`; its derivative comes from torch.func, so
that no formula stands twice.  The gradients are computed in the forward; the backward scales them.

Order of this file: reference, autograd, public function.  N tokens, S sequences, D hidden, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from uft_kernels.backend import accumulation
from uft_kernels.linear_logprob import (
    Room,
    Scales,
    autocast,
    check_head,
    head,
    kept_rows,
    linear_logprob_reference,
    slab_gradients,
)
from uft_kernels.products import chunks, product
from uft_kernels.raw_logits import check_scales
from uft_kernels.token_logprob import Rows, backward_rows, forward_rows

KEEP = 2 * 2**30


class PreferenceLoss(NamedTuple):
    """loss: a scalar with a gradient.  logp: [S], without one, for metrics."""

    loss: Tensor
    logp: Tensor


# ---- reference ----


def linear_preference_loss_reference(
    hidden_ND: Tensor, weight_VD: Tensor, target_N: Tensor, sequence_N: Tensor, sequences: int,
    loss: Callable[[Tensor], Tensor], bias_V: Tensor | None = None, **scales: float | None,
) -> PreferenceLoss:  # fmt: skip
    """The specification.  Computes in float32, or in float64 if given float64."""
    token_logp_N = linear_logprob_reference(hidden_ND, weight_VD, target_N, bias_V, **scales).logp
    logp_S = _summed(token_logp_N, sequence_N, sequences)
    return PreferenceLoss(loss(logp_S), logp_S.detach())


def _summed(token_logp_N: Tensor, sequence_N: Tensor, sequences: int) -> Tensor:
    """In a fixed order; index_add adds atomically on a GPU."""
    sorted_N, order_N = sequence_N.sort(stable=True)
    edges = torch.searchsorted(sorted_N, torch.arange(sequences + 1, device=sequence_N.device))
    return torch.segment_reduce(token_logp_N[order_N], "sum", lengths=edges.diff(), axis=0, initial=0)


# ---- autograd ----


class _LinearPreferenceLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden_ND, weight_VD, bias_V, target_N, sequence_N, sequences, loss, scales, keep):
        wanted = ctx.needs_input_grad[:3]
        (N, D), V, dtype = hidden_ND.shape, len(weight_VD), accumulation(hidden_ND.dtype)
        K = min(N, keep // (V * hidden_ND.dtype.itemsize)) if any(wanted) else 0
        rows = Rows(*hidden_ND.new_empty(4, N, dtype=dtype))
        unit_KV = torch.empty(K, V, dtype=hidden_ND.dtype, device=hidden_ND.device)  # e_t - p
        grad_hidden = torch.empty(N, D, dtype=dtype, device=hidden_ND.device)
        room = Room()
        for part in _chunks(N, K, V, hidden_ND.dtype):
            logits_NV = head(hidden_ND[part], weight_VD, bias_V, room.logits(hidden_ND[part], V))
            found = forward_rows(logits_NV, target_N[part], entropy=False, **scales.folded)
            for whole, value in zip(rows, found):
                whole[part] = value
            if part.stop <= K:
                one_N = torch.ones_like(found.logp)
                backward_rows(logits_NV, target_N[part], found, one_N, None, unit_KV[part], **scales.folded)
                if wanted[0]:
                    product(unit_KV[part], weight_VD, grad_hidden[part])
        room = logits_NV = None  # before the slabs
        logp_S = _summed(rows.logp, sequence_N, sequences)
        if not any(wanted):
            return loss(logp_S), logp_S
        with torch.enable_grad():
            grad_S, value = torch.func.grad_and_value(loss)(logp_S)
        grad_N = grad_S.to(dtype)[sequence_N]

        grad_hidden[:K] *= grad_N[:K, None]
        rest, scaled_KD = slice(K, N), (grad_N[:K, None] * hidden_ND[:K]).to(hidden_ND.dtype)

        def gradient(tokens, slab, local_N, out_NS):
            tokens = slice(tokens.start + K, tokens.stop + K)
            logits_NS = head(hidden_ND[tokens], weight_VD[slab], None if bias_V is None else bias_V[slab])
            here = Rows(*(value[tokens] for value in rows))
            return backward_rows(logits_NS, local_N, here, grad_N[tokens], None, out_NS, **scales.folded)

        def kept(slab):
            return product(unit_KV[:, slab].T, scaled_KD)

        others, grad_weight, grad_bias = slab_gradients(
            hidden_ND[rest], weight_VD, bias_V, target_N[rest], wanted, gradient, start=kept if K else None
        )
        if wanted[0]:
            grad_hidden[rest] = others
        if wanted[2] and K:
            grad_bias += (grad_N[:K].to(unit_KV.dtype) @ unit_KV).to(grad_bias.dtype)
        ctx.save_for_backward(grad_hidden.to(hidden_ND.dtype) if wanted[0] else None, grad_weight, grad_bias)
        ctx.mark_non_differentiable(logp_S)
        return value, logp_S

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad, _):
        found = (None if t is None else t * grad.to(t.dtype) for t in ctx.saved_tensors)
        return *found, *(None,) * 6


def _chunks(N: int, K: int, V: int, dtype: torch.dtype):
    """The usual chunks, none of which is partly kept."""
    yield from chunks(K, V, dtype)
    for part in chunks(N - K, V, dtype):
        yield slice(part.start + K, part.stop + K)


# ---- public ----


def linear_preference_loss(
    hidden_ND: Tensor,
    weight_VD: Tensor,
    target_N: Tensor,
    sequence_N: Tensor,
    sequences: int,
    loss: Callable[[Tensor], Tensor],
    bias_V: Tensor | None = None,
    *,
    temperature: float = 1.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    keep: int = KEEP,
    kept: int | None = None,
) -> PreferenceLoss:
    """A scalar function of sequence log-probabilities, with gradients for hidden states, head and bias.

    hidden_ND    [N, D], any float dtype; the logits and all sums are float32, or float64 if given it
    weight_VD    [V, D], of the same dtype
    target_N     [N], int64 in [0, V); IGNORE costs nothing
    sequence_N   [N], int64 in [0, sequences): which sequence a token belongs to
    loss         [sequences] log-probabilities -> scalar; ordinary torch, differentiated by torch.func
    bias_V       [V] or None
    temperature, softcap, logit_scale   as in `linear_logprob`
    keep         bytes of probabilities that may be kept for the weight's gradient; what does not fit costs a product
    kept         how many targets are not IGNORE, where the caller knows: saves a synchronisation with the device
    returns      PreferenceLoss; the backward runs without recomputing anything

    Under autocast, hidden states and head are taken in its dtype.
    Raises ValueError where shapes, dtypes or scales do not fit.
    """
    check_head(hidden_ND, weight_VD, bias_V, target_N)
    check_scales(temperature, softcap, logit_scale)
    if sequence_N.shape != target_N.shape:
        raise ValueError(f"want sequence [N] like target {[*target_N.shape]}, got {[*sequence_N.shape]}")
    hidden_ND, weight_VD, bias_V = autocast(hidden_ND, weight_VD, bias_V)
    index_K = kept_rows(target_N, kept)
    found = _LinearPreferenceLoss.apply(
        hidden_ND[index_K].contiguous(), weight_VD, bias_V, target_N[index_K], sequence_N[index_K], sequences, loss,
        Scales(temperature, softcap, logit_scale), keep,
    )  # fmt: skip
    return PreferenceLoss(*found)
