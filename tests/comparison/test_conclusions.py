"""What a comparison says it has shown, and what not, from numbers made up."""

import math

import pytest

from uft.comparison.statistics import holm, interval, sign_flip
from uft.comparison.summary import conclusions, seeds_needed
from uft.comparison.tables import less_is_better, shown, signed, terminal_table


def contrast(values, metric="pairs/rewards/accuracies", tests=1):
    found = interval(values)
    p = sign_flip(values)
    return {"a": "joint", "b": "sequential", "metric": metric, **found._asdict(), "p": p, "p_holm": min(1.0, tests * p),
            "by_seed": dict(enumerate(values))}  # fmt: skip


def test_seeds_that_a_test_needs():
    assert seeds_needed(1) == 6 and 2.0 ** (1 - 6) <= 0.05 < 2.0 ** (1 - 5)
    for tests in range(1, 12):
        n = seeds_needed(tests)
        assert tests * 2.0 ** (1 - n) <= 0.05 < tests * 2.0 ** (2 - n)
    assert max(holm({"a": 2.0**-6, "b": 2.0**-6}).values()) <= 0.05  # two tests, seven seeds


def test_few_seeds_conclude_nothing_however_large_the_difference():
    first, second = conclusions([contrast([5.0, 5.1, 4.9])], 3)
    assert "with 3 seeds the smallest p that an exact sign-flip test can have is 0.25; 6 seeds are" in first
    assert "joint is better than sequential by 5 on average" in second and "does not confirm" in second
    assert "on the one seed" in conclusions([contrast([5.0])], 1)[1]


def test_six_seeds_can_conclude_and_the_sign_is_read_by_the_metric():
    values = [0.5, 0.6, 0.4, 0.5, 0.7, 0.3]
    assert conclusions([contrast(values)], 6) == [
        "pairs/rewards/accuracies: joint is better than sequential by 0.5 (p = 0.031 after Holm)."
    ]
    assert "joint is worse than sequential" in conclusions([contrast(values, "demonstrations/nll")], 6)[0]
    assert "cannot be told apart; differences from" in conclusions([contrast([0.5, -0.6, 0.4, -0.5, 0.7, -0.3])], 6)[0]
    assert "the same on every seed" in conclusions([contrast([0.0] * 6)], 6)[0]


def test_arms_that_diverged_or_have_their_own_budget_are_said_to():
    gone = {"joint": {3: "diverged: loss is nan", 5: "diverged: loss is inf"}, "heavy": {1: "not run: no budget"}}
    said = conclusions([contrast([0.5] * 4)], 6, gone, ["joint"])
    assert said[0].startswith(
        "joint diverged on seeds 3, 5: its means and contrasts have no number there and leave them"
    )
    assert said[1] == "heavy was not run on seed 1: its means and contrasts have no number there and leave it out."
    assert said[2] == "joint has a budget of its own: differences from it are not at equal cost."
    assert "with 4 seeds the smallest p" in said[3]  # of the six that were asked for
    assert said[4].startswith("pairs/rewards/accuracies (joint not at equal cost): joint is better than sequential")
    none = contrast([math.nan]) | {"n": 0, "by_seed": {}}
    assert conclusions([none], 1, {"joint": {0: "diverged: x"}})[1:] == [
        "pairs/rewards/accuracies: there is no seed on which both joint and sequential came to their end."
    ]


@pytest.mark.parametrize(
    "metric, less",
    [("demonstrations/nll", True), ("pairs/rewards/accuracies", False), ("verifiable/F_true", True),
     ("eval_loss", True), ("divergence/prior/policy/kl", True), ("refusals/false_refusal", True),
     ("verifiable/BT_true", False), ("eval_loss/sft", True), ("eval_instructions/nll", True),
     ("pairs/drift/chosen", False), ("refusals/false_refusal/group/young", True),
     ("refusals/false_refusal/young", True),
     ("refusals/refusal/group/young", False), ("pairs/rewards/rejected", True), ("pairs/logps/rejected", True),
     ("pairs/rewards/chosen", False), ("pairs/rewards/margins", False), ("eval_rewards/rejected", True),
     ("verifiable/accuracy/group/loss", False), ("verifiable/accuracy/gap", True)],
)  # fmt: skip
def test_directions(metric, less):
    assert less_is_better(metric) == less


def test_numbers_in_tables():
    assert shown(interval([1.0, 3.0])) == "2.000 ± 12.706" and shown(interval([math.nan, 1.0])) == "–"
    assert shown(interval([0.5])) == "0.500" and signed(interval([0.5])) == "+0.500"
    assert signed(interval([1.0, 3.0])) == "+2.000 [-10.706, +14.706]"
    assert terminal_table(["a", "b"], [["x", "10"]]).splitlines()[2] == "x  10"
