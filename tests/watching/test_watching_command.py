"""`uft watch`: what it finds in folders, what it says of runs that go on, end and die, and that it can be followed."""

import json
import multiprocessing
import os
import pty
import re
import select
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from processes import start, wait_for
from rich.console import Console
from watched_runs import journal, trainer

from uft.cli import main
from uft.watching.lines import append, read
from uft.watching.page import chosen, page
from uft.watching.runs import Watcher

HERE = {"host": socket.gethostname(), "pid": os.getpid()}
TWO = [{"loss": 2.0, "loss/sft": 1.5, "loss/dpo": 0.5}, {"loss": 1.0, "loss/sft": 0.75, "loss/dpo": 0.25}]


def put(folder: Path, *metrics: dict, end: str | None = None, age: float = 0.0, **begin) -> Path:
    """The journal of a run whose last line is `age` seconds old."""
    folder.mkdir(parents=True, exist_ok=True)
    entries = journal(*metrics, begin=HERE | begin)
    shift = time.time() - age - max(e["time"] for e in entries)
    for entry in entries:
        append(folder / "progress.jsonl", entry | {"time": entry["time"] + shift})
    if end:
        append(
            folder / "progress.jsonl", {"event": "end", "step": entries[-1]["step"], "time": time.time(), "reason": end}
        )
    return folder


def seen(*folders: Path, metrics=(), width=160) -> str:
    console = Console(width=width, record=True, file=open(os.devnull, "w"))  # noqa: SIM115
    console.print(page(Watcher(folders).runs(), time.time(), width, metrics))
    return console.export_text()


def dead_pid() -> int:
    child = multiprocessing.get_context("fork").Process(target=time.time)
    child.start()
    child.join()
    return child.pid


@pytest.mark.parametrize(
    "options, state",
    [
        ({}, "running"),
        ({"end": "finished"}, "finished"),
        ({"end": "stopped"}, "stopped"),
        ({"age": 600.0}, "quiet for 10 min"),
        ({"age": 600.0, "host": "elsewhere"}, "quiet for 10 min"),
        ({"host": "elsewhere"}, "running"),
        ({"pid": dead_pid()}, "died"),
        ({"pid": dead_pid(), "end": "finished"}, "finished"),
    ],
)
def test_states(tmp_path, options, state):
    put(tmp_path, *TWO, **options)
    assert Watcher([tmp_path]).runs()[0].state(time.time()) == state


def test_slow_logs_are_not_quiet(tmp_path):
    (tmp_path / "a").mkdir()
    for entry in journal(*TWO, TWO[0], begin=HERE, every=100):  # a log each 100 s: it may be silent for 1,000
        append(tmp_path / "a" / "progress.jsonl", entry | {"time": time.time() - 700 + entry["time"] - 1300})
    assert Watcher([tmp_path]).runs()[0].state(time.time()) == "running"


def test_one_run_closely(tmp_path):
    put(tmp_path, *TWO, {"eval_loss": 0.9, "eval_loss/sft": 0.6})
    append(tmp_path / "samples.jsonl", {"step": 10, "place": 0, "source": "a", "prompt": "old?", "answer": "old"})
    for place, source in enumerate("aab"):
        answer = {"answer": f"to\x1b[31m{source}\n{place}", "reference": None}
        append(tmp_path / "samples.jsonl", {"step": 20, "place": place, "source": source, "prompt": "new?"} | answer)
    text = seen(tmp_path)
    assert "running" in text and "step 30/100" in text and "1:10 left" in text  # a second per step
    assert re.search(r"loss +1 █▁ +0.9", text) and re.search(r"loss/sft +0.75 █▁ +0.6", text)
    assert "↑ loss/dpo   → loss/sft" in text and "●" in text
    assert "answers at step 20" in text and "old" not in text and "\x1b" not in text
    assert "to·[31ma⏎0" in text and "to·[31mb⏎2" in text and "⏎1" not in text  # one of each source


def test_what_is_asked_for_is_shown(tmp_path):
    put(tmp_path, {"loss": 1.0, "rewards/margins": 0.5, "weight/sft": 1.0, "mine": 3.0, "eval_only": 1.0})
    (run,) = Watcher([tmp_path]).runs()
    assert chosen(run) == ["loss", "rewards/margins"]  # a weight that is always the same says nothing
    assert chosen(run, ["mine", "weight/*", "only"]) == ["mine", "weight/sft", "only"]


def test_a_pattern_that_matches_nothing_is_an_error(tmp_path, capsys):
    put(tmp_path, {"loss": 1.0, "loss/sft": 0.5}, {"eval_loss": 2.0})
    assert main(["watch", str(tmp_path), "--once", "--metrics", "loss,nope*"]) == 1
    assert capsys.readouterr().err == "uft: no metric matches 'nope*'; there are loss, loss/sft\n"
    assert "no metric matches 'nope*'; there are loss" in seen(tmp_path, metrics=["nope*"])  # while one follows
    put(tmp_path / "begun")  # has logged nothing yet
    assert "no metric" not in seen(tmp_path / "begun", metrics=["nope*"])


WRONG = [
    {"time": "x"}, {"time": [1]}, {"time": True}, {"time": float("inf")}, {"step": True}, {"step": "9"}, {"step": None},
    {"event": "begin", "max_steps": "x"}, {"event": "begin", "plane": 3}, {"event": "begin", "plane": [["a"], [1]]},
    {"event": "begin", "stages": "ab"}, {"event": "begin", "stages": {"names": ["a"], "position": 1}},
    {"event": "begin", "stages": {"names": ["a"], "costs": ["x"]}}, {"event": "begin", "stages": {"names": None}},
]  # fmt: skip


@pytest.mark.parametrize("wrong", WRONG, ids=str)
def test_a_line_of_wrong_types_is_passed_over_like_a_torn_one(tmp_path, wrong):
    put(tmp_path, *TWO)
    before = seen(tmp_path)
    line = {"event": "log", "step": 30, "time": time.time(), "loss": 5.0} | wrong
    with (tmp_path / "progress.jsonl").open("a") as file:
        file.write(json.dumps(line) + "\n")
    (tmp_path / "samples.jsonl").write_text('{"step": 1, "place": "x"}\n{"step": 1, "source": ["a"]}\n')
    assert re.sub(r"[\d:]+ left", "", seen(tmp_path)) == re.sub(r"[\d:]+ left", "", before)


def test_keys_that_are_missing_do_no_harm(tmp_path):
    lines = [{"event": "begin", "step": 0, "pid": 10**30, "host": socket.gethostname()}, {"step": 1, "loss": 2.5},
             {"event": "end", "step": 1}]  # fmt: skip
    (tmp_path / "progress.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines[:2]))
    assert "2.5" in seen(tmp_path)
    (tmp_path / "progress.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert "2.5" in seen(tmp_path)


def test_a_loss_that_is_not_finite_is_seen(tmp_path):
    put(tmp_path, {"loss": float("nan")})
    assert re.search(r"loss +nan", seen(tmp_path))


def test_runs_are_found_below_a_folder_and_the_newest_comes_first(tmp_path):
    for age, arm in enumerate(("sft", "joint", "dpo")):
        for seed in (0, 1):
            put(tmp_path / "compare" / arm / f"seed{seed}", *TWO, age=10.0 * age + seed)
    put(tmp_path / "compare" / "joint" / "seed0" / "checkpoint-5", *TWO)  # nobody's run
    runs = Watcher([tmp_path, tmp_path / "compare"]).runs()
    assert [run.name for run in runs] == [
        f"compare/{arm}/seed{seed}" for arm in ("sft", "joint", "dpo") for seed in (0, 1)
    ]
    text = seen(tmp_path)
    assert text.count("running") == 7 and text.count("sft 0.75, dpo 0.25") == 6


def test_stages_are_one_run_with_the_time_of_all(tmp_path):
    stages = {"names": ["sft", "dpo"], "costs": [1.0, 3.0]}
    put(tmp_path / "x" / "sft", {"loss/sft": 2.0}, {"loss/sft": 1.0}, end="finished", stages=stages | {"position": 0})
    (run,) = Watcher([tmp_path]).runs()
    assert run.name == "x" and run.state(time.time()) == "running"  # the second is about to begin
    put(tmp_path / "x" / "sft", {"loss/sft": 2.0}, stages=stages | {"position": 0})
    (run,) = Watcher([tmp_path]).runs()
    # 90 of 100 steps at a second each, and 300 s
    assert run.now.left(run.last_time) == (pytest.approx(90, abs=1), pytest.approx(390, abs=1))
    put(tmp_path / "x" / "dpo", {"loss/dpo": 0.5}, {"loss/dpo": 0.2}, stages=stages | {"position": 1})
    text = seen(tmp_path / "x")
    assert "step dpo 20/100, stage 2 of 2" in text and "+ a stage begins" in text and "1:20 left" in text
    (alone,) = Watcher([tmp_path / "x" / "dpo"]).runs()
    assert alone.name == str(tmp_path / "x" / "dpo") and not alone.stages


def test_a_run_of_which_only_the_record_is_there(tmp_path):
    record = {"steps": 20, "planned_steps": 20, "metrics": [{"loss": 1.0, "step": 10}, {"loss": 0.5, "step": 20}]}
    (tmp_path / "run.json").write_text(json.dumps(record))
    (run,) = Watcher([tmp_path]).runs()
    assert run.state(time.time()) == "finished" and run.now.series["loss"] == [(10, 1.0), (20, 0.5)]
    (tmp_path / "run.json").write_text("{")  # being written
    assert Watcher([tmp_path]).runs() == []


def test_a_file_is_followed_as_it_grows_and_as_it_is_begun_anew(tmp_path):
    watcher = Watcher([put(tmp_path, TWO[0])])
    assert watcher.runs()[0].now.step == 10
    with (tmp_path / "progress.jsonl").open("ab") as file:
        file.write(b'{"event": "log", "step": 20, "time": 1, "loss": 1')
        file.flush()
        assert watcher.runs()[0].now.step == 10  # half a line
        file.write(b".5}\n")
    assert watcher.runs()[0].now.series["loss"] == [(10, 2.0), (20, 1.5)]
    (tmp_path / "progress.jsonl").unlink()
    put(tmp_path, {"loss": 9.0})
    assert watcher.runs()[0].now.series["loss"] == [(10, 9.0)]


def test_the_command_prints_once(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["watch"]) == 1 and "runs is no folder" in capsys.readouterr().err
    Path("runs").mkdir()
    assert main(["watch", "--once"]) == 1 and "found no run" in capsys.readouterr().err
    put(Path("runs/first"), *TWO)
    assert main(["watch"]) == 0  # the output is no terminal
    assert "first" in capsys.readouterr().out
    assert main(["watch", "--once", "--metrics", "loss/*", "runs/first"]) == 0
    out = capsys.readouterr().out
    assert "loss/sft" in out and "grad_norm" not in out
    assert main(["watch", "--interval", "0", "runs"]) == 1
    assert main(["watch", "--help"]) == 0 and "Ctrl-C ends it" in capsys.readouterr().out


def test_it_starts_without_torch():
    code = "import sys, uft.watching.command, uft.watching.page; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_it_is_followed_in_a_terminal(tmp_path):
    put(tmp_path, TWO[0])
    shown, terminal = pty.openpty()
    command = [sys.executable, "-m", "uft.cli", "watch", str(tmp_path), "--interval", "0.1"]
    environment = os.environ | {"TERM": "xterm", "COLUMNS": "100", "LINES": "40"}
    run = subprocess.Popen(command, stdin=terminal, stdout=terminal, stderr=terminal, env=environment)
    text = ""

    def until(what: str) -> None:
        nonlocal text
        end = time.monotonic() + 60
        while what not in text:
            assert time.monotonic() < end, text[-2000:]
            if select.select([shown], [], [], 0.1)[0]:
                text += os.read(shown, 65536).decode(errors="replace")

    try:
        until("step 10/100")
        append(tmp_path / "progress.jsonl", {"event": "log", "step": 20, "time": time.time(), "loss": 1.0})
        until("step 20/100")
        run.send_signal(signal.SIGINT)
        until("\x1b[?1049l")  # the screen is as it was
        assert run.wait(30) == 0
    finally:
        run.kill()
        os.close(terminal)
        os.close(shown)


def _long(folder: str) -> None:
    trainer(folder, max_steps=100_000, eval_steps=50_000, held_out=None, eval_strategy="no").train()


def test_a_run_that_is_killed_has_died_and_goes_on_when_resumed(tmp_path):
    child = start(_long, str(tmp_path))
    wait_for(lambda: len(read(tmp_path / "progress.jsonl")) > 3)
    (run,) = Watcher([tmp_path]).runs()
    assert run.state(time.time()) == "running" and run.now.left(time.time())[0] > 0
    os.kill(child.pid, signal.SIGKILL)
    child.join()
    with (tmp_path / "progress.jsonl").open("ab") as file:
        file.write(b'{"event": "lo')  # the worst moment
    assert Watcher([tmp_path]).runs()[0].state(time.time()) == "died"
    trainer(tmp_path, max_steps=2, held_out=None, eval_strategy="no").train()
    (run,) = Watcher([tmp_path]).runs()
    assert run.state(time.time()) == "finished" and run.now.step == 2
