"""Attention over packed rows, for any model of transformers that attends through its attention interface.

`use_packing(model, "segments")` gives the model an attention function that knows `uft.segments.Segments`: part by part
with PyTorch's scaled_dot_product_attention, or on a GPU in half precision with its variable-length flash attention, for
which a shared prompt's keys are laid before each of its responses.  Neither forms the mask of the whole row.

`use_packing(model, "masks")` keeps the model's own attention and hands it that mask: for eager attention, and with it
for softcapped scores and attention sinks.

Both need what a model's code does with positions and masks to be what its configuration says, which `why_not_packed`
tries out on a few tokens.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention.varlen import varlen_attn
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from uft.head import causal_model
from uft.segments import Part, Segments

NAME = "uft_sdpa"
WINDOWED = "sliding_attention"
KNOWN_LAYERS = ("full_attention", WINDOWED)
KNOWN = frozenset(inspect.signature(varlen_attn).parameters)  # which grew from version to version


def attend(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None,
    dropout: float = 0.0, scaling: float | None = None, sliding_window: int | None = None,
    segments: Segments | None = None, **kwargs: Any,
) -> tuple[Tensor, None]:  # fmt: skip
    """transformers' attention interface: query [B, H, L, E], key and value [B, H', L, E] -> [B, L, H, E].

    Without `segments` this is transformers' own "sdpa".
    """
    if segments is None:
        if attention_mask is not None and attention_mask.shape[-2:] == (1, 1) != (query.shape[2], key.shape[2]):
            raise ValueError(f"{type(module).__name__} did not hand `segments` to its attention")
        sdpa = ALL_ATTENTION_FUNCTIONS["sdpa"]
        return sdpa(module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs)
    if kwargs.get("softcap") is not None or kwargs.get("s_aux") is not None:
        raise ValueError(f"{type(module).__name__} caps its scores or has sinks; want attn_implementation eager")
    if len(query) != 1 or query.shape[2] != key.shape[2]:
        raise ValueError(f"found queries {[*query.shape]} and keys {[*key.shape]}; want one packed row")
    if query.is_cuda and query.dtype in (torch.bfloat16, torch.float16) and not dropout and query.shape[-1] <= 256:
        return _varlen(query, key, value, segments, scaling, sliding_window), None
    return _by_parts(query, key, value, segments, dropout, scaling, sliding_window), None


# ---- the two ways ----


@torch.compiler.disable  # lengths differ from batch to batch, and each would be compiled
def _by_parts(
    query: Tensor, key: Tensor, value: Tensor, segments: Segments, dropout: float, scaling: float | None,
    window: int | None,
) -> Tensor:  # fmt: skip
    # split, not slices: the gradient of all parts is then one concatenation
    lengths = [part.length for part in segments.parts]
    queries, keys, values = (x.split(lengths, dim=2) for x in (query, key, value))
    grouped = query.shape[1] != key.shape[1]
    found = []
    for part, q, k, v in zip(segments.parts, queries, keys, values):
        if part.shared:
            k, v = (torch.cat([x[part.first][:, :, : part.shared], own], 2) for x, own in ((keys, k), (values, v)))
        plain = not part.shared and (window is None or part.length <= window)
        mask = None if plain else segments.part_mask(part, window, query.device)
        found.append(
            F.scaled_dot_product_attention(
                q, k, v, mask, dropout_p=dropout, is_causal=plain, scale=scaling, enable_gqa=grouped
            )
        )
    return torch.cat(found, 2).transpose(1, 2).contiguous()


def _varlen(
    query: Tensor, key: Tensor, value: Tensor, segments: Segments, scaling: float | None, window: int | None
) -> Tensor:
    """Flash attention aligns queries with the end of their keys, so a response behind a copy of its prompt's keys is
    causal as it is; and its window counts places, which are positions here."""
    query, key, value = (x[0].transpose(0, 1) for x in (query, key, value))
    if segments.shares:
        key, value = (x.index_select(0, segments.keys) for x in (key, value))
    options: dict[str, Any] = {}
    if scaling is not None and scaling != query.shape[-1] ** -0.5:
        if "scale" in KNOWN:
            options["scale"] = scaling
        else:
            query = query * (scaling * query.shape[-1] ** 0.5)
    if query.shape[1] != key.shape[1]:
        if "enable_gqa" in KNOWN:
            options["enable_gqa"] = True
        else:
            key, value = (x.repeat_interleave(query.shape[1] // x.shape[1], 1) for x in (key, value))
    if "window_size" in KNOWN:
        options["window_size"] = (-1 if window is None else window - 1, 0)
    elif window is None:
        options["is_causal"] = True
    else:
        raise ValueError(f"torch {torch.__version__} has no sliding windows in varlen_attn; want layout padded")
    return varlen_attn(query, key, value, segments.cu_q, segments.cu_k, segments.max_q, segments.max_k, **options)[None]


# ---- a model that reads packed rows ----


def use_packing(model: nn.Module, how: str) -> None:
    """Makes the model read packed rows by "segments" or "masks"; see the top of the file."""
    model = causal_model(model)
    if how == "segments":
        AttentionInterface.register(NAME, attend)
        AttentionMaskInterface.register(NAME, sdpa_mask)
        model.set_attn_implementation(NAME)
    model.packed_attention = how


def packing_of(model: nn.Module) -> str | None:
    """How the model reads packed rows; None if it does not."""
    return getattr(causal_model(model), "packed_attention", None)


def packed_inputs(model: nn.Module, segments: Segments, device: torch.device) -> dict[str, Any]:
    """The arguments of the model's forward that say which tokens of the row see which."""
    how = packing_of(model)
    if how is None:  # a reference that was put in place later
        how = packing_for(model)
        if why := why_not_packed(model, how):
            raise ValueError(f"{type(causal_model(model)).__name__} cannot read packed rows: {why}")
    if how == "segments":
        # four dimensions: transformers takes it for a finished mask and makes none of its own from the positions
        return {"segments": segments, "attention_mask": torch.ones(1, 1, 1, 1, dtype=torch.bool, device=device)}
    config = causal_model(model).config.get_text_config()
    window = getattr(config, "sliding_window", None)
    kinds = getattr(config, "layer_types", None) or ([WINDOWED] if window else [KNOWN_LAYERS[0]])
    dtype = torch.float32 if torch.is_autocast_enabled(device.type) else causal_model(model).dtype
    masks = {}
    for kind in dict.fromkeys(kinds):
        seen = segments.mask(window if kind == WINDOWED else None, device)[None, None]
        if config._attn_implementation == "eager":
            seen = torch.zeros(seen.shape, dtype=dtype, device=device).masked_fill(~seen, torch.finfo(dtype).min)
        masks[kind] = seen
    return {"attention_mask": masks if len(masks) > 1 else next(iter(masks.values()))}


def packing_for(model: nn.Module) -> str:
    """How a model could read packed rows, by the attention it was loaded with.  Raises ValueError if in no way."""
    model = causal_model(model)
    config = model.config.get_text_config()
    if other := set(getattr(config, "layer_types", None) or ()) - set(KNOWN_LAYERS):
        raise ValueError(f"it has layers of {', '.join(sorted(other))}")
    attention = config._attn_implementation
    if attention == "eager":
        return "masks"
    if attention in ("sdpa", NAME) or "flash" in str(attention):
        return "segments"
    raise ValueError(f"its attention is {attention!r}; want sdpa, eager or flash attention")


@torch.no_grad()
def why_not_packed(model: nn.Module, how: str) -> str | None:
    """Tries packed rows out: what is wrong with them, or None.

    Two prompts, one of them with two responses, must give in one row what each response gives alone.  Windows are
    longer than this and taken on trust.  Leaves the model able to read packed rows only if it returns None.
    """
    inner, training = causal_model(model), model.training
    before = inner.config._attn_implementation
    rows = [([5, 6, 7, 8, 9], [[10, 11, 12], [13, 14]]), ([9, 8, 7], [[6, 5, 4, 3]])]
    device = inner.get_input_embeddings().weight.device
    vocabulary = inner.get_input_embeddings().weight.shape[0]
    rows = [([i % vocabulary for i in p], [[i % vocabulary for i in r] for r in rs]) for p, rs in rows]
    model.eval()
    try:
        alone = [
            model(input_ids=torch.tensor([prompt + r], device=device), use_cache=False).logits[0, len(prompt) :]
            for prompt, responses in rows
            for r in responses
        ]
        use_packing(model, how)
        parts, ids, answers = [], [], []
        for prompt, responses in rows:
            first = len(parts)
            for k, r in enumerate(responses):
                new = r if k else prompt + r
                parts.append(Part(len(new), first, len(prompt) if k else 0))
                answers.append(slice(len(ids) + len(new) - len(r), len(ids) + len(new)))
                ids += new
        segments = Segments.of(parts).to(device)
        together = model(
            input_ids=torch.tensor([ids], device=device),
            position_ids=segments.position_ids().to(device),
            use_cache=False,
            **packed_inputs(model, segments, device),
        ).logits[0, -len(ids) :]
        worst = max(float((together[at].float() - one.float()).abs().max()) for at, one in zip(answers, alone))
        size = max(float(one.float().abs().max()) for one in alone)
        found = None
        if not worst <= (1e-3 if together.dtype == torch.float32 else 5e-2) * size:
            found = f"its logits in a packed row differ by {worst:.2g} from those alone (largest logit {size:.2g})"
    except Exception as error:  # a model that cannot be run like this is not one to be packed
        found = f"{type(error).__name__}: {error}".splitlines()[0][:200]
    finally:
        model.train(training)
    if found is not None:
        inner.packed_attention = None
        inner.set_attn_implementation(before)
    return found
