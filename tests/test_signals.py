"""SIGTERM and Ctrl-C end training between two steps, behind a checkpoint from which it goes on as if never stopped."""

import os
import signal
import time
from pathlib import Path

import pytest
import torch
from mixed import dataset, model, parameters, trainer
from processes import assert_same_end, join, ranks_resume, start, start_ranks, wait_for, write_end
from safetensors.torch import load_file
from transformers import TrainerCallback

from uft.checkpoint import is_whole, last_checkpoint
from uft.signals import StopSignals, Terminated

OBJECTIVE = {"sft": {"loss": "nll"}, "preference": {"loss": "dpo"}}


class Slow(TrainerCallback):
    """Says which step has begun, and gives signals time to fall into it."""

    def on_step_begin(self, args, state, control, **kwargs):
        Path(args.output_dir, f"began-{args.process_index}").write_text(str(state.global_step + 1))
        time.sleep(0.02)


def train(folder: str, resume: bool = False, **options) -> None:
    defaults = dict(
        per_device_train_batch_size=2, gradient_accumulation_steps=2, max_steps=24, logging_steps=3,
        save_strategy="steps", save_steps=500, max_grad_norm=1.0, save_total_limit=2,
    )  # fmt: skip
    run = trainer(
        OBJECTIVE, dataset(("demonstrations", "pairs")), output_dir=folder, callbacks=[Slow()], **defaults | options
    )
    run.train(resume_from_checkpoint=resume)
    write_end(run, folder)


def began(folder: Path, rank: int = 0) -> int:
    path = folder / f"began-{rank}"
    return int(path.read_text() or 0) if path.exists() else 0


def steps(folder: Path) -> list[int]:
    return sorted(int(path.name[11:]) for path in folder.glob("checkpoint-*"))


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    folder = tmp_path_factory.mktemp("uninterrupted")
    assert join([start(train, str(folder))]) == [0]
    return folder


@pytest.mark.parametrize("number, status", [(signal.SIGTERM, 143), (signal.SIGINT, 1)])
def test_a_signal_saves_a_checkpoint_and_leaves(number, status, uninterrupted, tmp_path):
    child = start(train, str(tmp_path), stderr=tmp_path / "stderr")
    wait_for(lambda: began(tmp_path) >= 5)
    os.kill(child.pid, number)
    assert join([child]) == [status]  # multiprocessing makes 1 of every exception, and so of KeyboardInterrupt
    (step,) = steps(tmp_path)
    assert 5 <= step <= 7  # of the step in which it came, not later
    assert is_whole(tmp_path / f"checkpoint-{step}")
    said = (tmp_path / "stderr").read_text()
    assert "stopping at the end of this optimiser step" in said
    name = "Ctrl-C" if number == signal.SIGINT else "SIGTERM"
    assert f"stopped by {name} after step {step} of 24; checkpoint in {tmp_path}/checkpoint-{step}" in said
    assert join([start(train, str(tmp_path), resume=True)]) == [0]
    assert_same_end(tmp_path, uninterrupted)


def test_a_second_interrupt_stops_at_once(tmp_path):
    def dawdle(folder):
        class Dawdle(TrainerCallback):
            def on_substep_end(self, args, state, control, **kwargs):
                Path(folder, "inside").touch()
                time.sleep(60)

        trainer(
            "dpo", dataset(("pairs",)), output_dir=folder, callbacks=[Dawdle()], gradient_accumulation_steps=2,
            per_device_train_batch_size=2,
        ).train()  # fmt: skip

    child = start(dawdle, str(tmp_path), stderr=tmp_path / "stderr")
    wait_for((tmp_path / "inside").exists)
    os.kill(child.pid, signal.SIGINT)
    wait_for(lambda: "stopping at the end" in (tmp_path / "stderr").read_text())  # two at once would be one
    assert child.is_alive()
    os.kill(child.pid, signal.SIGINT)
    assert join([child], seconds=10) == [1]
    assert steps(tmp_path) == []


@ranks_resume
def test_a_signal_to_one_rank_stops_all_at_the_same_step(tmp_path):
    options = {"ddp_backend": "gloo", "max_steps": 8}
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    assert join(start_ranks(train, str(whole), **options)) == [0, 0]
    children = start_ranks(train, str(stopped), **options)
    wait_for(lambda: began(stopped, rank=1) >= 3)
    os.kill(children[1].pid, signal.SIGTERM)
    assert join(children) == [143, 143]
    assert len(steps(stopped)) == 1 and 3 <= steps(stopped)[0] <= 5
    assert join(start_ranks(train, str(stopped), resume=True, **options)) == [0, 0]
    assert_same_end(stopped, whole)


def test_the_best_checkpoint_strategy_saves_too(tmp_path):
    """It decides anew, after every evaluation, whether to save."""
    options = {
        "save_strategy": "best", "metric_for_best_model": "eval_loss", "eval_strategy": "steps", "eval_steps": 1,
        "eval_dataset": dataset(("pairs",), n=2), "greater_is_better": True, "load_best_model_at_end": True,
    }  # fmt: skip
    child = start(train, str(tmp_path), **options)
    wait_for(lambda: began(tmp_path) >= 8)
    os.kill(child.pid, signal.SIGTERM)
    assert join([child]) == [143]
    assert last_checkpoint(tmp_path) and steps(tmp_path)[-1] >= 8


def test_handlers_are_put_back_and_ignored_signals_stay_ignored():
    before = signal.signal(signal.SIGTERM, signal.SIG_IGN)
    try:
        with StopSignals() as signals:
            assert signal.getsignal(signal.SIGTERM) is signal.SIG_IGN
            assert signal.getsignal(signal.SIGINT) == signals._note
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
        with pytest.raises(KeyError), StopSignals():
            raise KeyError  # whatever ends training
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGTERM, before)


def test_one_process_reduces_nothing(monkeypatch, tmp_path):
    run = trainer("sft", dataset(("demonstrations",)), output_dir=tmp_path)
    reduced = []
    reduce = run.accelerator.reduce
    monkeypatch.setattr(run.accelerator, "reduce", lambda t, how: reduced.append(t.shape) or reduce(t, how))
    run.train()
    assert torch.Size([3]) not in reduced


class Told(TrainerCallback):
    """SIGTERM at an event of the trainer, `times` times: its handler is called, so that the process is not at risk."""

    def __init__(self, event: str, step: int, times: int = 1):
        self.step, self.times = step, times
        setattr(self, event, self._tell)

    def _tell(self, args, state, control, **kwargs):
        if state.global_step == self.step and self.times:
            self.times -= 1
            signal.getsignal(signal.SIGTERM)(signal.SIGTERM, None)


def told(folder: Path, *callbacks, **options):
    return trainer(
        OBJECTIVE, dataset(("demonstrations", "pairs")), output_dir=folder, callbacks=list(callbacks), **options
    )


def saved_weights(checkpoint: Path) -> torch.Tensor:
    policy = model(seed=9)
    policy.load_state_dict(load_file(checkpoint / "model.safetensors"), strict=False)
    return parameters(policy)


@pytest.mark.parametrize("event, step", [("on_step_begin", 2), ("on_step_end", 3), ("on_train_end", 3)])
def test_a_signal_at_the_last_step_stops_behind_its_checkpoint(event, step, tmp_path):
    """In the step, between it and what follows it, and behind that: nothing that would come next is begun."""
    whole = told(tmp_path / "whole", max_steps=3)
    whole.train()
    run = told(tmp_path, Told(event, step), max_steps=3)
    with pytest.raises(Terminated) as raised:
        run.train()
    checkpoint = tmp_path / "checkpoint-3"
    assert str(raised.value) == (
        f"stopped by SIGTERM after step 3 of 3; checkpoint in {checkpoint}, resuming goes on from there"
    )
    assert raised.value.code == 143
    assert steps(tmp_path) == [3] and is_whole(checkpoint)
    assert not run.is_in_train and not (tmp_path / "run.json").exists()
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    assert torch.equal(saved_weights(checkpoint), parameters(whole.model))
    resumed = told(tmp_path, max_steps=3)
    resumed.train(resume_from_checkpoint=True)
    assert resumed.state.global_step == 3 and torch.equal(parameters(resumed.model), parameters(whole.model))


def test_a_checkpoint_that_is_there_already_is_not_written_again(tmp_path):
    class Count(TrainerCallback):
        saves = 0

        def on_save(self, args, state, control, **kwargs):
            self.saves += 1

    count = Count()
    run = told(tmp_path, Told("on_train_end", 2), count, save_strategy="steps", save_steps=2)
    with pytest.raises(Terminated):
        run.train()
    assert count.saves == 1 and steps(tmp_path) == [2]


def test_the_checkpoint_of_an_earlier_training_is_not_taken_for_ones_own(tmp_path):
    run = told(tmp_path, Told("on_step_begin", 0, times=2))
    for _ in range(2):
        with pytest.raises(Terminated, match="after step 1 of 2"):
            run.train()
        assert torch.equal(saved_weights(tmp_path / "checkpoint-1"), parameters(run.model))
    run.train()  # and the signal of an earlier training is not one's own
    assert run.state.global_step == 2


def test_the_best_weights_are_not_saved_as_those_of_the_last_step(tmp_path):
    """They have been loaded when a signal comes behind the last step, which was not saved as it was not the best."""
    options = dict(
        max_steps=3, save_strategy="best", metric_for_best_model="eval_loss", greater_is_better=True,
        eval_strategy="steps", eval_steps=1, eval_dataset=dataset(("pairs",), n=2), load_best_model_at_end=True,
    )  # fmt: skip
    run = told(tmp_path, Told("on_train_end", 3), **options)
    with pytest.raises(Terminated, match=r"after step 3 of 3; checkpoint in .*/checkpoint-1, resuming goes on"):
        run.train()
    assert run.state.best_global_step == 1 and steps(tmp_path) == [1]
    assert torch.equal(saved_weights(tmp_path / "checkpoint-1"), parameters(run.model))
    resumed = told(tmp_path, **options)
    resumed.train(resume_from_checkpoint=True)
    assert resumed.state.global_step == 3 and torch.equal(parameters(resumed.model), parameters(run.model))
