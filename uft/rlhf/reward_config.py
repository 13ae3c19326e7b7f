"""RewardConfig: transformers' TrainingArguments and what training a reward model adds to them."""

from __future__ import annotations

from dataclasses import dataclass, field

from transformers import TrainingArguments

from uft.losses.reward import cross_entropy, squared_error

REGRESSION = {"bce": cross_entropy, "mse": squared_error}


@dataclass
class RewardConfig(TrainingArguments):
    """Arguments of `train_reward_model`; every field of `transformers.TrainingArguments` is one too.

    Batch sizes count examples: a pair is one example with two responses.
    """

    learning_rate: float = field(default=1e-5, metadata={"help": "Peak learning rate."})
    logging_steps: float = field(default=10, metadata={"help": "Log every so many steps."})
    remove_unused_columns: bool | None = field(default=False, metadata={"help": "Leave this off."})
    max_length: int = field(default=1024, metadata={"help": "Longest prompt + response in tokens."})
    center_rewards_coefficient: float = field(
        default=0.0, metadata={"help": "Weight of (r_w + r_l)^2, which draws the mean reward to 0; 0.01 is usual."}
    )
    margin: bool = field(
        default=False,
        metadata={
            "help": "Subtract margin_scale times score_chosen - score_rejected inside of the sigmoid, for pairs that "
            "have scores other than 1 and 0."
        },
    )
    margin_scale: float = field(default=1.0, metadata={"help": "Margin of a pair with scores 1 and 0, in nats."})
    regression: str = field(
        default="bce", metadata={"help": "Loss of labels and scores: bce, or mse, both of the sigmoid of the reward."}
    )
    disable_dropout: bool = field(default=True, metadata={"help": "Set every dropout to 0."})

    def __post_init__(self):
        super().__post_init__()
        if self.regression not in REGRESSION:
            raise ValueError(f"regression is {self.regression!r}; want {' or '.join(REGRESSION)}")
        for name in ("center_rewards_coefficient", "margin_scale"):
            if not 0 <= getattr(self, name) < float("inf"):
                raise ValueError(f"{name} is {getattr(self, name)}; want a number >= 0")
        if self.label_smoothing_factor:
            raise ValueError(f"label_smoothing_factor is {self.label_smoothing_factor}; want 0, it has no meaning here")
        self._n_gpu = min(self.n_gpu, 1)  # one process per GPU: torchrun or accelerate, not DataParallel
