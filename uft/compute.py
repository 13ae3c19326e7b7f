"""Stated compute: what a run costs in tokens, passes and floating-point operations.

Model FLOPs, counted on real tokens (padding is waste of the layout, not cost of the method):

    forward(n tokens) = 2 W n + 4 L d n^2      W linear weights, head included; L layers, d = heads * head size
                                               a fused head runs on the tokens that count, another on all
    backward          = forward for the gradients of activations + 2 W_trained n + 4 L d n^2 for those of weights
                        and of the attention products                     PaLM arXiv:2204.02311, App. B, without the 1/2
                                                                          for causality, as SDPA and FlopCounter count

What is computed a second time to save memory (checkpointed layers, logits of a fused head) is not counted.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from torch import nn

from uft.feedback import KINDS, Batch, Example, Response
from uft.head import has_fused_head
from uft.models import REFERENCE_ADAPTER
from uft.objective import Objective

logger = logging.getLogger(__name__)

Count = np.ndarray | int
# conv1d: GPT-2's linear layers
_LINEAR = ("Linear", "Conv1D")


@dataclass(frozen=True)
class Cost:
    """Cost of running one model, per sequence of n tokens of which the head sees `scored`, by default all.

    Units: floating-point operations.
    """

    linear_weights: int  # without the head's
    trained_weights: int
    attention: int  # 4 L d
    head_weights: int = 0
    trained_head: int = 0

    @classmethod
    def of(cls, model: nn.Module) -> Cost:
        config, head = model.config, model.get_output_embeddings()
        of_head = {id(p) for p in head.parameters()} if head is not None else set()
        # by identity: an adapter's layer shows its base layer's weight as its own
        weights = {
            id(module.weight): module.weight
            for name, module in model.named_modules()
            if any(kind in type(module).__name__ for kind in _LINEAR)
            and getattr(module, "weight", None) is not None
            and not name.endswith((f".{REFERENCE_ADAPTER}", ".original_module"))  # the latter: peft trains a copy
        }.values()
        config = config.get_text_config() if hasattr(config, "get_text_config") else config
        heads = getattr(config, "num_attention_heads", 0) or 0
        head_size = getattr(config, "head_dim", None) or (config.hidden_size // heads if heads else 0)
        linear = sum(w.numel() for w in weights)
        others = sum(p.numel() for p in model.parameters()) - model.get_input_embeddings().weight.numel()
        if linear < 0.5 * others or not heads:
            logger.warning(
                "FLOPs of %s are undercounted: only linear layers and attention are known, %d of %d weights",
                type(model).__name__, linear, others,
            )  # fmt: skip
        body, ends = [w for w in weights if id(w) not in of_head], [w for w in weights if id(w) in of_head]
        return cls(
            linear_weights=sum(w.numel() for w in body),
            trained_weights=sum(w.numel() for w in body if w.requires_grad),
            attention=4 * config.num_hidden_layers * heads * head_size,
            head_weights=sum(w.numel() for w in ends),
            trained_head=sum(w.numel() for w in ends if w.requires_grad),
        )

    def forward(self, n: Count, scored: Count | None = None) -> Count:
        scored = n if scored is None else scored
        return 2 * self.linear_weights * n + self.attention * n * n + 2 * self.head_weights * scored

    def backward(self, n: Count, scored: Count | None = None) -> Count:
        scored = n if scored is None else scored
        of_weights = 2 * self.trained_weights * n + 2 * self.trained_head * scored
        return self.forward(n, scored) + of_weights + self.attention * n * n


@dataclass(frozen=True)
class Tally:
    """What training on some examples costs.  Passes count sequences."""

    tokens: int = 0  # read by the policy with gradient
    response_tokens: int = 0  # of these, the ones that count in a loss
    policy_forwards: int = 0  # with or without gradient
    backwards: int = 0
    reference_forwards: int = 0
    flops: int = 0

    def __add__(self, other: Tally) -> Tally:
        return Tally(**{name: amount + getattr(other, name) for name, amount in vars(self).items()})


class Meter:
    """Counts what a gradient step over some responses costs under an objective.

    `reference_runs` is False where the reference's log-probabilities are cached or none are needed; `reference` is
    the model that runs, where it is another than the policy.
    """

    def __init__(
        self, model: nn.Module, objective: Objective, reference_runs: bool, reference: nn.Module | None = None
    ):
        self.cost = Cost.of(model)
        self.fused = has_fused_head(model)
        self.reference_cost = self.cost if reference is None else Cost.of(reference)
        self.reference_runs = reference_runs
        self._of(objective)

    def _of(self, objective: Objective) -> None:
        self.objective = objective
        self.with_reference = [k in objective.kinds_with_reference for k in KINDS]
        # terms whose statistics need a pass of their own over rows that also get a gradient
        self.extra_passes = sum(t.statistics_on not in (None, "mismatched") for t in objective.terms)

    def under(self, objective: Objective) -> Meter:
        """For the same models under another objective."""
        meter = copy.copy(self)
        meter._of(objective)
        return meter

    def of(
        self, kind: np.ndarray, length: np.ndarray, counted: np.ndarray, used: np.ndarray, trained: bool = True
    ) -> Tally:
        """kind (codes), length (prompt + response tokens), counted (tokens in the loss), used (by some term).

        Each int or bool [responses].  `trained` is False for what runs forward alone, as in evaluation.
        """
        mismatched = kind == KINDS.index("mismatched")
        kept = mismatched | used.astype(bool)
        kind, mismatched = kind[kept], mismatched[kept]
        length, counted = length[kept].astype(np.int64), counted[kept].astype(np.int64)
        with_reference = np.array(self.with_reference)[kind]
        # passes without gradient: one for a mismatched response, one per statistic over ordinary rows
        silent = np.where(mismatched, 1, self.extra_passes * with_reference)
        reference = self.reference_runs * (silent + (with_reference & ~mismatched))
        scored = counted if self.fused else length
        forward, backward = self.cost.forward(length, scored), self.cost.backward(length, scored)
        run = (~mismatched).astype(np.int64)
        gradient = run * trained
        flops = (silent + run) * forward + gradient * backward
        flops = flops + reference * self.reference_cost.forward(length, scored)
        return Tally(
            tokens=int((gradient * length).sum()),
            response_tokens=int((gradient * counted).sum()),
            policy_forwards=int((silent + run).sum()),
            backwards=int(gradient.sum()),
            reference_forwards=int(reference.sum()),
            flops=int(flops.sum()),
        )

    def of_batch(self, batch: Batch, trained: bool = True) -> Tally:
        columns = (batch.kind, batch.length, batch.in_loss.sum(-1), self.objective.used_rows(batch))
        return self.of(*(column.cpu().numpy() for column in columns), trained)

    def of_examples(self, examples: Iterable[Example], trained: bool = True) -> Tally:
        rows = [
            (
                KINDS.index("mismatched" if r.mismatched else e.kind),
                *_lengths(e, r),
                self.objective.uses(
                    e.kind,
                    any(k == better for better, _ in e.preferences),
                    any(k == worse for _, worse in e.preferences),
                ),
            )
            for e in examples
            for k, r in enumerate(e.responses)
        ]
        return self.of(*np.array(rows, dtype=np.int64).reshape(-1, 4).T, trained)

    def of_reference(self, responses: Iterable[tuple[Example, Response]]) -> int:
        """FLOPs of one pass of the reference over some responses."""
        length, counted = np.array([_lengths(e, r) for e, r in responses], dtype=np.int64).reshape(-1, 2).T
        return int(self.reference_cost.forward(length, counted if self.fused else length).sum())


def _lengths(example: Example, response: Response) -> tuple[int, int]:
    """Tokens of prompt and response, and those that count in a loss."""
    prompt = example.prompt if response.prompt is None else response.prompt
    counted = len(response.tokens) if response.in_loss is None else int(response.in_loss.sum())
    return len(prompt) + len(response.tokens), counted
