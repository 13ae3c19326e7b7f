"""Options of a source that make its columns what a reader wants: a score from several columns, strings as a chat."""

import json

import pytest
from tiny import tiny_tokenizer

from uft.data import DataError, Source, load_feedback, read_text

RATED = {"prompt": "say:", "completion": " hello", "helpfulness": 4, "correctness": 1, "verbosity": 2}
WEIGHTS = {"helpfulness": 3.0, "correctness": 1.0}


def read(rows, **options):
    return list(read_text(Source("s", data=rows, **options)).examples)


def test_a_score_from_several_columns():
    (example,) = read([RATED], score=WEIGHTS, score_range=(0, 4))
    assert example.kind == "score"
    assert example.targets == (pytest.approx((3 * 4 + 1 * 1) / 4 / 4),)
    (example,) = read([RATED | {"score": 0.1}], score=WEIGHTS, score_range=(0, 4))
    assert example.targets == (pytest.approx(13 / 16),)  # what was asked for, not the column that is there


def test_each_column_of_a_score_must_be_in_range(tmp_path):
    """The mean of 5 and 0 would be in range."""
    (bad,) = read([RATED | {"helpfulness": 5, "correctness": 0}], score=WEIGHTS, score_range=(0, 4))
    assert (bad.reason, bad.column) == ("score out of range", "helpfulness")
    (bad,) = read([RATED | {"correctness": None}], score=WEIGHTS, score_range=(0, 4))
    assert (bad.reason, bad.column) == ("missing value", "correctness")
    (tmp_path / "a.csv").write_text("prompt,completion,helpfulness,correctness\nsay:, hello,4,1\nsay:, hello,many,1\n")
    good, bad = read_text(Source("s", tmp_path / "a.csv", score=WEIGHTS, score_range=(0, 4))).examples
    assert good.targets == (pytest.approx(13 / 16),)
    assert (bad.reason, bad.column) == ("wrong type", "helpfulness")


@pytest.mark.parametrize(
    "options, message",
    [
        ({"score": {"fun": 1.0}}, "found columns .*; want fun, which `score` names"),
        ({"score": {"helpfulness": -1.0}}, "score is .*; want a mapping from columns to positive weights"),
        ({"score": "helpfulness"}, "score is 'helpfulness'; want a mapping"),
        ({"score": WEIGHTS, "kind": "demonstration"}, "for kind 'demonstration'; want it for kind 'score' only"),
        ({"chat": "yes"}, "chat is 'yes'; want true or false"),
    ],
)
def test_refused(options, message):
    with pytest.raises(DataError, match=message):
        read([RATED], **options)


def test_strings_as_a_chat(tmp_path):
    """The same tokens as the same rows written as conversations."""
    rows = {
        "pair": {"prompt": "say:", "chosen": "hello", "rejected": "good bye"},
        "demonstration": {"prompt": "say:", "completion": "hello"},
        "label": {"prompt": "say:", "completion": "hello", "label": True},
    }
    for kind, row in rows.items():
        written = {
            name: [{"role": "user" if name == "prompt" else "assistant", "content": value}]
            if isinstance(value, str)
            else value
            for name, value in row.items()
        }
        (tmp_path / f"{kind}.jsonl").write_text(json.dumps(row))
        (tmp_path / f"{kind}2.jsonl").write_text(json.dumps(written))
        path = str(tmp_path / kind)
        data, _ = load_feedback({"s": Source("s", f"{path}.jsonl", chat=True)}, tiny_tokenizer(), max_length=64)
        wanted, _ = load_feedback({"s": Source("s", f"{path}2.jsonl")}, tiny_tokenizer(), max_length=64)
        assert data.fingerprint == wanted.fingerprint and data[0].kind == kind
    # a conversation stays what it is; a document has no prompt
    assert read([written], chat=True)[0] == read([written])[0]
    assert read([{"text": "hello"}], chat=True)[0].responses == ("hello",)
    (bad,) = read([rows["demonstration"] | {"prompt": ""}], chat=True)
    assert bad.reason == "empty prompt"
