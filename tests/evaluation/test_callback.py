"""The suite during training: logged, compared with the start, and without effect on the run."""

import json

import pytest
import torch
from evaluation_data import DEMONSTRATIONS, PAIRS, SUMS
from mixed import parameters
from peft import LoraConfig
from processes import TIMING
from tiny import tiny_model, tiny_tokenizer
from transformers import TrainerCallback

from uft.config import UnifiedConfig
from uft.evaluation.callback import EvaluationCallback
from uft.evaluation.config import EvaluationConfig
from uft.evaluation.report import Report
from uft.trainer import UnifiedTrainer

CONFIG = {
    "demonstrations": {"held_out": DEMONSTRATIONS[3:]},
    "pairs": {"held_out": PAIRS[3:]},
    "verifiable": {"sums": {"data": SUMS, "verify": "number"}},
    "divergence": {"prior": {"data": DEMONSTRATIONS, "along": ["responses", "policy", "reference"]}},
    "generation": {"max_new_tokens": 4, "temperature": 1.0},
}
LORA = LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM", lora_dropout=0.2)


def made(folder, adapter=False, **args):
    tokenizer = tiny_tokenizer()
    defaults = dict(
        use_cpu=True, max_steps=4, logging_steps=1, per_device_train_batch_size=4, learning_rate=5e-3, report_to="none",
        disable_tqdm=True, save_strategy="no", disable_dropout=False, max_length=64,
    )  # fmt: skip
    policy = tiny_model(tokenizer, 0)
    policy.config.attention_dropout = 0.2  # so that random numbers decide
    for module in policy.modules():
        if hasattr(module, "attention_dropout"):
            module.attention_dropout = 0.2
    return UnifiedTrainer(
        model=policy, objective="dpo_nll", processing_class=tokenizer,
        args=UnifiedConfig(output_dir=str(folder), **defaults | args), peft_config=LORA if adapter else None,
        train_dataset={"demonstrations": DEMONSTRATIONS, "pairs": PAIRS},
        eval_dataset={"demonstrations": DEMONSTRATIONS[:2], "pairs": PAIRS[:2]},
    )  # fmt: skip


def losses(run):
    return [
        {name: value for name, value in entry.items() if not any(word in name for word in TIMING)}
        for entry in run.state.log_history
        if "loss" in entry
    ]


def measured(run):
    return {e["step"]: e for e in run.state.log_history if "eval_demonstrations/nll" in e and "eval_loss" not in e}


@pytest.mark.parametrize("way", ["frozen", "adapter", "padded", "unfused"])
def test_training_goes_on_as_if_nothing_were_measured(way, tmp_path):
    options = {"adapter": way == "adapter"} | {
        "padded": {"layout": "padded"}, "unfused": {"fused_head": False},
    }.get(way, {})  # fmt: skip
    plain = made(tmp_path / "plain", **options)
    plain.train()
    run = made(tmp_path / "measured", **options)
    run.add_callback(EvaluationCallback(run, EvaluationConfig.of(CONFIG), every=1))
    run.train()
    assert torch.equal(parameters(run.model), parameters(plain.model))
    assert losses(run) == losses(plain)
    assert run.counters().keys() == plain.counters().keys()
    assert list(measured(run)) == [0, 1, 2, 3, 4]


def test_the_numbers_are_those_of_the_suite_and_compare_with_the_start(tmp_path):
    run = made(tmp_path, eval_strategy="steps", eval_steps=2)
    run.add_callback(EvaluationCallback(run, EvaluationConfig.of(CONFIG)))
    run.train()
    entries = measured(run)
    assert list(entries) == [0, 2, 4]
    start = entries[0]
    assert start["eval_pairs/rewards/margins"] == 0  # its reference is the policy as it was
    assert start["eval_divergence/prior/responses/kl"] == pytest.approx(0, abs=1e-6)
    assert "eval_pairs/F" not in start and "eval_verifiable/F" in entries[4]
    nll = [entries[step]["eval_demonstrations/nll"] for step in (0, 2, 4)]
    assert entries[4]["eval_demonstrations/nll_change"] == pytest.approx(nll[2] - nll[0], abs=1e-6)
    assert abs(nll[2] - nll[0]) > 1e-2
    assert entries[4]["eval_divergence/prior/policy/kl"] > 1e-4

    found = Report.of(tmp_path / "evaluation" / "step-4")
    assert found.metrics["demonstrations/nll"] == pytest.approx(nll[2])
    from uft.evaluation.suite import evaluate

    again = evaluate(run.model, run.processing_class, EvaluationConfig.of(CONFIG), run.reference)
    assert again.metrics["demonstrations/nll"] == pytest.approx(nll[2], rel=1e-5)
    assert again.metrics["divergence/prior/policy/kl"] == pytest.approx(
        found.metrics["divergence/prior/policy/kl"], rel=1e-3
    )


def test_several_evaluation_sets_are_one_measurement_which_chooses_the_best(tmp_path):
    run = made(
        tmp_path, eval_strategy="steps", eval_steps=2, save_strategy="best", load_best_model_at_end=True,
        metric_for_best_model="eval_pairs/likelihood/accuracies",
    )  # fmt: skip
    run.eval_dataset = {"a": run.eval_dataset, "b": run.eval_dataset}
    run.add_callback(EvaluationCallback(run, EvaluationConfig.of(CONFIG)))
    seen = []

    class Watch(TrainerCallback):
        def on_evaluate(self, args, state, control, metrics=None, **kwargs):
            seen.append(metrics)

    run.add_callback(Watch())
    run.train()
    assert len(measured(run)) == 3  # at 0, 2 and 4, though there are two sets
    assert len(seen) == 4 and all("eval_pairs/F" in metrics for metrics in seen)
    assert run.state.best_metric == max(m["eval_pairs/likelihood/accuracies"] for m in seen)


def test_a_resumed_run_compares_with_the_same_start(tmp_path):
    whole = made(tmp_path / "whole", save_strategy="steps", save_steps=2)
    whole.add_callback(EvaluationCallback(whole, EvaluationConfig.of(CONFIG), every=2))
    whole.train()
    resumed = made(tmp_path / "whole", save_strategy="steps", save_steps=2)
    (tmp_path / "whole" / "evaluation" / "step-4" / "evaluation.json").unlink()
    resumed.add_callback(EvaluationCallback(resumed, EvaluationConfig.of(CONFIG), every=2))
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    assert torch.equal(parameters(whole.model), parameters(resumed.model))
    assert measured(resumed)[4] == measured(whole)[4]
    assert json.loads((tmp_path / "whole" / "evaluation" / "step-4" / "evaluation.json").read_text())["before"]


def test_a_resumed_run_without_its_start_says_so(tmp_path, caplog):
    run = made(tmp_path, save_strategy="steps", save_steps=2)
    run.train()
    resumed = made(tmp_path, save_strategy="steps", save_steps=2)
    resumed.add_callback(EvaluationCallback(resumed, EvaluationConfig.of(CONFIG), every=2))
    import logging

    caplog.set_level(logging.WARNING)
    logging.getLogger("transformers").propagate = True
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    logging.getLogger("transformers").propagate = False
    assert "not compared with its start" in caplog.text
    assert "eval_pairs/F" not in measured(resumed)[4] and "eval_pairs/likelihood/accuracies" in measured(resumed)[4]


def test_evaluating_outside_of_training_measures_nothing_more(tmp_path):
    run = made(tmp_path)
    run.add_callback(EvaluationCallback(run, EvaluationConfig.of(CONFIG)))
    assert "eval_demonstrations/nll_sequence" not in run.evaluate()


def test_what_is_refused(tmp_path):
    run = made(tmp_path)
    with pytest.raises(ValueError, match="ranks is 'first'"):
        EvaluationCallback(run, EvaluationConfig.of(CONFIG), ranks="first")
    with pytest.raises(ValueError, match="every is 0"):
        EvaluationCallback(run, EvaluationConfig.of(CONFIG), every=0)
    run.reference = None
    with pytest.raises(ValueError, match="the trainer has none"):
        EvaluationCallback(run, EvaluationConfig.of(CONFIG))
