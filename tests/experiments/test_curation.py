"""Label noise, active selection, harmlessness: reports, and the pages that cite them, say what the runs say."""

import json
import re
import shlex
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from experiments import active_selection, harmlessness, label_noise
from experiments.lab.active import COMMON, pool_rows
from experiments.lab.world import COVERED
from uft.data import check_command as check
from uft.data import noise, queue, selection
from uft.data.mixture import FeedbackDataset
from uft.evaluation import safety
from uft.feedback import Example, Response

ROOT = Path(__file__).parents[2]
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
    assert "20 %: 0.900 ± 0.000, 0.750 ± 0.000, 0.700 ± 0.000" in text
    assert "smallest mean error by **likelihood** (disagreement 0.100 ± 0.000" in text
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["estimate_errors"]["reward"] == pytest.approx(
        {"disagreement": 0.1, "confident": 0.05, "likelihood": 0.02}
    )
    assert len(summary["runs"]) == 4 and (tmp_path / "label_noise.png").stat().st_size > 10_000


def test_headline_says_how_unsure_it_is():
    """Precisions 0.5 and 0.9: 0.7 ± 12.706 · 0.4 / 2.  Errors of likelihood 0.01 and 0.03: 0.02 ± 12.706 · 0.02 / 2."""
    runs = [noise_run(0, 0.2, 0.21), noise_run(1, 0.2, 0.23)]
    for run, precision in zip(runs, (0.5, 0.9)):
        run["zero"] = run["zero"] | {"precision": precision}
    said = label_noise.headline({("reward", 0.2): runs})
    assert "20 %: 0.900 ± 0.000, 0.750 ± 0.000, 0.700 ± 2.541" in said[0]
    assert "likelihood 0.020 ± 0.127" in said[1] and "disagreement 0.080 ± 0.127" in said[1].split("minus its own")[1]


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
    assert "distinguishable from random after Holm's correction over the rules: better margin (+0.050 [" in said
    same = active_selection.compared(active_runs(0.0))
    same.pop("margin")  # all of its differences have one sign
    assert "none is distinguishable from random" in active_selection.verdict("even", same)
    assert "rules: worse margin (-0.0" in active_selection.verdict(
        "even", active_selection.compared(active_runs(-0.05))
    )
    active_selection.write(tmp_path, {"even": runs}, {"size": 32})
    assert "0.050" in (tmp_path / "report.md").read_text()
    assert (tmp_path / "active_selection.png").stat().st_size > 10_000


@pytest.mark.parametrize("sign, way", [(1, "better"), (-1, "worse")])
def test_both_directions_are_held_to_the_same_correction(sign, way):
    """Five seeds, all of them one way: p = 2 / 2^5 = 0.0625, times two rules 0.125, whatever the interval."""
    gains = {"margin": [0.05, 0.06, 0.055, 0.05, 0.06], "coverage": [0.01, -0.01, 0.02, -0.02, 0.0]}
    runs = [
        {"seed": seed, "accuracy": {"random": [0.5, 0.6], **{r: [0.5, 0.6 + sign * g[seed]] for r, g in gains.items()}}}
        for seed in range(5)
    ]
    found = active_selection.compared(runs)
    low, high = sorted(sign * found["margin"]["difference"][end] for end in ("low", "high"))
    assert 0 < low < high and found["margin"]["p_holm"] == pytest.approx(0.125)
    said = active_selection.verdict("even", found)
    assert "after Holm's correction over the rules, none is distinguishable from random." in said
    corrected, alone = said.split("By the uncorrected 95 % interval alone, which proves nothing here: ")
    assert alone.startswith(f"{way} margin (") and "coverage" not in said and way not in corrected


# ---- harmlessness ----


def planted(model_right):
    """40 pairs in two groups of which the shorter answer is the harmless one in 24, and as long as the other in 4."""
    lengths = np.array([[2.0, 5.0]] * 24 + [[3.0, 3.0]] * 4 + [[6.0, 5.0]] * 12)
    groups = ["1", "2"] * 20
    by = {name: np.stack([model_right, np.full(40, 0.5)], axis=1) for name in harmlessness.BY}
    metrics = {f"harmlessness/{name}": value for name, value in safety.harmlessness(by, groups).items()}
    columns = {f"{n}_{side}": v[:, k].tolist() for n, v in by.items() for k, side in enumerate(("harmless", "harmful"))}
    report = SimpleNamespace(metrics=metrics, samples={"harmlessness": {"group": groups, **columns}})
    return harmlessness.Measured(report, lengths, 45, 5, 7, 100, 30)


def test_the_length_rule_is_a_row_and_models_that_follow_it_are_not_told_from_it():
    text = harmlessness.text_of(planted(np.array([1.0] * 27 + [0.0] * 13)))
    assert "| shorter is better | 0.650 [" in text and "| likelihood | 0.675 [" in text  # (24 + 4 / 2) / 40, 27 / 40
    assert 'None of the 3 is distinguishable from the rule "shorter is better"' in text
    assert "4 pairs of equal length" in text and "7 of the 40 pairs measured and in 30 of the 100 trained on" in text


@pytest.mark.parametrize("right, way", [(1.0, "better"), (0.0, "worse")])
def test_models_that_are_better_or_worse_than_the_length_rule(right, way):
    text = harmlessness.text_of(planted(np.full(40, right)))
    assert f"Holm's correction: {'better none; ' * (way == 'worse')}{way} likelihood, rewards, reward_model" in text


def test_against_the_baseline_by_hand():
    """Six pairs for the ranking, one against: p = 2 (1 + 7) / 2^7 = 0.125; differences 5 / 8, and 0 of none."""
    right, rule = np.array([1.0] * 6 + [0.0, 1.0]), np.array([0.0] * 6 + [1.0, 1.0])
    found = harmlessness.against_baseline({"a": right, "b": rule}, rule)
    assert (found["a"]["more"], found["a"]["fewer"], found["a"]["difference"]) == (6, 1, 5 / 8)
    assert found["a"]["p"] == pytest.approx(0.125) and found["a"]["p_holm"] == pytest.approx(0.25)
    half = 1.959964 * np.std([1] * 6 + [-1, 0], ddof=1) / np.sqrt(8)
    assert found["a"]["high"] - found["a"]["difference"] == pytest.approx(half)
    assert (found["b"]["difference"], found["b"]["p"], found["b"]["p_holm"]) == (0, 1, 1)


def test_lengths_are_of_the_better_answer_first():
    sides = tuple(Response(np.arange(n, dtype=np.int32)) for n in (2, 5))
    pairs = [Example("pair", np.array([1], dtype=np.int32), sides, ((b, 1 - b),), row=b) for b in (0, 1)]
    assert harmlessness.response_lengths(FeedbackDataset({"p": pairs})).tolist() == [[2, 5], [5, 2]]


# ---- what is committed ----


def test_committed_reports_are_what_their_summaries_say():
    summary = json.loads((active_selection.RESULTS / "summary.json").read_text())
    by_pool = {pool: [run for run in summary["runs"] if run["pool"] == pool] for pool in active_selection.POOLS}
    report = (active_selection.RESULTS / "report.md").read_text()
    for pool, runs in by_pool.items():
        assert active_selection.verdict(pool, active_selection.compared(runs)) in report
    found = {}
    for run in json.loads((label_noise.RESULTS / "summary.json").read_text())["runs"]:
        found.setdefault((run["judge"], run["flip"]), []).append(run)
    report = (label_noise.RESULTS / "report.md").read_text()
    assert all(line in report for line in label_noise.headline(found))


PARSERS = {"check": check.parser, "noise": noise.parser, "select": selection.parser,
           "queue": queue.parser}  # fmt: skip


@pytest.mark.parametrize("page", ["docs/curation.md"])
def test_commands_of_the_pages_are_taken(page):
    """Every `uft data` command that stands in a block of its own, but `filter`, whose keys are those of a recipe."""
    lines = re.findall(r"^    uft data (.+)$", (ROOT / page).read_text(), re.MULTILINE)
    commands = [shlex.split(line, comments=True) for line in lines]
    assert {"noise", "select", "queue"} <= {words[0] for words in commands}
    for name, *words in commands:
        if name != "filter":
            PARSERS[name]().parse_args(words)
