"""What is not finite never reaches the weights: the run names the rows it came from, or leaves the step out."""

import dataclasses
import json
import math

import pytest
import torch
from mixed import dataset, examples, parameters, trainer
from processes import join, start_ranks
from transformers import TrainerCallback

from uft import faults
from uft.checkpoint import is_whole
from uft.data.mixture import FeedbackDataset
from uft.faults import NonFiniteStep

NAN, INF = float("nan"), float("inf")
OBJECTIVE = {
    "sft": {"loss": "nll"},
    "preference": {"loss": "dpo"},
    "bco": {"loss": "bco", "on": "labels"},  # has a state that outlives the step
}
KINDS = ("demonstrations", "pairs", "labels")


def poisoned(kind: str, row: int, weight: float = NAN, kinds=KINDS) -> FeedbackDataset:
    """The data of the tests, with one row whose loss is not finite."""
    data = {name: examples(name) for name in kinds}
    bad = data[kind][row]
    answers = tuple(dataclasses.replace(response, weight=weight) for response in bad.responses)
    data[kind][row] = dataclasses.replace(bad, responses=answers)
    return FeedbackDataset(data)


class Watch(TrainerCallback):
    """The weights after each step, and in which step a row was."""

    def __init__(self):
        self.weights = []

    def on_train_begin(self, args, state, control, model, **kwargs):
        self.weights.append(parameters(model).clone())

    on_step_end = on_train_begin


def run(folder, data, *callbacks, objective=OBJECTIVE, **options):
    defaults = dict(per_device_train_batch_size=2, gradient_accumulation_steps=2, max_steps=6, max_grad_norm=1.0)
    return trainer(objective, data, output_dir=folder, callbacks=list(callbacks), **defaults | options)


@pytest.mark.parametrize("kind, row, weight", [("demonstrations", 3, NAN), ("pairs", 5, INF), ("labels", 1, NAN)])
def test_the_run_stops_behind_a_checkpoint_and_names_the_rows(kind, row, weight, tmp_path):
    watch, healthy = Watch(), Watch()
    faulty = run(tmp_path, poisoned(kind, row, weight), watch)
    with pytest.raises(NonFiniteStep) as raised:
        faulty.train()
    said, step = str(raised.value), faulty.state.global_step
    assert said.startswith(f"step {step + 1}: the loss is {weight if math.isnan(weight) else 'inf'}")
    named = {part.split("'")[1]: part.split(", row ")[1] for part in said.split("; ") if part.startswith("data set")}
    assert str(row) in named[kind].split(", ")
    assert sum(len(rows.split(", ")) for rows in named.values()) <= 2  # of its micro-batch of two
    run(tmp_path / "healthy", dataset(KINDS), healthy).train()
    # what the weights are, and what is saved, is what they would have been without that row
    assert torch.equal(parameters(faulty.model), healthy.weights[step])
    if not step:
        assert said.endswith("no step was taken before it")
        return
    assert said.endswith(f"the state before it is in {tmp_path}/checkpoint-{step}")
    assert is_whole(tmp_path / f"checkpoint-{step}")
    mended = run(tmp_path, dataset(KINDS), resume_despite=["data"])
    mended.train(resume_from_checkpoint=True)
    assert torch.equal(parameters(mended.model), healthy.weights[-1])
    history = [entry["loss/bco"] for entry in mended.state.log_history if "loss/bco" in entry]
    assert len(history) == 6 and all(map(math.isfinite, history))


def test_a_step_is_skipped_where_the_user_says_so(tmp_path, monkeypatch):
    warnings = []
    monkeypatch.setattr(faults.logger, "warning", warnings.append)
    watch = Watch()
    faulty = run(tmp_path, poisoned("labels", 1), watch, on_non_finite="skip", max_steps=12)
    output = faulty.train()
    moved = [not torch.equal(a, b) for a, b in zip(watch.weights, watch.weights[1:])]
    assert moved.count(False) == 2  # once in each of the two epochs
    assert faulty.counters()["skipped_steps"] == 2 == len(warnings)
    skipped = moved.index(False) + 1
    assert f"step {skipped} is skipped: the loss is nan" in warnings[0] and "data set 'labels', row 1" in warnings[0]
    assert torch.isfinite(parameters(faulty.model)).all() and math.isfinite(output.training_loss)
    numbers = [v for entry in faulty.state.log_history for v in entry.values() if isinstance(v, float)]
    # the norm of the skipped gradient is logged as it was
    assert sum(not math.isfinite(v) for v in numbers) <= 2
    logged = {entry["step"]: entry for entry in faulty.state.log_history if "loss/sft" in entry}
    entries = [entry for entry in faulty.state.log_history if entry["step"] == skipped]
    assert entries and not any("loss" in entry for entry in entries)
    assert skipped not in logged and all(math.isfinite(entry["loss"]) for entry in logged.values())
    assert logged[12]["skipped_steps"] == 2
    assert json.loads((tmp_path / "run.json").read_text())["compute"]["skipped_steps"] == 2
    assert all(math.isfinite(v) for v in faulty.run_state.statistics["bco"].values())


@pytest.mark.parametrize("clip", [0.0, 1.0])
def test_a_gradient_alone(clip, tmp_path):
    """A finite loss with an infinite gradient: the rows of the whole step are to blame."""
    watch = Watch()
    faulty = run(tmp_path, dataset(KINDS), watch, max_grad_norm=clip)

    def overflow(grad):
        return torch.full_like(grad, INF) if faulty.state.global_step == 2 else grad  # in the third step

    next(faulty.model.parameters()).register_hook(overflow)
    with pytest.raises(NonFiniteStep, match=r"step 3: the loss is finite, but the norm of its gradient is (inf|nan); "):
        faulty.train()
    assert torch.equal(parameters(faulty.model), watch.weights[2])
    assert is_whole(tmp_path / "checkpoint-2")


def test_rows_are_named_by_their_own_log_probability(tmp_path):
    """Where it is not finite itself, its neighbours in the micro-batch are not named."""
    data = {"demonstrations": examples("demonstrations", 8)}
    bad = data["demonstrations"][5]
    data["demonstrations"][5] = dataclasses.replace(bad, prompt=bad.prompt.copy())
    data["demonstrations"][5].prompt[0] = 60  # a token of its own, with an embedding that is spoilt
    from mixed import model

    policy = model(vocab_size=61)
    policy.get_input_embeddings().weight.data[60] = NAN
    faulty = trainer("sft", FeedbackDataset(data), policy, output_dir=tmp_path)
    with pytest.raises(NonFiniteStep, match=r"step 1: the loss is nan; data set 'demonstrations', row 5; no step was"):
        faulty.train()


def test_a_scaler_looks_at_gradients_itself(tmp_path):
    """Infinite gradients are how it finds its scale, so that they are no fault."""
    faulty = run(tmp_path, dataset(KINDS))
    faulty.train()
    state, control = faulty.state, faulty.control
    faulty.guard.saw(torch.tensor(1.0), _scored())
    faulty.grad_norm = torch.tensor(INF)
    faulty.accelerator.scaler = object()
    faulty.guard.on_pre_optimizer_step(faulty.args, state, control)
    faulty.accelerator.scaler = None
    faulty.guard.begin()
    faulty.guard.saw(torch.tensor(1.0), _scored())
    with pytest.raises(NonFiniteStep):
        faulty.guard.on_pre_optimizer_step(faulty.args, state, control)


def _scored():
    from types import SimpleNamespace

    batch = SimpleNamespace(source=torch.tensor([0]), row=torch.tensor([0]))
    return SimpleNamespace(logp=torch.tensor([-1.0]), batch=batch)


def test_nothing_is_kept_of_the_graph(tmp_path):
    """What is remembered of a micro-batch holds no activations."""
    kept = []

    class Look(TrainerCallback):
        def on_substep_end(self, args, state, control, **kwargs):
            kept.extend(tensor.requires_grad for seen in healthy.guard._seen for tensor in seen)

    healthy = run(tmp_path, dataset(KINDS), Look(), max_steps=1)
    healthy.train()
    assert kept and not any(kept) and healthy.guard._seen == []


def test_a_full_disk_does_not_hide_the_reason(tmp_path, monkeypatch):
    def full(*args):
        raise OSError("No space left on device")

    monkeypatch.setattr("uft.checkpoint.write_manifest", full)
    faulty = run(tmp_path, poisoned("labels", 1))
    with pytest.raises(NonFiniteStep, match=r"row 1.*could not be saved: .*No space left on device"):
        faulty.train()


def test_unknown_choice_is_refused(tmp_path):
    with pytest.raises(ValueError, match="on_non_finite is 'hope'; want error or skip"):
        run(tmp_path, dataset(KINDS), on_non_finite="hope")


def ranks(folder: str, on_non_finite: str) -> None:
    faulty = run(
        folder, poisoned("pairs", 5, kinds=("pairs",)), objective="dpo", on_non_finite=on_non_finite,
        ddp_backend="gloo", max_steps=4, per_device_train_batch_size=1,
    )  # fmt: skip
    faulty.train()
    assert faulty.counters()["skipped_steps"] == 2


@pytest.mark.slow
def test_ranks_agree(tmp_path):
    """One of them has the bad row; both stop with the same message, or skip the same step."""
    assert join(start_ranks(ranks, str(tmp_path), "error", stderr=tmp_path / "stderr")) == [1, 1]
    said = [line for line in (tmp_path / "stderr").read_text().splitlines() if line.startswith("NonFiniteStep")]
    assert len(said) == 2 and said[0] == said[1] and "data set 'pairs', row 5;" in said[0]
    assert join(start_ranks(ranks, str(tmp_path / "skip"), "skip")) == [0, 0]


def test_skipping_ends_where_every_step_is_bad(tmp_path):
    """Weights that are spoilt make every step bad; a run that skips them all would end as if it had trained."""
    faulty = run(tmp_path, dataset(KINDS), Watch(), on_non_finite="skip", max_steps=30)
    faulty.model.lm_head.weight.data[0] = NAN
    with pytest.raises(NonFiniteStep, match=r"step 10: the loss is nan, the 10th such step in a row"):
        faulty.train()
