"""Refusal and harmlessness by group: intervals by hand and by coverage, gaps, and the section of the suite."""

import json

import numpy as np
import pytest
from evaluation_data import PAIRS, REFUSALS
from hypothesis import given
from hypothesis import strategies as st
from tiny import tiny_model, tiny_tokenizer

from uft.data.quality.bias import share
from uft.data.rows import DataError
from uft.evaluation.command import run
from uft.evaluation.config import EvaluationConfig
from uft.evaluation.generation import Generation
from uft.evaluation.safety import (
    Rate,
    group_metrics,
    group_of,
    harmlessness,
    held_out,
    largest_gap,
    rates,
    refusal_by_group,
    wilson,
)
from uft.evaluation.suite import evaluate
from uft.recipe import RecipeError
from uft.rlhf.reward_model import RewardModel

TOKENIZER = tiny_tokenizer()


def test_wilson_by_hand():
    """5 of 10, z = 1.96: centre (0.5 + 3.8415 / 20) / 1.38415 = 0.5, half 1.96 √(0.025 + 0.0096) / 1.38415 = 0.2634."""
    assert wilson(5, 10) == pytest.approx((0.5, 0.2366, 0.7634, 10), abs=1e-4)
    # Newcombe 1998a, Table I: 0 of 20 gives 0 to 0.1611; 81 of 263 gives 0.2553 to 0.3662
    assert wilson(0, 20)[:3] == pytest.approx((0, 0, 0.1611), abs=1e-4)
    assert wilson(81, 263)[1:3] == pytest.approx((0.2553, 0.3662), abs=1e-4)
    for bad in ((1, 0), (3, 2), (-1, 4)):
        with pytest.raises(ValueError, match="found"):
            wilson(*bad)


@given(st.integers(1, 60).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))))
def test_intervals_hold_the_share_and_lie_within_0_and_1(counts):
    rate, low, high, _ = wilson(*counts)
    assert 0 <= low <= rate <= high <= 1 and high > low
    other = wilson(counts[1] - counts[0], counts[1])
    assert (other.low, other.high) == pytest.approx((1 - high, 1 - low))


def test_gap_is_newcombes_interval():
    """Newcombe 1998b, Table II, method 10: 56/70 − 48/80 is 0.2 with 0.0524 to 0.3339."""
    found = {"a": wilson(48, 80), "b": wilson(56, 70)}
    gap = largest_gap(found)
    assert (gap.gap, gap.low, gap.high) == pytest.approx((0.2, 0.0524, 0.3339), abs=1e-4)
    assert (gap.higher, gap.lower) == ("b", "a")
    wider = largest_gap(found | {"c": wilson(7, 10)})  # three pairs to choose from
    assert wider.gap == gap.gap and wider.low < gap.low and wider.high > gap.high
    assert largest_gap({"a": Rate(0.5, 0.2, 0.8, 10)}) is None


def test_gaps_of_equal_groups_seldom_exclude_zero():
    """Five groups with one rate: the interval of the largest of ten gaps covers 0 in 95 % of the draws or more."""
    rng = np.random.default_rng(0)
    misses = 0
    for _ in range(400):
        found = {str(i): wilson(int(k), 40) for i, k in enumerate(rng.binomial(40, 0.4, 5))}
        misses += largest_gap(found).low > 0
    assert misses <= 0.05 * 400 + 9  # two standard deviations


def test_refusals_by_group():
    texts = ["I cannot help with that.", "Sure!", "I can't assist.", "Sure!", "I won't help.", "Sure!"]
    generations = [Generation("p", text, 3, True) for text in texts]
    should, groups = [True, True, True, True, False, False], ["x", "x", "y", "y", "x", "y"]
    found = refusal_by_group(generations, should, groups)
    assert (found["refusal/group/x"], found["refusal/group/y"]) == (0.5, 0.5)
    assert (found["false_refusal/group/x"], found["false_refusal/group/y"]) == (1.0, 0.0)
    assert found["refusal/gap"] == 0 and found["false_refusal/gap"] == 1
    assert found["refusal/group/x/n"] == 2
    assert found["false_refusal/group/x/low"] < 1 == found["false_refusal/group/x/high"]
    with pytest.raises(ValueError, match="6 generations, 6 should_refuse and 5 groups"):
        refusal_by_group(generations, should, groups[:5])


def test_harmlessness_by_hand():
    by = {"likelihood": np.array([[-1.0, -2.0], [-3.0, -2.0], [-1.0, -1.0], [0.0, -5.0]])}
    found = harmlessness(by, ["x", "x", "y", "y"])
    assert found["likelihood"] == 2.5 / 4 and found["likelihood/n"] == 4
    assert (found["likelihood/group/x"], found["likelihood/group/y"], found["likelihood/gap"]) == (0.5, 0.75, 0.25)
    assert found["likelihood/low"] == wilson(2.5, 4).low
    assert set(harmlessness(by)) == {"likelihood", "likelihood/low", "likelihood/high", "likelihood/n"}
    with pytest.raises(ValueError, match=r"likelihood: found \[4\]"):
        harmlessness({"likelihood": np.zeros(4)})
    with pytest.raises(ValueError, match="4 outcomes and 3 groups"):
        rates([1, 0, 1, 1], ["x", "y", "x"])


def test_one_group_has_no_gap_and_missing_values_are_one():
    assert "r/gap" not in group_metrics("r", [1.0, 0.0], ["x", "x"])
    assert [group_of(value) for value in (None, "", "a/b", 3, 0)] == ["none", "none", "a_b", "3", "0"]


def test_group_names_overwrite_nothing():
    """Groups with the names of what is said of them: the interval, count and gap of the whole stay what they are."""
    names = ["low", "high", "n", "gap", "group"]
    right = np.array([1.0, 0.0, 0.0, 1.0, 1.0] * 4)
    by = {"likelihood": np.stack([right, np.full(20, 0.5)], axis=1)}
    plain, named = harmlessness(by, list("abcde") * 4), harmlessness(by, names * 4)
    assert len(plain) == len(named) == 4 + 5 * 4 + 3
    own = ("", "/low", "/high", "/n", "/gap", "/gap/low", "/gap/high")
    assert all(named[f"likelihood{end}"] == plain[f"likelihood{end}"] for end in own)
    for letter, name in zip("abcde", names):
        for end in ("", "/low", "/high", "/n"):
            assert named[f"likelihood/group/{name}{end}"] == plain[f"likelihood/group/{letter}{end}"]
    with pytest.raises(ValueError, match="found group 'x/low'; want a name without '/'"):
        group_metrics("r", [1.0, 0.0], ["x", "x/low"])


def test_one_interval_of_wilson():
    """The one for ties here, and scipy's for counts in reports on data, are the same."""
    for hits, of in ((0, 7), (5, 10), (81, 263), (9, 9)):
        its = share(hits, of)
        assert wilson(hits, of)[:3] == pytest.approx((its["share"], its["low"], its["high"]), abs=1e-12)


def test_held_out_keeps_prompts_together_and_stays():
    prompts = [f"prompt {i // 2}" for i in range(4000)]
    out = held_out(prompts, 0.2)
    assert (out[::2] == out[1::2]).all() and abs(out.mean() - 0.2) < 0.04
    assert (held_out([*prompts, "more"], 0.2)[:-1] == out).all()
    assert (held_out(prompts, 0.4) >= out).all()  # a larger share holds the smaller
    assert (held_out(prompts, 0.2, "other") != out).any()
    with pytest.raises(ValueError, match="share is 1"):
        held_out(prompts, 1)


# ---- in the suite ----

GROUPED = [pair | {"topic": "xy"[i % 2]} for i, pair in enumerate(PAIRS)]
ASKED = [row | {"topic": "xyz"[i % 3]} for i, row in enumerate(REFUSALS)]
SECTIONS = {
    "harmlessness": {"red": {"data": GROUPED, "group": "topic"}},
    "refusals": {"mixed": {"data": ASKED, "group": "topic"}},
    "generation": {"max_new_tokens": 4},
    "max_length": 64,
}  # fmt: skip


def test_suite_measures_likelihood_rewards_and_reward_model_by_group():
    model, reference = tiny_model(TOKENIZER, 0), tiny_model(TOKENIZER, 1)
    rewards = RewardModel.of(tiny_model(TOKENIZER, 2), TOKENIZER)
    report = evaluate(model, TOKENIZER, EvaluationConfig.of(SECTIONS), reference, rewards=rewards)
    rows = report.samples["harmlessness"]
    assert rows["group"] == ["x", "y"] * 3
    for by in ("likelihood", "rewards", "reward_model"):
        right = np.array(rows[f"{by}_harmless"]) > np.array(rows[f"{by}_harmful"])
        assert report.metrics[f"harmlessness/{by}"] == right.mean()
        assert report.metrics[f"harmlessness/{by}/group/x"] == pytest.approx(right[::2].mean())
        assert f"harmlessness/{by}/gap/low" in report.metrics
        assert report.metrics[f"harmlessness/{by}/group/y/n"] == 3
    assert rows["correct"] == [a > b for a, b in zip(rows["likelihood_harmless"], rows["likelihood_harmful"])]
    # what the reward model says of the pairs' own tokens, in their order
    config = EvaluationConfig.of({"pairs": {"p": PAIRS}, "max_length": 64})
    from uft.evaluation.data import read_data

    expected = rewards(list(read_data(config, TOKENIZER).pairs[:]))
    assert rows["reward_model_harmless"] == pytest.approx([each[0] for each in expected], abs=1e-5)
    assert {"refusals/refusal/group/x", "refusals/false_refusal/group/y/high"} <= report.metrics.keys()
    assert "refusals/refusal/gap" in report.metrics
    assert report.samples["refusals"]["group"] == list("xyz") * 2

    later = evaluate(model, TOKENIZER, EvaluationConfig.of(SECTIONS), reference, before=report)
    assert later.metrics["harmlessness/F"] == 0 and "harmlessness/reward_model" not in later.metrics


def test_without_a_reference_and_groups_only_likelihood():
    config = EvaluationConfig.of({"harmlessness": {"red": PAIRS}, "max_length": 64})
    report = evaluate(tiny_model(TOKENIZER, 0), TOKENIZER, config)
    names = {"likelihood", "likelihood/low", "likelihood/high", "likelihood/n"}
    assert {name.removeprefix("harmlessness/") for name in report.metrics} == names
    two = EvaluationConfig.of({"harmlessness": {"red": PAIRS[:3], "blue": PAIRS[3:]}, "max_length": 64})
    report = evaluate(tiny_model(TOKENIZER, 0), TOKENIZER, two)
    assert report.samples["harmlessness"]["group"] == ["red"] * 3 + ["blue"] * 3


@pytest.mark.parametrize(
    "sections, message",
    [
        ({"harmlessness": {"red": {"data": PAIRS, "group": "topic"}}}, "found no column 'topic'"),
        ({"refusals": {"r": {"data": REFUSALS, "group": "topic"}}}, "found no column 'topic'"),
        ({"harmlessness": {"red": [{"text": "a"}]}}, "harmlessness: found examples of kind document"),
    ],
)
def test_groups_that_are_not_there(sections, message):
    with pytest.raises(DataError, match=message):
        evaluate(tiny_model(TOKENIZER, 0), TOKENIZER, EvaluationConfig.of(sections))


def test_options_are_checked():
    with pytest.raises(RecipeError, match=r"harmlessness.red: group is 3"):
        EvaluationConfig.of({"harmlessness": {"red": {"data": PAIRS, "group": 3}}})
    with pytest.raises(RecipeError, match="grup"):
        EvaluationConfig.of({"harmlessness": {"red": {"data": PAIRS, "grup": "topic"}}})


def test_command_takes_a_reward_model(tmp_path):
    model = tiny_model(TOKENIZER, 0)
    model.save_pretrained(tmp_path / "model")
    TOKENIZER.save_pretrained(tmp_path / "model")
    RewardModel.of(model, TOKENIZER).save(tmp_path / "reward")
    (tmp_path / "pairs.jsonl").write_text("\n".join(map(json.dumps, GROUPED)))
    values = {
        "model": str(tmp_path / "model"), "reward_model": str(tmp_path / "reward"), "output_dir": str(tmp_path / "out"),
        "max_length": 64, "harmlessness": {"red": {"path": str(tmp_path / "pairs.jsonl"), "group": "topic"}},
    }  # fmt: skip
    report, path = run(values)
    assert report.metrics["harmlessness/reward_model/n"] == 6
    assert "harmlessness/reward_model/gap" in json.loads(path.read_text())["metrics"]
