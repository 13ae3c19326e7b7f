"""Trainers of reward models and of reinforcement learning are watched as well."""

import json
from dataclasses import replace

import pytest
from tiny import tiny_model, tiny_tokenizer
from watched_runs import PAIRS, read_data, tensorboard

from uft.rlhf.config import RLConfig
from uft.rlhf.ppo import RLTrainer
from uft.rlhf.reward import RewardConfig, RewardModel, train_reward_model
from uft.watching.lines import read

OPTIONS = {
    "use_cpu": True, "max_steps": 2, "logging_steps": 1, "per_device_train_batch_size": 2, "save_strategy": "no",
    "report_to": "tensorboard", "max_length": 64, "disable_tqdm": False,
}  # fmt: skip


def test_a_reward_model(tmp_path, capsys):
    tokenizer = tiny_tokenizer()
    data = read_data({"pairs": PAIRS})
    args = RewardConfig(output_dir=str(tmp_path / "out"), eval_strategy="steps", eval_steps=1, **OPTIONS)
    train_reward_model(RewardModel.of(tiny_model(tokenizer, 0), tokenizer), data, args, data)
    scalars = set(tensorboard(tmp_path / "out").Tags()["scalars"])
    assert {
        "loss/train",
        "loss/eval",
        "loss/preference (eval)",
        "rewards/margins",
        "speed/tokens_per_second",
    } <= scalars
    journal = read(tmp_path / "out" / "progress.jsonl")
    assert journal[0]["trainer"] == "RewardTrainer" and any("eval_rewards/accuracies" in e for e in journal)
    assert "step 2/2, 100 %: held out: loss" in capsys.readouterr().out


def test_reinforcement_learning(tmp_path, capsys):
    tokenizer = tiny_tokenizer()
    prompts = [replace(e, responses=()) for e in read_data({"pairs": PAIRS})]
    args = RLConfig(
        output_dir=str(tmp_path), advantage="rloo", samples=2, max_new_tokens=4, kl_in="reward", **OPTIONS
    )  # fmt: skip

    def length(examples):
        return [[float(len(r.tokens)) for r in e.responses] for e in examples]

    RLTrainer(tiny_model(tokenizer, 0), length, prompts, args, tokenizer).train()
    shown = tensorboard(tmp_path)
    scalars = set(shown.Tags()["scalars"])
    assert {"loss/policy", "reward/reward", "reward/std", "divergence/kl_sequence", "answers/length"} <= scalars
    assert not any(tag.startswith("other/") for tag in scalars)
    journal = read(tmp_path / "progress.jsonl")
    assert journal[0]["objective"] == "rloo" and journal[-1]["reason"] == "finished"
    assert journal[1]["reward"] > 0 and "samples.jsonl" not in {path.name for path in tmp_path.iterdir()}
    assert json.loads((tmp_path / "run.json").read_text())["steps"] == 2
    assert "step 2/2, 100 %: loss" in capsys.readouterr().out


def test_what_reinforcement_learning_does_not_read_is_refused(tmp_path):
    with pytest.raises(ValueError, match="loss_plane is True, which has no effect here"):
        RLConfig(output_dir=str(tmp_path), loss_plane=True, **OPTIONS)
