"""Noise of labels: estimates by hand and planted, folds that keep prompts together, margins of other folds alone."""

import json
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import tiny_model, tiny_tokenizer

from uft.data import noise
from uft.data.mixture import load_feedback
from uft.data.noise import (
    NoiseRate,
    bayes_threshold,
    confident_rate,
    cross_validated,
    detection,
    flagged,
    folds_by_prompt,
    margins,
    noise_rate,
    probability_right,
)
from uft.data.rows import DataError
from uft.data.sources import Source
from uft.feedback import Example, Response


def pair(prompt, i=0, preferences=((0, 1),)):
    sides = tuple(Response(np.array([value], dtype=np.int32)) for value in (1, 2))
    return Example("pair", np.array([prompt], dtype=np.int32), sides, preferences, row=i)


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(0, 8), min_size=12, max_size=40), st.integers(2, 4), st.integers(0, 5))
def test_folds_keep_prompts_together_and_are_even(prompts, folds, seed):
    distinct = set(prompts)
    if len(distinct) < folds:
        with pytest.raises(ValueError, match=f"found {len(distinct)} prompts and {folds} folds"):
            folds_by_prompt(prompts, folds, seed)
        return
    fold = folds_by_prompt(prompts, folds, seed)
    of_prompt = [{int(f) for p, f in zip(prompts, fold) if p == prompt} for prompt in distinct]
    assert all(len(each) == 1 for each in of_prompt)
    counts = np.bincount([min(each) for each in of_prompt], minlength=folds)
    assert counts.max() - counts.min() <= 1 and counts.min() >= 1


def test_confident_rate_by_hand():
    """p = .9, .9, .8, .2, t = 0.7: three reach it one way, 1 − .2 = .8 the other, so a quarter is turned round."""
    p = np.array([0.9, 0.9, 0.8, 0.2])
    assert p.mean() == pytest.approx(0.7)
    assert confident_rate(np.log(p / (1 - p))) == pytest.approx(1 / 4)
    # .45 is below one half, but 1 − .45 does not reach t: it is nobody's
    p = np.array([0.9, 0.9, 0.45])
    assert confident_rate(np.log(p / (1 - p))) == 0


def test_detection_by_hand():
    """Wrong are the margins −2 and 1.  Of the four (wrong, right) pairs −2 is below both, 1 below 3 and above −1."""
    margin, wrong = np.array([-2.0, 1.0, 3.0, -1.0]), np.array([True, True, False, False])
    found = detection(margin, wrong, flagged(margin))
    assert found == (1 / 2, 1 / 2, 3 / 4, 2, 2)
    assert detection(np.zeros(4), wrong, flagged(margin, 1.5)).auroc == 1 / 2  # all ties
    assert detection(margin, wrong, flagged(margin, 1.5))[:2] == (1.0, 1 / 2)
    nothing = detection(margin, np.zeros(4, dtype=bool), flagged(margin, 5))
    assert math.isnan(nothing.precision) and math.isnan(nothing.recall) and math.isnan(nothing.auroc)


@pytest.mark.parametrize("share", [0.0, 0.1, 0.3])
def test_planted_noise_is_estimated_at_any_scale(share):
    """Pairs with gaps of utility, answered by Bradley–Terry, then turned round; a reward that knows the gaps up to a
    factor.  Disagreement counts close pairs too, so it is larger than the share."""
    rng = np.random.default_rng(0)
    gap = rng.exponential(3.0, 6000)
    right = rng.random(6000) < 1 / (1 + np.exp(-gap))
    right ^= rng.random(6000) < share
    for factor in (0.2, 5.0):
        rate = noise_rate(factor * np.where(right, gap, -gap))
        assert rate.likelihood == pytest.approx(share, abs=0.025)
        assert rate.scale == pytest.approx(1 / factor, rel=0.2)
        assert rate.disagreement > share + 0.05


def test_rewards_that_know_nothing_are_one_half():
    rng = np.random.default_rng(1)
    rate = noise_rate(rng.normal(size=4000))
    assert abs(rate.disagreement - 0.5) < 0.03 and rate.likelihood > 0.4
    assert noise_rate(np.zeros(3)).likelihood == 0.5


def test_bayes_threshold_is_where_right_and_wrong_are_as_likely():
    rate = NoiseRate(0.3, 0.2, 0.2, 2.0)
    assert bayes_threshold(rate) == pytest.approx(math.log(4) / 2)
    assert probability_right(np.array([-bayes_threshold(rate)]), rate)[0] == pytest.approx(0.5)
    assert bayes_threshold(rate._replace(likelihood=0.0)) == math.inf
    assert not flagged(np.array([-1e9]), math.inf).any()
    for epsilon, expected in ((0.0, [1.0, 1.0]), (0.2, [0.0, 1.0])):  # where σ is 0 in float64
        found = probability_right(np.array([-1e4, 1e4]), rate._replace(likelihood=epsilon))
        assert found == pytest.approx(expected)


def test_probability_right_is_bayes_rule():
    """ε = 0.2, a = 2, m = 1: 0.8 σ(2) / (0.8 σ(2) + 0.2 σ(−2)) = 0.8 · 0.8808 / (0.7046 + 0.0238) = 0.9673."""
    assert probability_right(np.array([1.0]), NoiseRate(0.3, 0.2, 0.2, 2.0))[0] == pytest.approx(0.9673, abs=1e-4)


@pytest.mark.parametrize("bad", [np.array([]), np.array([1.0, math.nan]), np.ones((2, 2))])
def test_what_are_no_margins_is_refused(bad):
    with pytest.raises(ValueError, match="margins: found"):
        noise_rate(bad)


def test_margins_follow_the_preference_and_refuse_others():
    rewards = lambda examples: [[1.0, 4.0] for _ in examples]
    assert margins(rewards, [pair(1), pair(1, preferences=((1, 0),))]).tolist() == [-3.0, 3.0]
    with pytest.raises(ValueError, match="row 7: found 0 preferences in an example of kind pair; want a pair"):
        margins(rewards, [pair(1, 7, ())])


def test_no_judge_sees_the_prompts_it_judges():
    pairs = [pair(i % 7, i) for i in range(21)]
    seen = []

    def train(others):
        prompts = {int(example.prompt[0]) for example in others}

        def rewards(examples):
            seen.extend(int(example.prompt[0]) in prompts for example in examples)
            return [[float(example.row), 0.0] for example in examples]

        return rewards

    margin, fold = cross_validated(pairs, train, 3, seed=2)
    assert seen == [False] * 21 and set(fold) == {0, 1, 2}
    assert margin.tolist() == [float(i) for i in range(21)]  # each at the place of its pair


PROMPTS = [f"say {a} {b}:" for a in "abcdef" for b in "abcd"]


@pytest.fixture
def data(tmp_path):
    """A model's folder, and pairs of which every fifth prefers the other answer."""
    tokenizer = tiny_tokenizer()
    tiny_model(tokenizer, 0).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    rows = [
        {"prompt": p, "chosen": [" a", " b"][i % 5 == 0], "rejected": [" b", " a"][i % 5 == 0], "note": i}
        for i, p in enumerate(PROMPTS)
    ]
    (tmp_path / "pairs.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return tmp_path


@pytest.mark.parametrize("by", ["reward", "implicit"])
def test_command_finds_what_was_turned_round(data, by, capsys):
    words = [str(data / "pairs.jsonl"), "--model", str(data / "model"), "--output", str(data / "out"), "--by", by]
    words += ["--folds", "2", "--learning_rate", "3e-3", "--epochs", "6", "--batch_size", "4"]
    assert noise.main(words) == 0
    assert "share of wrong labels" in capsys.readouterr().out
    rows = [json.loads(line) for line in (data / "out" / "rows.jsonl").read_text().splitlines()]
    suspects = [json.loads(line) for line in (data / "out" / "suspects.jsonl").read_text().splitlines()]
    assert [row["row"] for row in rows] == list(range(len(PROMPTS)))
    wrong = np.arange(len(PROMPTS)) % 5 == 0
    found = detection(np.array([r["margin"] for r in rows]), wrong, np.array([r["flagged"] for r in rows]))
    assert found.auroc > 0.9
    assert {s["note"] for s in suspects} == {row["row"] for row in rows if row["flagged"]}
    assert [s["noise"]["margin"] for s in suspects] == sorted(s["noise"]["margin"] for s in suspects)
    report = json.loads((data / "out" / "report.json").read_text())
    assert report["pairs"] == len(PROMPTS) and report["flagged"] == len(suspects)


def test_suspects_may_hold_what_json_cannot(tmp_path):
    rows = [{"prompt": "p", "chosen": "a", "rejected": "b", "note": math.nan, "kept": 1}]
    source = Source("pairs", data=rows, kind="pair")
    noise.write_noise(tmp_path / "out", source, [pair(1)], np.array([-2.0]), np.array([0]), 0.0, {})
    (suspect,) = [json.loads(line) for line in (tmp_path / "out" / "suspects.jsonl").read_text().splitlines()]
    assert suspect["note"] is None and suspect["kept"] == 1 and suspect["noise"]["margin"] == -2.0


@pytest.mark.parametrize("value", ["-1", "much", "nan"])
def test_threshold_is_refused_before_anything_is_read(value):
    with pytest.raises(DataError, match=f"threshold is '{value}'"):
        noise.main(["no_such_file.jsonl", "--model", "none", "--output", "out", f"--threshold={value}"])


@pytest.mark.parametrize("there", noise.FILES)
def test_an_earlier_report_is_not_lost(data, there):
    """Said before the model, which does not exist, is looked for."""
    (data / "out").mkdir()
    (data / "out" / there).write_text("earlier work")
    words = [str(data / "pairs.jsonl"), "--model", str(data / "none"), "--output", str(data / "out")]
    with pytest.raises(DataError, match=f"{there}' is there already; want another --output, or --overwrite"):
        noise.main(words)
    with pytest.raises(DataError, match=r"suspects.jsonl' is a file that is read"):
        noise.main([str(data / "out" / "suspects.jsonl"), *words[1:], "--overwrite"])
    assert (data / "out" / there).read_text() == "earlier work"


def test_overwrite_replaces_an_earlier_report(data):
    (data / "out").mkdir()
    for name in noise.FILES:
        (data / "out" / name).write_text("earlier work")
    words = [str(data / "pairs.jsonl"), "--model", str(data / "model"), "--output", str(data / "out"), "--folds", "2"]
    assert noise.main([*words, "--overwrite"]) == 0
    assert not any("earlier work" in (data / "out" / name).read_text() for name in noise.FILES)


def test_too_few_prompts_for_the_folds(data):
    lines = (data / "pairs.jsonl").read_text().splitlines()
    (data / "few.jsonl").write_text("\n".join([lines[0]] * 4))
    pairs = load_feedback([str(data / "few.jsonl")], tiny_tokenizer())[0][:]
    with pytest.raises(ValueError, match="found 1 prompts and 2 folds"):
        cross_validated(pairs, lambda others: None, 2)
