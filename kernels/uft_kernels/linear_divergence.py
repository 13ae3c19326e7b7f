"""Log-probabilities of policy and reference and their exact divergences, from hidden states and two linear heads.

One pass over the tokens, two products of 2NVD flops, gives for each token: log-probability under the policy and under
the reference, KL(policy || reference), KL(reference || policy), the entropy and the weighted Jensen-Shannon
divergence.  No N x V tensor is held; formulas and gradients with respect to logits are those of `token_divergence`.

                                    forward    backward
    nothing wants a gradient           2
    the head is frozen               2 + k        0        k outputs that want a gradient: a row d output / dh each
    the head is trained                2          4        both logits again, dW, dh; slabs of the vocabulary outside
    ... and the logits are few         2          2        dW, dh; both logits were kept (`products.KEEP`)

The reference gets no gradient.  It may have another hidden size, and it may share the policy's head, as it does where
an adapter is switched off.

Order of this file: reference, autograd, public function.  N tokens, D hidden, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from uft_kernels import products
from uft_kernels.backend import accumulation
from uft_kernels.linear_logprob import (
    Room,
    autocast,
    check_head,
    head,
    kept_rows,
    logits_reference,
    room_for_logits,
    scaled,
    slab_gradients,
    spread,
)
from uft_kernels.products import chunks, fits, product
from uft_kernels.raw_logits import check_scales
from uft_kernels.token_divergence import (
    Pair,
    Scales,
    backward_pair,
    check_weight,
    forward_pair,
    token_divergence_reference,
)
from uft_kernels.token_logprob import IGNORE, token_logprob_reference

OUTPUTS = ("logp", "kl", "reverse_kl", "entropy", "js")  # those that can have a gradient, in the order of their grads


class LinearDivergence(NamedTuple):
    """Each [N], in nats, float32 (float64 for float64); `js` is None where it was not asked for."""

    logp: Tensor
    reference_logp: Tensor
    kl: Tensor
    reverse_kl: Tensor
    entropy: Tensor
    js: Tensor | None = None


# ---- reference ----


def linear_divergence_reference(
    hidden_ND: Tensor, weight_VD: Tensor, reference_hidden_NE: Tensor, reference_weight_VE: Tensor, target_N: Tensor,
    bias_V: Tensor | None = None, reference_bias_V: Tensor | None = None, *, temperature: float = 1.0,
    softcap: float | None = None, reference_softcap: float | None = None, logit_scale: float = 1.0,
    reference_logit_scale: float = 1.0, js_weight: float | None = None,
) -> LinearDivergence:  # fmt: skip
    """The specification.  Computes in float32, or in float64 if given float64."""
    z_NV = logits_reference(hidden_ND, weight_VD, bias_V) * logit_scale
    w_NV = logits_reference(reference_hidden_NE, reference_weight_VE, reference_bias_V).detach() * reference_logit_scale
    ours = token_logprob_reference(z_NV, target_N, temperature=temperature, softcap=softcap)
    theirs = token_logprob_reference(w_NV, target_N, temperature=temperature, softcap=reference_softcap)
    found = token_divergence_reference(
        z_NV, w_NV, temperature=temperature, softcap=softcap, reference_softcap=reference_softcap, js_weight=js_weight
    )
    ignored_N = target_N == IGNORE
    kept = (None if value is None else value.masked_fill(ignored_N, 0.0) for value in found)
    return LinearDivergence(ours.logp, theirs.logp, *kept)


# ---- autograd ----


WHOLE = slice(None)  # no default argument, which torch.compile of torch 2.11 cannot look into


class Head(NamedTuple):
    """A linear head with the hidden states it is applied to; `scale` multiplies its logits."""

    hidden_ND: Tensor
    weight_VD: Tensor
    bias_V: Tensor | None
    scale: float = 1.0

    def logits(self, tokens: slice, slab: slice, out: Tensor | None = None) -> Tensor:
        bias_V = None if self.bias_V is None else self.bias_V[slab]
        logits_NV = head(self.hidden_ND[tokens], self.weight_VD[slab], bias_V, out)
        return logits_NV if self.scale == 1.0 else logits_NV.mul_(self.scale)


class _LinearDivergence(torch.autograd.Function):
    """The fields of LinearDivergence.  `wanted` names the outputs that a frozen head keeps a gradient row for."""

    @staticmethod
    def forward(ctx, hidden_ND, weight_VD, bias_V, logit_scale, reference, target_N, scales, wanted):
        wants_hidden, *wants_head = ctx.needs_input_grad[:3]
        ctx.frozen, ctx.scales, ctx.scale = wants_hidden and not any(wants_head), scales, logit_scale
        ctx.wanted = wanted
        ctx.set_materialize_grads(False)
        policy, N, V = Head(hidden_ND, weight_VD, bias_V, logit_scale), len(hidden_ND), len(weight_VD)
        pair = Pair(*hidden_ND.new_zeros(len(Pair._fields), N, dtype=accumulation(hidden_ND.dtype)))
        effects = [torch.empty_like(hidden_ND) for _ in wanted] if ctx.frozen else []
        ctx.kept = any(wants_head) and fits(2 * N, V, hidden_ND.dtype, products.KEEP)
        kept = [room_for_logits(hidden_ND, V) for _ in range(2)] if ctx.kept else []
        room = Room()
        for part in chunks(N, V, hidden_ND.dtype):
            z_out = kept[0][part] if kept else room.logits(hidden_ND[part], V, "ours")
            w_out = kept[1][part] if kept else room.logits(hidden_ND[part], V, "theirs")
            z_NV, w_NV = policy.logits(part, WHOLE, z_out), reference.logits(part, WHOLE, w_out)
            found = forward_pair(z_NV, w_NV, target_N[part], scales)
            for whole, value in zip(pair, found):
                whole[part] = value
            one_N = torch.ones_like(found.kl)
            for effect_ND, name in zip(effects, wanted):
                grads = [one_N if output == name else None for output in OUTPUTS]
                dz_NV = room.gradient(hidden_ND[part], V)
                backward_pair(z_NV, w_NV, target_N[part], found, grads, scales, dz_NV)
                effect_ND[part] = product(dz_NV, weight_VD).mul_(logit_scale)
        ctx.reference_scale = reference.scale
        if ctx.frozen:
            ctx.save_for_backward(*effects)
        else:
            ctx.save_for_backward(hidden_ND, weight_VD, bias_V, *reference[:3], target_N, *pair, *kept)
        # copies: `torch.compile` before torch 2.13 does not take several views of one buffer for outputs
        outputs = tuple(value.clone() for value in (pair.logp, pair.kl, pair.reverse_kl, pair.entropy, pair.js,
                                                    pair.reference_logp))  # fmt: skip
        unwanted = [value for name, value in zip(OUTPUTS, outputs) if ctx.frozen and name not in wanted]
        ctx.mark_non_differentiable(outputs[-1], *unwanted)
        return outputs

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, *grads):
        grads, nothing = grads[: len(OUTPUTS)], (None,) * 8
        if all(grad is None for grad in grads):
            return nothing
        if ctx.frozen:
            of_wanted = tuple(grads[OUTPUTS.index(name)] for name in ctx.wanted)
            return scaled(ctx.saved_tensors, of_wanted), *nothing[1:]
        hidden_ND, weight_VD, bias_V, *reference, target_N = ctx.saved_tensors[:7]
        sides = Head(hidden_ND, weight_VD, bias_V, ctx.scale), Head(*reference, ctx.reference_scale)
        pair, kept = Pair(*ctx.saved_tensors[7 : 7 + len(Pair._fields)]), ctx.saved_tensors[7 + len(Pair._fields) :]

        def gradient(tokens, slab, local_N, out_NS):
            here = Pair(*(value[tokens] for value in pair))
            of_here = [None if grad is None else grad[tokens] for grad in grads]
            logits = [k[tokens, slab] for k in kept] or [side.logits(tokens, slab) for side in sides]
            backward_pair(*logits, local_N, here, of_here, ctx.scales, out_NS)
            return out_NS if ctx.scale == 1.0 else out_NS.mul_(ctx.scale)

        wanted = ctx.needs_input_grad[:3]
        return *slab_gradients(hidden_ND, weight_VD, bias_V, target_N, wanted, gradient, copies=2), *nothing[3:]


# ---- public ----


def linear_divergence(
    hidden_ND: Tensor,
    weight_VD: Tensor,
    reference_hidden_NE: Tensor,
    reference_weight_VE: Tensor,
    target_N: Tensor,
    bias_V: Tensor | None = None,
    reference_bias_V: Tensor | None = None,
    *,
    temperature: float = 1.0,
    softcap: float | None = None,
    reference_softcap: float | None = None,
    logit_scale: float = 1.0,
    reference_logit_scale: float = 1.0,
    js_weight: float | None = None,
    differentiable: Sequence[str] = ("logp", "kl"),
    kept: int | None = None,
) -> LinearDivergence:
    """Log-probabilities under policy and reference, their KL both ways, entropy and Jensen-Shannon divergence.

    hidden_ND, weight_VD, bias_V    the policy's: [N, D], [V, D], [V] or None, of one float dtype
    reference_*                     the reference's: [N, E], [V, E], [V] or None; no gradient
    target_N        [N], int64 in [0, V); where it is IGNORE everything is 0 and nothing is computed
    temperature     divides both sides' (capped) logits
    softcap, logit_scale, reference_*   as in `linear_logprob`
    js_weight       share of the reference in the mixture, in (0, 1); None: no Jensen-Shannon divergence
    differentiable  the outputs that want a gradient where the head is frozen, each of which costs one product: of
                    logp, kl, reverse_kl, entropy, js.  A trained head gives all of them a gradient at the same price
    kept            how many targets are not IGNORE, where the caller knows: saves a synchronisation with the device
    returns         LinearDivergence of [N] tensors

    Under autocast, hidden states and heads are taken in its dtype.
    Raises ValueError where shapes, dtypes, scales or names do not fit.
    """
    check_head(hidden_ND, weight_VD, bias_V, target_N)
    check_head(reference_hidden_NE, reference_weight_VE, reference_bias_V, target_N)
    if len(weight_VD) != len(reference_weight_VE):
        raise ValueError(f"want heads of one vocabulary, got {len(weight_VD)} and {len(reference_weight_VE)} entries")
    check_scales(temperature, softcap, logit_scale, reference_logit_scale)
    check_scales(temperature, reference_softcap)
    check_weight(js_weight)
    for name in differentiable:
        if name not in OUTPUTS or (name == "js" and js_weight is None):
            raise ValueError(f"differentiable names {name!r}; want some of {', '.join(OUTPUTS)} (js with a js_weight)")
    hidden_ND, weight_VD, bias_V, *reference = autocast(
        hidden_ND, weight_VD, bias_V,
        *(None if t is None else t.detach() for t in (reference_hidden_NE, reference_weight_VE, reference_bias_V)),
    )  # fmt: skip
    index_K = kept_rows(target_N, kept)
    theirs = Head(reference[0][index_K].contiguous(), *reference[1:], reference_logit_scale)
    scales = Scales(temperature, softcap, reference_softcap, js_weight)
    found = _LinearDivergence.apply(
        hidden_ND[index_K].contiguous(), weight_VD, bias_V, logit_scale, theirs, target_N[index_K], scales,
        tuple(dict.fromkeys(differentiable)),
    )  # fmt: skip
    found = (spread(value, index_K, len(target_N)) for value in found)
    logp, kl, reverse_kl, entropy, js, reference_logp = found
    return LinearDivergence(logp, reference_logp, kl, reverse_kl, entropy, None if js_weight is None else js)
