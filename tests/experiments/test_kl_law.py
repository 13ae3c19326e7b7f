"""The KL law: curves and R2 by hand, and planted runs in which one KL decides what is forgotten, others being noise."""

import json
from collections.abc import Callable

import numpy as np
import pytest

from experiments import figures
from experiments.fits import fitted_r2, left_out_r2, monotone, resampled_spearman, spearman, within_r2
from experiments.kl_law import KL, judged, main
from experiments.reporting.folders import read_result
from experiments.reporting.runs import LAB, REAL, REAL_KL, runs_of
from tests.experiments.overlaps import caught

# ---- curves, by hand ----


def test_a_monotone_curve_pools_what_falls():
    x, y = np.array([0.0, 1, 2, 3]), np.array([0.0, 1, 0, 1])
    np.testing.assert_allclose(monotone(x, y)(x), [0, 0.5, 0.5, 1])
    # squared error 1/4 + 1/4, of 4 · 1/4 in all
    assert fitted_r2("monotone", x, y) == pytest.approx(0.5)
    # between the points it is straight, outside level; the order of the runs does not matter
    np.testing.assert_allclose(monotone(x[::-1], y[::-1])(np.array([-9.0, 0.5, 9.0])), [0, 0.25, 1])


def test_equal_x_share_one_height():
    np.testing.assert_allclose(monotone(np.array([1.0, 1, 2]), np.array([0.0, 1, 3]))(np.array([1.0, 2])), [0.5, 3])


def test_a_parabola_is_fitted_exactly_and_its_turn_is_not_monotone():
    x = np.arange(-3.0, 4)
    assert fitted_r2("quadratic", x, 2 + x - 3 * x**2) == pytest.approx(1.0)
    assert fitted_r2("monotone", x, -(x**2)) < 0.8
    # y = |x| on -1, 0, 1 twice is a parabola through (-1, 1), (0, 0), (1, 1)
    assert fitted_r2("quadratic", np.array([-1.0, 0, 1]), np.array([1.0, 0, 1])) == pytest.approx(1.0)
    # a symmetric hump over a line: the best quadratic in x of (0, 1, 0, 1) at 0..3 is the line 0.2 + 0.2 x: R2 = 0.2
    assert fitted_r2("quadratic", np.arange(4.0), np.array([0.0, 1, 0, 1])) == pytest.approx(0.2)


def test_what_does_not_vary_has_no_r2():
    assert np.isnan(fitted_r2("quadratic", np.arange(4.0), np.ones(4)))
    assert np.isnan(fitted_r2("monotone", np.ones(4), np.arange(4.0)))
    assert np.isnan(spearman(np.ones(3), np.arange(3.0)))


def test_left_out_groups_are_judged_against_the_mean_of_the_others():
    x, groups = np.array([0.0, 1, 0, 1]), ["a", "a", "b", "b"]
    assert left_out_r2("monotone", x, np.array([0.0, 1, 0, 1]), groups) == pytest.approx(1.0)
    # b is 2 higher everywhere: each point is missed by 2 (16 in all), the other group's mean by 1.5 or 2.5 (17 in all)
    assert left_out_r2("monotone", x, np.array([0.0, 1, 2, 3]), groups) == pytest.approx(1 - 16 / 17)
    assert np.isnan(left_out_r2("monotone", x, x, ["a"] * 4))


def test_within_groups_their_levels_do_not_count():
    x = np.array([0.0, 1, 2, 0, 1, 2])
    y = x**2 + np.array([0, 0, 0, 50, 50, 50])
    assert within_r2(x, y, [0, 0, 0, 1, 1, 1]) == pytest.approx(1.0)
    assert fitted_r2("quadratic", x, y) < 0.01


def test_clusters_are_drawn_whole():
    """Two clusters, in each of which y falls with x, though it rises from one to the other."""
    x, y = np.array([0.0, 1, 10, 11]), np.array([1.0, 0, 11, 10])
    draws = resampled_spearman(x[None], y, ["a", "a", "b", "b"], draws=200)[:, 0]
    # one cluster twice: the order inside it, -1; both: 3, 3, 1, 1 places apart make rho = 1 - 6 · 4 / (4 · 15)
    assert {round(float(rho), 6) for rho in draws} == {-1.0, 0.6}


# ---- planted runs ----


def planted(folder, name: str, forget: Callable[[dict, np.random.Generator], float], seed: int, lacking: str = "",
            lines=("unified DPO + NLL", "SFT → DPO", "SFT only")):  # fmt: skip
    random = np.random.default_rng(seed)
    points = []
    for line in lines:
        for x in range(4):
            per_seed = {m: {} for m in (*KL, "fact_recall", "retention")}
            for s in range(3):
                kl = {k: float(random.uniform(0, 3)) for k in KL}
                facts = 1 - forget(kl, random)
                for measure, value in (kl | {"fact_recall": facts, "retention": facts / 3}).items():
                    per_seed[measure][str(s)] = value
            per_seed.pop(lacking, None)
            points.append({"line": line, "x": float(x), "per_seed": per_seed, "compute": []})
    (folder / name).mkdir()
    summary = {"study": name, "question": "Which?", "points": points}
    (folder / name / "summary.json").write_text(json.dumps(summary))
    return folder / name


def decides(which: str):
    return lambda kl, random: 0.1 * kl[which] ** 2


@pytest.mark.parametrize("which", KL)
def test_the_kl_that_decides_wins(which, tmp_path):
    folders = [planted(tmp_path, name, decides(which), k) for k, name in enumerate("abc")]
    runs, lacking = runs_of([read_result(folder) for folder in folders])
    assert len(runs) == 3 * 36 and not lacking
    found = judged(runs, "forgotten", draws=200)
    assert found["best"] == which and found["criterion"] == "r2_monotone_left_out_experiment"
    row = found["predictors"][which]
    assert row["r2_quadratic"] == pytest.approx(1.0) and row["r2_monotone"] == pytest.approx(1.0)
    assert row["r2_quadratic_left_out_experiment"] == pytest.approx(1.0)
    assert row["r2_monotone_left_out_experiment"] > 0.99 and row["r2_within_seeds"] == pytest.approx(1.0)
    assert row["rho_by_setting"] == {"rho": pytest.approx(1), "low": pytest.approx(1), "high": pytest.approx(1),
                                     "clusters": 36}  # fmt: skip
    assert row["rho_by_seed"]["clusters"] == 3
    assert found["highest_rho_in_resamples"] == 1.0
    for name, other in found["predictors"].items():
        if name != which:
            assert other["r2_quadratic"] < 0.2 and other["r2_monotone_left_out_experiment"] < 0.2
            assert other["rho_by_setting"]["low"] < 0.25
    assert found["methods"]["SFT → DPO"]["runs"] == 36
    assert found["methods"]["SFT → DPO"]["own"][which] == pytest.approx(1.0)
    assert found["methods"]["SFT → DPO"]["common"] == pytest.approx(1.0)


def test_noise_has_no_winner(tmp_path):
    folders = [planted(tmp_path, name, lambda kl, random: random.random(), k) for k, name in enumerate("abc")]
    found = judged(runs_of([read_result(folder) for folder in folders])[0], "forgotten", draws=100)
    assert all(row["r2_monotone_left_out_experiment"] < 0.15 for row in found["predictors"].values())
    assert all(row["rho_by_setting"]["low"] < 0.1 for row in found["predictors"].values())


def test_a_run_that_two_experiments_share_counts_once(tmp_path):
    folders = [planted(tmp_path, name, decides("kl_base"), seed) for name, seed in (("a", 0), ("b", 0), ("c", 1))]
    runs, _ = runs_of([read_result(folder) for folder in folders])
    assert len(runs) == 2 * 36 and {run.experiment for run in runs} == {"a", "c"}


def test_neither_does_one_that_they_call_by_other_names(tmp_path):
    """Else it would be left out and known at once."""
    first = planted(tmp_path, "a", decides("kl_base"), 0)
    again = planted(tmp_path, "b", decides("kl_base"), 0, lines=("joint stage", "two stages", "one stage"))
    runs, _ = runs_of([read_result(first), read_result(again)])
    assert len(runs) == 36 and {run.method for run in runs} == {"unified DPO + NLL", "SFT → DPO", "SFT only"}


def test_runs_without_every_kl_are_counted_and_named(tmp_path):
    whole = planted(tmp_path, "whole", decides("kl_base"), 0)
    part = planted(tmp_path, "part", decides("kl_base"), 1, lacking="kl_base_prior")
    runs, lacking = runs_of([read_result(whole), read_result(part)])
    assert len(runs) == 36 and lacking == {"part": 36}


def test_the_base_is_no_run_but_what_is_lost_is_measured_from_it(tmp_path):
    study = planted(tmp_path, "study", decides("kl_base"), 0)
    scale = planted(tmp_path, "scale", decides("kl_base"), 1)
    zero = {name: {"0": 0.0, "1": 0.0} for name in KL}
    base = {"label": "base model", "family": "control", "compute": [], "steps": [],
            "per_seed": zero | {"fact_recall": {"0": 1.0, "1": 1.0}, "retention": {"0": 0.34, "1": 0.36},
                                "score": {}, "alignment": {}}}  # fmt: skip
    (tmp_path / "main").mkdir()
    summary = {"settings": {}, "search": {}, "tables": {"Equal FLOPs": {"pairs": {"base": base}}}}
    (tmp_path / "main" / "summary.json").write_text(json.dumps(summary))
    runs, lacking = runs_of([read_result(path) for path in (study, scale, tmp_path / "main")])
    assert len(runs) == 72 and not lacking
    for run in runs:
        if run.experiment == "scale" or run.seed == 2:  # other base models, or none that was measured
            assert np.isnan(run.lost)
        else:
            assert run.lost == pytest.approx((0.34, 0.36)[run.seed] - (1 - run.forgotten) / 3)


def test_real_text_has_names_and_a_world_of_its_own(tmp_path):
    values = {name: {"0": 1.0} for name in REAL_KL.values()} | {"knowledge": {"0": 0.7}, "retention": {"0": 0.5}}
    base = {name: {"0": 0.0} for name in REAL_KL.values()} | {"knowledge": {"0": 1.0}, "retention": {"0": 0.3}}
    arms = {"base": {"label": "base model", "per_seed": base}, "sft": {"label": "SFT only", "per_seed": values}}
    (tmp_path / "real_small").mkdir()
    (tmp_path / "real_small" / "summary.json").write_text(json.dumps({"arms": arms}))
    [run], _ = runs_of([read_result(tmp_path / "real_small")])
    assert run.world == REAL != LAB and run.kl == dict.fromkeys(KL, 1.0)
    assert run.forgotten == pytest.approx(0.3) and run.lost == pytest.approx(-0.2)


def test_what_is_written(tmp_path, monkeypatch, capsys):
    drawn = caught(monkeypatch)
    folders = [planted(tmp_path, name, decides("kl_base_prior"), k) for k, name in enumerate("ab")]
    folders.append(planted(tmp_path, "c", decides("kl_base_prior"), 9, lines=("MSE", "unified UFT (Wang et al.)")))
    assert main([*map(str, folders), "--output", str(tmp_path / "out"), "--draws", "100"]) == 0
    out = tmp_path / "out"
    assert {path.name for path in out.iterdir()} == {"report.md", "report.html", "summary.json", "kl_law.png"}
    text, summary = (out / "report.md").read_text(), json.loads((out / "summary.json").read_text())
    assert "predicted best by **KL(π‖base), prior task**" in text and "What limits this" in text
    assert summary["found"][LAB]["forgotten"]["best"] == "kl_base_prior" and len(summary["runs"]) == 96
    assert "lost" not in summary["found"][LAB]  # no base was measured
    assert "KL(π‖base), prior task" in capsys.readouterr().out
    [figure] = drawn
    assert figure.panels == 4 and figure.overlapping == [] and figure.legend_entries <= 7


def test_too_few_runs_say_what_they_lack(tmp_path, capsys):
    folder = planted(tmp_path, "part", decides("kl_base"), 1, lacking="kl_base_prior")
    assert main([str(folder), "--output", str(tmp_path / "out")]) == 1
    assert "part 36" in capsys.readouterr().err
    assert figures.plt.get_fignums() == []
