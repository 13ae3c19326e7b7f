"""Every way to the same numbers: ours, eager, torch.compile, torch's own, and the peers that are installed.

A maker takes the inputs of a case and returns the call that is timed, or raises `Missing` with the reason.  What a call
returns is (values, gradients): the values are per token, the gradients those of hidden states and, where trained, head.

TRL's kernels are loaded file by file, so that the rest of TRL need not be installed: --peers names a folder that holds
`trl/kernels`, by default site-packages.
"""

from __future__ import annotations

import importlib.util
import sys
import types
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from uft_kernels import linear_divergence, linear_logprob, linear_preference_loss, products

BETA = 0.1


class Missing(Exception):
    """Why something cannot be measured here."""


@dataclass
class Inputs:
    """N tokens of two sequences a pair; `upstream` weighs each token's value.  hidden and weight are leaves."""

    hidden: Tensor
    weight: Tensor
    target: Tensor
    reference_hidden: Tensor
    reference_weight: Tensor
    upstream: Tensor
    sequence: Tensor
    sequences: int
    wants: tuple[bool, bool]  # gradients of hidden and of weight
    cache: dict[str, Any] = field(default_factory=dict)

    def leaves(self) -> tuple[Tensor, Tensor]:
        return tuple(t.detach().requires_grad_(w) for t, w in zip((self.hidden, self.weight), self.wants))

    def dpo(self, logp: Tensor) -> Tensor:
        """DPO against references of 0: the difference between chosen and rejected, whose places alternate."""
        return -F.logsigmoid(BETA * (logp[::2] - logp[1::2])).mean()


Made = Callable[[], tuple[Tensor, tuple[Tensor, ...]]]


def _values(make: Callable[[Inputs, Tensor, Tensor], Tensor]) -> Callable[[Inputs], Made]:
    """A call from per-token values: forward, and backward of their weighted sum where something wants a gradient."""

    def maker(inputs: Inputs) -> Made:
        def run():
            hidden, weight = inputs.leaves()
            wanted = [t for t in (hidden, weight) if t.requires_grad]
            with nullcontext() if wanted else torch.no_grad():
                values = make(inputs, hidden, weight)
            gradients = torch.autograd.grad(values, wanted, inputs.upstream.to(values.dtype)) if wanted else ()
            return values.detach(), gradients

        return run

    return maker


def _loss(make: Callable[[Inputs, Tensor, Tensor], Tensor]) -> Callable[[Inputs], Made]:
    def maker(inputs: Inputs) -> Made:
        def run():
            hidden, weight = inputs.leaves()
            loss = make(inputs, hidden, weight)
            return loss.detach()[None], torch.autograd.grad(loss, (hidden, weight))

        return run

    return maker


# ---- eager, compiled, torch's own ----


def _eager_logp(hidden: Tensor, weight: Tensor, target: Tensor) -> Tensor:
    return (hidden @ weight.T).float().log_softmax(-1).gather(-1, target[:, None]).squeeze(-1)


def _eager_kl(hidden: Tensor, weight: Tensor, reference_hidden: Tensor, reference_weight: Tensor) -> Tensor:
    log_p = (hidden @ weight.T).float().log_softmax(-1)
    with torch.no_grad():
        log_q = (reference_hidden @ reference_weight.T).float().log_softmax(-1)
    return (log_p.exp() * (log_p - log_q)).sum(-1)


def _torch_linear(inputs: Inputs, hidden: Tensor, weight: Tensor) -> Tensor:
    return -F.linear_cross_entropy(hidden, weight, inputs.target, reduction="none")


def _needs_torch_linear(maker: Callable[[Inputs], Made]) -> Callable[[Inputs], Made]:
    def checked(inputs: Inputs) -> Made:
        if not hasattr(F, "linear_cross_entropy"):
            raise Missing(f"torch {torch.__version__} has no F.linear_cross_entropy")
        return maker(inputs)

    return checked


# ---- peers ----


def _needs_gpu(name: str) -> None:
    if not torch.cuda.is_available():
        raise Missing(f"{name} is Triton alone and needs a GPU")


def trl(peers: Path | None) -> Any:
    """TRL's two kernel files as a package of their own, without TRL around them."""
    if "bench_trl.kernels" in sys.modules:
        return sys.modules["bench_trl.kernels"]
    installed = importlib.util.find_spec("trl")  # finds without importing
    folder = peers / "trl" if peers else Path(installed.origin).parent if installed else None
    if folder is None or not (folder / "kernels").is_dir():
        raise Missing("TRL's kernels are not here (extra `peers`, or --peers FOLDER)")
    for name, content in (
        ("bench_trl", {"__path__": []}),
        ("bench_trl.trainer", {"__path__": []}),
        # of which a kernel imports a context that gathers a sharded head
        ("bench_trl.trainer.utils", {"maybe_gather_lm_head_ctx": lambda *_, **__: nullcontext()}),
        ("bench_trl.kernels", {"__path__": [str(folder / "kernels")]}),
    ):
        module = types.ModuleType(name)
        vars(module).update(content)
        sys.modules[name] = module
    for name in ("chunked_logprob", "chunked_divergence"):
        spec = importlib.util.spec_from_file_location(f"bench_trl.kernels.{name}", folder / "kernels" / f"{name}.py")
        module = importlib.util.module_from_spec(spec)
        sys.modules[spec.name] = module
        spec.loader.exec_module(module)
        setattr(sys.modules["bench_trl.kernels"], name, module)
    return sys.modules["bench_trl.kernels"]


PEERS: list[Path | None] = [None]  # where TRL's files are, set by the command line


def _trl_logp(inputs: Inputs, hidden: Tensor, weight: Tensor) -> Tensor:
    function = trl(PEERS[0]).chunked_logprob.ChunkedLogProbFunction
    return function.apply(hidden, weight, None, inputs.target, 1.0, 32_768, None, 1.0, ())[0]


def _trl_kl(inputs: Inputs, hidden: Tensor, weight: Tensor) -> Tensor:
    function = trl(PEERS[0]).chunked_divergence.ChunkedDivergenceFunction
    other = inputs.reference_hidden, inputs.reference_weight
    return function.apply(hidden, weight, None, *other, None, 1.0)[0]


def _cce_logp(inputs: Inputs, hidden: Tensor, weight: Tensor) -> Tensor:
    _needs_gpu("cut-cross-entropy")
    try:
        from cut_cross_entropy import linear_cross_entropy
    except ImportError as error:
        raise Missing(f"cut-cross-entropy is not here: {error}") from error
    return -linear_cross_entropy(hidden, weight, inputs.target, reduction="none")


def _liger_logp(inputs: Inputs, hidden: Tensor, weight: Tensor) -> Tensor:
    _needs_gpu("Liger")
    try:
        from liger_kernel.ops.fused_linear_cross_entropy import LigerFusedLinearCrossEntropyFunction as function
    except ImportError as error:
        raise Missing(f"Liger is not here: {error}") from error
    return -function.apply(hidden, weight, inputs.target, None, None, -100, 0.0, 0.0, "none")[0]


def _liger_dpo(inputs: Inputs, hidden: Tensor, weight: Tensor) -> Tensor:
    """Liger wants sequences of one length, chosen before rejected; ours are all of one length and alternate."""
    try:
        from liger_kernel.chunked_loss import LigerFusedLinearDPOLoss
    except ImportError as error:
        raise Missing(f"Liger is not here: {error}") from error
    S, D = inputs.sequences, hidden.shape[1]
    if len(hidden) % S:
        raise Missing(f"Liger's DPO wants sequences of one length; {len(hidden)} tokens are not {S} such")
    order = torch.cat([torch.arange(0, S, 2), torch.arange(1, S, 2)]).to(hidden.device)
    states, targets = hidden.view(S, -1, D)[order], inputs.target.view(S, -1)[order]
    loss, _ = LigerFusedLinearDPOLoss(beta=BETA, use_ref_model=False)(weight, states, targets)
    return loss


def _dpo_of(logp: Callable[[Inputs, Tensor, Tensor], Tensor]) -> Callable[[Inputs, Tensor, Tensor], Tensor]:
    def loss(inputs: Inputs, hidden: Tensor, weight: Tensor) -> Tensor:
        token_logp = logp(inputs, hidden, weight)
        summed = torch.zeros(inputs.sequences, dtype=token_logp.dtype, device=token_logp.device)
        return inputs.dpo(summed.index_add(0, inputs.sequence, token_logp))

    return loss


# ---- ours ----


def _our_logp(inputs: Inputs, hidden: Tensor, weight: Tensor) -> Tensor:
    return linear_logprob(hidden, weight, inputs.target, kept=len(hidden), fused=True).logp


FILTER = (
    2.0**-12
)  # the smallest probability whose gradient bfloat16 does not lose beside 1, as cut-cross-entropy has it


def _our_filtered_logp(inputs: Inputs, hidden: Tensor, weight: Tensor) -> Tensor:
    return linear_logprob(hidden, weight, inputs.target, kept=len(hidden), filter_eps=FILTER).logp


def _our_logp_apart(inputs: Inputs, hidden: Tensor, weight: Tensor) -> Tensor:
    """With logits by cuBLAS, which a kernel then reads."""
    _needs_gpu("the kernel of logits and rows together")
    if inputs.wants == (True, False):
        raise Missing("a frozen head has no other form")
    products.FUSED = False
    try:
        return _our_logp(inputs, hidden, weight)
    finally:
        products.FUSED = None


def _our_kl(inputs: Inputs, hidden: Tensor, weight: Tensor) -> Tensor:
    found = linear_divergence(
        hidden, weight, inputs.reference_hidden, inputs.reference_weight, inputs.target, kept=len(hidden),
        differentiable=("kl",),
    )  # fmt: skip
    return found.kl


def _our_dpo(inputs: Inputs, hidden: Tensor, weight: Tensor) -> Tensor:
    found = linear_preference_loss(
        hidden, weight, inputs.target, inputs.sequence, inputs.sequences, inputs.dpo, kept=len(hidden)
    )
    return found.loss


def _eager(inputs: Inputs, hidden: Tensor, weight: Tensor) -> Tensor:
    return _eager_logp(hidden, weight, inputs.target)


def _eager_divergence(inputs: Inputs, hidden: Tensor, weight: Tensor) -> Tensor:
    return _eager_kl(hidden, weight, inputs.reference_hidden, inputs.reference_weight)


def _compiled(of: Callable, values: Callable, arguments: Callable[[Inputs], tuple]) -> Callable[[Inputs], Made]:
    """Compiled anew for each case and shape: after a few of them dynamo would give up and run eagerly, unseen."""

    def maker(inputs: Inputs) -> Made:
        torch._dynamo.reset()
        compiled = torch.compile(of, dynamic=False, fullgraph=True)
        return values(lambda inputs, hidden, weight: compiled(hidden, weight, *arguments(inputs)))(inputs)

    return maker


def _target(inputs: Inputs) -> tuple:
    return (inputs.target,)


def _reference(inputs: Inputs) -> tuple:
    return inputs.reference_hidden, inputs.reference_weight


LOGP = {
    "ours": _values(_our_logp),
    "ours, apart": _values(_our_logp_apart),
    "ours, filtered": _values(_our_filtered_logp),
    "eager": _values(_eager),
    "torch.compile": _compiled(_eager_logp, _values, _target),
    "F.linear_cross_entropy": _needs_torch_linear(_values(_torch_linear)),
    "TRL": _values(_trl_logp),
    "Liger": _values(_liger_logp),
    "CCE": _values(_cce_logp),
}
KL = {
    "ours": _values(_our_kl),
    "eager": _values(_eager_divergence),
    "torch.compile": _compiled(_eager_kl, _values, _reference),
    "TRL": _values(_trl_kl),
}
DPO = {
    "ours": _loss(_our_dpo),
    "eager": _loss(_dpo_of(_eager)),
    "torch.compile": _compiled(_eager_logp, lambda logp: _loss(_dpo_of(logp)), _target),
    "F.linear_cross_entropy": _needs_torch_linear(_loss(_dpo_of(_torch_linear))),
    "TRL": _loss(_dpo_of(_trl_logp)),
    "Liger": _loss(_liger_dpo),
    "CCE": _loss(_dpo_of(_cce_logp)),
}
