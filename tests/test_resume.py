"""Killed at any moment and resumed, a run ends with the same weights, metrics and counters, to the bit."""

import copy
import json
import multiprocessing
import os
import pkgutil
import random
import shutil
import signal
import time
from pathlib import Path

import pytest
import torch
from mixed import Tokenizer, dataset, model, parameters, trainer
from peft import LoraConfig
from processes import TIMING, assert_same_end, join, ranks_resume, start, start_ranks, wait_for, write_end

from uft.checkpoint import is_whole, last_checkpoint, superfluous
from uft.config import UnifiedConfig
from uft.logps import Logps
from uft.stages import Budget, Stage, run_stages

OBJECTIVE = {
    "sft": {"loss": "nll"},
    "preference": {"loss": "dpo"},
    "bco": {"loss": "bco", "on": "labels"},  # has a state that outlives the step
}
LORA = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")


def train(folder: str, resume: bool, objective=OBJECTIVE, lora=False, eval_steps=6, **options) -> None:
    """One run of 18 steps over several epochs; saves off the rhythm of logging, and inside an accumulation window."""
    torch.set_num_threads(1)
    run = trainer(
        objective, dataset(("demonstrations", "pairs", "labels"), n=8), output_dir=folder, max_steps=18,
        per_device_train_batch_size=2, gradient_accumulation_steps=2, save_strategy="steps", save_steps=4,
        logging_steps=3, eval_strategy="steps", eval_steps=eval_steps, eval_dataset=dataset(("pairs",), n=4),
        save_total_limit=2, max_grad_norm=1.0, peft_config=copy.deepcopy(LORA) if lora else None, **options,
    )  # fmt: skip
    checkpoint = last_checkpoint(folder) if resume else None
    run.train(resume_from_checkpoint=checkpoint)
    write_end(run, folder)


def train_stages(folder: str, resume: bool, boundary: str) -> None:
    """Likelihood, then DPO, with an adapter."""
    torch.set_num_threads(1)
    stages = [
        Stage("sft", "sft", on=("demonstrations",), budget=Budget(steps=6)),
        Stage("dpo", "dpo", on=("pairs",), budget=Budget(steps=6), boundary=boundary),
    ]
    args = UnifiedConfig(
        output_dir=folder, use_cpu=True, per_device_train_batch_size=4, save_strategy="steps", save_steps=2,
        logging_steps=1, disable_tqdm=True, learning_rate=1e-2, report_to="none", use_peft=True, lora_r=4,
    )  # fmt: skip
    policy, records = run_stages(
        model(), stages, dataset(("demonstrations", "pairs")), args, Tokenizer(), resume=resume
    )
    counters = [
        {name: n for name, n in record["compute"].items() if not any(word in name for word in TIMING)}
        for record in records
    ]
    torch.save(parameters(policy), f"{folder}/final.pt")
    Path(folder, "final.json").write_text(json.dumps([[], counters]))


def in_child(folder: Path, resume: bool, run=train, **options) -> multiprocessing.Process:
    return start(run, str(folder), resume, **options)


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    folder = tmp_path_factory.mktemp("uninterrupted")
    torch.set_num_threads(1)
    start = time.monotonic()
    child = in_child(folder, resume=False)
    child.join()
    assert child.exitcode == 0
    return folder, time.monotonic() - start


@pytest.mark.parametrize("kills", [8, pytest.param(20, marks=pytest.mark.slow)])
def test_killed_at_random_moments(kills, uninterrupted, tmp_path):
    expected, duration = uninterrupted
    moments = random.Random(0)
    resumed_from = set()
    for trial in range(kills):
        folder = tmp_path / f"run{trial}"
        child = in_child(folder, resume=False)
        time.sleep(moments.uniform(0.0, duration))
        os.kill(child.pid, signal.SIGKILL)
        child.join()
        folder.mkdir(exist_ok=True)
        assert all(is_whole(path) for path in folder.glob("checkpoint-*")), "a torn checkpoint was left"
        checkpoint = last_checkpoint(folder)
        resumed_from.add(checkpoint and Path(checkpoint).name)
        child = in_child(folder, resume=True)
        child.join()
        assert child.exitcode == 0
        assert_same_end(folder, expected)
        shutil.rmtree(folder)
    assert len(resumed_from) > 2  # the kills did fall at different moments


LONG = ("a cached reference", "stages, adapter kept")
KTO = {"sft": {"loss": "nll"}, "kto": {"loss": "kto", "on": "pairs+labels"}}
CACHED = {"sft": {"loss": "nll"}, "dpo": {"loss": "dpo"}, "una": {"loss": "una_mse", "on": "labels"}}
BEST = {"load_best_model_at_end": True, "metric_for_best_model": "eval_loss", "greater_is_better": False}


def test_a_stage_begun_anew_draws_the_same_adapter(tmp_path):
    """A kill before the second stage's first checkpoint: its adapter is drawn again, by the seed."""
    for folder in ("whole", "again"):
        (tmp_path / folder).mkdir()
    train_stages(str(tmp_path / "whole"), False, "merge")
    shutil.copytree(tmp_path / "whole", tmp_path / "again", dirs_exist_ok=True)
    shutil.rmtree(tmp_path / "again" / "dpo")
    train_stages(str(tmp_path / "again"), True, "merge")
    assert_same_end(tmp_path / "again", tmp_path / "whole")


OTHER_WAYS = {
    "an adapter, which switched off is the reference": (train, {"objective": KTO, "lora": True}),
    "a cached reference": (train, {"objective": CACHED, "reference": "cached"}),
    "the best model at the end": (train, BEST | {"eval_steps": 4}),
    "stages, adapter merged": (train_stages, {"boundary": "merge"}),
    "stages, adapter kept": (train_stages, {"boundary": "keep"}),
}


@pytest.mark.parametrize(
    "way",
    [pytest.param(way, marks=[pytest.mark.slow] if way in LONG else []) for way in OTHER_WAYS],
)
def test_killed_in_other_ways_of_training(way, tmp_path):
    run, options = OTHER_WAYS[way]
    expected, start = tmp_path / "whole", time.monotonic()
    expected.mkdir()
    child = in_child(expected, False, run, **options)
    child.join()
    assert child.exitcode == 0
    duration, moments = time.monotonic() - start, random.Random(way)
    for trial in range(3):
        folder = tmp_path / f"run{trial}"
        child = in_child(folder, False, run, **options)
        time.sleep(duration * (trial + moments.random()) / 3)
        os.kill(child.pid, signal.SIGKILL)
        child.join()
        folder.mkdir(exist_ok=True)
        child = in_child(folder, True, run, **options)
        child.join()
        assert child.exitcode == 0
        assert_same_end(folder, expected)


def train_ranks(folder: str, resume: bool) -> None:
    """Two steps per epoch and a checkpoint after every third, so that some are in the middle of an epoch."""
    run = trainer(
        OBJECTIVE, dataset(("demonstrations", "pairs", "labels"), n=8), output_dir=folder, max_steps=8,
        per_device_train_batch_size=4, gradient_accumulation_steps=2, save_strategy="steps", save_steps=3,
        logging_steps=4, max_grad_norm=1.0, ddp_backend="gloo",
    )  # fmt: skip
    run.train(resume_from_checkpoint=resume and last_checkpoint(folder))
    write_end(run, folder)


def kill(children) -> None:
    for child in children:
        os.kill(child.pid, signal.SIGKILL)
    for child in children:
        child.join()


@ranks_resume
@pytest.mark.parametrize("trials", [1, pytest.param(8, marks=pytest.mark.slow)])
def test_two_ranks_killed_and_resumed(trials, tmp_path):
    """Every rank goes on with its own rows, counters and metrics."""
    whole, moments = tmp_path / "whole", random.Random(trials)
    begin = time.monotonic()
    assert join(start_ranks(train_ranks, str(whole), False)) == [0, 0]
    duration = time.monotonic() - begin
    for trial in range(trials):
        folder = tmp_path / f"run{trial}"
        children = start_ranks(train_ranks, str(folder), False)
        if trial:
            time.sleep(moments.uniform(0.0, duration))
        else:
            wait_for((folder / "checkpoint-3").exists)
        kill(children)
        assert trial or last_checkpoint(folder) == str(folder / "checkpoint-3")
        assert join(start_ranks(train_ranks, str(folder), True)) == [0, 0]
        assert_same_end(folder, whole)


def kills(function):
    """The function, whose process is killed while it runs for the second time."""
    calls = []

    def killing(*args, **kwargs):
        calls.append(1)
        if len(calls) == 2:
            os.kill(os.getpid(), signal.SIGKILL)
        return function(*args, **kwargs)

    return killing


@pytest.mark.parametrize(
    "moment",
    ["transformers.Trainer._save_optimizer_and_scheduler", "uft.checkpoint.write_manifest", "uft.checkpoint.publish",
     "uft.checkpoint.superfluous"],
)  # fmt: skip
def test_killed_while_a_checkpoint_is_written(moment, uninterrupted, tmp_path, monkeypatch):
    module, name = moment.rsplit(".", 1)
    owner = pkgutil.resolve_name(module)
    with monkeypatch.context() as patch:
        patch.setattr(owner, name, kills(getattr(owner, name)))
        assert join([start(train, str(tmp_path), False)]) == [-signal.SIGKILL]
    assert is_whole(tmp_path / "checkpoint-4")
    assert all(is_whole(path) for path in tmp_path.glob("checkpoint-*"))
    assert join([start(train, str(tmp_path), True)]) == [0]
    assert_same_end(tmp_path, uninterrupted[0])
    assert not (tmp_path / "partial").exists()


def test_killed_while_the_reference_cache_is_written(tmp_path, monkeypatch):
    options = {"objective": CACHED, "reference": "cached"}
    whole = tmp_path / "whole"
    assert join([start(train, str(whole), False, **options)]) == [0]

    def half_the_file(file, **arrays):
        file.write(b"PK" * 100)
        file.flush()
        os.kill(os.getpid(), signal.SIGKILL)

    def between_the_files(logps, path):
        save(logps, path)
        os.kill(os.getpid(), signal.SIGKILL)

    save = Logps.save
    for target, killing in (("np.savez", half_the_file), ("Logps.save", between_the_files)):
        folder = tmp_path / killing.__name__
        with monkeypatch.context() as patch:
            patch.setattr(f"uft.logps.{target}", killing)
            assert join([start(train, str(folder), False, **options)]) == [-signal.SIGKILL]
        assert len(list(folder.glob("_reference-*.npz"))) == (killing is between_the_files)
        assert join([start(train, str(folder), True, **options)]) == [0]
        assert_same_end(folder, whole)


def test_killed_between_stages(tmp_path):
    """Behind the first stage's last step, shortly before it, or in the second, which begins where the first ended."""
    whole = tmp_path / "whole"
    whole.mkdir()
    train_stages(str(whole), False, "keep")
    for gone in (("dpo",), ("dpo", "sft/checkpoint-6"), ("dpo/checkpoint-6", "dpo/checkpoint-4", "dpo/run.json")):
        folder = tmp_path / str(len(gone))
        shutil.copytree(whole, folder)
        for name in gone:
            (Path.unlink if name.endswith(".json") else shutil.rmtree)(folder / name)
        train_stages(str(folder), True, "keep")
        assert_same_end(folder, whole)


def test_resume_without_a_checkpoint_says_so(tmp_path):
    run = trainer("dpo", dataset(("pairs",)), output_dir=tmp_path)
    with pytest.raises(ValueError, match="no whole checkpoint"):
        run.train(resume_from_checkpoint=True)


def test_which_checkpoints_are_superfluous(tmp_path):
    for step in (5, 10, 15, 100):
        (tmp_path / f"checkpoint-{step}").mkdir()

    def gone(limit, best=None):
        return [int(p.name[11:]) for p in superfluous(tmp_path, limit, best and tmp_path / f"checkpoint-{best}")]

    assert gone(2) == [5, 10]
    assert gone(2, best=5) == [10, 15]
    assert gone(2, best=15) == [5, 10]
    assert gone(1, best=5) == [10, 15]  # the newest stays too, to go on from
    assert gone(9) == []
