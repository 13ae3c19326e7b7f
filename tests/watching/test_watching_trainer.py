"""What a run writes for those who watch it, and that it is the same run as without."""

import json
import time
from pathlib import Path

import matplotlib
import numpy as np
import pytest
import torch
from matplotlib.image import imread
from mixed import parameters
from tiny import tiny_model, tiny_tokenizer
from transformers import TrainerCallback
from transformers.integrations import TensorBoardCallback
from watched_runs import DATA, HELD_OUT, PAIRS, config, read_data, tensorboard, trainer

from uft.presets import make_objective
from uft.stages import Budget, Stage, run_stages
from uft.trainer import UnifiedTrainer
from uft.watching.facts import axes_of
from uft.watching.lines import metrics_of, read
from uft.watching.path import Point
from uft.watching.plane import LossPlane, draw
from uft.watching.samples import SampleAnswers, chosen

WATCHED = {"report_to": "tensorboard", "samples": 3, "loss_plane": True}
DROPOUT = {"use_peft": True, "lora_r": 4, "lora_dropout": 0.3, "disable_dropout": False}  # draws random numbers
STAGES = [
    Stage("sft", "sft", on=("instructions",), budget=Budget(steps=4)),
    Stage("dpo", "dpo", on=("preferences",), budget=Budget(steps=8)),
]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A watched run, and its folder."""
    folder = tmp_path_factory.mktemp("watched")
    found = trainer(folder, **WATCHED, **DROPOUT)
    found.train()
    return found, folder


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """The same run as nobody watches it."""
    found = trainer(tmp_path_factory.mktemp("plain"), **DROPOUT)
    found.train()
    return found


def history(run) -> list[dict]:
    return [
        {name: value for name, value in entry.items() if "runtime" not in name and "per_second" not in name}
        for entry in run.state.log_history
    ]


def test_watching_changes_no_bit(run, plain):
    assert torch.equal(parameters(run[0].model), parameters(plain.model))
    assert history(run[0]) == history(plain)


# ---- TensorBoard ----


def test_training_and_evaluation_are_in_one_group(run):
    shown = tensorboard(run[1])
    scalars = set(shown.Tags()["scalars"])
    assert {"loss/train", "loss/eval", "loss/sft", "loss/sft (eval)", "rewards/margins", "rewards/margins (eval)",
            "optimisation/learning_rate", "optimisation/grad_norm", "weight/sft", "sources/preferences/accuracy",
            "sources/instructions/nll (eval)", "progress/epoch", "progress/num_tokens", "speed/tokens_per_second",
            "memory/peak_memory_gib"} <= scalars  # fmt: skip
    assert not any(tag.startswith(("train/", "eval/", "other/")) for tag in scalars)
    logged = {e["step"]: e["loss/sft"] for e in run[0].state.log_history if "loss/sft" in e}
    found = {e.step: e.value for e in shown.Scalars("loss/sft")}
    assert found == pytest.approx(logged)


def test_objective_settings_samples_and_plane_are_there(run):
    shown = tensorboard(run[1])
    words = {tag: shown.Tensors(tag)[0].tensor_proto.string_val[0].decode() for tag in shown.Tags()["tensors"]
             if tag.endswith("text_summary")}  # fmt: skip
    assert "| preference | Pairwise | pairs | 1.0 | dpo | 0.1 |" in words["objective/text_summary"]
    assert "| learning_rate | 0.001 |" in words["settings/text_summary"]
    assert "**answer**" in words["samples/0 instructions/text_summary"]
    assert shown.Tags()["images"] == ["loss_plane"]
    assert {"_hparams_/session_start_info", "_hparams_/experiment"} <= set(shown.summary_metadata)


def test_a_resumed_run_goes_on_in_its_folder_and_hides_what_was_lost(tmp_path):
    first = trainer(tmp_path, **WATCHED, save_strategy="steps", save_steps=2)
    first.train()
    second = trainer(tmp_path, **WATCHED, save_strategy="steps", save_steps=2)
    second.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert torch.equal(parameters(first.model), parameters(second.model))
    logs = [e for e in read(tmp_path / "progress.jsonl") if "loss" in e]
    assert "tokens_per_second" not in logs[2] and "tokens_per_second" in logs[3]  # what was counted before is not fast
    steps = [e.step for e in tensorboard(tmp_path).Scalars("loss/train")]
    assert steps == [1, 2, 3, 4, 5, 6]
    assert [e["step"] for e in logs] == steps
    answers = [json.loads(line) for line in (tmp_path / "samples.jsonl").read_text().splitlines()]
    assert [(e["step"], e["place"]) for e in answers] == [(s, p) for s in (3, 6) for p in range(3)]


def test_a_callback_that_somebody_gave_stays(tmp_path):
    given = trainer(tmp_path, callbacks=[TensorBoardCallback])
    assert TensorBoardCallback in [type(c) for c in given.callback_handler.callbacks]


# ---- samples ----


def test_samples_are_the_same_prompts_each_time(run):
    entries = [json.loads(line) for line in (run[1] / "samples.jsonl").read_text().splitlines()]
    first, second = entries[:3], entries[3:]
    assert [e["step"] for e in entries] == [3] * 3 + [6] * 3
    assert [e["prompt"] for e in first] == [e["prompt"] for e in second] and len({e["prompt"] for e in first}) == 3
    assert {e["source"] for e in first} == {"instructions", "preferences"}
    for entry in first:
        row = HELD_OUT[entry["source"]][entry["row"]]
        assert entry["prompt"] == row["prompt"] and entry["reference"] == row.get("chosen", row.get("completion"))
        assert entry["answer"] != "" and isinstance(entry["ended"], bool)


def test_every_kind_is_represented_and_no_prompt_comes_twice():
    same = [{"prompt": "say:", "completion": " a", "label": True}] * 50
    labels = [*same, {"prompt": "good:", "completion": " no", "label": False}]
    data = read_data({"a": labels, "b": PAIRS, "docs": [{"text": "the cat sat on the mat"}]})
    found = chosen(data, 4)
    assert [e.source for e in found] == ["a", "b", "a", "b"]
    assert len({e.prompt.tobytes() for e in found}) == 4
    assert [e.row for e in found] == [e.row for e in chosen(read_data({"a": labels, "b": PAIRS, "docs": [
        {"text": "the cat sat on the mat"}]}), 4)]  # fmt: skip
    assert len(chosen(data, 100)) == 6  # as many as there are prompts
    assert chosen(data, 4, room=1) == []


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"held_out": None, "eval_strategy": "no"}, "no eval_dataset"),
        ({"held_out": {"instructions": [{"text": "the cat"}]}}, "without prompts"),
        ({"samples_max_new_tokens": 256}, "want room for it"),
        ({"samples": -1}, "want at least 0"),
    ],
)
def test_samples_that_cannot_be_written_are_refused_before_training(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        trainer(tmp_path, **{"samples": 2} | changes)


def test_weights_in_shards_are_refused(tmp_path, monkeypatch):
    from accelerate import Accelerator
    from accelerate.utils import DistributedType

    from uft.watching.samples import SampleAnswers

    made = trainer(tmp_path, samples=1)
    monkeypatch.setattr(Accelerator, "distributed_type", DistributedType.FSDP)
    with pytest.raises(ValueError, match="weights are in shards"):
        SampleAnswers(made)


# ---- journal, plane, stages ----


def test_the_journal_tells_what_was_logged(run):
    entries = read(run[1] / "progress.jsonl")
    assert [entries[0]["event"], entries[-1]["event"], entries[-1]["reason"]] == ["begin", "end", "finished"]
    logged = [{k: v for k, v in e.items() if k not in ("step", "epoch")} for e in run[0].state.log_history]
    extra = {"tokens_per_second", "peak_memory_gib"}
    for entry, expected in zip((e for e in entries if e["event"] == "log"), logged, strict=True):
        assert {k: v for k, v in metrics_of(entry).items() if k not in extra} == pytest.approx(expected)
    assert all(e["tokens_per_second"] > 0 and 0 < e["peak_memory_gib"] < 64 for e in entries if "loss" in e)


def test_a_run_that_ended_early_and_one_that_cannot_write(tmp_path, caplog):
    class Stop(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            control.should_training_stop = state.global_step == 2

    trainer(tmp_path / "early", callbacks=[Stop()], held_out=None, eval_strategy="no").train()
    assert read(tmp_path / "early" / "progress.jsonl")[-1]["reason"] == "ended early"
    (tmp_path / "full" / "progress.jsonl").mkdir(parents=True)
    full = trainer(tmp_path / "full", max_steps=1, held_out=None, eval_strategy="no")
    full.train()  # is not the journal's to stop
    assert full.state.global_step == 1 and (tmp_path / "full" / "run.json").exists()


def test_the_plane_is_drawn(run, plain):
    picture = imread(run[1] / "loss_plane.png")[..., :3]
    assert picture.shape[:2] == (528, 704)
    blue, orange = (np.array([int(c[i : i + 2], 16) for i in (1, 3, 5)]) / 255 for c in ("#8fa8c8", "#c2410c"))
    assert all((np.abs(picture - color).max(-1) < 0.02).sum() > 50 for color in (blue, orange))
    assert not Path(plain.args.output_dir, "loss_plane.png").exists()  # reports to nothing


def test_the_plane_is_as_large_whatever_matplotlib_was_told(tmp_path):
    points = [Point(1, 2.0, 0.7), Point(2, 1.0, 0.5)]
    with matplotlib.rc_context({"savefig.dpi": 150, "figure.dpi": 150}):
        pixels = draw(points, points, (("loss/sft",), ("loss/dpo",)), tmp_path / "plane.png")
    assert imread(tmp_path / "plane.png").shape[:2] == pixels.shape[:2] == (528, 704)


@pytest.mark.parametrize(
    "objective, names, axes",
    [
        ("dpo_nll", DATA, (("loss/sft",), ("loss/preference",))),
        ("uft", DATA, (("instructions/nll",), ("loss/preference",))),  # has no likelihood term
        ("dpo", ["preferences"], ((), ("loss/preference",))),
        ("sft", ["instructions"], (("loss/sft",), ())),
    ],
)
def test_axes_of_the_plane(objective, names, axes):
    assert axes_of(make_objective(objective), read_data({name: DATA[name] for name in names})) == axes


def test_drawing_takes_no_more_than_its_share(run, monkeypatch):
    """1 % of the time: after a drawing of 0.2 s the next one is at least 20 s later."""
    clock, drawn = [100.0], []
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])

    def slow(*args):
        drawn.append(clock[0])
        clock[0] += 0.2
        return np.zeros((1, 1, 3), np.uint8)

    monkeypatch.setattr("uft.watching.plane.draw", slow)
    plane = next(c for c in run[0].callback_handler.callbacks if isinstance(c, LossPlane))
    plane.on_train_begin(run[0].args, run[0].state, None)
    monkeypatch.setattr(run[0], "is_in_train", True)
    for _ in range(600):
        clock[0] += 0.1
        plane._drawn = None  # there is something new
        plane.on_log(run[0].args, run[0].state, None)
    assert drawn[0] >= 105 and min(np.diff(drawn)) >= 20 and len(drawn) == 3


def test_stages_are_one_run(tmp_path):
    """The first has nothing to evaluate on, and so no prompts to answer."""
    tokenizer = tiny_tokenizer()
    args = config(tmp_path, eval_steps=2, samples=2, loss_plane=True, max_steps=-1)
    data, held_out = read_data(DATA), read_data({"preferences": PAIRS})
    run_stages(tiny_model(tokenizer, 0), STAGES, data, args, tokenizer, eval_data=held_out)
    first, second = (read(tmp_path / name / "progress.jsonl")[0] for name in ("sft", "dpo"))
    assert first["stages"]["names"] == ["sft", "dpo"] and second["stages"]["position"] == 1
    assert first["plane"] == [["loss/sft"], ["loss/preference"]]
    spent = [record["compute"]["flops"] for record in json.loads((tmp_path / "run.json").read_text())["stages"]]
    costs = first["stages"]["costs"]
    assert costs[1] / costs[0] == pytest.approx(spent[1] / spent[0], rel=0.05)
    assert (tmp_path / "loss_plane.png").exists() and not (tmp_path / "dpo" / "loss_plane.png").exists()
    assert [(tmp_path / name / "samples.jsonl").exists() for name in ("sft", "dpo")] == [False, True]


# ---- progress ----


def test_without_a_terminal_there_are_few_lines(tmp_path, capsys):
    trainer(tmp_path, disable_tqdm=False, max_steps=8, eval_steps=8).train()
    out, err = capsys.readouterr()
    lines = out.splitlines()
    assert len(lines) == 3 and "tqdm" not in err and "%|" not in err
    assert lines[0].startswith("step 1/8, 12 %: loss ") and "(preference " in lines[0] and "left" in lines[0]
    assert lines[1].startswith("step 8/8, 100 %: loss ") and "tokens/s" in lines[1]
    assert lines[2].startswith("step 8/8, 100 %: held out: loss ")


def test_the_bar_of_a_terminal(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    trainer(tmp_path, disable_tqdm=False).train()
    out, err = capsys.readouterr()
    assert "held out: loss" in out + err and "{" not in out
    last = err.split("\r")[-1]
    assert "6/6" in last and "loss" in last and "tokens/s" in last and "left" in last


def test_disable_tqdm_is_respected(tmp_path, capsys):
    trainer(tmp_path, disable_tqdm=True, max_steps=1).train()
    out, _ = capsys.readouterr()
    assert "left" not in out and out.startswith("{'loss': ")  # as transformers prints it


def test_tokens_per_second_leave_evaluations_answers_and_checkpoints_out(tmp_path, monkeypatch):
    pause, answers = 0.7, SampleAnswers._answers
    monkeypatch.setattr(SampleAnswers, "_answers", lambda self: (time.sleep(pause), answers(self))[1])
    monkeypatch.setattr(UnifiedTrainer, "_save_checkpoint", lambda *args: time.sleep(pause))

    class Slow(TrainerCallback):
        def on_prediction_step(self, args, state, control, **kwargs):
            time.sleep(pause)

    trainer(
        tmp_path, held_out=HELD_OUT["preferences"], callbacks=[Slow()], samples=1, eval_steps=1, max_steps=2,
        save_strategy="steps", save_steps=1,
    ).train()  # fmt: skip
    first, second = (e for e in read(tmp_path / "progress.jsonl") if "loss" in e)
    assert second["time"] - first["time"] > 3 * pause
    assert (second["num_tokens"] - first["num_tokens"]) / second["tokens_per_second"] < 0.9 * pause
