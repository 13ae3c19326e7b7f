"""From rows to text: which kind a source holds, what a row becomes, and what is wrong with one that cannot be used."""

import math
from functools import partial

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.data.tiny_tokenizers import assistant, user
from uft.data.readers import TextExample, detect_kind, implicit_prompt, read_text
from uft.data.sources import BadRow, DataError, Source


def read(rows, **options):
    return list(read_text(Source("s", data=rows, **options)).examples)


def one(row, **options):
    (example,) = read([row], **options)
    return example


# ---- kinds ----


@pytest.mark.parametrize(
    "columns, kind",
    [
        ("text", "document"),
        ("text label", "document"),
        ("messages", "demonstration"),
        ("prompt prompt_id messages", "demonstration"),
        ("prompt completion task source", "demonstration"),
        ("prompt completion text", "demonstration"),
        ("chosen rejected", "pair"),
        ("prompt chosen rejected source", "pair"),
        ("prompt prompt_id chosen rejected messages score_chosen score_rejected", "pair"),
        ("prompt completion label", "label"),
        ("prompt completion score model score_rank", "score"),
    ],
)
def test_kind_from_columns(columns, kind):
    assert detect_kind(tuple(columns.split())) == kind


def test_columns_of_no_kind_and_of_two():
    with pytest.raises(DataError, match=r"data set 's': found columns question, answer; want .*pair: chosen, rejected"):
        read([{"question": "q", "answer": "a"}])
    row = {"prompt": "p", "completion": "c", "label": True, "score": 0.5}
    with pytest.raises(DataError, match=r"found the columns of label and of score; want `kind`"):
        read([row])
    assert one(row, kind="score").targets == (0.5,)
    with pytest.raises(
        DataError, match=r"found columns prompt, completion, label, score; want chosen, rejected for kind"
    ):
        read([row], kind="pair")
    with pytest.raises(DataError, match=r"found kind 'pairs'; want document, demonstration, pair"):
        read([row], kind="pairs")
    with pytest.raises(DataError, match=r"found column 'score_chosen' alone; want score_chosen and score_rejected"):
        read([{"prompt": "p", "chosen": "a", "rejected": "b", "score_chosen": 1.0}])


# ---- what a row becomes ----


def test_strings():
    document = one({"text": "t"})
    assert (document.kind, document.prompt, document.responses) == ("document", "", ("t",))
    assert math.isnan(document.targets[0])
    assert one({"prompt": "p", "completion": "c"}) == TextExample("demonstration", "p", ("c",), (1.0,))
    sides = ("chosen", "rejected")
    pair = {"prompt": "p", "chosen": "a", "rejected": "b"}
    assert one(pair) == TextExample("pair", "p", ("a", "b"), (1.0, 0.0), ((0, 1),), sides)
    scored = one(pair | {"score_chosen": 8, "score_rejected": np.float32(3)}, score_range=(0, 10))
    assert scored.targets == pytest.approx((0.8, 0.3))
    assert one({"prompt": "p", "completion": "c", "score": 0.25}) == TextExample("score", "p", ("c",), (0.25,))


@pytest.mark.parametrize("value, target", [(True, 1.0), (False, 0.0), (1, 1.0), (0.0, 0.0), (np.bool_(True), 1.0)])
def test_labels(value, target):
    row = {"prompt": "p", "completion": "c", "label": value}
    assert one(row) == TextExample("label", "p", ("c",), (target,))


@pytest.mark.parametrize("score, low, high, target", [(5, 1, 5, 1.0), (1, 1, 5, 0.0), (2, 1, 5, 0.25), (0, -1, 1, 0.5)])
def test_scores_are_rescaled(score, low, high, target):
    assert one({"prompt": "p", "completion": "c", "score": score}, score_range=(low, high)).targets == (target,)


def test_conversations():
    turns = [user("a"), assistant("b"), user("c"), assistant("d")]
    messages = one({"messages": turns})
    assert (messages.prompt, messages.responses) == (turns[:1], (turns[1:],))
    row = {"prompt": turns[:3], "completion": turns[3:]}
    assert one(row) == TextExample("demonstration", turns[:3], (turns[3:],), (1.0,))
    none = [{**turn, "tool_calls": None} for turn in turns]  # as parquet gives them
    assert one({"messages": none}).responses == (turns[1:],)


def test_an_empty_prompt_is_for_demonstrations_only():
    assert one({"prompt": "", "completion": "c"}).prompt == ""
    for row in ({"label": 1}, {"score": 1.0}):
        assert one({"prompt": "", "completion": "c"} | row).reason == "empty prompt"
    assert one({"prompt": "", "chosen": "c", "rejected": "d"}).reason == "empty prompt"


def test_columns_may_have_other_names_and_errors_use_them():
    columns = {"prompt": "q", "chosen": "winner", "rejected": "loser"}
    rows = [{"q": "p", "winner": "a", "loser": "b"}, {"q": "p", "winner": " ", "loser": "b"}]
    good, bad = read(rows, columns=columns)
    assert good.responses == ("a", "b")
    assert str(bad) == (
        "data set 's', row 1, column 'winner': empty response: found ' '; want text that is not only white space"
    )


# ---- implicit prompts ----


def test_implicit_prompt_of_dialogues():
    """hh-rlhf: the dialogue stands in both answers."""
    start = "\n\nHuman: Hi\n\nAssistant:"
    example = one({"chosen": start + " Hello!", "rejected": start + " Go away."})
    assert (example.prompt, example.responses) == (start, (" Hello!", " Go away."))
    shared = [user("a"), assistant("b"), user("c")]
    row = {"chosen": [*shared, assistant("d")], "rejected": [*shared, assistant("e")]}
    for prompt in ({}, {"prompt": "c"}, {"prompt": shared}):  # none, as in ultrafeedback_binarized, repeated
        example = one(row | prompt)
        assert (example.prompt, example.responses) == (shared, ([assistant("d")], [assistant("e")]))


def test_a_prompt_that_all_strings_repeat_is_taken_off():
    rows = [{"prompt": f"q{i}?", "chosen": f"q{i}? yes", "rejected": f"q{i}? no"} for i in range(3)]
    reading = read_text(Source("s", data=rows))
    assert [example.responses for example in reading.examples] == [(" yes", " no")] * 3
    assert "taken off the front" in reading.notes[0]
    # rows that are refused for an empty or missing answer say nothing about it
    broken = read_text(Source("s", data=[*rows, {"prompt": "q", "chosen": "q yes", "rejected": ""}]))
    assert [example.responses for example in list(broken.examples)[:3]] == [(" yes", " no")] * 3
    # where most do, and not all, it is left and said
    most = read_text(Source("s", data=[*rows, {"prompt": "q", "chosen": "yes", "rejected": "no"}]))
    assert next(iter(most.examples)).responses == ("q0? yes", "q0? no")
    assert "3 of the first 4 rows repeat their prompt" in most.notes[0]
    # but not where one row does so by chance
    by_chance = [
        {"prompt": "Hi", "chosen": "Hi there", "rejected": "Hi!"},
        {"prompt": "a", "chosen": "b", "rejected": "c"},
    ]
    assert read(by_chance)[0].responses == ("Hi there", "Hi!")


def test_nothing_in_common_is_no_prompt():
    bad = one({"chosen": "yes ", "rejected": "no"})
    assert "row 0, column 'chosen, rejected': empty prompt: found nothing in common; want both to start" in str(bad)


@pytest.mark.parametrize("prompt", [{}, {"prompt": "p"}], ids=["implicit", "repeated"])
def test_answers_that_are_equal_behind_their_prompt(prompt):
    bad = one(prompt | {"chosen": "p a", "rejected": "p  a"})
    assert (bad.reason, bad.column) == ("equal responses", "rejected")


def test_an_empty_answer_is_that_before_it_is_anything_else():
    assert one({"prompt": "p", "chosen": " ", "rejected": " "}).reason == "empty response"
    assert one({"chosen": "", "rejected": "no"}).reason == "empty response"
    assert implicit_prompt("", "no") == ("", "", "no")


words = st.text(alphabet="ab \n", min_size=1, max_size=8)


@pytest.mark.peers
@settings(max_examples=300, deadline=None)
@given(words, words, words)
def test_implicit_prompt_is_trls(shared, one, other):
    from trl.data_utils import extract_prompt

    chosen, rejected = shared + one, shared + other
    theirs = extract_prompt({"chosen": chosen, "rejected": rejected})
    assert implicit_prompt(chosen, rejected) == (theirs["prompt"], theirs["chosen"], theirs["rejected"])
    turns = [[user(letter) for letter in text] for text in (chosen, rejected)]
    theirs = extract_prompt({"chosen": turns[0], "rejected": turns[1]})
    assert implicit_prompt(*turns) == (theirs["prompt"], theirs["chosen"], theirs["rejected"])


# ---- bad rows ----

DEMONSTRATION = partial(dict, prompt="p", completion="c")
PAIR = partial(dict, prompt="p", chosen="a", rejected="b")
SCORED = partial(PAIR, score_chosen=0.5, score_rejected=0.5)
LABEL = partial(dict, prompt="p", completion="c", label=True)
SCORE = partial(dict, prompt="p", completion="c", score=0.5)
CHAT = partial(dict, prompt=[user("a")], completion=[assistant("b")])
MESSAGES = partial(dict, messages=[user("a"), assistant("b")])


@pytest.mark.parametrize(
    "good, change, column, reason, found, wanted",
    [
        (partial(dict, text="t"), {"text": "\n"}, "text", "empty text", r"'\n'", "not only white space"),
        (partial(dict, text="t"), {"text": None}, "text", "missing value", "nothing", "a string"),
        (DEMONSTRATION, {"completion": ""}, "completion", "empty response", "''", "not only white space"),
        (DEMONSTRATION, {"completion": None}, "completion", "missing value", "nothing", "a string or a list"),
        (DEMONSTRATION, {"prompt": None}, "prompt", "missing value", "nothing", "a string or a list"),
        (DEMONSTRATION, {"completion": 7}, "completion", "wrong type", "7 (int)", "a string or a list"),
        (DEMONSTRATION, {"completion": "\ud800"}, "completion", "invalid UTF-8", r"'\ud800' at position 0", "UTF-8"),
        (DEMONSTRATION, {"prompt": [user("a")]}, "completion", "mixed formats", "a string", "a list of messages"),
        (PAIR, {"chosen": " "}, "chosen", "empty response", "' '", "not only white space"),
        (PAIR, {"rejected": ""}, "rejected", "empty response", "''", "not only white space"),
        (PAIR, {"rejected": "a"}, "rejected", "equal responses", "'a' twice", "chosen and rejected to differ"),
        (PAIR, {"rejected": "a\n"}, "rejected", "equal responses", r"'a\n', chosen but for white space", "to differ"),
        (
            PAIR, {"prompt": [user("p")], "chosen": [assistant("a")], "rejected": [assistant(" a")]},
            "rejected", "equal responses", "[{'role': 'assistant', 'content': ' a'}]", "to differ",
        ),
        (PAIR, {"rejected": [assistant("a")]}, "rejected", "mixed formats", "a list of", "a string, as chosen"),
        (PAIR, {"prompt": " "}, "prompt", "empty prompt", "' '", "not only white space"),
        (PAIR, {"prompt": None}, "prompt", "missing value", "nothing", "a string or a list"),
        (SCORED, {"score_chosen": 1.5}, "score_chosen", "score out of range", "1.5", "[0, 1]; or set score_range"),
        (SCORED, {"score_chosen": 0.1}, "score_chosen", "scores contradict", "0.1 below", "at least as high"),
        (SCORED, {"score_rejected": None}, "score_rejected", "missing value", "nothing", "a number in [0, 1]"),
        (LABEL, {"label": 2}, "label", "label not 0 or 1", "2 (int)", "true, false, 0 or 1"),
        (LABEL, {"label": math.nan}, "label", "label not 0 or 1", "nan (float)", "true, false, 0 or 1"),
        (LABEL, {"label": "yes"}, "label", "wrong type", "'yes'", "true, false, 0 or 1"),
        (LABEL, {"label": None}, "label", "missing value", "nothing", "true, false, 0 or 1"),
        (SCORE, {"score": -0.1}, "score", "score out of range", "-0.1", "a number in [0, 1]"),
        (SCORE, {"score": math.inf}, "score", "score out of range", "inf", "a number in [0, 1]"),
        (SCORE, {"score": math.nan}, "score", "score is NaN", "nan", "a number in [0, 1]"),
        (SCORE, {"score": "0.5"}, "score", "wrong type", "'0.5'", "a number in [0, 1]"),
        (SCORE, {"score": True}, "score", "wrong type", "True (bool)", "a number in [0, 1]"),
        (CHAT, {"completion": [assistant(" ")]}, "completion", "empty response", "' '", "not only white space"),
        (CHAT, {"completion": []}, "completion", "empty response", "''", "not only white space"),
        (CHAT, {"completion": [assistant("b"), user("c")]}, "completion", "invalid roles", "t, user", "at its"),
        (CHAT, {"completion": [user("b"), assistant("c")]}, "completion", "invalid roles", "user, a", "at its"),
        (CHAT, {"prompt": [assistant("a")]}, "prompt", "invalid roles", "ends with the assistant", "another's message"),
        (CHAT, {"prompt": []}, "prompt", "empty prompt", "no message", "at least one"),
        (CHAT, {"prompt": [{"role": "human", "content": "a"}]}, "prompt", "invalid roles", "'human'", "system,"),
        (CHAT, {"prompt": [{"role": "user"}]}, "prompt", "wrong type", "{'role'", "with role and content"),
        (CHAT, {"prompt": [{"role": "user", "content": 3}]}, "prompt", "wrong type", "3 (int)", "a string"),
        (MESSAGES, {"messages": "text"}, "messages", "wrong type", "'text'", "a list of messages"),
        (MESSAGES, {"messages": None}, "messages", "missing value", "nothing", "a list of messages"),
        (MESSAGES, {"messages": []}, "messages", "empty prompt", "no message", "at least one"),
        (MESSAGES, {"messages": [user("a")]}, "messages", "empty response", "''", "not only white space"),
        (MESSAGES, {"messages": [assistant("a")]}, "messages", "empty prompt", "no message", "at least one"),
        (
            MESSAGES, {"messages": [user("a"), assistant(""), user("b"), assistant("c")]},
            "messages", "empty response", "''", "not only white space",
        ),
    ],
)  # fmt: skip
def test_bad_rows_say_where_and_what(good, change, column, reason, found, wanted):
    before, bad = read([good(), good() | change])
    assert isinstance(before, TextExample)
    assert isinstance(bad, BadRow)
    assert (bad.reason, bad.column, bad.row) == (reason, column, 1)
    message = str(bad)
    assert message.startswith(f"data set 's', row 1, column {column!r}: {reason}: found ")
    before_want, after_want = message.split(": found ", 1)[1].split("; want ", 1)
    assert found in before_want
    assert wanted in after_want


def test_a_key_that_only_some_rows_lack_makes_them_bad_rows(tmp_path):
    path = tmp_path / "pairs.jsonl"
    path.write_text('{"prompt": "p", "chosen": "a"}\n\n{"prompt": "p", "chosen": "a", "rejected": "b"}\n')
    bad, good = read_text(Source("s", path)).examples
    assert str(bad) == (
        f"{path}, row 0 (line 1), column 'rejected': missing value: found nothing; want a string or a list of messages"
    )
    assert (good.row, good.line) == (1, 3)
    path.write_text("broken\n")
    reading = read_text(Source("s", path))
    assert reading.kind is None
    assert [row.reason for row in reading.examples] == ["broken JSON"]
