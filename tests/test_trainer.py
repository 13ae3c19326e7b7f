"""The optimiser step: exact denominators, references that agree, evaluation that is a mean."""

import numpy as np
import pytest
import torch
from mixed import KINDS, Tokenizer, dataset, model, parameters, trainer
from peft import LoraConfig
from transformers import TrainerCallback

from uft.collation import Collator
from uft.config import UnifiedConfig
from uft.feedback import mismatched
from uft.models import FrozenReference, score
from uft.statistics import step_statistics
from uft.trainer import UnifiedTrainer

EVERYTHING = {
    "sft": {"loss": "nll", "weight": 0.7},
    "chosen": {"loss": "sequence_mean_nll", "on": "chosen", "weight": 0.3},
    "preference": {"loss": "dpo", "beta": 0.5},
    "kto": {"loss": "kto", "beta": 0.5},
    "bco": {"loss": "bco", "on": "labels+scores", "beta": 0.5},
    "una": {"loss": "una_mse", "on": "responses+demonstrations", "beta": 0.5},
    "kl": {"direction": "reference_policy", "on": "demonstrations", "weight": 0.5},
}
LORA = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")


class KeepGradients(TrainerCallback):
    """Remembers the gradient of every optimiser step."""

    def __init__(self):
        self.gradients = []

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        self.gradients.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]))


def gradients_of(objective, data, steps=2, policy=None, **args):
    keep = KeepGradients()
    run = trainer(objective, data, policy, callbacks=[keep], max_steps=steps, **args)
    # the reference differs from the policy, so that no term is at its trivial starting value
    run.reference = FrozenReference(model(seed=1))
    run.train()
    losses = [entry["loss"] for entry in run.state.log_history if "loss" in entry]
    return keep.gradients, losses, run


@pytest.fixture(scope="module")
def whole_step():
    return gradients_of(EVERYTHING, dataset(), per_device_train_batch_size=40, layout="padded")


LAYOUTS = {
    "padded": {"layout": "padded"},
    "left": {"layout": "padded", "padding_side": "left"},
    "multiple": {"layout": "padded", "pad_to_multiple_of": 32},
    "padded to a budget": {"layout": "padded", "token_budget": 64, "max_length": 64},
    "packed": {"layout": "packed", "prefix_sharing": False},
    "shared": {"layout": "packed"},
    "packed to a multiple": {"layout": "packed", "pad_to_multiple_of": 128},
    "packed to a budget": {"layout": "packed", "token_budget": 64, "max_length": 64},
    "packed by masks": {"layout": "packed", "attention": "eager"},
    "unfused": {"layout": "packed", "fused_head": False},
}


SIZES = [(20, 2), (8, 5), (3, 14), (1, 40)]
CUTS = [(name, *size) for name in LAYOUTS for size in (SIZES if name in ("left", "shared") else SIZES[::3])]


@pytest.mark.parametrize("layout, size, accumulation", CUTS)
def test_gradient_does_not_depend_on_the_layout(whole_step, layout, size, accumulation):
    options = dict(LAYOUTS[layout])
    policy = model()
    if attention := options.pop("attention", None):
        policy.set_attn_implementation(attention)
    gradients, losses, run = gradients_of(
        EVERYTHING, dataset(), policy=policy, per_device_train_batch_size=size,
        gradient_accumulation_steps=accumulation, **options,
    )  # fmt: skip
    assert run.data_collator.collate.packed == (options["layout"] == "packed")
    expected, expected_losses, _ = whole_step
    for found, want in zip(gradients, expected):
        assert (found - want).norm() <= 1e-5 * want.norm()
    np.testing.assert_allclose(losses, expected_losses, rtol=1e-5)


def test_every_kind_and_term_takes_part(whole_step):
    _, _, run = whole_step
    logged = run.state.log_history[0]
    assert {f"loss/{name}" for name in EVERYTHING} <= logged.keys()
    assert {f"{kind}/nll" for kind in KINDS} <= logged.keys()
    for name in (
        "rewards/chosen",
        "rewards/margins",
        "logps/chosen",
        "logps/rejected",
        "kl",
        "reverse_kl",
        "entropy",
        "kl/kto",
        "weight/sft",
    ):
        assert name in logged
    parts = sum(logged[f"weight/{name}"] * logged[f"loss/{name}"] for name in EVERYTHING)
    assert logged["loss"] == pytest.approx(parts, rel=1e-5)
    assert {f"examples/{kind}": 16 for kind in KINDS}.items() <= run.counters().items()


def test_order_within_the_step_does_not_matter(whole_step):
    """Another seed permutes the same 40 rows; the first step sees all of them."""
    gradients, _, _ = gradients_of(EVERYTHING, dataset(), steps=1, per_device_train_batch_size=40, data_seed=7)
    # KTO's KL pairs each row with its predecessor in the data set, so it does not change either
    assert (gradients[0] - whole_step[0][0]).norm() <= 1e-5 * whole_step[0][0].norm()


def test_a_wrong_denominator_would_be_seen(whole_step, monkeypatch):
    """The comparison above fails for the mean of micro-batch means, which is what it is there to catch."""
    from uft.trainer import Step, UnifiedTrainer

    def per_micro_batch(self, iterator, n, device):
        items = [next(iterator) for _ in range(n)]
        counts = sum(self.objective.counts(batch) for batch in items[0].batches).clamp(min=1) * n
        return items, Step(counts, step_statistics(self, self.model_wrapped, lambda: items, update=True), n)

    monkeypatch.setattr(UnifiedTrainer, "get_batch_samples", per_micro_batch)
    gradients, _, _ = gradients_of(
        EVERYTHING, dataset(), steps=1, per_device_train_batch_size=8, gradient_accumulation_steps=5
    )
    assert (gradients[0] - whole_step[0][0]).norm() > 1e-3 * whole_step[0][0].norm()


@pytest.mark.parametrize("size", [1, 7, 40])
def test_evaluation_is_an_exact_mean(size):
    run = trainer(EVERYTHING, dataset(), eval_dataset=dataset(), per_device_eval_batch_size=size)
    run.reference = FrozenReference(model(seed=1))
    found = run.evaluate()
    expected = _evaluation_by_hand(run)
    assert found["eval_loss"] == pytest.approx(expected, rel=1e-5)


def _evaluation_by_hand(run):
    """All rows in one batch, straight through the objective."""
    examples = mismatched(dataset()[:])
    batch = Collator(0, sources=KINDS)(examples)
    statistics = step_statistics(run, run.model, lambda: [run.data_collator(examples)], update=False)
    loss, _ = run.objective(run.scored(run.model, batch), run.objective.counts(batch), statistics)
    return float(loss)


# ---- what is refused, told and counted ----


def test_data_that_no_term_uses_is_refused():
    with pytest.raises(ValueError, match=r"'pairs' holds examples of kind pair, which no term of objective 'sft' uses"):
        trainer("sft", dataset(("demonstrations", "pairs")))


def test_reference_none_is_refused_where_one_is_needed():
    with pytest.raises(ValueError, match="'dpo' needs a reference"):
        trainer("dpo", dataset(("pairs",)), reference="none")


def test_simpo_needs_no_reference():
    run = trainer("simpo", dataset(("pairs",)), reference="none")
    run.train()
    assert run.counters().get("reference_forwards", 0) == 0


@pytest.mark.parametrize("option", [{"gradient_checkpointing": True}, {"bf16": True}])
def test_other_training_options_run(option):
    run = trainer(EVERYTHING, dataset(), **option)
    before = parameters(run.model).clone()
    run.train()
    assert not torch.equal(parameters(run.model), before)
    assert np.isfinite(run.state.log_history[0]["loss"])


def test_a_compiled_policy_has_a_frozen_reference():
    data = dataset(("demonstrations", "pairs"))
    losses = []
    for options in ({}, {"torch_compile": True, "torch_compile_backend": "eager"}):
        run = trainer("dpo_nll", data, **options)
        run.train()
        losses.append([entry["loss"] for entry in run.state.log_history if "loss" in entry])
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)


def test_imitating_chosen_answers_is_imitating_them_as_demonstrations():
    """Leaving the rejected rows out must not leave out what the chosen ones are."""
    from dataclasses import replace

    pairs = dataset(("demonstrations", "pairs"))
    imitated = [replace(e, kind="demonstration", responses=e.responses[:1], preferences=())
                for e in pairs.examples["pairs"]]  # fmt: skip
    demonstrations = type(pairs)({"demonstrations": pairs.examples["demonstrations"], "pairs": imitated})
    with_pairs, _, run = gradients_of("sft_chosen", pairs, steps=1, per_device_train_batch_size=16)
    with_demonstrations, _, _ = gradients_of("sft", demonstrations, steps=1, per_device_train_batch_size=16)
    assert (with_pairs[0] - with_demonstrations[0]).norm() <= 1e-5 * with_demonstrations[0].norm()
    assert run.state.log_history[0]["loss/sft"] > 0


def test_rows_that_no_term_is_on_cost_nothing():
    """Imitating chosen answers needs no pass over the rejected ones."""
    run = trainer("sft_chosen", dataset(("pairs",)), max_steps=1)
    run.train()
    lengths = [len(e.prompt) + len(e.responses[0].tokens) for e in dataset(("pairs",))]
    assert run.counters()["policy_forwards"] == run.counters()["backwards"] == 8
    assert run.counters()["tokens"] == sum(lengths)
    assert run.counters()["flops"] == run.meter.of_examples(run.train_dataset).flops


@pytest.mark.parametrize("size", [1, 3, 16])
def test_metrics_of_two_preference_terms_are_one_mean(size):
    objective = {"preference": {"loss": "dpo"}, "quality": {"loss": "una_mse", "on": "scores"}}
    run = trainer(objective, dataset(("pairs", "scores")), eval_dataset=dataset(("pairs", "scores")),
                  per_device_eval_batch_size=size)  # fmt: skip
    run.reference = FrozenReference(model(seed=1))
    batch = Collator(0, sources=("pairs", "scores"))(dataset(("pairs", "scores"))[:])
    with torch.no_grad():
        scored = score(model(), batch, run.reference)
    desired = batch.target >= 0.5
    expected = 0.1 * (scored.logp - scored.reference_logp)[desired].mean()
    assert run.evaluate()["eval_rewards/chosen"] == pytest.approx(float(expected), rel=1e-4)


def test_a_reference_for_some_rows_only_leaves_the_metrics_of_others_whole():
    objective = {"preference": {"loss": "simpo", "beta": 2.0}, "kl": {"on": "demonstrations"}}
    run = trainer(objective, dataset(("demonstrations", "pairs")), eval_dataset=dataset(("demonstrations", "pairs")))
    found = run.evaluate()
    assert np.isfinite(found["eval_rewards/margins"])
    assert "eval_pairs/accuracy" not in found  # no reference, no implicit reward


def test_the_logged_divergence_is_the_exact_one():
    run = trainer({"kl": {"on": "demonstrations"}}, dataset(("demonstrations",)),
                  eval_dataset=dataset(("demonstrations",)), per_device_eval_batch_size=3)  # fmt: skip
    run.reference = FrozenReference(model(seed=1))
    batch = Collator(0, sources=("demonstrations",))(dataset(("demonstrations",))[:])
    with torch.no_grad():
        logp, other = (m(batch.input_ids, attention_mask=batch.attention_mask).logits[:, :-1].double().log_softmax(-1)
                       for m in (model(), model(seed=1)))  # fmt: skip
    expected = {
        "kl": logp.exp() * (logp - other), "reverse_kl": other.exp() * (other - logp), "entropy": -logp.exp() * logp
    }  # fmt: skip
    found = run.evaluate()
    for name, value in expected.items():
        assert found[f"eval_{name}"] == pytest.approx(value.sum(-1)[batch.shifted].mean().item(), rel=1e-4), name
    assert found["eval_loss"] == pytest.approx(found["eval_kl"])


def test_evaluation_passes_once_over_data_for_bco(monkeypatch):
    run = trainer("bco", dataset(("labels",)), eval_dataset=dataset(("labels",)), per_device_eval_batch_size=4)
    passes, forward = [], type(run.model).forward
    monkeypatch.setattr(type(run.model), "forward", lambda self, **kw: passes.append(self) or forward(self, **kw))
    run.evaluate()
    assert sum(m is run.model for m in passes) == 2  # the eight labels, four at a time


def test_the_seed_decides_fresh_weights_and_adapters(tmp_path):
    def args(seed):
        return UnifiedConfig(output_dir=str(tmp_path), use_cpu=True, seed=seed)

    def drawn(seed, **options):
        torch.manual_seed(int(torch.randint(1000, (1,))))  # whatever was drawn before
        run = UnifiedTrainer(
            options.pop("model", None) or model().config, "sft", args(seed),
            dataset(("demonstrations",)), processing_class=Tokenizer(), **options,
        )  # fmt: skip
        return torch.cat([p.flatten() for name, p in run.model.named_parameters() if "lora_A" in name or not options])

    assert torch.equal(drawn(1), drawn(1)) and not torch.equal(drawn(1), drawn(2))
    adapter = [drawn(seed, model=model(), peft_config=LORA) for seed in (1, 1, 2)]
    assert torch.equal(adapter[0], adapter[1]) and not torch.equal(adapter[0], adapter[2])


def test_terms_without_data_are_told():
    run = trainer("dpo_nll", dataset(("pairs",)))
    assert run.idle_terms == ["sft"] == run.record()["idle_terms"]
    assert trainer("dpo_nll", dataset(("pairs", "demonstrations"))).idle_terms == []


def test_a_reference_of_another_size_costs_what_it_costs():
    big, small = (
        trainer("dpo", dataset(("pairs",)), reference_model=model(seed=1, num_hidden_layers=layers)).meter.of_examples(
            dataset(("pairs",))
        )
        for layers in (8, 2)
    )
    assert big.flops > 1.5 * small.flops


def test_peak_memory_is_that_of_the_run():
    before = trainer("sft", dataset(("demonstrations",)))
    before.train()
    spent = torch.ones(100_000_000)
    del spent
    after = trainer("sft", dataset(("demonstrations",)))
    after.train()
    peaks = [run.record()["compute"]["peak_memory_bytes"] for run in (before, after)]
    assert abs(peaks[1] - peaks[0]) < 200_000_000


def test_cpo_reports_its_own_reward():
    run = trainer("cpo", dataset(("pairs",)), eval_dataset=dataset(("pairs",)))
    batch = Collator(0, sources=("pairs",))(dataset(("pairs",))[:])
    with torch.no_grad():
        scored = score(model(), batch)
    better, worse = batch.preferences.unbind(-1)
    margin = 0.1 * (scored.logp[better] - scored.logp[worse]).mean()
    assert run.evaluate()["eval_rewards/margins"] == pytest.approx(margin.item(), rel=1e-4)


def test_what_cannot_be_evaluated_is_refused():
    run = trainer("sft", dataset(("demonstrations",)))
    with pytest.raises(ValueError, match="found list to evaluate on"):
        run.evaluate([{"prompt": "a", "completion": "b"}])


def test_arguments_that_would_be_ignored_are_refused():
    for option, message in (
        ({"neftune_noise_alpha": 5.0}, "neftune_noise_alpha is 5.0"),
        ({"label_smoothing_factor": 0.1}, "label_smoothing_factor is 0.1"),
        ({"train_sampling_strategy": "group_by_length"}, "train_sampling_strategy is 'group_by_length'"),
        ({"pad_to_multiple_of": 0}, "pad_to_multiple_of is 0; want at least 1"),
        ({"gradient_accumulation_steps": 0}, "gradient_accumulation_steps is 0; want at least 1"),
        ({"per_device_train_batch_size": 0}, "per_device_train_batch_size is 0; want at least 1"),
        ({"max_steps": 0}, "max_steps is 0"),
        ({"max_length": 40, "token_budget": 40, "pad_to_multiple_of": 64}, "max_length 40, padded 64; want room"),
        ({"accelerator_config": {"split_batches": True}}, "accelerator_config.split_batches is on"),
        ({"accelerator_config": {"dispatch_batches": True}}, "accelerator_config.dispatch_batches is on"),
    ):
        with pytest.raises(ValueError, match=message):
            trainer("sft", dataset(("demonstrations",)), **option)
    for name in ("compute_metrics", "compute_loss_func", "data_collator"):
        with pytest.raises(ValueError, match=f"{name} has no meaning here"):
            UnifiedTrainer(model(), "sft", train_dataset=dataset(("demonstrations",)), **{name: print})


def test_a_source_may_be_called_lightweight():
    data = dataset(("demonstrations",))
    renamed = type(data)({"lightweight": data.examples["demonstrations"]})
    assert "eval_lightweight/nll" in trainer("sft", renamed, eval_dataset=renamed).evaluate()


def test_a_finished_run_resumed_with_more_epochs_goes_on(tmp_path):
    options = dict(output_dir=tmp_path, max_steps=-1, save_strategy="epoch")
    trainer("sft", dataset(("demonstrations",)), num_train_epochs=1, **options).train()
    longer = trainer("sft", dataset(("demonstrations",)), num_train_epochs=3, **options)
    longer.train(resume_from_checkpoint=True)
    assert longer.state.global_step == 3


def test_a_checkpoint_beyond_the_last_step_is_refused(tmp_path):
    options = dict(output_dir=tmp_path, save_strategy="steps", save_steps=2)
    trainer("sft", dataset(("demonstrations",)), max_steps=4, **options).train()
    for checkpoint in (True, str(tmp_path / "checkpoint-4")):
        shorter = trainer("sft", dataset(("demonstrations",)), max_steps=3, **options)
        with pytest.raises(ValueError, match="checkpoint-4: is of step 4 and this run ends at step 3"):
            shorter.train(resume_from_checkpoint=checkpoint)


def test_lengths_in_epochs_and_in_steps_are_compared(tmp_path):
    options = dict(output_dir=tmp_path, save_strategy="steps", save_steps=1, per_device_train_batch_size=4)
    trainer("sft", dataset(("demonstrations",)), max_steps=3, **options).train()
    longer = trainer("sft", dataset(("demonstrations",)), max_steps=-1, num_train_epochs=2, **options)
    longer.train(resume_from_checkpoint=True)
    assert longer.state.global_step == 4
    shorter = trainer("sft", dataset(("demonstrations",)), max_steps=-1, num_train_epochs=1, **options)
    with pytest.raises(ValueError, match="checkpoint-4: is of step 4 and this run ends at step 2"):
        shorter.train(resume_from_checkpoint=True)


class Early(TrainerCallback):
    """Ends a run after its second step."""

    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop = state.global_step == 2


def test_a_run_that_a_callback_ended_stays_ended(tmp_path):
    def resumed(**options):
        run = trainer("sft", dataset(("demonstrations",)), output_dir=tmp_path, save_strategy="steps", save_steps=1,
                      callbacks=[Early()], **{"max_steps": 6} | options)  # fmt: skip
        run.train(resume_from_checkpoint=(tmp_path / "run.json").exists())
        return run.state.global_step

    assert resumed() == 2
    assert resumed() == 2
    assert resumed(max_steps=7) == 7  # another run, which its callback does not end


def test_a_finished_run_comes_back_as_its_best_model(tmp_path):
    def fresh():
        return trainer(
            "sft", dataset(("demonstrations",)), eval_dataset=dataset(("demonstrations",), n=2), output_dir=tmp_path,
            max_steps=3, save_strategy="steps", save_steps=1, eval_strategy="steps", eval_steps=1,
            load_best_model_at_end=True, metric_for_best_model="eval_loss", greater_is_better=True,
        )  # fmt: skip

    first, again = fresh(), fresh()
    first.train()
    again.train(resume_from_checkpoint=True)
    assert first.state.best_global_step < 3
    assert torch.equal(parameters(first.model), parameters(again.model))
