"""Attention over packed rows, for any model of transformers that attends through its attention interface.

`use_packing(model, "segments")` gives the model an attention function that knows `uft.segments.Segments`: part by part
with PyTorch's scaled_dot_product_attention, or on a GPU in half precision with its variable-length flash attention, for
which a shared prompt's keys are laid before each of its responses.  Neither forms the mask of the whole row.

`use_packing(model, "masks")` keeps the model's own attention and hands it that mask: for eager attention, and with it
for softcapped scores and attention sinks.

Both need what a model's code does with positions and masks to be what its configuration says, which `uft.packing_probe`
tries out.
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
from uft.segments import Segments

NAME = "uft_sdpa"
WINDOWED = "sliding_attention"
KNOWN_LAYERS = ("full_attention", WINDOWED)
# of configurations; what they stand for is not in the mask that a model is given
OTHER_WINDOWS = (
    "window_size",
    "attention_window",
    "attention_window_size",
    "local_window_size",
    "attention_chunk_size",
)
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
    if how is None:
        raise ValueError(f"{type(causal_model(model)).__name__} was given a packed row before `use_packing`")
    if how == "segments":
        # four dimensions: transformers takes it for a finished mask and makes none of its own from the positions
        return {"segments": segments, "attention_mask": torch.ones(1, 1, 1, 1, dtype=torch.bool, device=device)}
    config = causal_model(model).config.get_text_config()
    dtype = torch.float32 if torch.is_autocast_enabled(device.type) else causal_model(model).dtype
    masks = {}
    for kind, window in dict.fromkeys(layers_of(config)):
        seen = segments.mask(window, device)[None, None]
        if config._attn_implementation == "eager":
            seen = torch.zeros(seen.shape, dtype=dtype, device=device).masked_fill(~seen, torch.finfo(dtype).min)
        masks[kind] = seen
    return {"attention_mask": masks if len(masks) > 1 else next(iter(masks.values()))}


def layers_of(config: Any) -> list[tuple[str, int | None]]:
    """The kind of each layer, and the window of its attention."""
    window = getattr(config, "sliding_window", None)
    n = getattr(config, "num_hidden_layers", 1)
    kinds = getattr(config, "layer_types", None) or [WINDOWED if window else KNOWN_LAYERS[0]] * n
    return [(kind, window if kind == WINDOWED else None) for kind in kinds]


def packing_for(model: nn.Module) -> str:
    """How a model could read packed rows, by the attention it was loaded with.  Raises ValueError if in no way."""
    model = causal_model(model)
    config = model.config.get_text_config()
    if other := set(getattr(config, "layer_types", None) or ()) - set(KNOWN_LAYERS):
        raise ValueError(f"it has layers of {', '.join(sorted(other))}")
    attention = config._attn_implementation
    if attention == "eager":
        if local := [name for name in OTHER_WINDOWS if getattr(config, name, None)]:
            raise ValueError(f"its {local[0]} is a window of its own, by places in the row")
        return "masks"
    if attention in ("sdpa", NAME) or "flash" in str(attention):
        return "segments"
    raise ValueError(f"its attention is {attention!r}; want sdpa, eager or flash attention")
