"""Reward models: what they are (`reward_model`), and how they are trained (`reward_training`)."""

from uft.rlhf.reward_config import RewardConfig
from uft.rlhf.reward_model import RewardEnsemble, RewardModel
from uft.rlhf.reward_training import train_reward_model

__all__ = ["RewardConfig", "RewardEnsemble", "RewardModel", "train_reward_model"]
