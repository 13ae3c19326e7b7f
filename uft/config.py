"""UnifiedConfig: transformers' TrainingArguments and what unified training adds to them."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import TrainingArguments

from uft.models import REFERENCE_MODES
from uft.trl_names import takes_trl_names

# fields of TrainingArguments that would be left unused
MEANINGLESS = {
    "auto_find_batch_size": "token_budget bounds the memory of a pass",
    "include_num_input_tokens_seen": "num_tokens is logged, and run.json counts more",
    "bf16_full_eval": "evaluation runs in the precision of training",
    "fp16_full_eval": "evaluation runs in the precision of training",
    "use_liger_kernel": "the head is fused already, and Liger would put another in its place",
}
LAYOUTS = ("auto", "packed", "padded")


@takes_trl_names
@dataclass
class UnifiedConfig(TrainingArguments):
    """Arguments of `UnifiedTrainer`; every field of `transformers.TrainingArguments` is one too.

    Batch sizes count examples: a pair is one example with two responses.
    The constructor also takes the names of TRL's SFTConfig, DPOConfig and KTOConfig (docs/from_trl.md).
    """

    _VALID_DICT_FIELDS = [*TrainingArguments._VALID_DICT_FIELDS, "model_init_kwargs", "from_trl"]  # noqa: RUF012

    learning_rate: float = field(default=2e-5, metadata={"help": "Peak learning rate."})
    logging_steps: float = field(default=10, metadata={"help": "Log every so many steps."})
    remove_unused_columns: bool | None = field(default=False, metadata={"help": "Leave this off."})
    max_length: int = field(
        default=1024, metadata={"help": "Longest prompt + response in tokens. Prompts are cut from the left."}
    )
    data_cache: str | None = field(
        default=None,
        metadata={
            "help": "Folder for tokenised data, which need not fit in memory then and is tokenised once; default: in "
            "memory, on every rank."
        },
    )
    reference: str = field(
        default="auto",
        metadata={
            "help": "auto (adapter off for LoRA, else frozen), frozen, adapter, cached (log-probabilities computed "
            "once and kept on disk) or none."
        },
    )
    reference_cache: str | None = field(
        default=None, metadata={"help": "Folder for cached reference log-probabilities; default output_dir."}
    )
    reference_cache_exact: bool = field(
        default=True,
        metadata={
            "help": "Compute cached log-probabilities in the very batches that training will run, so that every margin "
            "starts at exactly 0. Off: in large batches sorted by length, once for all seeds and batch sizes; margins "
            "then start at rounding errors."
        },
    )
    fused_head: bool = field(
        default=True,
        metadata={
            "help": "Log-probabilities straight from hidden states, so that whole logits never exist. Models whose "
            "head is no linear layer give logits, with a warning."
        },
    )
    filter_eps: float = field(
        default=0.0,
        metadata={
            "help": "The fused head's backward leaves out blocks of the vocabulary without a probability above this; "
            "0 is exact. Much faster for trained models; cut-cross-entropy uses 2^-12."
        },
    )
    disable_dropout: bool = field(default=True, metadata={"help": "Set every dropout to 0."})
    layout: str = field(
        default="auto",
        metadata={
            "help": "packed (the responses of a batch in one row without padding), padded (a row each), or auto: "
            "packed where the model's attention is known to allow it."
        },
    )
    prefix_sharing: bool = field(
        default=True, metadata={"help": "In a packed row, run a prompt once for all of its responses."}
    )
    token_budget: int | None = field(
        default=None,
        metadata={
            "help": "Cut each device's batch into passes of at most this many tokens, padding included; by default it "
            "is one pass. It bounds memory and changes no result."
        },
    )
    padding_side: str = field(default="right", metadata={"help": "right or left, in the padded layout."})
    pad_to_multiple_of: int = field(default=1, metadata={"help": "Pad batches to a multiple of this length."})
    on_non_finite: str = field(
        default="error",
        metadata={
            "help": "What a loss or gradient that is not finite does, before it reaches the weights: error (stop, "
            "behind a checkpoint) or skip (leave that step out, counted and logged)."
        },
    )
    gradient_conflict: int = field(
        default=0,
        metadata={
            "help": "Every so many steps, log cosine and norm ratio of the gradients of each two terms of the "
            "objective; 0 never. It changes no result. It costs a forward, and a backward per term, over that step's "
            "data, and memory for a gradient per term."
        },
    )
    samples: int = field(
        default=0,
        metadata={
            "help": "How many held-out prompts are answered at each evaluation, always the same: samples.jsonl, and "
            "TensorBoard. It changes no result."
        },
    )
    samples_max_new_tokens: int = field(default=128, metadata={"help": "Longest of these answers, in tokens."})
    loss_plane: bool | None = field(
        default=None,
        metadata={
            "help": "Draw loss_plane.png while training: likelihood losses against preference losses; default: where "
            "the run reports to something (report_to)."
        },
    )
    logging_nan_inf_filter: bool = field(default=False, metadata={"help": "Leave this off: see on_non_finite."})
    resume_despite: list[str] | None = field(
        default=None,
        metadata={
            "help": "What may differ from the run that wrote the checkpoint (world_size, data, learning_rate, ..., or "
            "all), though the result is then not that of one exact run."
        },
    )
    on_bad_row: str = field(default="error", metadata={"help": "error, or drop (counted and reported)."})
    dtype: str = field(
        default="float32",
        metadata={
            "help": "dtype of the loaded weights; auto is the checkpoint's. Small updates vanish in bfloat16 weights: "
            "train float32 weights with bf16 autocast (--bf16)."
        },
    )
    attn_implementation: str | None = field(default=None, metadata={"help": "eager, sdpa, flash_attention_2, ..."})
    trust_remote_code: bool = field(default=False, metadata={"help": "Run code from the model's repository."})
    model_init_kwargs: dict[str, Any] | str | None = field(
        default=None, metadata={"help": "What else from_pretrained is told, such as {revision: main}."}
    )
    from_trl: dict[str, Any] | str | None = field(
        default=None,
        metadata={"help": "What TRL's names said of objective, tokenizer and data. A recipe says it in its own place."},
    )
    use_peft: bool = field(default=False, metadata={"help": "Train a LoRA adapter instead of all weights."})
    lora_r: int = field(default=16, metadata={"help": "LoRA rank."})
    lora_alpha: int = field(default=16, metadata={"help": "LoRA scale numerator."})
    lora_dropout: float = field(default=0.0, metadata={"help": "LoRA dropout."})
    lora_target_modules: list[str] | None = field(
        default=None, metadata={"help": "Modules that get an adapter; default all linear layers but the head."}
    )

    def __post_init__(self):
        super().__post_init__()
        if self.reference not in REFERENCE_MODES:
            raise ValueError(f"reference is {self.reference!r}; want one of {', '.join(REFERENCE_MODES)}")
        if not 0.0 <= self.filter_eps < 1.0 or (self.filter_eps and not self.fused_head):
            raise ValueError(f"filter_eps is {self.filter_eps}; want a probability in [0, 1), and a fused head")
        if self.on_non_finite not in ("error", "skip"):
            raise ValueError(f"on_non_finite is {self.on_non_finite!r}; want error or skip")
        if getattr(self, "enable_jit_checkpoint", False):
            raise ValueError("enable_jit_checkpoint is on; want it off: SIGTERM saves a checkpoint anyway")
        if self.on_bad_row not in ("error", "drop"):
            raise ValueError(f"on_bad_row is {self.on_bad_row!r}; want error or drop")
        if self.dtype != "auto" and not isinstance(getattr(torch, self.dtype, None), torch.dtype):
            raise ValueError(f"dtype is {self.dtype!r}; want auto, float32, bfloat16 or float16")
        for name in ("per_device_train_batch_size", "per_device_eval_batch_size", "pad_to_multiple_of",
                     "gradient_accumulation_steps"):  # fmt: skip
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; want at least 1")
        if not (math.isfinite(self.learning_rate) and self.learning_rate >= 0):
            raise ValueError(f"learning_rate is {self.learning_rate}; want a number from 0 on, such as 1e-5")
        if self.max_steps == 0 or self.max_steps < -1:
            raise ValueError(f"max_steps is {self.max_steps}; want a number of steps, or -1 for num_train_epochs")
        if self.max_steps < 0 and not self.num_train_epochs > 0:
            raise ValueError(f"num_train_epochs is {self.num_train_epochs}; want more than 0, or max_steps")
        if self.layout not in LAYOUTS:
            raise ValueError(f"layout is {self.layout!r}; want one of {', '.join(LAYOUTS)}")
        longest = -(-self.max_length // self.pad_to_multiple_of) * self.pad_to_multiple_of
        if self.token_budget is not None and self.token_budget < longest:
            padded = f", padded {longest}" if longest > self.max_length else ""
            raise ValueError(
                f"token_budget is {self.token_budget} and max_length {self.max_length}{padded}; want room for the "
                "longest row"
            )
        if self.padding_side not in ("right", "left"):
            raise ValueError(f"padding_side is {self.padding_side!r}; want right or left")
        if self.use_peft and self.lora_dropout and self.disable_dropout:
            raise ValueError(f"lora_dropout is {self.lora_dropout} and disable_dropout is on; want one of them changed")
        if self.label_smoothing_factor:
            raise ValueError(
                f"label_smoothing_factor is {self.label_smoothing_factor}; want 0: smoothing is an option of a term's "
                "loss (for example preference: {loss: cdpo, label_smoothing: 0.1})"
            )
        if self.neftune_noise_alpha:
            raise ValueError(
                f"neftune_noise_alpha is {self.neftune_noise_alpha}; want none: with noise in the policy's embeddings "
                "alone, rewards would not start at 0"
            )
        if self.train_sampling_strategy != "random":
            raise ValueError(
                f"train_sampling_strategy is {self.train_sampling_strategy!r}; want random: the mixture of sources "
                "decides the order"
            )
        if self.samples < 0 or self.samples_max_new_tokens < 1:
            raise ValueError(
                f"samples is {self.samples} and samples_max_new_tokens {self.samples_max_new_tokens}; want at least 0 "
                "and 1"
            )
        if self.max_length < 2:
            raise ValueError(f"max_length is {self.max_length}; want at least 2")
        for name, why in MEANINGLESS.items():
            if getattr(self, name, None) not in (None, False, "no"):
                raise ValueError(f"{name} is {getattr(self, name)!r}; want it off: {why}")
        for name in ("split_batches", "dispatch_batches"):
            if getattr(self.accelerator_config, name, None):
                raise ValueError(f"accelerator_config.{name} is on; want it off: every rank reads its own share")
        if self.ddp_broadcast_buffers is None:
            # the buffers of language models are constants, and a broadcast would want every rank to run as many passes
            self.ddp_broadcast_buffers = False
        elif self.ddp_broadcast_buffers:
            raise ValueError("ddp_broadcast_buffers is on; want it off: ranks run as many passes as their rows need")
        self._n_gpu = min(self.n_gpu, 1)  # one process per GPU: torchrun or accelerate, not DataParallel

    def __getstate__(self) -> dict:
        # checkpoints hold the pickled arguments and may be uploaded; a token must not travel with them
        return {name: None if name == "hub_token" else value for name, value in self.__dict__.items()}

    def peft_config(self):
        """The LoRA configuration these arguments describe, or None."""
        if not self.use_peft:
            return None
        from peft import LoraConfig

        modules = self.lora_target_modules
        return LoraConfig(
            r=self.lora_r,
            lora_alpha=self.lora_alpha,
            lora_dropout=self.lora_dropout,
            target_modules="all-linear" if modules in (None, [], ["all-linear"]) else modules,
            task_type="CAUSAL_LM",
        )
