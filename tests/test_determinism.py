"""The same seed gives the same run, to the bit, on a CPU."""

import copy

import pytest
import torch
from mixed import dataset, model, parameters, trainer
from peft import LoraConfig
from processes import TIMING

OBJECTIVE = {"sft": {"loss": "nll"}, "preference": {"loss": "dpo"}, "bco": {"loss": "bco", "on": "labels"}}
LORA = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")
WAYS = {
    "all weights": {},
    "adapter": {"peft_config": LORA},
    "cached reference": {"reference": "cached"},
    "dropout": {"peft_config": LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM", lora_dropout=0.3),
                "disable_dropout": False},
}  # fmt: skip


def once(folder, way, seed, drawn):
    policy = model()
    torch.rand(drawn)  # what was drawn before does not matter
    run = trainer(
        OBJECTIVE, dataset(("demonstrations", "pairs", "labels")), policy, output_dir=folder, seed=seed, max_steps=5,
        per_device_train_batch_size=3, gradient_accumulation_steps=2, max_grad_norm=1.0, **copy.deepcopy(WAYS[way]),
    )  # fmt: skip
    run.train()
    history = [
        {name: value for name, value in entry.items() if not any(word in name for word in TIMING)}
        for entry in run.state.log_history
    ]
    return parameters(run.model), history


@pytest.mark.parametrize("way", WAYS)
def test_the_same_seed_gives_the_same_run(way, tmp_path):
    weights, history = once(tmp_path / "a", way, 3, drawn=7)
    again, history_again = once(tmp_path / "b", way, 3, drawn=11)
    assert torch.equal(weights, again)
    assert history == history_again
    other, _ = once(tmp_path / "c", way, 4, drawn=7)
    assert not torch.equal(weights, other)
