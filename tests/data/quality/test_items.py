"""Rows as plain text, their keys, hashes of words, scripts and endings."""

import math

import numpy as np
import pytest

from tests.data.quality.planted import corpus, pair, sentence
from uft.data.quality.endings import Lexicon, at_longest, signs
from uft.data.quality.items import (
    Words,
    key,
    ngrams,
    normalised,
    only_words,
    read_evaluation,
    shingles,
    short_names,
    words_of,
)
from uft.data.quality.scripts import known_scripts, main_script, scripts, share_in
from uft.data.rows import DataError
from uft.data.sources import Source


def test_what_is_the_same_after_normalisation():
    assert key("Ａ  b\nC ") == key("a B c")
    assert key("3 + 4") != key("3 - 4")
    assert key("a", "b") != key("a b") and key("a", "b") != key("ab", "")
    assert normalised("STRASSE") == normalised("straße")


def test_a_conversation_has_the_prompt_that_a_string_has():
    chat = {
        "prompt": [{"role": "user", "content": "How?"}], "completion": [{"role": "assistant", "content": "So."}]
    }  # fmt: skip
    (one,) = corpus(a=[chat]).items
    (other,) = corpus(b=[{"prompt": "how?", "completion": "so."}]).items
    assert one.prompt_key == other.prompt_key and one.row_key == other.row_key
    assert one.response_keys == other.response_keys


def test_responses_are_what_the_assistant_says():
    turns = [("user", "q"), ("assistant", "a"), ("user", "longer than all"), ("assistant", "b")]
    chat = [{"role": role, "content": text} for role, text in turns]
    other = [*chat[:2], {"role": "user", "content": "another turn"}, chat[3]]
    one, two, again = corpus(a=[{"messages": chat}, {"messages": other}, {"messages": chat}]).items
    assert one.responses == ("a\n\nb",) and one.prompt == "q"
    assert one.later == ("longer than all",) and one.asked == ("longer than all",)
    # what the user says is part of the row all the same
    assert one.row_key == again.row_key != two.row_key and one.response_keys != two.response_keys
    made = corpus(a=[{"messages": chat}, {"messages": other}])
    assert len(made.row_parts(0, 3)) == 3 and len(made.row_words[0]) == 2


def test_blank_names_are_none():
    rows = [
        pair("p", "a", str(i), annotator=who, part=who) for i, who in enumerate([" ", "", None, math.nan, " x\ny "])
    ]
    read = type(corpus()).read([Source(name="s", data=rows)], ["s"], by="part")
    assert [item.annotator for item in read.items] == [None, None, None, None, "x y"]
    assert [item.group for item in read.items] == ["s", "s", "s", "s", "s/x y"]


def test_groups_annotators_and_bad_rows():
    rows = [pair("p", "a", "b", part="x", annotator=7), pair("p", "a", "a"), pair("p", "b", "c", part="y")]
    read = type(corpus())
    found = read.read([Source(name="s", data=rows)], ["s"], by="part")
    assert [(item.group, item.row, item.annotator) for item in found.items] == [("s/x", 0, "7"), ("s/y", 2, None)]
    assert [(row.row, row.reason) for row in found.bad["s"]] == [(1, "equal responses")]
    assert found.groups == ("s/x", "s/y") and found.count([1]) == {"s/x": 0, "s/y": 1}


def test_ngrams_are_of_words_in_a_row():
    words = Words()
    a, b = words("one two three four"), words("zero one two three")
    assert set(ngrams(a, 3).tolist()) & set(ngrams(b, 3).tolist()) == {int(ngrams(words("one two three"), 3)[0])}
    assert len(ngrams(a, 5)) == 0
    # the order counts, and a text shorter than n is a shingle itself
    assert ngrams(words("a b"), 2) != ngrams(words("b a"), 2)
    assert len(shingles(words("a b"), 3)) == 1 and len(shingles(words(""), 3)) == 0
    # another object hashes alike: what was found does not depend on the process
    assert np.array_equal(Words()("one two three four"), a)


@pytest.mark.parametrize(
    "text, words",
    [
        ("नमस्ते दुनिया", ["नमस्ते", "दुनिया"]),  # vowels and virama are marks
        ("தமிழ் மொழி", ["தமிழ்", "மொழி"]),
        ("مُحَمَّد", ["مُحَمَّد"]),
        ("你好, ok", ["你", "好", ",", "ok"]),
        ("ที่นี่", ["ที่", "นี่"]),
        ("カタカナー", list("カタカナー")),
        ("2024年 x_1 déf", ["2024", "年", "x_1", "déf"]),
        ("한국어 말", ["한국어", "말"]),  # has spaces
    ],
)
def test_words_of_other_scripts(text, words):
    assert [normalised(word) for word in words] == words_of(normalised(text))


def test_marks_are_told_from_words():
    # without its vowels this would be the same
    assert not np.array_equal(Words()("कि"), Words()("की"))
    words = Words()
    assert len(words("(a + b)")) == 5
    assert np.array_equal(only_words(words("(a + b)")), words("a b"))


def test_prompts_of_evaluation_files():
    rows = [
        {"prompt": " Q "}, {"prompt": None, "messages": [{"role": "user", "content": "M"}, {"role": "assistant",
        "content": "A"}]}, {"prompt": [{"role": "user", "content": "C"}]}, {"prompt": None, "text": "T"}, {"prompt":
    ""}, ]  # fmt: skip
    assert list(read_evaluation(Source(name="e", data=rows))) == [(0, "Q"), (1, "M"), (2, "C"), (3, "T"), (4, "")]
    with pytest.raises(DataError, match="'e': found no prompt"):
        list(read_evaluation(Source(name="e", data=[{"answer": "3"}])))


def test_short_names_hold_no_folder():
    sources = [Source(name=name, path=name) for name in ("/x/a.jsonl", "/y/a.parquet", "org/data", "/z/b.csv")]
    assert short_names(sources) == ["a", "a (2)", "org/data", "b"]


# ---- scripts ----


@pytest.mark.parametrize(
    "text, script",
    [
        ("abc é", "LATIN"),
        ("привет ok", "CYRILLIC"),
        ("你好", "CJK"),
        ("12 + 3", "none"),
        ("γειά", "GREEK"),
        ("ｆｕｌｌ", "LATIN"),
        ("ｱｲ", "KATAKANA"),
    ],
)
def test_scripts(text, script):
    assert main_script(text) == script


def test_known_scripts_are_what_letters_have():
    letters = "aя你あアب한कไ𐌰"
    assert {main_script(letter) for letter in letters} < known_scripts() and "LATYN" not in known_scripts()


def test_share_of_letters():
    assert scripts("ab да!") == {"LATIN": 2, "CYRILLIC": 2}
    assert share_in("ab да!", frozenset({"LATIN"})) == 0.5
    assert share_in("1 2 3", frozenset({"LATIN"})) == 1.0


# ---- endings ----


LEXICON = Lexicon(
    [
        "the government said so",
        "a government is needed",
        "the govern",
        "the need, no need, needed",
        "सरकार की सरकार",
        "政府官员 政府官员",
    ]
)


@pytest.mark.parametrize(
    "text, found",
    [
        ("...", ["no text"]),
        ("=", []),
        ("And then the govern", ["mid word"]),
        ("And then the government", []),
        ("And then the need", []),  # begins "needed", and is a word itself
        ("one two three four five six seven eight", ["no final mark"]),
        ("one two three four five six seven eight.", []),
        ('He said "one two three four five six seven!"', []),
        ("one two three four five six seven,", []),
        ("Here it is:\n```python\nx = 1", ["open fence"]),
        ("Here it is as I have written it:\n```python\nx = 1\n```", []),
        ("one two three four five six and 12", []),
        ("यह सर", ["mid word"]),  # its marks hold the longer word together
        ("政府", []),  # a letter is a word, and no word is cut
    ],
)
def test_signs_of_an_ending(text, found):
    assert signs(text, LEXICON) == found


def test_the_last_word_is_found_at_once():
    """Not by trying each way to take the words before it apart, of which a word of n letters has 2^n."""
    assert signs("internationalisation" * 50 + " and so on.", LEXICON) == []


def test_a_limit_is_shared_by_several():
    assert at_longest([60, 60, 60, 12]) == {0, 1, 2}
    assert at_longest([60, 60, 12]) == set()
    assert at_longest([20, 20, 20]) == set()  # short responses are as long by chance
    assert at_longest([]) == set()
    assert sentence(1) != sentence(2)
