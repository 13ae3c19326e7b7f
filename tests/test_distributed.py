"""Several ranks take the step that one process takes."""

import copy
import json

import pytest
import torch
from mixed import KINDS, dataset, examples, model, parameters, trainer
from peft import LoraConfig
from ranks import run
from test_trainer import EVERYTHING

from uft.data.mixture import FeedbackDataset

LORA = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")


def of_sizes(**sizes: int):
    return FeedbackDataset({kind: examples(kind, sizes.get(kind, 8)) for kind in KINDS})


DATA = {
    "mixed kinds": dataset(),
    # 41 rows in steps of 8: the last one is a single row, which all ranks but one lack
    "one row left": of_sizes(pairs=9),
    # a source of a single row, which only one rank ever has
    "a rare source": of_sizes(demonstrations=1),
    "no documents": dataset(KINDS[:4]),
}


def train(folder, name, world, data, objective=EVERYTHING, lora=False, **options):
    """One epoch and a bit, in steps of 8 rows."""
    from transformers.trainer_callback import PrinterCallback

    own = lora or options.get("reference") == "cached"  # the policy as it is at the start is the reference
    run = trainer(
        objective, DATA[data], reference_model=None if own else model(seed=1), per_device_train_batch_size=8 // world,
        max_steps=7, optim="sgd", eval_dataset=dataset(("pairs", "demonstrations"), n=5), per_device_eval_batch_size=3,
        output_dir=folder / f"run-{name}", ddp_backend="gloo" if world > 1 else None,
        peft_config=copy.deepcopy(LORA) if lora else None,
        **options,
    )  # fmt: skip
    run.remove_callback(PrinterCallback)
    assert run.args.world_size == world
    start = parameters(run.model)
    run.train()
    evaluation = run.evaluate()
    counters = run.counters()
    if run.args.process_index == 0:
        torch.save(parameters(run.model) - start, folder / f"{name}.pt")
        history = [entry for entry in run.state.log_history if "loss" in entry]
        (folder / f"{name}.json").write_text(json.dumps([history, counters, evaluation]))


def assert_same(folder):
    """The weights moved alike, and what was logged and counted is the same."""
    one, many = (torch.load(folder / f"{name}.pt") for name in ("one", "many"))
    assert (one - many).norm() <= 1e-4 * one.norm() and one.norm() > 0
    (history, counters, evaluation), (theirs, their_counters, their_evaluation) = (
        json.loads((folder / f"{name}.json").read_text()) for name in ("one", "many")
    )
    for ours, other in zip(history, theirs, strict=True):
        assert ours.keys() == other.keys()
        for key in ours:
            assert other[key] == pytest.approx(ours[key], rel=1e-4, abs=1e-6), key
    for key, amount in counters.items():
        if "seconds" not in key and key != "tokens_run":
            assert their_counters[key] == amount, key
    for key, amount in evaluation.items():
        if not any(word in key for word in ("runtime", "per_second")):
            assert their_evaluation[key] == pytest.approx(amount, rel=1e-4, abs=1e-6), key


WITHOUT_KL = {"sft": {"loss": "nll"}, "preference": {"loss": "dpo"}, "una": {"loss": "una_mse", "on": "labels+scores"}}
CASES = [
    ("mixed kinds", 2, {}),
    ("one row left", 4, {}),
    pytest.param("a rare source", 2, {"layout": "padded"}, marks=pytest.mark.slow),
    pytest.param("mixed kinds", 2, {"token_budget": 64, "max_length": 64}, marks=pytest.mark.slow),
    pytest.param(
        "one row left",
        4,
        {"gradient_accumulation_steps": 2, "token_budget": 64, "max_length": 64},
        marks=pytest.mark.slow,
    ),
    ("mixed kinds", 2, {"lora": True}),
    ("no documents", 2, {"objective": WITHOUT_KL, "reference": "cached"}),
]


@pytest.mark.parametrize("data, ranks, options", CASES)
def test_ddp_takes_the_step_of_one_process(data, ranks, options, tmp_path):
    run(_train, tmp_path, 1, "one", 1, data, options)
    run(_train, tmp_path, ranks, "many", ranks, data, options)
    assert_same(tmp_path)


def _train(folder, name, world, data, options):
    train(folder, name, world, data, **options)
