"""Label noise and active selection: what is put in is what is counted, and reports say what the runs say."""

import json

import numpy as np
import pytest

from experiments import active_selection, label_noise
from experiments.lab.active import COMMON, pool_rows
from experiments.lab.world import COVERED

RNG = np.random.default_rng(0)


def noise_run(seed, flip, estimated):
    found = {"precision": 0.5 + flip, "recall": 0.75, "auroc": 0.9, "flagged": 4, "wrong": 3}
    estimates = {"disagreement": flip + 0.1, "confident": flip + 0.05, "likelihood": estimated, "scale": 1.0}
    return {"seed": seed, "flip": flip, "true": flip, "estimated": estimates, "gold_accuracy": 0.8,
            "zero": found, "bayes": found | {"precision": float("nan")}}  # fmt: skip


def test_label_noise_report_says_what_was_measured(tmp_path):
    found = {("reward", flip): [noise_run(seed, flip, flip + 0.02) for seed in (0, 1)] for flip in (0.0, 0.2)}
    label_noise.write(tmp_path, found)
    text = (tmp_path / "report.md").read_text()
    assert "20 %: 0.90, 0.75, 0.70" in text and "smallest mean error by **likelihood**" in text
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["estimate_errors"]["reward"] == pytest.approx(
        {"disagreement": 0.1, "confident": 0.05, "likelihood": 0.02}
    )
    assert len(summary["runs"]) == 4 and (tmp_path / "label_noise.png").stat().st_size > 10_000


def test_the_skewed_pool_is_skewed_and_the_even_one_is_not():
    for pool, share, marked in (("skewed", COMMON, 0.05), ("even", 0.25, 0.5)):
        rows = pool_rows(pool, 1500, 2)
        assert abs(np.mean([row["prompt"].startswith(COVERED[2]) for row in rows]) - share) < 0.05
        assert abs(np.mean([row["prompt"].endswith("!=") for row in rows]) - marked) < 0.05
        assert rows == pool_rows(pool, 1500, 2) != pool_rows(pool, 1500, 3)


def active_runs(gain):
    """Curves in which `margin` beats random by `gain` and `coverage` is like it but for its own luck."""
    runs = []
    for seed in range(8):
        base = 0.6 + 0.02 * seed + np.array([0.0, 0.1, 0.2])
        curves = {"random": base, "margin": base + np.array([0, gain, gain + 0.001 * (seed % 3)]),
                  "coverage": base + np.array([0, *RNG.normal(0, 0.02, 2)])}  # fmt: skip
        spread = dict.fromkeys(("distance", "nearest", "vendi", "radius"), 1.0)
        runs.append({"pool": "even", "seed": seed, "budgets": [4, 8, 16], "diversity": dict.fromkeys(curves, spread),
                     "accuracy": {rule: list(map(float, curve)) for rule, curve in curves.items()}})  # fmt: skip
    return runs


def test_a_planted_gain_is_found_and_none_where_there_is_none(tmp_path):
    runs = active_runs(0.05)
    found = active_selection.compared(runs)
    assert found["margin"]["difference"]["mean"] == pytest.approx(0.0504, abs=2e-4)  # not of the first budget
    assert found["margin"]["p_holm"] == pytest.approx(2 * 2 / 2**8) and found["coverage"]["p_holm"] > 0.05
    said = active_selection.verdict("even", found)
    assert "excludes 0: margin" in said and "Holm's correction over the rules: margin better" in said
    same = active_selection.compared(active_runs(0.0))
    same.pop("margin")  # all of its differences have one sign
    assert "no rule is distinguishably better" in active_selection.verdict("even", same)
    assert "worse: margin" in active_selection.verdict("even", active_selection.compared(active_runs(-0.05)))
    active_selection.write(tmp_path, {"even": runs}, {"size": 32})
    assert "0.050" in (tmp_path / "report.md").read_text()
    assert (tmp_path / "active_selection.png").stat().st_size > 10_000
