"""A whole comparison with a tiny model: what is in the summary is what is in the runs' files."""

import itertools
import math

import numpy as np
import pytest
from comparison_workplace import COMPARISON, changed, read, uft, write
from scipy import stats

from uft.comparison import runs
from uft.comparison.compare import Prepared
from uft.comparison.identity import claim
from uft.comparison.recipe import Comparison

ARMS = {"sequential": ["sft", "dpo"], "joint": ["train"]}


def flops(folder, arm, seed):
    return [stage["compute"]["flops"] for stage in read(folder / f"out/{arm}/seed{seed}/run.json")["stages"]]


def measured(folder, arm, seed, metric):
    return read(folder / f"out/{arm}/seed{seed}/{ARMS[arm][-1]}/evaluation.json")["metrics"][metric]


def test_means_and_intervals_are_those_of_the_files(compared):
    summary = read(compared / "out/summary.json")
    for arm, metric in itertools.product(
        ARMS, ("demonstrations/nll", "pairs/rewards/accuracies", "pairs/drift/chosen")
    ):
        values = [measured(compared, arm, seed, metric) for seed in (0, 1)]
        found = summary["arms"][arm]["stages"][-1]["measures"][metric]
        half = (
            stats.t.ppf(0.975, 1) * abs(values[0] - values[1]) / 2
        )  # the standard error of two is half their distance
        assert found["mean"] == pytest.approx(np.mean(values), rel=1e-12)
        assert found["high"] - found["mean"] == pytest.approx(half, rel=1e-9, abs=1e-12)
        assert found["by_seed"] == {"0": values[0], "1": values[1]}


def test_contrasts_are_paired_by_seed(compared):
    summary = read(compared / "out/summary.json")
    assert [(c["a"], c["b"], c["metric"]) for c in summary["contrasts"]] == [
        ("joint", "sequential", "demonstrations/nll"),
        ("joint", "sequential", "pairs/rewards/accuracies"),
    ]
    for contrast in summary["contrasts"]:
        for seed in (0, 1):
            ours, theirs = (measured(compared, arm, seed, contrast["metric"]) for arm in ("joint", "sequential"))
            assert contrast["by_seed"][str(seed)] == pytest.approx(ours - theirs, rel=1e-12, abs=1e-15)
        assert contrast["mean"] == pytest.approx(np.mean(list(contrast["by_seed"].values())))
        a, b = contrast["by_seed"].values()
        # of the four ways to flip signs
        assert contrast["p"] == sum(abs(s * a + t * b) >= abs(a + b) - 1e-15 for s in (1, -1) for t in (1, -1)) / 4
    assert "the smallest p that an exact sign-flip test can have is 0.5" in summary["conclusions"][0]


def test_forgetting_is_against_the_base_and_the_stage_before(compared):
    base = read(compared / "out/base/evaluation.json")["samples"]["demonstrations"]
    folder = compared / "out/sequential/seed1"
    sft, dpo = (read(folder / f"{name}/evaluation.json")["samples"]["demonstrations"] for name in ("sft", "dpo"))
    measures = read(folder / "run.json")["stages"][1]["measures"]

    def rise(before):
        assert before["id"] == dpo["id"]
        return sum(b - a for a, b in zip(before["nll"], dpo["nll"])) / sum(dpo["tokens"])

    assert measures["demonstrations/nll_change"] == pytest.approx(rise(base))
    assert measures["previous/demonstrations/nll_change"] == pytest.approx(rise(sft))
    assert rise(base) != pytest.approx(rise(sft))


def test_base_has_no_implicit_reward(compared):
    metrics = read(compared / "out/base/evaluation.json")["metrics"]
    assert metrics["pairs/rewards/margins"] == 0.0 and metrics["pairs/rewards/accuracies"] == 0.5


def test_flops_are_equal_to_the_nearest_step(compared):
    for seed in (0, 1):
        decided, spent = sum(flops(compared, "sequential", seed)), sum(flops(compared, "joint", seed))
        steps = read(compared / f"out/joint/seed{seed}/run.json")["stages"][0]["steps"]
        assert steps != COMPARISON["max_steps"]  # it was prolonged
        assert abs(spent - decided) <= spent / steps  # steps differ in cost; half of a dear one is less than a mean one
        ratio = read(compared / "out/summary.json")["arms"]["joint"]["flops_relative_to_the_deciding_arm"][str(seed)]
        assert ratio == pytest.approx(spent / decided)


def test_report_holds_the_figures_and_says_what_was_equal(compared):
    page = (compared / "out/comparison.html").read_text()
    assert page.count("data:image/png;base64,") == 3
    text = (compared / "out/comparison.md").read_text()
    assert "Budget: equal FLOPs, reference passes counted. sequential trained as long as it said" in text
    assert all((compared / "out" / name).stat().st_size > 5000 for name in ("tradeoff.png", "stages.png", "cost.png"))
    # checkpoints go once a run is finished, and models were not asked for
    assert not list((compared / "out").rglob("checkpoint-*")) and not list((compared / "out").rglob("*.safetensors"))


def test_finished_runs_are_not_run_again_and_new_seeds_are(compared, monkeypatch, capsys):
    monkeypatch.chdir(compared)
    began = []

    def not_run(model, stages, data, args, *rest, **more):
        began.append(args.output_dir)
        raise ValueError("would train")

    monkeypatch.setattr(runs, "run_stages", not_run)
    before = (compared / "out/joint/seed0/run.json").read_bytes()
    assert uft("compare", "--config", "compare.yaml", "--logging_steps", 1) == 0  # which decides nothing
    assert began == [] and (compared / "out/joint/seed0/run.json").read_bytes() == before
    assert capsys.readouterr().out.count("found finished") == 4
    assert uft("compare", "--config", "compare.yaml", "--seeds", 0, 1, 2) == 1
    assert began == ["out/sequential/seed2"]


def test_another_setting_puts_a_run_aside_and_takes_it_back(tmp_path):
    folder = tmp_path / "seed0"
    assert claim(folder, {"rate": 1}) is None
    (folder / "weights").write_text("of rate 1")
    assert "a run of other settings lay there" in claim(folder, {"rate": 2})
    assert not (folder / "weights").exists()
    assert "is back" in claim(folder, {"rate": 1})
    assert (folder / "weights").read_text() == "of rate 1"
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").touch()
    with pytest.raises(ValueError, match="holds files of something else"):
        claim(tmp_path / "mine", {"rate": 1})


def test_killed_run_goes_on_from_its_newest_checkpoint(compared, workplace, monkeypatch):
    """Killed behind its last step, before that was measured; the end is that of the uninterrupted run."""
    whole, calls = runs.evaluate, []

    def killed(*args, **more):
        calls.append(args)
        if len(calls) == 3:  # base, sft, dpo
            raise OSError("killed")
        return whole(*args, **more)

    monkeypatch.setattr(runs, "evaluate", killed)
    plan = Comparison.of(COMPARISON)
    prepared = Prepared.of(plan)
    prepared.base()
    with pytest.raises(OSError, match="killed"):
        prepared.run(plan.arm("sequential"), 0, None).record()
    assert (workplace / "out/sequential/seed0/dpo/checkpoint-3").is_dir()
    prepared.run(plan.arm("sequential"), 0, None).record()
    assert len(calls) == 4  # the first stage was not measured again
    for metric in ("demonstrations/nll", "pairs/logps/chosen"):
        assert measured(workplace, "sequential", 0, metric) == measured(compared, "sequential", 0, metric)
    assert flops(workplace, "sequential", 0) == flops(compared, "sequential", 0)
    assert math.isnan(runs.measure_of(read(workplace / "out/sequential/seed0/run.json"), "nothing/measured"))


def test_dry_run_says_what_each_arm_would_get_and_writes_nothing(workplace, capsys):
    assert uft("compare", "--config", "compare.yaml", "--dry-run") == 0
    said = capsys.readouterr().out
    assert "2 arms × 2 seeds = 4 runs" in said and "sequential: dpo" in said and "joint − sequential" in said
    assert not (workplace / "out").exists()


@pytest.mark.slow
def test_flops_are_equal_within_two_per_cent(workplace):
    changes = {"seeds": [0], "max_steps": 60, "arms.sequential.stages.0.max_steps": 40}
    write(workplace, "compare.yaml", changed(COMPARISON, changes))
    assert uft("compare", "--config", "compare.yaml") == 0
    assert sum(flops(workplace, "joint", 0)) == pytest.approx(sum(flops(workplace, "sequential", 0)), rel=0.02)
    write(workplace, "compare.yaml", changed(COMPARISON, changes | {"budget": {"flops": "joint"}}))
    assert uft("compare", "--config", "compare.yaml", "--output_dir", "other", "--workers", 2) == 0
    summary = read(workplace / "other/summary.json")
    assert summary["arms"]["sequential"]["flops_relative_to_the_deciding_arm"]["0"] == pytest.approx(1, rel=0.02)
