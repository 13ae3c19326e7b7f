"""The optimiser step: exact denominators, references that agree, evaluation that is a mean."""

import numpy as np
import pytest
import torch
from mixed import KINDS, dataset, model, parameters, trainer
from peft import LoraConfig
from transformers import TrainerCallback

from uft.feedback import Collator, mismatched
from uft.models import AdapterReference, FrozenReference, adapter_is_identity, make_reference, merged, score

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


def gradients_of(objective, data, steps=2, **args):
    keep = KeepGradients()
    run = trainer(objective, data, callbacks=[keep], max_steps=steps, **args)
    # the reference differs from the policy, so that no term is at its trivial starting value
    run.reference = FrozenReference(model(seed=1))
    run.train()
    losses = [entry["loss"] for entry in run.state.log_history if "loss" in entry]
    return keep.gradients, losses, run


@pytest.fixture(scope="module")
def whole_step():
    return gradients_of(EVERYTHING, dataset(), per_device_train_batch_size=40)


@pytest.mark.parametrize("size, accumulation", [(20, 2), (8, 5), (3, 14), (1, 40)])
@pytest.mark.parametrize("side", ["right", "left"])
def test_gradient_does_not_depend_on_the_layout(whole_step, size, accumulation, side):
    gradients, losses, _ = gradients_of(
        EVERYTHING, dataset(), per_device_train_batch_size=size, gradient_accumulation_steps=accumulation,
        padding_side=side,
    )  # fmt: skip
    expected, expected_losses, _ = whole_step
    for found, want in zip(gradients, expected):
        assert (found - want).norm() <= 1e-5 * want.norm()
    np.testing.assert_allclose(losses, expected_losses, rtol=1e-5)


def test_every_kind_and_term_takes_part(whole_step):
    _, _, run = whole_step
    logged = run.state.log_history[0]
    assert {f"loss/{name}" for name in EVERYTHING} <= logged.keys()
    assert {f"{kind}/nll" for kind in KINDS} <= logged.keys()
    for name in ("rewards/chosen", "rewards/margins", "logps/chosen", "logps/rejected", "kl", "weight/sft"):
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
        batches = [next(iterator) for _ in range(n)]
        counts = self.objective.counts(batches[0]).clamp(min=1) * n
        return batches, Step(counts, self._statistics(self.model_wrapped, batches, update=True), n)

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
    collate = Collator(0, sources=KINDS)
    batch = collate(mismatched(dataset()[:]))
    statistics = run._statistics(run.model, [batch], update=False)
    loss, _ = run.objective(run.scored(run.model, batch), run.objective.counts(batch), statistics)
    return float(loss)


# ---- references ----


def losses_with(mode, objective="dpo_nll", lora=False, output_dir=None):
    kinds = ("demonstrations", "pairs") if objective == "dpo_nll" else ("labels", "scores")
    run = trainer(
        objective, dataset(kinds), eval_dataset=dataset(kinds, n=5), reference=mode, output_dir=output_dir,
        per_device_train_batch_size=5, gradient_accumulation_steps=2, max_steps=8,
        peft_config=LORA if lora else None,
    )  # fmt: skip
    before = run.evaluate()
    run.train()
    return before, [entry["loss"] for entry in run.state.log_history if "loss" in entry]


@pytest.mark.parametrize("objective", ["dpo_nll", "kto"])
@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
def test_references_agree_and_margins_start_at_zero(objective, lora, tmp_path):
    curves = {}
    for mode in ("frozen", "cached", *(["adapter"] if lora else [])):
        before, curves[mode] = losses_with(mode, objective, lora, tmp_path)
        assert before["eval_rewards/chosen"] == 0.0
        assert before["eval_rewards/rejected"] == 0.0
        if objective == "dpo_nll":
            assert before["eval_rewards/margins"] == 0.0
    for curve in curves.values():
        np.testing.assert_allclose(curve, curves["frozen"], rtol=1e-5)


@pytest.mark.parametrize("mode", ["frozen", "cached"])
def test_training_margins_are_exactly_zero_in_the_first_step(mode, tmp_path):
    run = trainer("dpo", dataset(("pairs",)), reference=mode, per_device_train_batch_size=3, output_dir=tmp_path)
    run.train()
    first = run.state.log_history[0]
    assert first["rewards/margins"] == 0.0 and first["rewards/chosen"] == 0.0
    assert first["loss"] == pytest.approx(np.log(2), abs=1e-7)


def test_cached_reference_is_read_back(tmp_path, monkeypatch):
    losses_with("cached", output_dir=tmp_path)
    files = {path.name for path in tmp_path.glob("_reference-*.npz")}
    assert len(files) == 2  # training and evaluation

    def refuse(*args, **kwargs):
        raise AssertionError("computed again")

    monkeypatch.setattr("uft.reference_cache.compute_logps", refuse)
    losses_with("cached", output_dir=tmp_path)
    with pytest.raises(AssertionError, match="computed again"):  # other weights, other fingerprint
        trainer(
            "dpo", dataset(("pairs",)), model(seed=5), reference="cached", output_dir=tmp_path
        ).train()  # fmt: skip


def test_damaged_cache_is_refused(tmp_path):
    losses_with("cached", output_dir=tmp_path)
    for path in tmp_path.glob("_reference-*.npz"):
        path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(ValueError, match=r"_reference-.*npz: not a readable cache"):
        losses_with("cached", output_dir=tmp_path)


def trained_adapter():
    run = trainer("sft", dataset(("demonstrations",)), peft_config=LORA, max_steps=4, learning_rate=0.1)
    run.train()
    assert not adapter_is_identity(run.model)
    return run.model


def test_after_an_earlier_stage_the_reference_is_that_stage_not_the_base():
    policy = trained_adapter()
    batch = Collator(0, sources=("pairs",))(dataset(("pairs",))[:])
    with torch.no_grad():
        stage_one = score(policy, batch).logp
        base = score(policy, batch, AdapterReference(None)).reference_logp
    assert (stage_one - base).abs().max() > 0.1  # the adapter did something, so the two can be told apart
    reference = make_reference(policy, "adapter")
    assert reference.adapter == "reference"
    run = trainer("dpo", dataset(("pairs",)), policy, eval_dataset=dataset(("pairs",)), max_steps=4)
    assert run.evaluate()["eval_rewards/margins"] == 0.0
    kept = {n: p.clone() for n, p in policy.named_parameters() if ".reference." in n}
    assert kept
    run.train()
    with torch.no_grad():
        after = score(policy, batch, run.reference)
    torch.testing.assert_close(after.reference_logp, stage_one)
    assert (after.logp - stage_one).abs().max() > 1e-3
    assert all(torch.equal(p, kept[n]) for n, p in policy.named_parameters() if n in kept)


def test_merging_the_adapter_keeps_the_model():
    policy = trained_adapter()
    batch = Collator(0, sources=("pairs",))(dataset(("pairs",))[:])
    with torch.no_grad():
        before = score(policy, batch).logp
        after = score(merged(policy), batch).logp
    torch.testing.assert_close(after, before, rtol=1e-5, atol=1e-4)


def test_frozen_reference_does_not_move_and_gets_no_gradient():
    run = trainer("dpo", dataset(("pairs",)), max_steps=3)
    before = parameters(run.reference.model).clone()
    run.train()
    assert torch.equal(parameters(run.reference.model), before)
    assert all(p.grad is None for p in run.reference.model.parameters())


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
