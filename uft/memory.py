"""How much memory a training step takes on each device, in bytes, computed from the model's shape before it is loaded.

    peak = held + max over the moments of a step

    held         weights w P / s_w + reference w P + optimiser states k m P_trained / s_o + copies that a sharding keeps
    moments      the reference's forward, end of forward, the head's backward, the last layer's, end of backward, step

P parameters, P_trained of them trained, w and m bytes per weight and per optimiser number, k optimiser numbers per
trained parameter (AdamW 2), s the ranks over which something is sharded (1 where it is not).  The terms and what ZeRO
divides of them are Rajbhandari et al. 2020, arXiv:1910.02054, section 3; there the optimiser has a float32 copy of
half-precision weights too, which PyTorch's AdamW does not keep and DeepSpeed does.

What a layer saves for its backward follows Korthikanti et al. 2023, arXiv:2205.05198, section 4, for the layers that
transformers' Llama, Mistral, Qwen2 and Qwen3 really run, which are not those of that paper.  Per token, in bytes, with
h hidden, d = heads * head size, e = key-value heads * head size, i intermediate, a bytes of an activation, w of a
weight:

    two norms             2 (4 h + 4)     what goes in, in float32, and its inverse root
                        + 2 w h           the normalised, where the norm's weight is trained
    inputs of q, k, v and of gate, up     2 a h, or 5 a h where autocast gives each product a copy of its own
    queries and keys' norms (Qwen3)       (4 + a) (d + e) + 4 (heads + key-value heads)
    attention             a (d + 2 e) + 4 heads + 2 a d     q, k, v, the logarithms of its sums, output, input of o
    gated MLP             4 a i           gate, its activation, up, their product
    LoRA of rank r        7 r a           and its inputs in the adapter's dtype, which is float32 without autocast

`tests/test_memory_estimate.py` counts them with hooks, to the byte.  At its end a backward holds every gradient and no
activation, at its beginning every activation and no gradient but the head's; layers are alike, so what lies between is
never more.  A step in several passes (accumulation, or a `token_budget`) has every gradient from its second pass on.

The head's buffers are those of `uft_kernels`: see `products.BUDGET`, `SLAB` and `KEEP` there.  Responses that share a
prompt save keys and values of their own behind a copy of the prompt's (`uft.attention`), 2 a e each.

Not counted: what is there before the model (CUDA's context, libraries), fragmentation, NCCL's buffers, masks, and what
"adamw_torch" holds for a moment on a GPU, where it works on lists of tensors.  Mixtures of experts and state-space
layers are not known.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PretrainedConfig
from transformers.pytorch_utils import Conv1D
from uft_kernels import products
from uft_kernels.linear_logprob import TOKENS

from uft.head import is_peft

# optimiser numbers per trained parameter, by transformers' names
STATES = {"adamw_torch": 2, "adamw_torch_fused": 2, "sgd": 0, "adagrad": 1, "rmsprop": 1}
SHARDINGS = ("none", "ddp", "zero2", "zero3", "fsdp2")
REFERENCES = ("frozen", "adapter", "cached", "none")
FLOAT = 4  # bytes

Parts = dict[str, int]


@dataclass(frozen=True)
class Memory:
    """Bytes per device: at each moment of a step, what each part holds."""

    moments: Mapping[str, Parts]

    @property
    def moment(self) -> str:
        """When the peak is reached."""
        return max(self.moments, key=lambda name: sum(self.moments[name].values()))

    @property
    def parts(self) -> Parts:
        return self.moments[self.moment]

    @property
    def total(self) -> int:
        return sum(self.parts.values())

    def table(self) -> str:
        """The parts at the peak, a line each."""
        rows = [*self.parts.items(), (f"peak, at {self.moment}", self.total)]
        width = max(len(name) for name, _ in rows)
        return "\n".join(f"{name:<{width}}  {_readable(n):>10}" for name, n in rows if n)


@dataclass(frozen=True)
class Shape:
    """What decides how much memory a model takes.  Weights are counted, not bytes."""

    hidden: int
    intermediate: int
    layers: int
    heads: int
    key_values: int
    head_size: int
    vocabulary: int
    parameters: int
    head: int  # of these, the head's; as many are the input embedding's
    linear: int  # weights of linear layers without the head
    ends: int  # inputs and outputs of these layers, added up: weights of an adapter of rank 1
    tied: bool
    gated: bool
    normed: bool  # queries and keys

    @classmethod
    def of(cls, model: PretrainedConfig | nn.Module) -> Shape:
        """Of a configuration, or of a model wherever it is, also on the meta device; its adapter is left out."""
        if isinstance(model, PretrainedConfig):
            with torch.device("meta"):
                model = AutoModelForCausalLM.from_config(copy.deepcopy(model))
        model = model.get_base_model() if is_peft(model) else model
        config = model.config.get_text_config()
        head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
        names = {name: module for name, module in model.named_modules() if "lora_" not in name and module is not head}
        linear = [module for module in names.values() if isinstance(module, (nn.Linear, Conv1D))]
        heads = config.num_attention_heads
        return cls(
            hidden=config.hidden_size,
            intermediate=getattr(config, "intermediate_size", None) or 4 * config.hidden_size,
            layers=config.num_hidden_layers,
            heads=heads,
            key_values=getattr(config, "num_key_value_heads", None) or heads,
            head_size=getattr(config, "head_dim", None) or config.hidden_size // heads,
            vocabulary=len(head.weight),
            parameters=sum(p.numel() for name, p in model.named_parameters() if "lora_" not in name),
            head=head.weight.numel(),
            linear=sum(module.weight.numel() for module in linear),
            ends=sum(sum(module.weight.shape) for module in linear),
            tied=head.weight is embedding.weight,
            gated=any(name.endswith("gate_proj") for name in names),
            normed=any(name.endswith("q_norm") for name in names),
        )

    @property
    def layer(self) -> int:
        """Weights of one layer."""
        outside = self.head * (1 if self.tied else 2)
        return (self.parameters - outside) // self.layers


@dataclass(frozen=True)
class _Setup:
    """One training step.  `weight` and `activation` in bytes per number; see `estimate` for the rest."""

    shape: Shape
    tokens: int
    counted: int
    shared: int
    rank: int  # of LoRA; 0 trains everything
    weight: int
    activation: int
    autocast: bool
    checkpointing: bool
    packed: bool

    @property
    def trained(self) -> int:
        return self.rank * self.shape.ends if self.rank else self.shape.parameters

    @property
    def trained_bytes(self) -> int:
        # peft keeps its adapters in float32
        return self.trained * (FLOAT if self.rank else self.weight)

    # ---- layers ----

    def layer(self) -> int:
        """What one layer saves for its backward."""
        s, a, lora = self.shape, self.activation, self.rank > 0
        d, e = s.heads * s.head_size, s.key_values * s.head_size
        converted = lora and not self.autocast and self.weight != FLOAT  # inputs of adapters, which are float32
        per_input = FLOAT if converted else a
        copies = 5 if self.autocast or converted else 2
        per_token = 2 * (FLOAT * s.hidden + FLOAT) + (0 if lora else 2 * self.weight * s.hidden)
        per_token += copies * per_input * s.hidden
        per_token += a * (d + 2 * e) + FLOAT * s.heads
        own_input = self.packed or converted or (lora and self.autocast)
        per_token += (a + per_input if own_input else a) * d
        per_token += (3 * a + per_input if s.gated else a + per_input) * s.intermediate
        if s.normed:
            per_token += (FLOAT + (0 if lora else a)) * (d + e) + FLOAT * (s.heads + s.key_values)
        if lora:
            per_token += (7 if s.gated else 6) * self.rank * (a if self.autocast else FLOAT)
        return self.tokens * per_token + self.shared * 2 * a * e

    def workspace(self) -> int:
        """What a layer's backward, or its forward without gradient, holds for a moment: three rows of its MLP, where
        it is widest, and gradient and value of the residual stream."""
        s = self.shape
        return self.tokens * (3 * self.activation * s.intermediate + 2 * self.weight * s.hidden)

    def layers(self) -> int:
        """What all layers and the last norm have saved when the backward begins."""
        s = self.shape
        last_norm = self.tokens * (FLOAT * s.hidden + (0 if self.rank else self.weight * s.hidden))
        if self.checkpointing:
            return last_norm + s.layers * self.tokens * self.weight * s.hidden
        return last_norm + s.layers * self.layer()

    # ---- head ----

    def head_forward(self, fused: bool) -> tuple[int, int]:
        """Bytes that are saved for the backward, and all that the head holds while it runs."""
        N, s, a = self.counted, self.shape, self.activation
        inputs, out = self.tokens * s.hidden * self.weight, N * s.hidden * a
        if not fused:
            kept = N * s.vocabulary * a
            return kept, kept + self.tokens * s.vocabulary * a + inputs
        copy = s.head * a if self.autocast else 0
        if not self.rank and self._kept:
            saved = N * s.vocabulary * FLOAT + out + copy
            return saved, saved + out + inputs
        chunk = min(N, products.BUDGET // (s.vocabulary * FLOAT) or 1)
        loop = s.vocabulary * chunk * (FLOAT + (a if self.rank else 0))
        return out + (0 if self.rank else copy), 2 * out + copy + loop + inputs

    @property
    def _kept(self) -> bool:
        return self.counted * self.shape.vocabulary * FLOAT <= products.KEEP

    def head_backward(self, fused: bool) -> int:
        """Beside what the forward saved and the gradient of a trained head."""
        N, s, a = self.counted, self.shape, self.activation
        rows = 2 * self.tokens * s.hidden * self.weight
        if not fused:
            return (N + self.tokens) * s.vocabulary * a + rows
        if self.rank:
            return 2 * N * s.hidden * FLOAT + rows
        at_a_time = min(N, TOKENS)
        entry = partial(products.entry_bytes, at_a_time, s.hidden, a, several=at_a_time < N)
        slab = products.slab_entries(s.vocabulary, entry())
        return slab * entry(copies=0 if self._kept else 1) + N * s.hidden * FLOAT + rows


def estimate(
    model: PretrainedConfig | nn.Module | Shape,
    *,
    tokens: int,
    counted: int | None = None,
    shared: int = 0,
    lora_r: int = 0,
    reference: str = "frozen",
    dtype: torch.dtype = torch.float32,
    autocast: torch.dtype | None = None,
    optim: str = "adamw_torch_fused",
    gradient_checkpointing: bool = False,
    fused_head: bool = True,
    packed: bool = True,
    passes: int = 1,
    sharding: str = "none",
    ranks: int = 1,
    sync_each_batch: bool = True,
) -> Memory:
    """Peak memory of an optimiser step on each device, in bytes.

    model      a configuration, a model (on the meta device costs nothing), or its `Shape`
    tokens     that a device runs in one pass: all of its batch, or at most the token_budget, padding included
    counted    of these, the ones that the head sees; by default all
    shared     tokens of prompt and response, over all responses but the first to a prompt, where these share it
    lora_r     rank of an adapter on every linear layer but the head; 0 trains all weights
    reference  frozen (a copy of the weights), adapter (none of its own), cached or none
    dtype, autocast   of the weights; of the products, where that is another
    passes     per optimiser step: more than one keeps gradients beside activations
    sharding   none, ddp, zero2 and zero3 (DeepSpeed), fsdp2, over `ranks` devices
    sync_each_batch   accelerate's option: FSDP2 reduces gradients after every pass

    Raises ValueError for what is not known.
    """
    counted = tokens if counted is None else counted
    if optim not in STATES:
        raise ValueError(f"optim is {optim!r}; what {', '.join(STATES)} hold is known")
    if reference not in REFERENCES or sharding not in SHARDINGS:
        raise ValueError(
            f"reference is {reference!r} and sharding {sharding!r}; want one of {', '.join(REFERENCES)} and one of "
            f"{', '.join(SHARDINGS)}"
        )
    if not 0 <= counted <= tokens or tokens < 1 or ranks < 1 or passes < 1:
        raise ValueError(f"found {counted} of {tokens} tokens counted, {passes} passes and {ranks} ranks")
    shape = model if isinstance(model, Shape) else Shape.of(model)
    casts = autocast is not None and autocast != dtype
    if casts and sharding.startswith("zero"):  # DeepSpeed turns the weights themselves into autocast's dtype
        dtype, casts = autocast, False
    activation = (autocast if casts else dtype).itemsize
    setup = _Setup(
        shape, tokens, counted, shared, lora_r, dtype.itemsize, activation, casts, gradient_checkpointing, packed
    )
    return Memory(_moments(setup, reference, STATES[optim], fused_head, passes, sharding, ranks, sync_each_batch))


def _moments(
    setup: _Setup, reference: str, states: int, fused: bool, passes: int, sharding: str, ranks: int, syncs: bool
) -> dict[str, Parts]:
    s, trained, whole = setup.shape, setup.trained_bytes, setup.shape.parameters * setup.weight
    updated = trained // setup.trained if not sharding.startswith("zero") else FLOAT
    of_weights = ranks if sharding in ("zero3", "fsdp2") else 1
    of_gradients = ranks if sharding in ("zero2", "zero3", "fsdp2") else 1
    gradients = trained // of_gradients
    # FSDP2 keeps them whole between passes of a step, unless it reduces them after each
    between = trained if sharding == "fsdp2" and passes > 1 and not syncs else gradients
    before = between if passes > 1 else 0
    # whole, of the head and of the input embedding: it becomes a gradient, is added to one, or is reduced to a share
    of_head = 0 if setup.rank else s.head * setup.weight
    own = passes == 1 and of_gradients == 1 and not s.tied
    outside = s.parameters - s.layers * s.layer
    # the layer that runs and the next one, what stands outside of layers, and a layer's gradients
    gathered = (outside + (2 if setup.rank else 3) * s.layer) * setup.activation
    # FSDP2 gathers weights in the dtype of the products
    casts = setup.activation * s.linear if setup.autocast and sharding != "fsdp2" else 0
    later_casts = casts // s.layers if setup.checkpointing else casts
    saved, head = setup.head_forward(fused)
    activations, layer = setup.layers(), setup.layer()
    again = layer if setup.checkpointing else 0  # a layer computed once more

    def at(**parts: int) -> Parts:
        return {
            "weights": (whole + (trained if setup.rank else 0)) // of_weights,
            "gathered": gathered if of_weights > 1 else 0,
            "reference": whole // of_weights if reference == "frozen" else 0,
            "optimiser": states * setup.trained * updated // of_gradients,
            "copies": _copies(setup, sharding, of_gradients),
        } | parts

    moments = {
        "the end of the forward": at(gradients=before, activations=activations, head=head, casts=casts),
        "the head's backward": at(
            gradients=before + of_head, activations=activations, head=saved + setup.head_backward(fused),
            casts=later_casts,
        ),
        "the last layer's backward": at(
            gradients=max(before, of_head // of_gradients), activations=activations,
            workspace=setup.workspace() + again, casts=later_casts,
        ),
        "the end of the backward": at(
            gradients=(between if passes > 1 else gradients) + (0 if own else of_head), activations=layer,
            workspace=setup.workspace(), casts=casts // s.layers,
        ),
        "the optimiser's step": at(gradients=gradients),
    }  # fmt: skip
    if reference in ("frozen", "adapter"):
        forward = at(gradients=before, head=head - saved, workspace=setup.workspace())
        moments = {"the reference's forward": forward} | moments
    return moments


def _copies(setup: _Setup, sharding: str, shards: int) -> int:
    """DDP reduces gradients in buckets of their own size.  DeepSpeed keeps float32 weights of its share to update, also
    beside float32 weights, and reduces in buckets of hidden^2 numbers (transformers' "auto")."""
    if sharding == "ddp":
        return setup.trained_bytes
    if sharding in ("zero2", "zero3"):
        return setup.trained * FLOAT // shards + setup.shape.hidden**2 * setup.weight
    return 0


def _readable(n: int) -> str:
    for unit in ("B", "KiB", "MiB", "GiB"):
        if n < 1024 or unit == "GiB":
            return f"{n} B" if unit == "B" else f"{n:.2f} {unit}"
        n /= 1024
    raise AssertionError
