"""What watching makes of names, numbers and journals, by hand."""

import json
import math
import os

import pytest
from watched_runs import journal

from uft.watching import text
from uft.watching.lines import append, metrics_of, parsed, read, valid
from uft.watching.path import boundaries, path_of, thinned
from uft.watching.rates import time_left
from uft.watching.tags import tag

AXES = (("loss/sft",), ("loss/dpo",))


@pytest.mark.parametrize(
    "name, expected",
    [
        ("loss", "loss/train"),
        ("eval_loss", "loss/eval"),
        ("eval_b_loss", "loss/eval b"),
        ("loss/sft", "loss/sft"),
        ("eval_loss/sft", "loss/sft (eval)"),
        ("eval_b_loss/sft", "loss/sft (eval b)"),
        ("eval_b_2_loss/sft", "loss/sft (eval b_2)"),
        ("loss/train", "loss/train (term)"),
        ("rewards/margins", "rewards/margins"),
        ("eval_rewards/margins", "rewards/margins (eval)"),
        ("org/data/nll", "sources/org/data/nll"),
        ("eval_pairs/accuracy", "sources/pairs/accuracy (eval)"),
        ("online/kl", "online/kl"),
        ("weight/sft", "weight/sft"),
        ("learning_rate", "optimisation/learning_rate"),
        ("num_tokens", "progress/num_tokens"),
        ("peak_memory_gib", "memory/peak_memory_gib"),
        ("train_runtime", "speed/runtime (train)"),
        ("eval_runtime", "speed/runtime (eval)"),
        ("train_loss", "loss/mean of the run"),
        ("kl", "divergence/kl"),
        ("my_metric", "other/my_metric"),
    ],
)
def test_tags(name, expected):
    assert tag(name, sources=("pairs", "org/data"), splits=("b", "b_2")) == expected


def test_tags_of_different_metrics_differ():
    names = ["loss", "eval_loss", "loss/train", "loss/eval", "eval_loss/train", "train_loss", "test_loss", "loss/a"]
    assert len({tag(name) for name in names}) == len(names)


def test_numbers():
    assert [text.duration(s) for s in (0, 59.6, 200, 3723, 190000, None)] == [
        "0:00", "1:00", "3:20", "1:02:03", "2 d 4:46:40", "?",
    ]  # fmt: skip
    assert [text.short(v) for v in (1, 0.12345, 1234.5, 12345, 4.5e6, 1e-5, math.nan, None)] == [
        "1", "0.1235", "1234", "12.3k", "4.5M", "1.00e-05", "nan", "",
    ]  # fmt: skip


def test_sparkline():
    assert text.sparkline([0, 7]) == "▁█"
    assert text.sparkline(range(8)) == "▁▂▃▄▅▆▇█"
    assert text.sparkline([0, 0, 7, 7], width=2) == "▁█"  # means over stretches
    assert text.sparkline([1, math.nan, 2]) == "▁ █"
    assert text.sparkline([3, 3]) == "▁▁"
    assert text.sparkline([math.nan]) == " "
    assert text.sparkline([]) == ""


def test_plane_in_characters():
    assert text.plane([(0, 1), (2, 1), (2, 0)], marks=[1], width=3, height=2) == [
        "1 ┤o·+", "0 ┤  ●", "  └───", "   0 2",
    ]  # fmt: skip
    assert text.plane([(0, 0)]) == []


def test_time_left():
    assert time_left(20, 10, 5, 15) == (10, None)
    # stages of 1, 2 and 3 units; the second has 5 of 10 steps to go, at 2 seconds each: 10, and 20 * 3 / 2
    assert time_left(10, 5, 5, 10, [1, 2, 3], 1) == (10, 40)
    assert time_left(0, 0, 10, 10) == (None, None)


# ---- lines ----


def test_a_torn_line_is_passed_over_and_not_glued_to_the_next(tmp_path):
    path = tmp_path / "progress.jsonl"
    append(path, {"event": "begin", "step": 0})
    with path.open("ab") as file:
        file.write(b'{"event": "log", "step": 1, "lo')  # a kill
    append(path, {"event": "log", "step": 2, "loss": 1.5})
    assert [e["step"] for e in read(path)] == [0, 2]
    assert path.read_bytes().count(b"\n") == 3


@pytest.mark.parametrize("cut", range(0, 90, 7))
def test_whatever_is_cut_off_the_whole_lines_are_read(tmp_path, cut):
    path = tmp_path / "progress.jsonl"
    for step in range(5):
        append(path, {"event": "log", "step": step, "loss": 0.1, "text": "ä"})
    whole = path.read_bytes()
    os.truncate(path, len(whole) - cut)
    expected = len(whole[: len(whole) - cut].rstrip(b"\n").split(b"\n"))
    found = [e["step"] for e in read(path)]
    assert found == list(range(len(found))) and expected - 1 <= len(found) <= expected


def test_what_is_not_finite_is_null_in_the_file_and_nan_to_readers(tmp_path):
    append(tmp_path / "p", {"step": 1, "loss": math.nan, "grad_norm": math.inf, "odd": {1}})
    line = (tmp_path / "p").read_text()
    assert json.loads(line, parse_constant=lambda name: pytest.fail(name))["loss"] is None
    (entry,) = parsed(line.encode())
    metrics = metrics_of(entry)
    assert set(metrics) == {"loss", "grad_norm"} and math.isnan(metrics["loss"])


def test_lines_that_are_no_entries():
    assert parsed(b'3\nnull\n{"a": 1}\n[]\n\xff\n{"step": 1}\n') == [{"step": 1}]


def test_what_was_logged_behind_the_checkpoint_counts_no_more():
    first = journal(*[{"loss": 1.0}] * 4)  # steps 10 to 40
    again = {"event": "begin", "step": 20, "max_steps": 100}
    assert [e["step"] for e in valid([*first, again, {"event": "log", "step": 30}])] == [0, 10, 20, 20, 30]
    end = {"event": "end", "step": 20, "reason": "stopped"}
    assert all(e["event"] != "end" for e in valid([*first[:3], end, again]))
    assert [e["event"] for e in valid([*first, {"event": "begin", "step": 0}])] == ["begin"]  # another run


# ---- the path ----


def test_path_of_training_and_of_evaluations():
    entries = journal({"loss/sft": 2.0, "loss/dpo": 0.7}, {"loss/sft": 1.0, "loss/dpo": 0.5})
    entries.append({"event": "log", "step": 20, "eval_loss/sft": 1.5, "eval_loss/dpo": 0.6})
    assert [(p.step, p.x, p.y) for p in path_of([entries], AXES, False)] == [(10, 2.0, 0.7), (20, 1.0, 0.5)]
    assert [(p.step, p.x, p.y) for p in path_of([entries], AXES, True)] == [(20, 1.5, 0.6)]


def test_evaluations_of_two_data_sets_and_sums_of_terms():
    entries = journal()
    entries.append({"event": "log", "step": 5, "eval_a_loss/sft": 1.0, "eval_a_loss/docs": 2.0})
    entries.append({"event": "log", "step": 5, "eval_b_loss/dpo": 0.5})
    axes = (("loss/sft", "loss/docs"), ("loss/dpo",))
    assert [(p.x, p.y) for p in path_of([entries], axes, True)] == [(3.0, 0.5)]


def test_a_log_without_a_row_of_some_term_is_no_point():
    entries = journal({"loss/sft": 2.0, "loss/dpo": 0.7}, {"loss/sft": 1.0}, {"loss/sft": 1.0, "loss/dpo": math.nan})
    assert [p.step for p in path_of([entries], AXES, False)] == [10]


def test_stages_are_one_path_in_which_what_is_not_measured_is_held():
    sft = journal({"loss/sft": 2.0}, {"loss/sft": 1.0})
    dpo = journal({"loss/dpo": 0.7}, {"loss/dpo": 0.4})
    path = path_of([sft, dpo], AXES, False)
    assert [(p.x, p.y) for p in path] == [(2.0, 0.7), (1.0, 0.7), (1.0, 0.7), (1.0, 0.4)]
    assert [p.measured for p in path] == [(True, False)] * 2 + [(False, True)] * 2
    assert boundaries(path) == [2]
    assert path_of([sft], AXES, False) == []  # nothing is known of the other loss yet


def test_thinning_keeps_ends_stages_and_means():
    long = [journal(*({"loss/sft": float(i), "loss/dpo": 1.0} for i in range(500))) for _ in range(2)]
    path = path_of(long, AXES, False)
    thin = thinned(path, 50)
    assert len(thin) <= 54 and thin[0] == path[0] and thin[-1] == path[-1] and len(boundaries(thin)) == 1
    assert thin[1].x == sum(range(1, 21)) / 20  # 1,000 points, stretches of 20
    assert thinned(path[:50], 50) == path[:50]
