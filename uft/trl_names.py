"""Every name of TRL 1.16's SFTConfig, DPOConfig, KTOConfig and trainers, and what becomes of it here.

One table, of which `UnifiedConfig` makes its keyword arguments, the trainer its objective, and `uft.trl_tables` the
tables of docs/from_trl.md.  Names that transformers.TrainingArguments has mean what they mean there.

same         same name, same meaning
translated   accepted, and becomes something else here
refused      ValueError by name where it is set to something else than TRL's default
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Collection, Mapping
from typing import Any, NamedTuple

logger = logging.getLogger(__name__)

SFT, DPO, KTO = "SFTConfig", "DPOConfig", "KTOConfig"
ALL, PREFERENCE = (SFT, DPO, KTO), (DPO, KTO)
SAME, TRANSLATED, REFUSED = "same", "translated", "refused"
UNCUT = 2**20  # TRL's max_length None: longer than what any model reads


class Name(NamedTuple):
    """One name.  `default` is TRL's; `text` says what it becomes, or why it is refused and what there is instead;
    `differs` what we do otherwise while it stands at TRL's default."""

    name: str
    of: tuple[str, ...]
    default: Any
    state: str
    text: str
    differs: str = ""


NAMES = (
    # the model
    Name("model_init_kwargs", ALL, None, SAME, "`revision` (of the tokenizer as well), `dtype`, `attn_implementation`, "
         "`trust_remote_code` and whatever else `from_pretrained` takes; `device_map` and `quantization_config` are "
         "refused"),
    Name("trust_remote_code", ALL, False, SAME, ""),
    Name("router_aux_loss_coef", ALL, None, REFUSED, "there is no auxiliary loss of experts; want 0.0",
         "no auxiliary loss; TRL adds the model's own to mixture-of-experts models"),
    Name("disable_dropout", PREFERENCE, True, SAME, "of `SFTConfig` it is no field: TRL's SFT keeps dropout, ours "
         "switches it off unless `disable_dropout=False`"),
    Name("chat_template_path", (SFT,), None, TRANSLATED, "the tokenizer's chat template, from a .jinja file or from "
         "another tokenizer, of which no token may be missing here"),
    # the data
    Name("dataset_text_field", (SFT,), "text", TRANSLATED, "`Source(columns={'text': FIELD})`"),
    Name("dataset_kwargs", (SFT,), None, REFUSED, "data that is tokenised already is not read; want texts"),
    Name("dataset_num_proc", ALL, None, TRANSLATED, "nothing: the tokenizer's own threads work on all rows, and "
         "`data_cache` keeps the tokens"),
    Name("eos_token", (SFT,), None, TRANSLATED, "the tokenizer's `eos_token`, which the model's configuration follows"),
    Name("pad_token", (SFT, DPO), None, REFUSED, "deprecated in TRL; want tokenizer.pad_token set, and the tokenizer "
         "as processing_class"),
    Name("max_length", ALL, 1024, SAME, f"`None` becomes {UNCUT:,}",
         "prompts lose tokens on the left, and a response that does not fit is a bad row, refused or dropped and "
         "counted (`on_bad_row`); TRL cuts the end of the response, EOS and all"),
    Name("truncation_mode", (SFT, DPO), "keep_start", TRANSLATED, "nothing: `keep_end` is what happens to prompts, and "
         "responses are never cut", "see `max_length`"),
    Name("shuffle_dataset", (SFT,), False, TRANSLATED, "nothing: every epoch has an order of its own, by `seed`"),
    Name("packing", (SFT,), False, TRANSLATED, "`layout='packed'`: one row without padding; "
         "`per_device_train_batch_size` goes on counting examples, not blocks of max_length"),
    Name("packing_strategy", (SFT,), "bfd", REFUSED, "packing never cuts an example; want bfd"),
    Name("padding_free", (SFT, DPO), False, TRANSLATED, "`layout='packed'`, for every loss",
         "`layout='auto'` packs wherever the model's attention allows it; it changes no result"),
    Name("pad_to_multiple_of", ALL, "auto", SAME, "`'auto'` and `None` become 1"),
    Name("eval_packing", (SFT,), None, TRANSLATED, "nothing: evaluation is laid out as training, and its means are "
         "exact in any layout"),
    Name("completion_only_loss", (SFT,), None, REFUSED, "likelihood is of responses; for loss on prompts too, want the "
         "rows as plain text (formatting_func=lambda row: row['prompt'] + row['completion'])"),
    Name("assistant_only_loss", (SFT,), False, TRANSLATED, "what happens anyway: of `messages`, the assistant's tokens "
         "bear loss", "TRL's loss is on every token of `messages`, the user's too, unless this is on"),
    # the reference
    Name("precompute_ref_log_probs", PREFERENCE, False, TRANSLATED, "`reference='cached'`"),
    Name("precompute_ref_batch_size", PREFERENCE, None, TRANSLATED, "`reference_cache_exact=False`: large batches "
         "sorted by length, of 16,384 tokens whatever the number"),
    Name("sync_ref_model", PREFERENCE, False, REFUSED, "checkpoints hold no moving reference, so that a resumed run "
         "would be another one; want `stages`, each of which takes its reference anew"),
    Name("ref_model_mixup_alpha", PREFERENCE, 0.6, REFUSED, "see sync_ref_model"),
    Name("ref_model_sync_steps", PREFERENCE, 512, REFUSED, "see sync_ref_model"),
    # the loss
    Name("loss_type", (SFT,), "nll", SAME, "`nll`, `dft`; `chunked_nll` is `nll`"),
    Name("loss_type", (DPO,), ["sigmoid"], SAME, "one or several of `uft.from_trl.PAIRWISE`, and `sft`; `aot` and "
         "`aot_unpaired` are refused"),
    Name("loss_type", (KTO,), "kto", SAME, "`kto`, `apo_zero_unpaired`"),
    Name("loss_weights", (DPO,), None, SAME, "weights of the terms"),
    Name("beta", PREFERENCE, 0.1, SAME, "`beta` of every preference term"),
    Name("label_smoothing", (DPO,), 0.0, SAME, "of `robust` and `exo_pair`; refused for losses that have none, where "
         "TRL ignores it"),
    Name("discopop_tau", (DPO,), 0.05, SAME, "`tau` of `discopop`; refused for other losses"),
    Name("desirable_weight", (KTO,), 1.0, SAME, ""),
    Name("undesirable_weight", (KTO,), 1.0, SAME, ""),
    Name("ld_alpha", (DPO,), None, REFUSED, "no loss here weighs tokens by their place; against length want "
         "objective 'simpo' or loss_type 'sigmoid_norm'"),
    Name("f_divergence_type", (DPO,), "reverse_kl", REFUSED, "implicit rewards are those of the reverse KL; want for "
         "another divergence an exact KL term (kl: {direction: reference_policy})"),
    Name("f_alpha_divergence_coef", (DPO,), 0.5, REFUSED, "see f_divergence_type"),
    Name("use_weighting", (DPO,), False, REFUSED, "WPO's weights follow the policy; want a column `weight` in the "
         "data, which multiplies the loss of its row"),
    Name("activation_offloading", ALL, False, REFUSED, "activations stay on the device; want gradient_checkpointing, "
         "or token_budget, which bounds the tokens of a pass"),
)  # fmt: skip

# of earlier versions of TRL, which scripts still have
OTHERS = (
    Name("rpo_alpha", ("TRL < 1.0",), None, TRANSLATED, "a term of that weight: likelihood of the chosen answers, per "
         "token (`loss_type: ['sigmoid', 'sft']`)"),
    Name("max_seq_length", ("TRL < 0.20",), None, TRANSLATED, "`max_length`"),
    Name("reference_free", ("TRL < 1.0",), False, REFUSED, "want objective 'cpo', which is DPO without a reference and "
         "the likelihood of chosen, or 'simpo'"),
    Name("max_prompt_length", ("TRL < 1.0",), None, REFUSED, "a prompt may be as long as its response leaves room in "
         "max_length"),
    Name("max_completion_length", ("TRL < 1.0",), None, REFUSED, "responses are never cut; want max_length"),
    Name("generate_during_eval", ("TRL < 1.0",), False, REFUSED, "want uft.EvaluationCallback, which generates"),
)  # fmt: skip

ARGUMENTS = (
    Name("model", ("all",), None, SAME, "hub id, path or model; a configuration, for fresh weights, as well"),
    Name("ref_model", ("DPOTrainer", "KTOTrainer"), None, SAME, "also called `reference`"),
    Name("args", ("all",), None, SAME, "`UnifiedConfig`; or TRL's own config, whose values and defaults then hold"),
    Name("data_collator", ("all",), None, REFUSED, "batches hold several kinds of feedback and are put together here"),
    Name("train_dataset", ("all",), None, SAME, "or {name: data set} of several kinds"),
    Name("eval_dataset", ("all",), None, SAME, "a mapping holds splits, as in TRL, where train_dataset is one data "
         "set; where that is a mapping, it holds data sets of one split"),
    Name("processing_class", ("all",), None, SAME, "a tokenizer; without a pad token its EOS pads"),
    Name("compute_loss_func", ("SFTTrainer",), None, REFUSED, "a loss of your own is a term: `uft.losses.register`"),
    Name("compute_metrics", ("all",), None, REFUSED, "evaluation holds no logits; callbacks may measure more"),
    Name("callbacks", ("all",), None, SAME, ""),
    Name("optimizers", ("all",), (None, None), SAME, ""),
    Name("optimizer_cls_and_kwargs", ("SFTTrainer",), None, SAME, ""),
    Name("preprocess_logits_for_metrics", ("SFTTrainer",), None, REFUSED, "evaluation holds no logits"),
    Name("quantization_config", ("all",), None, REFUSED, "base weights are not quantised here; want dtype bfloat16 "
         "with LoRA, and token_budget to bound the rest"),
    Name("peft_config", ("all",), None, SAME, "or `use_peft` and `lora_*` of the config"),
    Name("formatting_func", ("SFTTrainer",), None, SAME, "each row becomes the text that it returns, with loss on "
         "all of it; special tokens written there are meant"),
)  # fmt: skip

# kept in `UnifiedConfig.from_trl`: what decides the objective, and what is done to tokenizer and data
OF_OBJECTIVE = ("loss_type", "loss_weights", "beta", "label_smoothing", "discopop_tau", "desirable_weight",
                "undesirable_weight", "rpo_alpha")  # fmt: skip
LIKELIHOOD = {"nll": "nll", "dft": "dft", "chunked_nll": "nll"}  # SFTConfig's loss_type: ours
OF_DATA = ("chat_template_path", "eos_token", "dataset_text_field")
KNOWN: dict[str, Name] = {name.name: name for name in (*OTHERS, *NAMES)}


def translated(given: Mapping[str, Any], fields: Collection[str]) -> dict[str, Any]:
    """Keyword arguments of a config with these fields, from some that may be TRL's.  Raises ValueError for what is
    refused, and for two that contradict each other."""
    found: dict[str, Any] = {name: value for name, value in given.items() if name not in KNOWN or name in fields}
    kept = dict(found.get("from_trl") or {})
    for name, value in given.items():
        if name in _VALUES:
            found[name] = _VALUES[name](value)
        if name not in KNOWN or name in fields:
            continue
        if name in (*OF_OBJECTIVE, *OF_DATA):
            if value is not None:
                kept[name] = value
            continue
        _refuse(KNOWN[name], value)
        for other, meant in _becomes(name, value).items():
            if given.get(other, meant) != meant and other != "reference_cache_exact":
                raise ValueError(
                    f"{name} is {value!r}, so {other} {meant!r}, and {other} is {given[other]!r}; want one"
                )
            found[other] = meant
    if kept:
        found["from_trl"] = kept
    return found


def _refuse(row: Name, value: Any) -> None:
    if row.state != REFUSED or value is None or value == row.default:
        return
    if (row.name, value) in (("completion_only_loss", True), ("router_aux_loss_coef", 0.0)):
        return  # what happens here
    if row.name == "dataset_kwargs" and not value.get("skip_prepare_dataset"):
        return
    raise ValueError(f"{row.name} is {value!r}; want {row.default!r}: {row.text}")


_VALUES: dict[str, Callable[[Any], Any]] = {
    "max_length": lambda value: UNCUT if value is None else value,
    "pad_to_multiple_of": lambda value: 1 if value in (None, "auto") else value,
}


def _becomes(name: str, value: Any) -> dict[str, Any]:
    if name in ("packing", "padding_free") and value:
        return {"layout": "packed"}
    if name == "precompute_ref_log_probs" and value:
        return {"reference": "cached"}
    if name == "precompute_ref_batch_size" and value is not None:
        return {"reference_cache_exact": False}
    if name == "max_seq_length":
        return {"max_length": _VALUES["max_length"](value)}
    return {}


def takes_trl_names(config: type) -> type:
    """Decorates a config, above `@dataclass`: its constructor then takes TRL's names as well."""
    of_dataclass = config.__init__

    @functools.wraps(of_dataclass)
    def __init__(self, *args: Any, **given: Any):
        own = translated(given, {field for field in config.__dataclass_fields__})
        of_dataclass(self, *args, **own)
        judged = set(OF_OBJECTIVE) & set(given) and given.get("loss_type") not in [*LIKELIHOOD]
        if type(self) is config and judged and "learning_rate" not in given:
            logger.warning(
                "learning_rate is not given, and %g here; TRL's DPOConfig and KTOConfig have 1e-06", self.learning_rate
            )

    config.__init__ = __init__
    return config


def hint(name: str) -> str | None:
    """What to write in a recipe for one of TRL's names; None for a name that is not TRL's."""
    if name not in KNOWN:
        return None
    if name in OF_OBJECTIVE:
        return f"what the loss depends on stands with the objective: want objective.{name} or a term's option"
    row = KNOWN[name]
    return f"{name} is TRL's, and {row.text}" if row.text else None
