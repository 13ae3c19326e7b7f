"""Our trainer in its layouts and TRL's, on the same model, rows, order, objective and optimiser; a run of one of them.

TRL with the fastest options that it has for these batches: attention by PyTorch, no recomputation of layers, its fused
head (always on), dropout off.  Its padding-free layout is switched off in TRL 1.16; batches sorted by length would be
other batches.
"""

from __future__ import annotations

import copy
import gc
import shutil
import tempfile
import time
from dataclasses import asdict, dataclass, field
from importlib.util import find_spec
from typing import Any

import torch
from transformers import PreTrainedModel, PrinterCallback, Trainer, TrainerCallback

from uft.config import UnifiedConfig
from uft.record import peak_memory_bytes, reset_peak_memory
from uft.trainer import UnifiedTrainer

from .parts import Parts, peak_of_tensors
from .shapes import make_model, make_plain_tokenizer
from .workloads import Workload

OURS, TRL = "ours", "TRL"
OURS_PADDED, OURS_PACKED, TRL_COMPACT = "ours, padded", "ours, packed", "TRL, short head"
# what differs between our rows; "ours" is packed and runs a prompt once
LAYOUTS = {
    OURS: {}, OURS_PADDED: {"layout": "padded"}, OURS_PACKED: {"layout": "packed", "prefix_sharing": False},
}  # fmt: skip
TOLD = {
    OURS: "packed rows, a prompt runs once for both responses",
    OURS_PACKED: "packed rows, each response behind a prompt of its own",
    OURS_PADDED: "a padded row per response",
    TRL: "as it is; on a CPU its head scores every position, padding and prompts too",
    TRL_COMPACT: "TRL changed to score response tokens alone on a CPU, as it does on a GPU",
}


@dataclass(frozen=True)
class Setting:
    """All that decides what a run computes; the same for every rival of a case.

    tuning      full, or lora (rank 16 on all linear layers but the head)
    reference   live: runs in every step; cached: log-probabilities computed before the first step
    warmup      steps that are not timed
    """

    shape: str
    workload: Workload
    tuning: str = "full"
    reference: str = "live"
    batch_size: int = 8
    max_length: int = 512
    warmup: int = 2
    beta: float = 0.1
    learning_rate: float = 1e-4
    device: str = "cpu"
    dtype: str = "float32"
    checkpointing: bool = False

    @property
    def steps(self) -> int:
        return len(self.workload.pairs) // self.batch_size

    def told(self) -> dict[str, Any]:
        return {**asdict(self), "workload": self.workload.name, "steps": self.steps}


@dataclass
class Run:
    """What one run of one rival showed.

    seconds        of each step, data included
    cpu_seconds    of the timed steps, of all threads: tells a busy machine from a slow trainer
    peak, loaded   bytes: the highest during training, and before it, with the model there (CPU: resident; GPU: tensors)
    prepared       seconds that computing the reference beforehand took
    parts          part -> seconds of the timed steps, of a profiled run
    tensors        bytes: the most that a step's tensors take beyond those that outlive it, of a profiled run on a CPU
    """

    rival: str
    seconds: list[float]
    timed_seconds: float
    cpu_seconds: float
    response_tokens: int
    peak: int
    loaded: int
    prepared: float
    log: list[dict[str, float]]
    mean_loss: float
    parts: dict[str, float] = field(default_factory=dict)
    tensors: int | None = None

    @property
    def rate(self) -> float:
        """Response tokens per second of the timed steps."""
        return self.response_tokens / self.timed_seconds


def missing(rival: str) -> str | None:
    """Why a rival cannot run here."""
    absent = [name for name in ("trl", "datasets") if find_spec(name) is None]
    if rival.startswith(TRL) and absent:
        return f"{' and '.join(absent)} not installed"
    return None


def run(rival: str, setting: Setting, profiled: bool = False, log_every: int = 10) -> Run:
    """One epoch over the workload.  Memory is the run's own only in a process of its own."""
    device = torch.device(setting.device)
    longest = max(pair.longest for pair in setting.workload.pairs)
    model = make_model(setting.shape, device, getattr(torch, setting.dtype), longest + 1)
    gc.collect()
    loaded = _in_use(device)
    folder = tempfile.mkdtemp(prefix="speed-")
    try:
        trainer = (make_trl if rival.startswith(TRL) else make_ours)(rival, model, setting, folder, log_every)
        prepared = _prepared(trainer)
        clock = _Clock(setting.warmup, device)
        trainer.remove_callback(PrinterCallback)
        trainer.add_callback(clock)
        parts = Parts(trainer, device, setting.warmup) if profiled else None
        mean_loss = trainer.train().training_loss
        found = Run(
            rival=rival,
            seconds=clock.seconds,
            timed_seconds=clock.timed,
            cpu_seconds=clock.cpu,
            response_tokens=_responses(setting),
            peak=clock.peak,
            loaded=loaded,
            prepared=prepared,
            log=[entry for entry in trainer.state.log_history if "loss" in entry],
            mean_loss=mean_loss,
        )
        if parts is not None:
            found.parts = parts.seconds(clock.timed)
            found.tensors = peak_of_tensors(trainer) if device.type == "cpu" else None
        return found
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _responses(setting: Setting) -> int:
    timed = setting.workload.pairs[setting.warmup * setting.batch_size : setting.steps * setting.batch_size]
    return sum(len(pair.chosen) + len(pair.rejected) for pair in timed)


class _Clock(TrainerCallback):
    """Seconds from the end of one step to that of the next, so that the data are in them, and the peak of memory."""

    def __init__(self, warmup: int, device: torch.device):
        self.warmup, self.device = warmup, device
        self.seconds: list[float] = []
        self.timed = self.cpu = 0.0
        self.peak = 0

    def on_train_begin(self, args, state, control, **kwargs) -> None:
        reset_peak_memory()
        self._last = self._now(True)
        if not self.warmup:
            self._begin = self._last, time.process_time()

    def on_step_end(self, args, state, control, **kwargs) -> None:
        first, last = state.global_step == self.warmup, state.global_step == state.max_steps
        now = self._now(first or last)
        self.seconds.append(now - self._last)
        self._last = now
        if first:
            self._begin = now, time.process_time()
        if last:
            self.timed, self.cpu = now - self._begin[0], time.process_time() - self._begin[1]
            self.peak = peak_memory_bytes()

    def _now(self, wait: bool) -> float:
        if wait and self.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()


def _in_use(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.memory_allocated()
    reset_peak_memory()
    return peak_memory_bytes()


def _prepared(trainer: Trainer) -> float:
    """Seconds of computing the reference beforehand; TRL has done it when it was made."""
    if not isinstance(trainer, UnifiedTrainer):
        return getattr(trainer, "prepared", 0.0)
    before = time.perf_counter()
    trainer.reference_cache.prepare()
    return time.perf_counter() - before if trainer.reference_cache.wanted else 0.0


# ---- the two trainers ----


def arguments(setting: Setting, folder: str, log_every: int) -> dict[str, Any]:
    gpu = setting.device == "cuda"
    return {
        "output_dir": folder, "use_cpu": not gpu, "bf16": gpu and setting.dtype == "bfloat16",
        "per_device_train_batch_size": setting.batch_size, "num_train_epochs": 1, "max_length": setting.max_length,
        "learning_rate": setting.learning_rate, "lr_scheduler_type": "constant", "max_grad_norm": 1.0,
        "optim": "adamw_torch_fused", "weight_decay": 0.0, "gradient_checkpointing": setting.checkpointing,
        "disable_dropout": True, "logging_steps": log_every, "save_strategy": "no", "report_to": "none",
        "disable_tqdm": True, "seed": setting.workload.seed, "dataloader_num_workers": 0,
    }  # fmt: skip


def lora(setting: Setting) -> Any:
    if setting.tuning != "lora":
        return None
    from peft import LoraConfig

    return LoraConfig(r=16, lora_alpha=16, lora_dropout=0.0, target_modules="all-linear", task_type="CAUSAL_LM")


def make_ours(rival: str, model: PreTrainedModel, setting: Setting, folder: str, log_every: int) -> UnifiedTrainer:
    return UnifiedTrainer(
        model=model,
        objective={"preset": "dpo_chosen_nll", "beta": setting.beta},
        args=UnifiedConfig(
            **arguments(setting, folder, log_every),
            reference="cached" if setting.reference == "cached" else "auto",
            dtype=setting.dtype,
            **LAYOUTS[rival],
        ),
        train_dataset=setting.workload.feedback(),
        processing_class=make_plain_tokenizer(),
        peft_config=lora(setting),
    )


def make_trl(rival: str, model: PreTrainedModel, setting: Setting, folder: str, log_every: int) -> Trainer:
    """TRL's trainer on token ids as they are."""
    import trl.trainer.utils
    from datasets import Dataset
    from trl import DPOConfig, DPOTrainer
    from trl.kernels import chunked_logprob

    class OnTokens(DPOTrainer):
        prepared = 0.0

        def _prepare_dataset(self, dataset, *args, **kwargs):
            return dataset

        def _precompute_ref_logps(self, *args, **kwargs):
            before = time.perf_counter()
            found = super()._precompute_ref_logps(*args, **kwargs)
            self.prepared = time.perf_counter() - before
            return found

    as_it_is = chunked_logprob._use_triton
    trl.trainer.utils._use_triton = (lambda device: True) if rival == TRL_COMPACT else as_it_is
    cached = setting.reference == "cached"
    alone = setting.tuning == "full" and not cached  # else the policy is its own reference
    return OnTokens(
        model=model,
        ref_model=copy.deepcopy(model) if alone else None,
        args=DPOConfig(
            **arguments(setting, folder, log_every),
            loss_type=["sigmoid", "sft"],
            loss_weights=[1.0, 1.0],
            beta=setting.beta,
            precompute_ref_log_probs=cached,
            train_sampling_strategy="sequential",
        ),
        train_dataset=Dataset.from_dict(setting.workload.columns()),
        processing_class=make_plain_tokenizer(),
        peft_config=lora(setting),
    )
