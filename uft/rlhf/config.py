"""RLConfig: UnifiedConfig and what reinforcement learning adds to it."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from uft.config import UnifiedConfig

# of UnifiedConfig: what reinforcement learning does not ask for
UNUSED = {"reference": "auto", "layout": "auto", "padding_side": "right", "prefix_sharing": True, "token_budget": None,
          "data_seed": None, "gradient_conflict": 0, "samples_max_new_tokens": 128, "loss_plane": None}  # fmt: skip
ADVANTAGES = ("gae", "rloo", "grpo")
KL_IN = ("reward", "loss", "none")
KL_LOSSES = ("exact", "k3")


@dataclass
class RLConfig(UnifiedConfig):
    """Arguments of `RLTrainer`.

    A rollout is per_device_train_batch_size prompts with `samples` responses each; max_steps counts optimiser steps, of
    which a rollout gets epochs_per_rollout * minibatches.
    """

    learning_rate: float = field(default=1e-6, metadata={"help": "Peak learning rate of the policy."})
    logging_steps: float = field(default=1, metadata={"help": "Log every so many steps."})
    advantage: str = field(
        default="gae",
        metadata={"help": "gae (PPO with a critic), rloo (leave one out) or grpo (group mean and deviation)."},
    )
    samples: int = field(default=1, metadata={"help": "Responses per prompt; rloo and grpo need at least 2."})
    epochs_per_rollout: int = field(default=1, metadata={"help": "Passes over each rollout."})
    minibatches: int = field(default=1, metadata={"help": "Optimiser steps per pass over a rollout."})
    micro_batch_size: int = field(default=0, metadata={"help": "Responses per forward pass; 0: all of a step's."})
    clip: float = field(default=0.2, metadata={"help": "Of the ratio of new and old probability."})
    value_clip: float = field(default=0.2, metadata={"help": "Of the change of a value; 0: none."})
    value_coefficient: float = field(default=0.5, metadata={"help": "Of the critic's loss."})
    critic_learning_rate: float = field(default=0.0, metadata={"help": "0: that of the policy."})
    gamma: float = field(default=1.0, metadata={"help": "Discount per token."})
    lam: float = field(default=0.95, metadata={"help": "Of generalised advantage estimation."})
    whiten: bool = field(default=True, metadata={"help": "Whether gae's advantages get mean 0 and variance 1."})
    kl_coefficient: float = field(default=0.05, metadata={"help": "Of the KL to the reference."})
    kl_in: str = field(default="reward", metadata={"help": "reward (per token), loss or none."})
    kl_loss: str = field(
        default="exact", metadata={"help": "As a loss: exact over the vocabulary, or k3, estimated by sampled tokens."}
    )
    kl_target: float = field(
        default=0.0, metadata={"help": "Nats per response that an adaptive coefficient keeps; 0: it is fixed."}
    )
    max_new_tokens: int = field(default=128, metadata={"help": "Of a response."})
    generation_batch_size: int = field(default=64, metadata={"help": "Responses that are generated side by side."})
    unended_penalty: float = field(
        default=0.0, metadata={"help": "Taken from the reward of a response that does not end by itself."}
    )

    def __post_init__(self):
        super().__post_init__()
        for name, known in (("advantage", ADVANTAGES), ("kl_in", KL_IN), ("kl_loss", KL_LOSSES)):
            if getattr(self, name) not in known:
                raise ValueError(f"{name} is {getattr(self, name)!r}; want one of {', '.join(known)}")
        for name in ("samples", "epochs_per_rollout", "minibatches", "max_new_tokens", "generation_batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; want at least 1")
        for name in ("kl_coefficient", "kl_target", "value_clip", "micro_batch_size", "critic_learning_rate"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} is {getattr(self, name)}; want at least 0")
        for name in ("gamma", "lam"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} is {getattr(self, name)}; want it in [0, 1]")
        if self.advantage != "gae" and self.samples < 2:
            raise ValueError(f"advantage is {self.advantage!r} with {self.samples} response per prompt; want 2 or more")
        if self.gradient_accumulation_steps != 1:
            raise ValueError("gradient_accumulation_steps is not 1; want micro_batch_size, which cuts a step")
        if self.max_steps < 1:
            raise ValueError(f"max_steps is {self.max_steps}; want a number of optimiser steps")
        if self.world_size > 1:
            raise ValueError(f"found {self.world_size} processes; want one (several: uft.rlhf.through_trl)")
        for name, default in UNUSED.items():
            if getattr(self, name) != default:
                raise ValueError(f"{name} is {getattr(self, name)!r}, which has no effect here; want it left out")
        if self.kl_target and self.kl_in == "none":
            raise ValueError("kl_target is set and kl_in is 'none'; want the KL in the reward or in the loss")
        saved = self.save_steps if self.save_steps >= 1 else math.ceil(self.save_steps * self.max_steps)
        if self.max_steps % self.updates or (self.save_strategy == "steps" and saved % self.updates):
            raise ValueError(
                f"max_steps is {self.max_steps} and save_steps {self.save_steps}; want multiples of the {self.updates} "
                "steps that a rollout gets, so that no checkpoint falls inside one"
            )

    @property
    def updates(self) -> int:
        """Optimiser steps per rollout."""
        return self.epochs_per_rollout * self.minibatches
