"""SIGTERM and Ctrl-C end training between two steps, behind a checkpoint from which it goes on as if never stopped."""

import os
import signal
import time
from pathlib import Path

import pytest
import torch
from mixed import dataset, trainer
from processes import assert_same_end, join, ranks_resume, start, start_ranks, wait_for, write_end
from transformers import TrainerCallback

from uft.checkpoint import is_whole, last_checkpoint
from uft.signals import StopSignals

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
