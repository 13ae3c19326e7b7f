"""Log-probabilities of a linear head, without ever holding its N x V logits.

    z[n, v] = W[v] . h[n] + b[v],     l[n] = log-softmax of scale * z (capped, tempered) at the target

    dl[n] / dh[n]  = (e_t - p) J W,   J = dz' / dz,        dl[n] / dW = ((e_t - p) J)^T h[n]

Products of 2NVD flops each:

                                    forward    backward
    nothing wants a gradient           1
    the head is frozen                 2           0         dl/dh is a row U[n]; whatever arrives only scales it
    the head is trained                1           3         logits again, dW, dh; slabs of the vocabulary outside
    ... and the logits are few         1           2         dW, dh; the logits were kept (`products.KEEP`)
    filter_eps > 0                     1        little       blocks of the vocabulary that matter (`linear_filter`)
    vocabulary in shards               1           3         each on its rank; one all-gather of [4, N], one all-reduce
                                                             of dh (`vocabulary_parallel`)

The frozen form needs one product less than recomputing, and none in the backward; with the entropy one more, for its
row.  The trained form goes through slabs of the vocabulary, so that each slab of dW is one product over all tokens,
written once, in the dtype of the gradient, and no float32 copy of dW exists.  e_t - p is formed in float32 and rounded
after that.  No atomics and no locks: the same numbers every time.

Order of this file: reference, autograd, public function.  N tokens, D hidden, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from uft_kernels import products
from uft_kernels.backend import accumulation
from uft_kernels.linear_filter import active_pairs, pair_gradients
from uft_kernels.linear_rows import fused_gradient, fused_rows, fusible
from uft_kernels.products import add_product, chunks, entry_bytes, fits, product, slab_entries, slabs
from uft_kernels.raw_logits import check_scales, scale_of
from uft_kernels.token_logprob import (
    ENTRIES,
    IGNORE,
    Rows,
    backward_rows,
    forward_rows,
    token_logprob_reference,
)
from uft_kernels.vocabulary_parallel import Shard, gathered, merged

TOKENS = 16_384  # per slab of the vocabulary in the backward


class LinearLogprob(NamedTuple):
    """Each [N], float32 (float64 for float64): log-probability of the target and, where asked for, the entropy of the
    distribution and whether the target is its likeliest token (bool)."""

    logp: Tensor
    entropy: Tensor | None = None
    top1: Tensor | None = None


class Scales(NamedTuple):
    """How logits become those of the softmax: softcap * tanh(scale * z / softcap) / temperature."""

    temperature: float = 1.0
    softcap: float | None = None
    logit_scale: float = 1.0

    @property
    def folded(self) -> dict[str, float | None]:
        """The same without a scale of their own: s c' tanh(z / c') / T with c' = c / s."""
        softcap = None if self.softcap is None else self.softcap / self.logit_scale
        return {"temperature": self.temperature / self.logit_scale, "softcap": softcap}


# ---- reference ----


def linear_logprob_reference(
    hidden_ND: Tensor, weight_VD: Tensor, target_N: Tensor, bias_V: Tensor | None = None, *, temperature: float = 1.0,
    softcap: float | None = None, logit_scale: float = 1.0,
) -> LinearLogprob:  # fmt: skip
    """The specification.  Computes in float32, or in float64 if given float64."""
    logits_NV = logits_reference(hidden_ND, weight_VD, bias_V) * logit_scale
    found = token_logprob_reference(logits_NV, target_N, temperature=temperature, softcap=softcap)
    top1_N = (logits_NV.argmax(-1) == target_N) & (target_N != IGNORE)
    return LinearLogprob(found.logp, found.entropy, top1_N)


def logits_reference(hidden_ND: Tensor, weight_VD: Tensor, bias_V: Tensor | None) -> Tensor:
    dtype = accumulation(hidden_ND.dtype)
    logits_NV = hidden_ND.to(dtype) @ weight_VD.to(dtype).T
    return logits_NV if bias_V is None else logits_NV + bias_V.to(dtype)


# ---- autograd ----


def head(hidden_ND: Tensor, weight_VD: Tensor, bias_V: Tensor | None, out: Tensor | None = None) -> Tensor:
    """The logits of some tokens, in float32 or float64."""
    logits_NV = product(hidden_ND, weight_VD.T, out)
    return logits_NV if bias_V is None else logits_NV.add_(bias_V)


class _LinearLogprob(torch.autograd.Function):
    """(logp, entropy, top1).  `weight` and `bias` are frozen where they want no gradient."""

    @staticmethod
    def forward(ctx, hidden_ND, weight_VD, bias_V, target_N, scales, entropy, top1, filter_eps, shard, fused):
        wants_hidden, *wants_head = ctx.needs_input_grad[:3]
        filtered = filter_eps > 0 and any(ctx.needs_input_grad[:3])
        ctx.frozen = wants_hidden and not any(wants_head) and not filtered and shard is None
        ctx.scales, ctx.shard = scales, shard
        ctx.filter_eps = filter_eps if filtered else 0.0
        ctx.set_materialize_grads(False)
        N, V = len(hidden_ND), len(weight_VD)
        if shard is not None:
            whole_N, target_N = target_N, shard.local(target_N, V).clamp(min=0)
        rows, hit_N = _empty_rows(hidden_ND), torch.zeros(N, dtype=torch.bool, device=hidden_ND.device)
        effects = [torch.empty_like(hidden_ND) for _ in range(1 + entropy)] if ctx.frozen else []  # dl/dh and dH/dh
        maxima_NB = hidden_ND.new_empty(N, -(-V // ENTRIES), dtype=accumulation(hidden_ND.dtype)) if filtered else None
        few = fits(N, V, hidden_ND.dtype, products.KEEP)
        ctx.kept = any(wants_head) and not filtered and few
        kept_NV = room_for_logits(hidden_ND, V) if ctx.kept else None
        # few logits are kept where the head is trained; its reference then must not be summed in another order
        ctx.fused = not (few or top1) and fusible(hidden_ND, weight_VD, fused)
        if ctx.fused and not (ctx.frozen or filtered):
            rows = fused_rows(hidden_ND, weight_VD, bias_V, target_N, entropy=entropy, **scales.folded)
            N = 0  # nothing is left to do
        room = Room()
        for part in chunks(N, V, hidden_ND.dtype):
            out_NV = kept_NV[part] if ctx.kept else room.logits(hidden_ND[part], V)
            logits_NV = head(hidden_ND[part], weight_VD, bias_V, out_NV)
            maxima = maxima_NB[part] if filtered else None
            found = forward_rows(logits_NV, target_N[part], maxima_NB=maxima, entropy=entropy, **scales.folded)
            for whole, value in zip(rows, found):
                whole[part] = value
            if top1:
                hit_N[part] = logits_NV.argmax(-1) == target_N[part]
            one_N = torch.ones_like(found.logp)
            for effect_ND, grads in zip(effects, ((one_N, None), (None, one_N))):
                dz_NV = room.gradient(hidden_ND[part], V)
                backward_rows(logits_NV, target_N[part], found, *grads, dz_NV, **scales.folded)
                effect_ND[part] = product(dz_NV, weight_VD)
        if shard is not None:
            target_N = shard.local(whole_N, V)
            parts = gathered(torch.stack([*rows, (target_N >= 0).to(rows.logp.dtype)]), shard.group)
            rows = merged(parts, scale_of(**scales.folded))
        saved = effects if ctx.frozen else (hidden_ND, weight_VD, bias_V, target_N, kept_NV, maxima_NB, *rows)
        ctx.save_for_backward(*saved)
        ctx.mark_non_differentiable(hit_N)
        return rows.logp, rows.entropy, hit_N

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_logp_N, grad_entropy_N, _):
        nothing = (None,) * 10
        if grad_logp_N is None and grad_entropy_N is None:
            return nothing
        if ctx.frozen:
            return scaled(ctx.saved_tensors, (grad_logp_N, grad_entropy_N)), *nothing[1:]
        hidden_ND, weight_VD, bias_V, target_N, kept_NV, maxima_NB, *rows = ctx.saved_tensors
        wanted, upstream = ctx.needs_input_grad[:3], (grad_logp_N, grad_entropy_N)
        if maxima_NB is not None:
            pairs = active_pairs(
                maxima_NB, Rows(*rows), target_N, upstream, ctx.filter_eps, scale_of(**ctx.scales.folded)
            )
            if pairs is not None:
                found = pair_gradients(
                    hidden_ND, weight_VD, bias_V, target_N, Rows(*rows), pairs, upstream, wanted, ctx.scales.folded
                )
                return *found, *nothing[3:]

        def logits(tokens, slab):
            if kept_NV is not None:
                return kept_NV[tokens, slab]
            return head(hidden_ND[tokens], weight_VD[slab], None if bias_V is None else bias_V[slab])

        fused = ctx.fused and kept_NV is None

        def gradient(tokens, slab, local_N, out_NS):
            here = Rows(*(value[tokens] for value in rows))
            grads = [None if g is None else g[tokens] for g in upstream]
            if fused:
                bias_S = None if bias_V is None else bias_V[slab]
                fused_gradient(
                    hidden_ND[tokens], weight_VD[slab], bias_S, local_N, here, *grads, out_NS, **ctx.scales.folded
                )
            else:
                backward_rows(logits(tokens, slab), local_N, here, *grads, out_NS, **ctx.scales.folded)

        # each shard has its part of the sum over the vocabulary
        reduce = None if ctx.shard is None else partial(torch.distributed.all_reduce, group=ctx.shard.group)
        found = slab_gradients(
            hidden_ND, weight_VD, bias_V, target_N, wanted, gradient, copies=0 if fused else 1, reduce=reduce
        )
        return *found, *nothing[3:]


def room_for_logits(hidden_ND: Tensor, V: int) -> Tensor:
    return hidden_ND.new_empty(len(hidden_ND), V, dtype=accumulation(hidden_ND.dtype))


class Room:
    """Memory for the logits of a chunk and for their gradient, used again by the next chunk."""

    def __init__(self) -> None:
        self.held: dict[str, Tensor] = {}

    def logits(self, hidden_ND: Tensor, V: int, name: str = "logits") -> Tensor:
        return self._rows(name, hidden_ND, V, accumulation(hidden_ND.dtype))

    def gradient(self, hidden_ND: Tensor, V: int) -> Tensor:
        return self._rows("gradient", hidden_ND, V, hidden_ND.dtype)

    def _rows(self, name: str, hidden_ND: Tensor, V: int, dtype: torch.dtype) -> Tensor:
        held = self.held.get(name)
        if held is None or len(held) < len(hidden_ND):
            self.held[name] = held = hidden_ND.new_empty(len(hidden_ND), V, dtype=dtype)
        return held[: len(hidden_ND)]


def _empty_rows(hidden_ND: Tensor) -> Rows:
    return Rows(*hidden_ND.new_empty(4, len(hidden_ND), dtype=accumulation(hidden_ND.dtype)))


def scaled(effects: tuple[Tensor, ...], grads: tuple[Tensor | None, ...]) -> Tensor:
    """sum of grad[n] * effect[n] over the outputs that have an upstream gradient, [N, D]."""
    total = None
    for effect_ND, grad_N in zip(effects, grads):
        if grad_N is not None:
            part_ND = effect_ND * grad_N[:, None].to(accumulation(effect_ND.dtype))
            total = part_ND if total is None else total + part_ND
    return None if total is None else total.to(effects[0].dtype)


def slab_gradients(
    hidden_ND: Tensor, weight_VD: Tensor, bias_V: Tensor | None, target_N: Tensor, wanted: Sequence[bool],
    gradient: Callable, *, copies: int = 1, start: Callable | None = None,
    reduce: Callable | None = None,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:  # fmt: skip
    """Gradients of hidden states, weight and bias: slabs of the vocabulary outside, tokens inside.

    wanted     which of the three
    gradient   (tokens, slab, their targets within the slab, out) writes the gradient of these logits to out
    copies     how many float32 logits of a stripe are there at a time; none where they stay on the chip
    reduce     is given the gradient of the hidden states before it is rounded
    start      slab -> what this slab of the weight's gradient begins with
    """
    (N, D), V, dtype = hidden_ND.shape, len(weight_VD), accumulation(hidden_ND.dtype)
    grad_hidden = torch.zeros(N, D, dtype=dtype, device=hidden_ND.device) if wanted[0] else None
    grad_weight = torch.empty_like(weight_VD, memory_format=torch.contiguous_format) if wanted[1] else None
    grad_bias = torch.zeros(V, dtype=dtype, device=hidden_ND.device) if wanted[2] else None
    at_a_time = max(1, min(N, TOKENS))
    several = start is not None or at_a_time < N
    per_entry = entry_bytes(at_a_time, D, hidden_ND.itemsize, copies=copies, several=several)
    for slab in slabs(V, slab_entries(V, per_entry)):
        S = slab.stop - slab.start
        # float32 until the whole slab of dW is there, then rounded once
        total_SD = None
        if wanted[1] and start is not None:
            total_SD = start(slab)
        elif wanted[1] and not N:
            total_SD = torch.zeros(S, D, dtype=dtype, device=hidden_ND.device)
        for tokens in slabs(N, at_a_time):
            # a target of another slab stands in no column of this one
            elsewhere = (target_N[tokens] < slab.start) | (target_N[tokens] >= slab.stop)
            local_N = (target_N[tokens] - slab.start).masked_fill(elsewhere, -1)
            out_NS = hidden_ND.new_empty(len(local_N), S)
            for stripe in slabs(len(local_N), products.STRIPE if copies else at_a_time):
                gradient(slice(tokens.start + stripe.start, tokens.start + stripe.stop), slab, local_N[stripe],
                         out_NS[stripe])  # fmt: skip
            if wanted[0]:
                add_product(grad_hidden[tokens], out_NS, weight_VD[slab])
            if wanted[2]:
                grad_bias[slab] += out_NS.sum(0, dtype=dtype)
            if wanted[1] and total_SD is None:
                total_SD = product(out_NS.T, hidden_ND[tokens])
            elif wanted[1]:
                add_product(total_SD, out_NS.T, hidden_ND[tokens])
            del out_NS  # before the next one is there
        if wanted[1]:
            grad_weight[slab] = total_SD
        del total_SD
    if reduce is not None and wanted[0]:
        reduce(grad_hidden)
    return (
        None if grad_hidden is None else grad_hidden.to(hidden_ND.dtype),
        grad_weight,
        None if grad_bias is None else grad_bias.to(bias_V.dtype),
    )


# ---- public ----


def linear_logprob(
    hidden_ND: Tensor,
    weight_VD: Tensor,
    target_N: Tensor,
    bias_V: Tensor | None = None,
    *,
    temperature: float = 1.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    entropy: bool = False,
    top1: bool = False,
    filter_eps: float = 0.0,
    kept: int | None = None,
    group: Any = None,
    first: int = 0,
    fused: bool = False,
) -> LinearLogprob:
    """Log-probability of each token's target under a linear head, in nats.

    hidden_ND     [N, D], any float dtype; the logits and all sums are float32, or float64 if given it
    weight_VD     [V, D], of the same dtype; no gradient is computed for it where it wants none
    target_N      [N], int64 in [0, V); IGNORE gives 0, no gradient, and costs nothing
    bias_V        [V] or None
    temperature, softcap, logit_scale   the softmax is over softcap * tanh(logit_scale * z / softcap) / temperature
    entropy       also the entropy of each distribution; it too has a gradient
    top1          also whether the target is the likeliest token
    filter_eps    blocks of 128 entries in which no probability is above this, and not the target, count as 0 in the
                  gradient; 0 is exact.  See `linear_filter`
    kept          how many targets are not IGNORE, where the caller knows: saves a synchronisation with the device
    group, first  a torch.distributed group that shares the vocabulary, and this rank's first entry; hidden states,
                  targets (of the whole vocabulary) and upstream gradients are the same on every rank, and each gets
                  the whole gradient of the hidden states
    fused         logits and their rows may come from one kernel where that was measured to be faster (half precision on
                  Hopper, no frozen head, no top1).  It sums in an order of its own: where a policy and its reference
                  shall agree to the bit, give both the same, and False where the policy's head is frozen
    returns       LinearLogprob of [N] tensors

    Under autocast, hidden states and head are taken in its dtype.
    Raises ValueError where shapes, dtypes or scales do not fit.
    """
    check_head(hidden_ND, weight_VD, bias_V, target_N)
    check_scales(temperature, softcap, logit_scale)
    if not 0.0 <= filter_eps < 1.0:
        raise ValueError(f"filter_eps is {filter_eps}; want a probability in [0, 1)")
    if group is not None and (top1 or filter_eps):
        raise ValueError("a vocabulary in shards knows neither top1 nor filter_eps")
    hidden_ND, weight_VD, bias_V = autocast(hidden_ND, weight_VD, bias_V)
    index_K = kept_rows(target_N, kept)
    found = _LinearLogprob.apply(
        hidden_ND[index_K].contiguous(), weight_VD, bias_V, target_N[index_K],
        Scales(temperature, softcap, logit_scale), entropy, top1, filter_eps,
        None if group is None else Shard(group, first), fused,
    )  # fmt: skip
    logp, entropies, hits = (spread(value, index_K, len(target_N)) for value in found)
    return LinearLogprob(logp, entropies if entropy else None, hits if top1 else None)


def kept_rows(target_N: Tensor, kept: int | None) -> Tensor:
    """[K] int64: the positions whose target is not IGNORE, in order."""
    if kept == len(target_N):
        return torch.arange(kept, device=target_N.device)
    if kept is None:
        return (target_N != IGNORE).nonzero().squeeze(-1)
    # a stable sort puts them first without asking the device how many there are
    return (target_N == IGNORE).byte().argsort(stable=True)[:kept]


def spread(value_K: Tensor, index_K: Tensor, N: int) -> Tensor:
    """[N]: the values at their positions, 0 elsewhere."""
    return torch.zeros(N, dtype=value_K.dtype, device=value_K.device).index_put((index_K,), value_K)


def autocast(*tensors: Tensor | None) -> tuple[Tensor | None, ...]:
    """The tensors in the dtype of autocast, where it is on for their device."""
    kind = tensors[0].device.type
    if not torch.is_autocast_enabled(kind) or tensors[0].dtype == torch.float64:
        return tensors
    dtype = torch.get_autocast_dtype(kind)
    return tuple(None if tensor is None else tensor.to(dtype) for tensor in tensors)


def check_head(hidden_ND: Tensor, weight_VD: Tensor, bias_V: Tensor | None, target_N: Tensor) -> None:
    shapes = f"hidden {[*hidden_ND.shape]}, weight {[*weight_VD.shape]}, target {[*target_N.shape]}"
    if (
        hidden_ND.ndim != 2
        or weight_VD.ndim != 2
        or hidden_ND.shape[1] != weight_VD.shape[1]
        or target_N.shape != hidden_ND.shape[:1]
    ):
        raise ValueError(f"want hidden [N, D], weight [V, D] and target [N], got {shapes}")
    if bias_V is not None and bias_V.shape != weight_VD.shape[:1]:
        raise ValueError(f"want bias [V], got {[*bias_V.shape]} beside {shapes}")
    if hidden_ND.dtype != weight_VD.dtype and not torch.is_autocast_enabled(hidden_ND.device.type):
        raise ValueError(f"want hidden and weight of one dtype, got {hidden_ND.dtype} and {weight_VD.dtype}")
