"""What a reward model likes besides quality, planted and found."""

import json
import math

import numpy as np
import pytest
from tiny import tiny_model, tiny_tokenizer

from uft.data.mixture import load_feedback
from uft.feedback import Example
from uft.rlhf.reward import RewardEnsemble, RewardModel
from uft.rlhf.reward_report import FEATURES, correlation, feature_bias, reward_report

ROWS = [
    {"prompt": "say:", "chosen": " hello world good bye", "rejected": " b"},  # the chosen one is longer
    {"prompt": "say:", "chosen": " c", "rejected": " the cat sat on the mat"},  # shorter
    {"prompt": "1 + 2 =", "chosen": " 3", "rejected": " 3!"},
    {"prompt": "good:", "chosen": " bye!", "rejected": " b"},
]


@pytest.fixture(scope="module")
def tokenizer():
    return tiny_tokenizer()


@pytest.fixture(scope="module")
def pairs(tokenizer):
    return list(load_feedback({"pairs": ROWS}, tokenizer, 64)[0])


def length_reward(examples):
    return [[float(len(response.tokens)) for response in example.responses] for example in examples]


def test_a_reward_that_is_the_length(tokenizer, pairs):
    found = reward_report(length_reward, pairs, tokenizer)
    metrics = found.metrics
    longer = [len(e.responses[0].tokens) > len(e.responses[1].tokens) for e in pairs]
    assert longer == [True, False, False, True]
    assert metrics["pairs"] == 4 and metrics["pairs/accuracy"] == 0.5
    assert (metrics["pairs/longer_chosen"], metrics["pairs/longer_chosen/accuracy"]) == (2, 1.0)
    assert (metrics["pairs/shorter_chosen"], metrics["pairs/shorter_chosen/accuracy"]) == (2, 0.0)
    assert metrics["pairs/as_long"] == 0 and math.isnan(metrics["pairs/as_long/accuracy"])
    for name in ("pearson", "spearman", "within_pairs"):
        assert metrics[f"length/{name}"] == pytest.approx(1.0)
    # the two answers with "!" are longer than the other side, and one of them was chosen
    assert metrics["feature/exclamation/pairs"] == 2
    assert metrics["feature/exclamation/preferred"] == 1.0 and metrics["feature/exclamation/chosen"] == 0.5
    assert metrics["feature/code/share"] == 0.0 and math.isnan(metrics["feature/code/difference"])


def test_feature_bias_by_hand():
    """Rewards 5 1 2 3, the first and the third have it: (5 + 2)/2 − (1 + 3)/2 = 1.5.  Of the pairs (0, 1), (3, 2) the
    first prefers the one with it, which was chosen, and the second the other."""
    found = feature_bias(np.array([5.0, 1, 2, 3]), np.array([True, False, True, False]), np.array([[0, 1], [3, 2]]))
    assert found == {"share": 0.5, "difference": 1.5, "pairs": 2, "preferred": 0.5, "chosen": 0.5}


@pytest.mark.parametrize(
    "name, with_it, without",
    [
        ("list", ["- one\n- two", "So:\n1. one\n 2) two"], ["a - b", "3.5 is more", "one-two"]),
        ("bold", ["**yes** no", "a __b__"], ["2 ** 3", "a * b"]),
        ("code", ["```py\nx\n```", "use `ls`"], ["it`s", "plain"]),
        ("exclamation", ["yes!"], ["yes."]),
        ("refusal", ["I cannot help with that."], ["I can help."]),
    ],
)
def test_features(name, with_it, without):
    assert all(FEATURES[name](text) for text in with_it)
    assert not any(FEATURES[name](text) for text in without)


def test_spread_of_an_ensemble(tokenizer, pairs):
    """Members agree on the first pair, on which both are right, and differ by 2 on one side of each other."""
    rewards = [[[1.0, 0.0]] + [[0.0, 1.0 + 2 * k]] * 3 for k in (0, 1)]
    ensemble = RewardEnsemble([lambda data, r=r: r[: len(data)] for r in rewards])
    found = reward_report(ensemble, pairs, tokenizer)
    assert found.metrics["spread/right"] == 0.0 and found.metrics["spread/wrong"] == 0.5
    assert found.metrics["spread/chosen"] == 0.0 and found.metrics["spread/rejected"] == pytest.approx(0.75)
    assert found.samples["spread"] == [0.0, 0.0, *[0.0, 1.0] * 3]


def test_a_scale_changes_no_probability(tokenizer, pairs):
    model = RewardModel.of(tiny_model(tokenizer, 0), tokenizer)
    scaled = RewardModel(model.model, tokenizer, 3.0, 7.0)
    plain, found = (reward_report(each, pairs, tokenizer).metrics for each in (model, scaled))
    for name in ("pairs/ece", "pairs/brier", "pairs/nll", "pairs/accuracy", "length/spearman"):
        assert found[name] == pytest.approx(plain[name], rel=1e-4), name
    assert found["pairs/margin"] == pytest.approx(plain["pairs/margin"] / 7, rel=1e-4)


def test_scores_have_no_pairs(tokenizer, tmp_path):
    rows = [{"prompt": "say:", "completion": " a" * (1 + i), "score": i / 4} for i in range(5)]
    data = list(load_feedback({"scores": rows}, tokenizer, 64)[0])
    found = reward_report(length_reward, data, tokenizer)
    assert found.calibration is None and "pairs" not in found.metrics
    assert found.metrics["targets"] == 5 and found.metrics["targets/spearman"] == pytest.approx(1.0)
    assert found.write(tmp_path).with_suffix(".png").exists()


def test_what_is_written_can_be_read(tokenizer, pairs, tmp_path):
    found = reward_report(length_reward, pairs, tokenizer, info={"model": "mine"})
    path = found.write(tmp_path)
    written = json.loads(path.read_text())
    assert written["metrics"]["pairs/accuracy"] == 0.5 and written["metrics"]["pairs/as_long/accuracy"] is None
    assert written["samples"]["reward"] == [r for each in length_reward(pairs) for r in each]
    assert sum(each["count"] for each in written["reliability"]) == 4
    table = path.with_suffix(".md").read_text()
    assert "# Rewards of mine" in table and "| pairs/accuracy | 0.5 |" in table
    assert path.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    assert "pairs/as_long/accuracy" in str(found) and "–" in str(found)


def test_a_reward_that_is_no_number_is_named(tokenizer, pairs):
    def rewards(examples: list[Example]):
        return [[0.0, math.nan if i == 2 else 1.0] for i in range(len(examples))]

    with pytest.raises(ValueError, match="data set 'pairs', row 2: found rewards"):
        reward_report(rewards, pairs, tokenizer)
    with pytest.raises(ValueError, match="found no examples"):
        reward_report(rewards, [], tokenizer)


def test_a_correlation_with_what_does_not_vary_is_not_defined():
    assert math.isnan(correlation(np.array([1.0, 2, 3]), np.array([4, 4, 4])))
    assert correlation(np.array([1.0, 2, 9]), np.array([1, 2, 3])) == pytest.approx(1.0)
