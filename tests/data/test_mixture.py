"""Several sources as one data set, the report that adds up, and the order in which rows are drawn."""

import logging

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.data.tiny_tokenizers import make
from uft.collation import Collator
from uft.data.mixture import FeedbackDataset, MixtureSampler, load_feedback
from uft.data.sources import BadRow, DataError, Source
from uft.data.template import Template
from uft.feedback import Example, Response, mismatched

DEMONSTRATIONS = [{"prompt": f"{i} + 1 =", "completion": f" {i + 1}"} for i in range(6)]
PAIRS = [{"prompt": "hello", "chosen": " good bye", "rejected": f" {i}"} for i in range(4)]
BAD = [{"prompt": "a", "chosen": "b", "rejected": "b"}, {"prompt": "a", "chosen": "", "rejected": "b"}]


def example(i: int, source: str = "train") -> Example:
    tokens = np.arange(i + 2, dtype=np.int32)
    return Example("demonstration", tokens, (Response(tokens, target=1.0),), source=source, row=i)


@pytest.fixture(scope="module")
def tokenizer():
    return make(adds_bos=True)


# ---- loading ----


def test_load(tokenizer):
    pairs = Source("pairs", data=PAIRS, weight=2.0)
    data, report = load_feedback({"demonstrations": DEMONSTRATIONS, "pairs": pairs}, tokenizer, max_length=64)
    assert (data.sources, data.sizes, data.weights) == (["demonstrations", "pairs"], [6, 4], [1.0, 2.0])
    assert len(data) == 10
    assert [data[i].source for i in range(10)] == ["demonstrations"] * 6 + ["pairs"] * 4
    assert [data[i].row for i in range(10)] == [0, 1, 2, 3, 4, 5, 0, 1, 2, 3]
    assert data.kinds() == {"demonstrations": {"demonstration"}, "pairs": {"pair"}}
    assert (data[-1].source, data[-1].row) == (data[9].source, data[9].row) == ("pairs", 3)
    assert [example.row for example in data[4:8]] == [4, 5, 0, 1]
    with pytest.raises(IndexError):
        data[10]
    assert report.ok and report["pairs"].kept == 4
    batch = Collator(tokenizer.pad_token_id, sources=data.sources)([data[0], data[9]])
    assert batch.source.tolist() == [0, 1, 1]
    assert batch.preferences.tolist() == [[1, 2]]
    again, _ = load_feedback({"demonstrations": DEMONSTRATIONS, "pairs": pairs}, Template(tokenizer, 64))
    assert again.fingerprint == data.fingerprint


def test_bad_rows_stop_loading_unless_they_are_dropped(tokenizer, caplog):
    with pytest.raises(BadRow, match=r"data set 'p', row 4, column 'rejected': equal responses"):
        load_feedback({"p": PAIRS + BAD}, tokenizer)
    with pytest.raises(BadRow, match="equal responses"):  # what the source says counts more
        load_feedback(Source("p", data=PAIRS + BAD, on_bad_row="error"), tokenizer, on_bad_row="drop")
    with caplog.at_level(logging.WARNING):
        data, report = load_feedback({"p": PAIRS + BAD}, tokenizer, on_bad_row="drop")
    assert data.sizes == [4]
    assert report["p"].dropped == {"equal responses": 1, "empty response": 1}
    assert "data set 'p': dropped 2 of 6 rows: 1 equal responses, 1 empty response" in caplog.text
    with pytest.raises(DataError, match=r"data set 'p': found no row that can be used among 2 \(1 equal responses, "):
        load_feedback({"p": BAD}, tokenizer, on_bad_row="drop")
    with pytest.raises(DataError, match="on_bad_row is 'skip'; want error or drop"):
        load_feedback({"p": BAD}, tokenizer, on_bad_row="skip")


def test_the_report_adds_up(tokenizer):
    sources = {
        "demonstrations": [
            *DEMONSTRATIONS,
            {"prompt": "the c", "completion": "at"},  # a token across the border
            {"prompt": "a b c d e f g " * 4, "completion": " 1"},  # cut
            {"prompt": "a", "completion": "a b c d e f g " * 4},  # too long
        ],
        "pairs": PAIRS + BAD,
        "documents": [{"text": "a b c d e f g " * 4}, {"text": "a"}, {"text": " "}],
    }
    data, report = load_feedback(sources, tokenizer, max_length=16, on_bad_row="drop")
    for source in report.sources:
        assert source.rows == len(sources[source.name])
        assert source.rows == source.kept + sum(source.dropped.values())
        assert source.examples == len(data.examples[source.name])
        assert source.tokens == sum(example.tokens for example in data.examples[source.name])
    demonstrations, pairs, documents = report.sources
    assert (demonstrations.apart, demonstrations.cut, demonstrations.dropped) == (1, 1, {"too long": 1})
    assert (pairs.kept, pairs.dropped.total()) == (4, 2)
    assert (documents.kept, documents.examples, documents.dropped) == (2, 2 + documents.chunks, {"empty text": 1})
    assert documents.chunks == 2
    lines = str(report).splitlines()
    assert lines[0].split()[:5] == ["source", "kind", "rows", "kept", "dropped"]
    assert lines[2].split()[:5] == ["pairs", "pair", "6", "4", "2"]
    assert "pairs: 1 dropped: empty response" in lines
    assert f"| pairs | pair | 6 | 4 | 2 | 4 | {pairs.tokens} | 0 | 0 |" in report.markdown().splitlines()
    assert len(report.bad_rows) == 4 and not report.ok


# ---- the data set ----


def test_examples_take_the_name_of_their_source():
    data = FeedbackDataset({"a": [example(0)], "b": [example(0), example(1, "b")]}, {"b": 0.5})
    assert [e.source for e in data] == ["a", "b", "b"]
    assert data.weights == [1.0, 0.5]
    assert repr(data) == "FeedbackDataset(a: 1 × 1, b: 2 × 0.5)"


def test_mapped():
    pairs = [Example("pair", e.prompt, e.responses * 2, ((0, 1),), row=i) for i, e in enumerate(map(example, range(3)))]
    data = FeedbackDataset({"a": pairs, "b": [example(0)]}, {"a": 2.0}).mapped(mismatched)
    assert [len(e.responses) for e in data] == [4, 4, 4, 1]
    assert data.weights == [2.0, 1.0]


@pytest.mark.parametrize(
    "examples, weights, message",
    [
        ({}, None, "found no examples; want at least one"),
        ({"a": [example(0)], "b": []}, None, "found no examples in source 'b'"),
        ({"a": [example(0)]}, {"b": 1.0}, "weights: found 'b'; want names of sources, a"),
        ({"a": [example(0)]}, {"a": 0.0}, "size 1 with weight 0.0 .*; want positive numbers"),
        ({"a": [example(0)]}, {"a": "1"}, "size 1 with weight '1'; want positive numbers"),
        ({"a": [example(0)]}, {"a": None}, "size 1 with weight None; want positive numbers"),
        ({"a": [example(0)]}, {"a": 0.4}, "size 1 with weight 0.4, which is never drawn"),
    ],
)
def test_data_sets_that_are_refused(examples, weights, message):
    with pytest.raises(ValueError, match=message):
        FeedbackDataset(examples, weights)


def test_fingerprint_changes_with_every_part():
    tokens, mask = np.arange(4, dtype=np.int32), np.array([True, True, False, True])

    def fingerprint(
        prompt=tokens, response=tokens, in_loss=None, target=1.0, kind="label", row=0, name="a", weight=1.0
    ):
        response = Response(response, in_loss, target, weight)
        return FeedbackDataset({name: [Example(kind, prompt, (response,), row=row)]}).fingerprint

    changes = [
        {}, {"prompt": tokens[:3]}, {"response": tokens[:3]}, {"prompt": tokens[:0], "response": np.tile(tokens, 2)},
        {"in_loss": mask}, {"in_loss": ~mask}, {"target": 0.0}, {"kind": "score"}, {"row": 1}, {"name": "b"},
        {"weight": 2.0},
    ]  # fmt: skip
    assert len({fingerprint(**change) for change in changes}) == len(changes)
    assert fingerprint() == fingerprint()


# ---- the order ----

mixtures = st.lists(
    st.tuples(st.integers(1, 40), st.sampled_from([0.5, 1.0, 2.0, 2.7, 1 / 3])), min_size=1, max_size=4
).filter(lambda mixture: all(size * weight >= 0.5 for size, weight in mixture))
seeds = st.integers(0, 5)


def sampler(mixture, seed=0, epoch=0):
    result = MixtureSampler([size for size, _ in mixture], [weight for _, weight in mixture], seed)
    result.set_epoch(epoch)
    return result


def sources_of(order, mixture):
    return np.searchsorted(np.cumsum([size for size, _ in mixture]), order, side="right")


@settings(max_examples=100, deadline=None)
@given(mixtures, seeds, st.integers(0, 4))
def test_an_epoch_holds_each_source_in_proportion(mixture, seed, epoch):
    order = list(sampler(mixture, seed, epoch))
    wanted = [int(np.floor(weight * size + 0.5)) for size, weight in mixture]
    source = sources_of(order, mixture)
    assert np.bincount(source, minlength=len(mixture)).tolist() == wanted
    assert len(sampler(mixture)) == len(order) == sum(wanted)
    for i, n in enumerate(wanted):  # any stretch, to within a draw or two
        drawn = np.cumsum([0, *(source == i)])
        excess = drawn - np.arange(len(drawn)) * n / len(order)
        assert excess.max() - excess.min() <= 2 + len(mixture) * n / len(order)


@settings(max_examples=100, deadline=None)
@given(mixtures, seeds)
def test_no_row_comes_again_before_all_have_come(mixture, seed):
    """Also across epochs: after k passes every row has come k times, and none more than once more."""
    orders = np.concatenate([sampler(mixture, seed, epoch).order() for epoch in range(5)])
    first = 0
    for i, (size, _) in enumerate(mixture):
        rows = orders[sources_of(orders, mixture) == i] - first
        for begin in range(0, len(rows), size):
            stretch = rows[begin : begin + size]
            assert len(set(stretch)) == len(stretch)
            assert set(stretch) <= set(range(size))
        first += size


@settings(max_examples=30, deadline=None)
@given(mixtures, seeds, st.integers(0, 3))
def test_the_order_is_a_function_of_seed_and_epoch(mixture, seed, epoch):
    one, other = sampler(mixture, seed, epoch), sampler(mixture, seed)
    list(other)  # what was drawn before leaves no trace
    other.set_epoch(epoch)
    assert list(one) == list(one) == list(other)


def test_seeds_and_epochs_differ():
    orders = {tuple(sampler([(50, 1.0), (20, 2.0)], seed, epoch)) for seed in range(4) for epoch in range(4)}
    assert len(orders) == 16
    # nor do two sources of one size come in the same permutation
    order = sampler([(50, 1.0), (50, 1.0)]).order()
    assert list(order[order < 50]) != list(order[order >= 50] - 50)
    # nor does one of them always come first
    assert {sampler([(50, 1.0), (50, 1.0)], epoch=epoch).order()[0] < 50 for epoch in range(20)} == {True, False}


def test_weights():
    counts = np.bincount(sampler([(10, 1.0), (10, 2.0), (10, 0.5)]).order(), minlength=30)
    assert set(counts[:10]) == {1}
    assert set(counts[10:20]) == {2}
    assert sorted(counts[20:]) == [0] * 5 + [1] * 5
    twice = np.bincount(np.concatenate([sampler([(10, 0.5)], epoch=e).order() for e in (0, 1)]))
    assert twice.tolist() == [1] * 10


@pytest.mark.parametrize(
    "sizes, weights",
    [
        ([], []),
        ([3], [0.0]),
        ([3], [-1.0]),
        ([3], [float("nan")]),
        ([0], [1.0]),
        ([3], [0.1]),
        ([3, 3], [1.0]),
        ([3], ["1"]),
    ],
)
def test_samplers_that_are_refused(sizes, weights):
    with pytest.raises(ValueError, match=r"found .*; want"):
        MixtureSampler(sizes, weights)
