"""The reference in its three forms: the same rewards, margins of exactly 0 at the start, nothing kept that is stale."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from mixed import VOCABULARY, dataset, model, parameters, trainer
from peft import LoraConfig

from uft import loading, reference_cache
from uft.collation import Collator
from uft.config import UnifiedConfig
from uft.faults import NonFiniteStep
from uft.logps import MISSING, Logps
from uft.models import AdapterReference, adapter_is_identity, make_reference, merged, score

LORA = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")


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


def test_a_damaged_cache_is_computed_again(tmp_path, monkeypatch):
    """As one that is missing is: it is a cache.  Every kind of damage is noticed."""
    monkeypatch.setattr(reference_cache.logger, "warning", lambda text: said.append(text))
    _, losses = losses_with("cached", output_dir=tmp_path)
    whole = {path: path.read_bytes() for path in tmp_path.glob("_reference-*.npz")}
    assert whole
    for damaged in (lambda b: b[:100], lambda b: b"", lambda b: b.replace(b[-400:-390], b"0123456789")):
        for path, content in whole.items():
            path.write_bytes(damaged(content))
        said = []
        assert losses_with("cached", output_dir=tmp_path)[1] == losses
        assert len(said) == 2 and all("_reference-" in text and "computing it again" in text for text in said), said
        assert {path: path.read_bytes() for path in whole} == whole


# ---- what a cache is named after ----


def caches(monkeypatch, data=None, world_size=1, **options):
    """The names of the files (training, evaluation) in which a run would look for its reference."""
    names = []
    run = trainer(
        "dpo", data or dataset(("pairs",)), eval_dataset=dataset(("pairs",), n=3), reference="cached", **options
    )
    with monkeypatch.context() as patched:
        patched.setattr(UnifiedConfig, "world_size", world_size)
        patched.setattr(reference_cache, "_kept", lambda path, needed: names.append(path.name) or {})
        run.reference_cache.prepare()
    return names


OF_THE_BATCHES = [
    {"world_size": 2},
    {"token_budget": 64, "max_length": 64},
    {"per_device_train_batch_size": 4},
    {"data_seed": 7},
    {"pad_to_multiple_of": 16},
]


def test_an_exact_cache_is_named_after_the_batches_of_training(monkeypatch):
    names = {name for options in [{}, *OF_THE_BATCHES] for name in caches(monkeypatch, **options)[:1]}
    assert len(names) == 1 + len(OF_THE_BATCHES)
    assert caches(monkeypatch) == caches(monkeypatch)


def test_an_exact_cache_of_evaluation_has_batches_of_its_own(monkeypatch):
    training, evaluation = caches(monkeypatch)
    assert training != evaluation
    other_training, other_evaluation = caches(monkeypatch, per_device_eval_batch_size=2)
    assert other_training == training and other_evaluation != evaluation


def test_a_cache_that_is_not_exact_is_one_for_all_batches(monkeypatch):
    def loosely(**options):
        return caches(monkeypatch, reference_cache_exact=False, **options)

    names = loosely()
    for options in OF_THE_BATCHES:
        assert loosely(**options) == names, options
    assert not {*names} & {*caches(monkeypatch)}
    # what the numbers depend on still counts
    assert loosely(data=dataset(("pairs",), n=7))[0] != names[0] and loosely(bf16=True)[0] != names[0]


def test_a_row_that_several_ranks_had_is_the_first_ones(monkeypatch):
    first, second = (
        Logps({"a": np.array([0, 1, 2, 3])}, {"a": np.float32(x)}) for x in ([1, 2, MISSING], [MISSING, 3, 4])
    )
    monkeypatch.setattr(reference_cache, "gather_object", lambda own: [first, *own])
    found = reference_cache._gathered(second, SimpleNamespace(num_processes=2))
    assert [found.get(("a", i)) for i in range(3)] == [[1.0], [2.0], [4.0]]
    assert reference_cache._gathered(second, SimpleNamespace(num_processes=1)) is second


# ---- adapters ----


def trained_adapter(config=LORA, **options):
    run = trainer("sft", dataset(("demonstrations",)), peft_config=config, max_steps=4, learning_rate=0.1, **options)
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


def with_dropout():
    """A policy whose adapter has learnt something and has dropout, and a batch."""
    config = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM", lora_dropout=0.5)
    policy = trained_adapter(config, disable_dropout=False)
    return policy, Collator(0, sources=("pairs",))(dataset(("pairs",))[:])


def test_the_reference_has_no_dropout_while_the_policy_has():
    policy, batch = with_dropout()
    trained = make_reference(policy, "adapter")
    assert trained.adapter == "reference"
    with torch.no_grad():
        policy.eval()
        stage_one = score(policy, batch).logp
        with policy.disable_adapter():
            base = score(policy, batch).logp
        for reference, expected in ((trained, stage_one), (AdapterReference(None), base)):
            policy.train()
            found = [score(policy, batch, reference) for _ in range(2)]
            assert (found[0].logp - found[1].logp).abs().max() > 1e-2  # dropout is on
            for scored in found:
                torch.testing.assert_close(scored.reference_logp, expected)
            assert all(module.training for module in policy.modules())
            policy.eval()
            score(policy, batch, reference)
            assert not any(module.training for module in policy.modules())


def test_a_reference_that_fails_leaves_the_policy_as_it_was():
    policy, _ = with_dropout()
    reference = make_reference(policy, "adapter")
    policy.train()
    trained = {name for name, parameter in policy.named_parameters() if parameter.requires_grad}
    with pytest.raises(KeyError), reference.applied(policy):
        assert not policy.training and policy.active_adapter == "reference"
        raise KeyError
    assert policy.training and policy.active_adapter == "default"
    assert {name for name, parameter in policy.named_parameters() if parameter.requires_grad} == trained


def test_evaluation_of_an_adapter_with_dropout_is_exact_and_goes_back_to_training():
    """In several batches, so that a policy that comes back from the reference with dropout would be seen."""
    policy, _ = with_dropout()
    run = trainer("dpo", dataset(("pairs",)), policy, eval_dataset=dataset(("pairs",)), disable_dropout=False,
                  per_device_eval_batch_size=3)  # fmt: skip
    run.model.train()
    found = run.evaluate()
    assert found["eval_rewards/margins"] == found["eval_rewards/chosen"] == 0.0  # policy and reference are equal yet
    assert all(module.training for module in run.model.modules())


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


def test_cached_reference_knows_the_models_config(tmp_path):
    for rope in (10_000.0, 100.0):
        policy = model(rope_parameters={"rope_type": "default", "rope_theta": rope})
        run = trainer("dpo", dataset(("pairs",)), policy, reference="cached", output_dir=tmp_path)
        run.train()
        assert run.state.log_history[0]["rewards/margins"] == 0.0
    assert len(list(tmp_path.glob("_reference-*.npz"))) == 2


def test_cached_reference_is_computed_in_the_precision_of_training(tmp_path):
    run = trainer("dpo", dataset(("pairs",)), reference="cached", output_dir=tmp_path, bf16=True)
    run.train()
    assert run.state.log_history[0]["rewards/margins"] == 0.0


def test_an_explicit_reference_is_used_with_cached_too(tmp_path):
    margins = [
        trainer("dpo", dataset(("pairs",)), eval_dataset=dataset(("pairs",)), reference=mode, output_dir=tmp_path,
                reference_model=model(seed=1)).evaluate()["eval_rewards/margins"]
        for mode in ("frozen", "cached")
    ]  # fmt: skip
    assert margins[0] == margins[1] != 0.0


def test_the_policy_cannot_be_its_own_reference():
    policy = model()
    with pytest.raises(ValueError, match="reference is the model that is trained"):
        trainer("dpo", dataset(("pairs",)), policy, reference_model=policy)


def test_a_reference_must_know_the_tokens():
    small = model(vocab_size=VOCABULARY - 1)
    with pytest.raises(ValueError, match=f"found a vocabulary of {VOCABULARY - 1} and {VOCABULARY} in the policy"):
        trainer("dpo", dataset(("pairs",)), reference_model=small)
    padded = model(vocab_size=VOCABULARY + 4)
    assert trainer("dpo", dataset(("pairs",)), reference_model=padded).reference.model is padded
    kl = {"kl": {"loss": "kl", "on": "pairs"}}
    with pytest.raises(ValueError, match="a KL compares the same tokens"):
        trainer(kl, dataset(("pairs",)), reference_model=padded)


@pytest.mark.parametrize("mode", ["frozen", "cached"])
def test_before_training_evaluation_runs_both_models_in_the_precision_of_training(mode, tmp_path):
    data = dataset(("pairs",))
    run = trainer("dpo", data, eval_dataset=data, reference=mode, output_dir=tmp_path, bf16=True)
    assert run.evaluate()["eval_rewards/margins"] == 0.0
    exact = trainer("dpo", data, eval_dataset=data, reference=mode, output_dir=tmp_path)
    assert run.evaluate()["eval_logps/chosen"] != exact.evaluate()["eval_logps/chosen"]


@pytest.mark.parametrize("rope, reach", [("dynamic", 128), ("longrope", 32)])
def test_rotary_embeddings_that_follow_the_longest_row_are_told(rope, reach, monkeypatch):
    """Of the others in the batch, the log-probabilities of a row must not depend silently."""
    said = []
    monkeypatch.setattr(loading.logger, "warning_once", said.append)
    parameters = {"rope_type": rope, "rope_theta": 1e4, "factor": 2.0}
    if rope == "longrope":
        factors = [1.0] * 4
        parameters |= {"original_max_position_embeddings": 32, "long_factor": factors, "short_factor": factors}
    for longest in (reach, reach + 1):
        trainer("sft", dataset(("demonstrations",)), model(rope_parameters=parameters), max_length=longest)
        told = [text for text in said if f"{rope} rotary embeddings beyond {reach} tokens" in text]
        assert len(told) == (longest > reach)


def test_logps_are_kept_by_place(tmp_path):
    first = {"a": np.array([0, 2, 3]), "b": np.array([0, 1])}
    known = Logps(first, {"a": np.float32([-1, -2, MISSING]), "b": np.float32([MISSING])})
    assert known.get(("a", 0)) == [-1.0, -2.0]
    for unknown in (("a", 1), ("a", 2), ("a", -1), ("b", 0), ("c", 0)):
        assert known.get(unknown) == ()
    assert known.known("a").tolist() == [True, False] and known.known("b").tolist() == [False]
    known.fill(Logps(first, {"a": np.float32([-9, -9, -3]), "b": np.float32([-4])}))
    assert known.get(("a", 0)) == [-1.0, -2.0] and known.get(("a", 1)) == [-3.0] and known.get(("b", 0)) == [-4.0]
    known.save(tmp_path / "file.npz")
    again = Logps.load(tmp_path / "file.npz")
    assert [again.get(("a", i)) for i in (0, 1)] == [[-1.0, -2.0], [-3.0]] and Logps.load(tmp_path / "none.npz") is None


def test_a_term_on_one_side_of_pairs_has_a_cached_reference(tmp_path):
    objective = {"una": {"loss": "una_mse", "on": "rejected"}}
    losses = []
    for mode in ("frozen", "cached", "cached"):
        run = trainer(objective, dataset(("pairs",)), reference=mode, output_dir=tmp_path / mode)
        run.train()
        losses.append([entry["loss"] for entry in run.state.log_history if "loss" in entry])
    assert losses[0] == losses[1] == losses[2]
    assert len(list((tmp_path / "cached").glob("_reference-*.npz"))) == 1


def test_a_broken_reference_is_not_taken_for_a_missing_one(tmp_path):
    broken = model()
    with torch.no_grad():
        broken.get_input_embeddings().weight[7] = float("nan")
    with pytest.raises(NonFiniteStep, match="step 1: the loss is nan"):
        trainer("dpo", dataset(("pairs",)), broken, reference="cached", output_dir=tmp_path).train()


def test_adapters_that_change_nothing_yet_share_their_reference(tmp_path):
    for seed in (0, 1):
        trainer(
            "dpo", dataset(("pairs",)), peft_config=LORA, reference="cached", reference_cache_exact=False, seed=seed,
            output_dir=tmp_path / str(seed), reference_cache=str(tmp_path),
        ).train()  # fmt: skip
    assert len(list(tmp_path.glob("_reference-*.npz"))) == 1
