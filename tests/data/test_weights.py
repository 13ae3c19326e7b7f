"""A column `weight`: the factor on the loss of a row."""

import math

import pytest

from tests.data.tiny_tokenizers import assistant, make, user
from uft.collation import Collator
from uft.data.mixture import load_feedback
from uft.data.readers import read_text
from uft.data.sources import Source

KINDS = {
    "document": {"text": "a b c d e f g"},
    "demonstration": {"messages": [user("a"), assistant("b")]},
    "pair": {"prompt": "p", "chosen": " a", "rejected": " b"},
    "label": {"prompt": "p", "completion": " a", "label": True},
    "score": {"prompt": "p", "completion": " a", "score": 0.5},
}


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_may_have_a_weight(kind):
    """Both sides of a pair and all chunks of a document get that of the row."""
    rows = [KINDS[kind] | {"weight": weight} for weight in (0.25, 2)]
    data, report = load_feedback({"s": rows}, make(), max_length=5 if kind == "document" else None)
    assert report["s"].kind == kind
    assert report["s"].notes == ("losses are multiplied by column 'weight'",)
    assert [{r.weight for r in example.responses} for example in data] == [{(0.25, 2.0)[e.row]} for e in data]
    assert len(data) > 2 or kind != "document"
    batch = Collator(0, sources=data.sources)(list(data))
    assert set(batch.weight.tolist()) == {0.25, 2.0}
    unweighted, report = load_feedback({"s": [KINDS[kind]]}, make())
    assert {r.weight for r in unweighted[0].responses} == {1.0} and report["s"].notes == ()


@pytest.mark.parametrize(
    "weight, reason, found",
    [
        (-0.5, "weight out of range", "-0.5"),
        (math.nan, "weight out of range", "nan"),
        (math.inf, "weight out of range", "inf"),
        pytest.param(10**400, "weight out of range", "inf", id="huge"),
        ("1", "wrong type", "'1'"),
        (True, "wrong type", "True (bool)"),
        (None, "missing value", "nothing"),
    ],
)
def test_what_is_no_weight(weight, reason, found):
    bad, good = read_text(Source("s", data=[KINDS["pair"] | {"weight": w} for w in (weight, 0)])).examples
    assert str(bad) == f"data set 's', row 0, column 'weight': {reason}: found {found}; want a number >= 0"
    assert good.weight == 0.0


def test_where_weights_come_from(tmp_path):
    (tmp_path / "a.csv").write_text("prompt,completion,weight\np, a,0.5\np, a,heavy\n")
    good, bad = read_text(Source("s", tmp_path / "a.csv")).examples
    assert good.weight == 0.5
    assert (bad.reason, bad.column) == ("wrong type", "weight")
    row = KINDS["label"] | {"importance": 3, "weight": "ignored, since another column was asked for"}
    source = Source("s", data=[row, row | {"importance": -1}], columns={"weight": "importance"})
    good, bad = read_text(source).examples
    assert (good.weight, bad.column) == (3.0, "importance")
    assert read_text(source).notes == ("losses are multiplied by column 'importance'",)
    # of a score that is made of columns, one may have that name
    reading = read_text(Source("s", data=[{"prompt": "p", "completion": "a", "weight": 0.25}], score={"weight": 1.0}))
    (example,) = reading.examples
    assert (example.weight, example.targets) == (1.0, (0.25,))
