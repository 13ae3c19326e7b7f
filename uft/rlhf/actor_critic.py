"""A policy and its critic under transformers.Trainer: optimiser groups, checkpoints, logs, the record of a run."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from torch import nn
from torch.utils.data import DataLoader, Dataset

from uft.faults import GuardedTrainer
from uft.feedback import Example
from uft.head import is_peft, unwrapped
from uft.metrics import RunState
from uft.record import environment, peak_memory_bytes, reset_peak_memory, write_json
from uft.rlhf.config import RLConfig
from uft.rlhf.rollouts import Critic

# fields that decide what a run becomes, so that a checkpoint of another one is refused
_DECIDING = (
    "advantage", "samples", "epochs_per_rollout", "minibatches", "clip", "value_clip", "value_coefficient",
    "critic_learning_rate", "gamma", "lam", "whiten", "kl_coefficient", "kl_in", "kl_loss", "kl_target",
    "max_new_tokens", "unended_penalty", "seed", "learning_rate", "per_device_train_batch_size", "max_steps",
    "lr_scheduler_type", "warmup_steps", "weight_decay", "optim", "adam_beta1", "adam_beta2", "adam_epsilon",
    "max_grad_norm", "use_peft", "lora_r", "lora_alpha", "bf16", "fp16",
)  # fmt: skip


class ActorCritic(nn.Module):
    """What is trained; the critic may be missing."""

    def __init__(self, policy: nn.Module, critic: Critic | None):
        super().__init__()
        self.policy, self.critic = policy, critic

    @property
    def config(self) -> Any:
        return self.policy.config

    def gradient_checkpointing_enable(self, **kwargs: Any) -> None:
        for model in (self.policy, None if self.critic is None else self.critic.model):
            if model is not None:
                model.gradient_checkpointing_enable(**kwargs)


class Prompts(Dataset):
    """Item i: the prompts of the rollout that optimiser step i trains on.  Each epoch has an order of its own."""

    def __init__(self, prompts: Sequence[Example], args: RLConfig):
        self.prompts, self.size = prompts, args.per_device_train_batch_size
        self.seed, self.updates, self.steps = args.seed, args.updates, args.max_steps
        if len(prompts) < self.size:
            raise ValueError(f"found {len(prompts)} prompts; want at least the {self.size} of a rollout")

    def __len__(self) -> int:
        return self.steps

    def __getitem__(self, step: int) -> list[Example]:
        per_epoch = len(self.prompts) // self.size
        epoch, place = divmod(step // self.updates, per_epoch)
        order = np.random.default_rng([self.seed, epoch]).permutation(len(self.prompts))
        return [self.prompts[i] for i in order[place * self.size : (place + 1) * self.size]]


class ActorCriticTrainer(GuardedTrainer):
    """What `RLTrainer` has besides its step.  `model` is an `ActorCritic`, `train_dataset` are `Prompts`."""

    loss_is_scaled_for_ga = True
    reward_name = ""  # what a checkpoint of another reward is told by
    _clock = 0.0

    @property
    def run_state(self) -> RunState:
        return next(c for c in self.callback_handler.callbacks if isinstance(c, RunState))

    @property
    def policy(self) -> nn.Module:
        return self.accelerator.unwrap_model(self.model).policy

    @property
    def critic(self) -> Critic | None:
        return self.accelerator.unwrap_model(self.model).critic

    def get_train_dataloader(self) -> DataLoader:
        return DataLoader(self.train_dataset, batch_size=1, collate_fn=_only, generator=torch.Generator())

    def get_batch_samples(self, epoch_iterator, num_batches: int, device: torch.device):
        self.guard.begin()
        return [next(epoch_iterator)], None

    def create_optimizer(self, *args: Any, **kwargs: Any):
        if self.optimizer is None and self.critic is not None:
            kind, options = self.get_optimizer_cls_and_kwargs(self.args, self.model)
            rate = self.args.critic_learning_rate or self.args.learning_rate
            groups = [
                {"params": [p for p in part.parameters() if p.requires_grad], "lr": lr}
                for part, lr in ((self.policy, self.args.learning_rate), (self.critic, rate))
            ]
            self.optimizer = kind(groups, **options | {"weight_decay": self.args.weight_decay})
        return super().create_optimizer(*args, **kwargs)

    def floating_point_ops(self, inputs: Any) -> int:
        return 0  # counted in `counters`

    def train(self, resume_from_checkpoint: str | None = None, **kwargs: Any):
        self.check_folders(resume_from_checkpoint)
        self.identity = {
            "rl": {name: repr(getattr(self.args, name)) for name in _DECIDING},
            "reward": self.reward_name,
            "data": self._prompts_digest(),
            "optimiser_state": not self.args.save_only_model,
        }
        if resume_from_checkpoint:
            self.check_resumable(resume_from_checkpoint)
        reset_peak_memory()
        self._clock = time.perf_counter()
        output = self.guarded_train(resume_from_checkpoint=resume_from_checkpoint, **kwargs)
        self.run_state.count(seconds=self._elapsed())
        if self.args.should_save:
            write_json(Path(self.args.output_dir) / "run.json", self.record())
        return output

    def _prompts_digest(self) -> str:
        digest = hashlib.sha256()
        for example in self.train_dataset.prompts:
            digest.update(np.ascontiguousarray(example.prompt).tobytes() + b"|")
        return digest.hexdigest()[:16]

    def record(self) -> dict[str, Any]:
        """Configuration, metrics over time and compute: what another person needs to judge a run."""
        return {
            "config": self.args.to_sanitized_dict(),
            "prompts": len(self.train_dataset.prompts),
            "steps": self.state.global_step,
            "planned_steps": self.state.max_steps,
            "compute": {**dict(sorted(self.run_state.counters.items())), "peak_memory_bytes": peak_memory_bytes()},
            "metrics": self.state.log_history,
            **environment(),
        }

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs:
            logs.update(self.run_state.take())
            self.run_state.count(seconds=self._elapsed())
            logs["num_tokens"] = self.run_state.counters.get("tokens", 0)
        super().log(logs, start_time)

    def _save_checkpoint(self, model, trial) -> None:
        self.run_state.count(seconds=self._elapsed())
        self.run_state.collect(list)
        super()._save_checkpoint(model, trial)

    def _maybe_log_save_evaluate(self, *args: Any, **kwargs: Any) -> None:
        if self.state.global_step % self.args.updates and self.state.global_step < self.state.max_steps:
            self.guard.stop = None  # a signal is followed at the end of the rollout; it stays received
        super()._maybe_log_save_evaluate(*args, **kwargs)

    def _save(self, output_dir: str | None = None, state_dict=None) -> None:
        folder, policy = Path(output_dir or self.args.output_dir), unwrapped(self.policy)
        # without the frozen copy that may be the reference
        policy.save_pretrained(folder, **({"selected_adapters": [policy.active_adapter]} if is_peft(policy) else {}))
        self.tokenizer.save_pretrained(folder)
        if self.critic is not None and folder.name.startswith("checkpoint-"):
            self.critic.model.save_pretrained(folder / "critic")
        torch.save(self.args, folder / "training_args.bin")

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model=None) -> None:
        folder, policy = Path(resume_from_checkpoint), unwrapped(self.policy)
        if is_peft(policy):
            from peft import set_peft_model_state_dict

            set_peft_model_state_dict(policy, load_file(folder / "adapter_model.safetensors"))
        else:
            _load(policy, folder)
        if self.critic is not None:
            _load(self.critic.model, folder / "critic")

    def _elapsed(self) -> float:
        now = time.perf_counter()
        elapsed, self._clock = now - self._clock, now
        return elapsed


def _load(model: nn.Module, folder: Path) -> None:
    """By transformers, whose files may be laid out in another way than the weights."""
    model.load_state_dict(type(model).from_pretrained(folder, dtype=model.dtype).state_dict())


def _only(items: list[list[Example]]) -> list[Example]:
    return items[0]
