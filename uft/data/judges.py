"""Rewards made for looking at data: trained on some pairs, to judge others.

Both start from a policy that stays as it is, and leave no file behind.
"""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np
from torch import nn
from transformers import PrinterCallback, Trainer

from uft.collation import Collator
from uft.config import UnifiedConfig
from uft.data.mixture import FeedbackDataset
from uft.evaluation.scoring import score_data
from uft.feedback import Example
from uft.models import FrozenReference
from uft.rlhf.reward_model import RewardModel, padding_of
from uft.rlhf.reward_training import RewardConfig, RewardTrainer
from uft.rlhf.sampling import Rewards
from uft.trainer import UnifiedTrainer

QUIET = {"save_strategy": "no", "report_to": "none", "disable_tqdm": True, "logging_strategy": "no"}


def reward_trained_on(
    pairs: Sequence[Example], policy: nn.Module, tokenizer: Any, seed: int, **options: Any
) -> RewardModel:
    """A reward model on the policy's body, trained on the pairs.  `options` are those of `RewardConfig`."""
    data = FeedbackDataset({"pairs": pairs})
    with tempfile.TemporaryDirectory(prefix="judge-") as folder:
        args = RewardConfig(output_dir=folder, seed=seed, **QUIET, **options)
        model = RewardModel.of(policy, tokenizer, seed=seed)
        _train(RewardTrainer(model, data, args))
    model.model.eval()
    return model


def implicit_trained_on(
    pairs: Sequence[Example], policy: nn.Module, tokenizer: Any, seed: int, beta: float = 0.1, **options: Any
) -> Rewards:
    """β [log π − log π_ref] of a copy of the policy trained by DPO on the pairs; `options` are of `UnifiedConfig`."""
    with tempfile.TemporaryDirectory(prefix="judge-") as folder:
        trainer = UnifiedTrainer(
            model=copy.deepcopy(policy), objective={"preset": "dpo", "beta": beta},
            args=UnifiedConfig(output_dir=folder, seed=seed, **QUIET, **options),
            train_dataset=FeedbackDataset({"pairs": pairs}), processing_class=tokenizer,
        )  # fmt: skip
        _train(trainer)
    trained = trainer.model.eval()
    reference = FrozenReference(copy.deepcopy(policy).to(trained.device))

    def rewards(examples: Sequence[Example]) -> list[list[float]]:
        data = FeedbackDataset({"pairs": list(examples)})
        scores = score_data(trained, data, Collator(padding_of(tokenizer)), reference=reference)
        values = beta * (scores.logp - scores.reference_logp)
        ends = np.cumsum([0, *(len(example.responses) for example in examples)])
        return [values[start:end].tolist() for start, end in pairwise(ends)]

    return rewards


def _train(trainer: Trainer) -> None:
    trainer.remove_callback(PrinterCallback)
    trainer.train()


BY = {"reward": reward_trained_on, "implicit": implicit_trained_on}
