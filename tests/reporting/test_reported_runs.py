"""What is read of folders of runs: whole, going on, broken; which runs belong together and what differs."""

import json
import math

import numpy as np
import pytest
from reported_runs import evaluation, journal, record

from uft.reporting.fairness import warnings
from uft.reporting.finding import find_runs
from uft.reporting.groups import differing, grouped, of_group
from uft.reporting.runs import ReportError, read_run
from uft.reporting.series import curve, group_curve, pieces, plane, smoothed
from uft.reporting.values import every_fact, summary


def only(found):
    (run,) = found.runs
    return run


def table(groups):
    return {row.label: row for row in summary(groups)}


# ---- folders ----


def test_stages_and_checkpoints_are_parts_of_their_run(plant):
    top = plant("out", "run.json", {"stages": [{"stage": "sft", **record()}, {"stage": "dpo", **record((5.0, 4.0))}]})
    plant("out/sft", "run.json", record())
    plant("out/checkpoint-2", "run.json", record())
    plant("out", "config.json", {})
    run = only(find_runs([top]))
    assert [stage.name for stage in run.stages] == ["sft", "dpo"] and run.steps == 5
    assert run.compute == {"tokens": 500, "flops": 8e12, "seconds": 150.0, "peak_memory_bytes": 3 * 2**30}


def test_several_runs_have_short_names_and_unknown_json_is_listed(plant, tmp_path):
    for name in ("all/a/seed2", "all/a/seed10", "all/b"):
        plant(name, "run.json", record())
    plant("all", "odd.json", {"what": 1})
    found = find_runs([tmp_path / "all"])
    assert [run.name for run in found.runs] == ["a/seed2", "a/seed10", "b"]
    assert found.skipped == [f"{tmp_path}/all/odd.json: no file that this report knows"]


def test_a_run_that_is_still_going(plant):
    folder = plant("going", "progress.jsonl", journal(3.0, 2.0) + '{"event": "log", "step": 3, "lo')
    run = only(find_runs([folder]))
    assert run.going and run.steps == 2 and run.last("loss") == 2.0
    (warning,) = warnings(grouped([run]))
    assert warning == "**Not finished**: `going` (not finished: step 2 of 10). Numbers are as far as they were logged."


def test_stages_that_are_still_going_or_have_not_begun(plant, tmp_path):
    names = {"names": ["sft", "dpo", "last"], "position": 1}
    plant("out", "run.json", {"stages": [{"stage": "sft", **record()}]})
    plant("out/sft", "run.json", record())
    plant("out/dpo", "progress.jsonl", journal(0.7, stages=names))
    run = only(find_runs([tmp_path / "out"]))
    assert [(stage.name, stage.finished, stage.steps) for stage in run.stages] == [
        ("sft", True, 3), ("dpo", False, 1), ("last", False, 0)]  # fmt: skip
    assert table(grouped([run]))["state"].cells == ("not finished: stage dpo, step 1 of 10",)
    (tmp_path / "out/run.json").unlink()  # killed before it was written: the stage's own says as much
    assert len(only(find_runs([tmp_path / "out"])).stages) == 3


@pytest.mark.parametrize(
    "file, content, said",
    [
        ("run.json", "{", "run.json: not JSON (Expecting property name enclosed in double quotes: line 1 column 2"),
        ("run.json", [1], "run.json: found a list; want an object"),
        ("run.json", {"x": 1}, "run.json: lacks metrics and compute; found x"),
        ("run.json", {"stages": 3}, "run.json: stages is no list of objects; want a record per stage"),
        ("run.json", {"metrics": {}, "compute": {}}, "run.json: metrics is a dict; want list"),
        ("evaluation.json", {"y": 1}, "evaluation.json: lacks metrics; found y"),
        ("progress.jsonl", "what?\n", "progress.jsonl: found no line with a step; want a JSON object per line"),
    ],
)
def test_broken_files_are_named(file, content, said, plant):
    folder = plant("bad", file, content)
    with pytest.raises(ReportError) as problem:
        find_runs([folder])
    assert str(folder / said.partition(":")[0]) in str(problem.value) and said in str(problem.value)
    assert "found no run" in str(problem.value)
    good = plant("good", "run.json", record())
    found = find_runs([folder, good])  # beside others it is left out, and said
    assert [run.folder for run in found.runs] == [good] and said in found.skipped[0]


def test_nothing_there(tmp_path):
    with pytest.raises(ReportError, match="nowhere: no such folder; want what a run has written"):
        find_runs([tmp_path / "nowhere"])
    with pytest.raises(ReportError, match=r"found no run; want a folder with run\.json"):
        find_runs([tmp_path])
    (tmp_path / "notes.txt").write_text("")
    with pytest.raises(ReportError, match="found a file; want a folder, or one of"):
        find_runs([tmp_path / "notes.txt"])


def test_a_broken_file_beside_a_run_is_a_note(plant):
    folder = plant("run", "run.json", record())
    plant("run", "guard.json", "oops")
    plant("run", "samples.jsonl", "oops\n")
    found = find_runs([folder])
    assert len(found.runs) == 1
    assert [sentence.split(": ")[1][:10] for sentence in found.skipped] == ["not JSON (", "found no l"]


# ---- evaluations ----


def test_an_evaluation_goes_to_the_run_whose_model_it_measured(plant, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    a, b = plant("runs/a", "run.json", record()), plant("runs/b", "run.json", record(seed=1, learning_rate=2e-3))
    plant("evaluated", "evaluation.json", evaluation("runs/b", {"demonstrations/nll": 1.5}))
    plant("older", "evaluation.json", evaluation("runs/b", {"demonstrations/nll": 9.0}, date="2025-01-01"))
    plant("other", "evaluation.json", evaluation("hub/model", {"demonstrations/nll": 2.5}))
    found = find_runs([a, b, *map(tmp_path.joinpath, ("evaluated", "older", "other"))])
    assert [(r.name, (r.evaluation or {}).get("metrics")) for r in found.runs] == [
        ("runs/a", None), ("runs/b", {"demonstrations/nll": 1.5}), ("other", {"demonstrations/nll": 2.5})]  # fmt: skip
    assert found.runs[2].kind == "evaluation"
    assert "older/evaluation.json: there is a newer evaluation of" in found.skipped[0]


def test_evaluations_on_the_way_count_where_there_is_no_other(plant, tmp_path):
    plant("run", "run.json", record())
    for step in (0, 9, 10):
        plant(f"run/evaluation/step-{step}", "evaluation.json", evaluation("run", {"pairs/nll": float(step)}))
    assert only(find_runs([tmp_path / "run"])).evaluation["metrics"] == {"pairs/nll": 10.0}


# ---- seeds ----


def test_runs_that_differ_only_in_seed_are_a_group_with_an_interval(plant, tmp_path):
    for seed, end in enumerate((1.0, 2.0, 3.0)):
        plant(f"all/joint/seed{seed}", "run.json", record((5.0, end), seed=seed))
    plant("all/other", "run.json", record((5.0, 1.0), seed=0, learning_rate=5e-4))
    groups = grouped(find_runs([tmp_path / "all"]).runs)
    assert [(group.name, len(group.runs)) for group in groups] == [("joint", 3), ("other", 1)]
    # mean 2, standard deviation 1: t(0.975, 2) / sqrt(3) = 4.303 / 1.732 = 2.484
    assert table(groups)["train: loss"].cells == ("2.0000 ± 2.4841", "1.0000")
    assert table(groups)["seeds"].cells == ("0, 1, 2", "0")
    found = group_curve(groups[0], "loss")
    assert found.x.tolist() == [1, 2] and found.y.tolist() == [5.0, 2.0]
    assert found.high[1] == pytest.approx(4.4841, abs=1e-4) and found.low[0] == found.high[0] == 5.0


@pytest.mark.parametrize("change", [{"learning_rate": 2e-3}, {"data": "e" * 64}, {"planned": 9}], ids=str)
def test_anything_but_the_seed_keeps_runs_apart(change, plant, tmp_path):
    plant("all/one", "run.json", record(seed=0))
    plant("all/two", "run.json", record(seed=1, **change))
    assert len(grouped(find_runs([tmp_path / "all"]).runs)) == 2


def test_the_same_seed_twice_is_no_interval(plant, tmp_path):
    for name in ("one", "two"):
        plant(f"all/{name}", "run.json", record(seed=3))
    assert [len(group.runs) for group in grouped(find_runs([tmp_path / "all"]).runs)] == [1, 1]


def test_data_drawn_by_the_seed_in_folders_of_seeds_are_a_group(plant, tmp_path):
    for seed in (0, 1):
        plant(f"all/arm/seed{seed}", "run.json", record(seed=seed, data=str(seed) * 64))
    (group,) = grouped(find_runs([tmp_path / "all/arm"]).runs)
    assert group.name == "arm"


# ---- what differs, and what is unfair ----


def test_only_differences_are_listed(plant, tmp_path):
    plant("all/a", "run.json", record(seed=0, commit="abc"))
    plant("all/b", "run.json", record(seed=1, commit="abd", learning_rate=2e-3, output_dir="elsewhere"))
    groups = grouped(find_runs([tmp_path / "all"]).runs)
    known = every_fact(groups)
    names = differing(groups, known)
    assert names == ["seed", "config.learning_rate", "commit"]
    assert [of_group(group, "config.learning_rate", known) for group in groups] == ["0.001", "0.002"]


@pytest.mark.parametrize(
    "change, said",
    [
        ({"flops": 4.2e12}, "**Different compute**: `b` spent 4.2 TFLOPs, 5 % more than `a` (4 TFLOPs)"),
        ({"flops": 12e12}, "**Different compute**: `b` spent 12 TFLOPs, 3.0 times as much as `a` (4 TFLOPs)"),
        ({"data": "0" * 64}, "**Different data**: of the same names and sizes, but other rows, tokens or targets"),
        ({"commit": "new"}, "**Different code**: `a`: abc123; `b`: new."),
        ({"planned": 8}, "**Fewer steps than planned**: `b` (stopped at step 3 of 8)"),
        ({}, "**A single seed each**"),
    ],
    ids=lambda value: str(value)[:20],
)
def test_unfair_comparisons_are_said(change, said, plant, tmp_path):
    plant("all/a", "run.json", record(learning_rate=1e-4))
    plant("all/b", "run.json", record(**change))
    found = warnings(grouped(find_runs([tmp_path / "all"]).runs))
    assert len(found) == (2 if change else 1) and any(said in sentence for sentence in found)


def test_two_per_cent_of_compute_are_equal(plant, tmp_path):
    plant("all/a", "run.json", record(learning_rate=1e-4))
    plant("all/b", "run.json", record(flops=4.08e12))
    assert not any("compute" in sentence for sentence in warnings(grouped(find_runs([tmp_path / "all"]).runs)))


def test_best_is_marked_only_where_it_means_something(plant, tmp_path):
    plant("all/a", "run.json", record(held_out=1.5, learning_rate=1e-4))
    plant("all/b", "run.json", record(held_out=1.25))
    rows = table(grouped(find_runs([tmp_path / "all"]).runs))
    assert rows["eval: loss/sft"].best == {1} and rows["train: loss"].best == frozenset()
    assert rows["time"].best == rows["peak memory"].best == frozenset()  # the same
    plant("all/b", "run.json", record(held_out=1.25, data="0" * 64))  # of other rows
    assert table(grouped(find_runs([tmp_path / "all"]).runs))["eval: loss/sft"].best == frozenset()


def test_a_loss_of_an_earlier_stage_is_said_to_be_one(plant, tmp_path):
    preference = [{"loss/preference": 0.5, "loss": 0.5, "step": 1}]
    later = {**record((1.0,)), "metrics": preference}
    plant("all/a", "run.json", {"stages": [{"stage": "sft", **record(held_out=1.0)}, {"stage": "dpo", **later}]})
    plant("all/b", "run.json", record(held_out=1.25))
    row = table(grouped(find_runs([tmp_path / "all"]).runs))["eval: loss/sft"]
    assert row.cells == ("1.0000 after sft", "1.2500") and row.best == frozenset()


def test_numbers_of_the_summary(plant):
    row = {r.label: r.cells[0] for r in summary(grouped([read_run(plant("r", "run.json", record()))]))}
    assert row["tokens"] == "300" and row["FLOPs (reference passes included)"] == "4 TFLOPs"
    assert row["time"] == "1 min 15 s" and row["peak memory"] == "3.00 GiB" and row["data (rows)"] == (
        "instructions (12), pairs (34)")  # fmt: skip
    assert row["objective"] == "dpo_nll (sft: token_nll + 0.5 · preference: dpo, β 0.1)"


# ---- curves ----


def test_curves_go_on_from_stage_to_stage(plant):
    stages = [{"stage": "sft", **record((3.0, 2.0))}, {"stage": "dpo", **record((9.0, 8.0, 7.0), flops=6e12)}]
    run = read_run(plant("out", "run.json", {"stages": stages}))
    assert curve(run, "loss").x.tolist() == [1, 2, 3, 4, 5]
    assert curve(run, "loss", "tokens").x.tolist() == [100, 200, 300, 400, 500]
    # 4 TFLOPs over 2 logs, then 6 over 3
    np.testing.assert_allclose(curve(run, "loss", "flops").x, [2e12, 4e12, 6e12, 8e12, 10e12])
    assert [piece.y.tolist() for piece in pieces(curve(run, "loss"), [2.0])] == [[3.0, 2.0], [9.0, 8.0, 7.0]]
    assert curve(run, "nothing") is None


def test_the_plane_holds_what_a_stage_does_not_measure(plant):
    stages = [
        {"stage": "sft", **record(()), "metrics": [{"loss/sft": x, "step": i} for i, x in ((1, 3.0), (2, 2.0))]},
        {"stage": "dpo", **record(()), "metrics": [{"loss/preference": 0.7, "step": 1}]},
    ]
    run = read_run(plant("out", "run.json", {"stages": stages}))
    assert [(p.x, p.y, p.measured) for p in plane(run, evaluated=False)] == [
        (3.0, 0.7, (True, False)), (2.0, 0.7, (True, False)), (2.0, 0.7, (False, True))]  # fmt: skip


def test_smoothing_keeps_a_constant_and_a_short_curve(plant):
    run = read_run(plant("r", "run.json", record([2.0] * 200)))
    np.testing.assert_allclose(smoothed(curve(run, "loss")).y, 2.0)
    short = curve(read_run(plant("s", "run.json", record())), "loss")
    assert smoothed(short) is short


@pytest.mark.parametrize("value", ["null", "NaN", "Infinity", "-Infinity", "1e999"])
def test_not_finite_numbers_are_no_points(plant, value):
    text = json.dumps(record((3.0, 2.0))).replace('"loss": 3.0', f'"loss": {value}')
    run = read_run(plant("r", "run.json", text))
    assert curve(run, "loss").x.tolist() == [2] and run.ending("loss") == 2.0
    going = read_run(plant("going", "progress.jsonl", journal(3.0, 2.0).replace('"loss": 3.0', f'"loss": {value}')))
    assert curve(going, "loss").y.tolist() == [2.0] and curve(going, "loss", "tokens").x.tolist() == [20]
    wholly = read_run(plant("none", "run.json", json.dumps(record((math.inf, math.nan)))))
    assert curve(wholly, "loss") is None and "loss" not in wholly.logged and plane(wholly, evaluated=False) == []
