"""Evaluation prompts planted in training rows, and templates that are none."""

import pytest

from tests.data.quality.planted import corpus, pair, sentence
from uft.data.quality.contamination import Overlap, look_for
from uft.data.rows import DataError


def found_in(rows, evaluation, **options):
    made = corpus(train=rows)
    return look_for(evaluation, made, range(len(made.items)), Overlap(**options))


def pairs_of(hits):
    return list(zip(hits.row.tolist(), hits.prompt.tolist()))


def demonstration(prompt, completion="yes."):
    return {"prompt": prompt, "completion": completion}


def test_thirteen_words_in_a_row():
    words = sentence(1).split()
    evaluation = [" ".join(words)]
    rows = [
        demonstration(sentence(2) + " " + " ".join(words[5:18])),  # 13 words
        demonstration(sentence(3) + " " + " ".join(words[5:17])),  # 12 words
        demonstration(
            sentence(4), "So: " + ", ".join(words[20:33]).upper() + "!"
        ),  # in the response, other case and marks
        # seven words at the end of the prompt and six at the start of the response are no overlap
        demonstration(sentence(5) + " " + " ".join(words[0:7]), " ".join(words[7:13])),
    ]
    assert pairs_of(found_in(rows, evaluation).ngram) == [(0, 0), (2, 0)]
    assert pairs_of(found_in(rows, evaluation, ngram=12).ngram) == [(0, 0), (1, 0), (2, 0)]


def test_short_prompts():
    eight = "which of these two rivers is the longer"
    rows = [
        demonstration("Tell me: " + eight + "?"),
        demonstration("why is it so"),
        demonstration("Tell me why is it so"),
    ]
    found = found_in(rows, [eight, "Why is it so"])
    assert pairs_of(found.ngram) == [(0, 0)]
    assert pairs_of(found.exact) == [(1, 1)]


@pytest.mark.parametrize("prompts, hits", [(10, 10), (11, 0)])
def test_what_many_prompts_have_is_a_template(prompts, hits):
    template = sentence(1, 13)
    rows = [demonstration(f"{template} {sentence(100 + i)}") for i in range(prompts)]
    found = found_in(rows, [f"{template} {sentence(99)}"])
    assert len(found.ngram.row) == hits
    assert found.templates == (hits == 0)
    # responses to one prompt are one document
    same = [demonstration(f"{template} {sentence(100)}", sentence(200 + i)) for i in range(prompts)]
    assert len(found_in(same, [f"{template} {sentence(99)}"]).ngram.row) == prompts


def test_a_template_of_the_evaluation():
    template = sentence(1, 13)
    rows = [demonstration(f"{template} {sentence(100)}")]
    evaluation = [f"{template} {sentence(200 + i)}" for i in range(11)]
    assert pairs_of(found_in(rows, evaluation).ngram) == []
    assert pairs_of(found_in(rows, evaluation[:10]).ngram) == [(0, j) for j in range(10)]


def test_a_prompt_that_many_rows_hold_whole_is_reported_apart():
    """Its n-grams are in more than ten prompts, as those of a template are."""
    asked, template = sentence(1, 30), sentence(2, 13)
    rows = [demonstration(f"{sentence(100 + i)} {asked}") for i in range(12)]
    rows += [demonstration(f"{sentence(200)} {' '.join(asked.split()[:29])}")]  # all n-grams but the last
    rows += [demonstration(f"{sentence(201)} {' '.join(asked.split()[1:])}")]  # all but the first
    rows += [demonstration(f"{template} {sentence(300 + i)}") for i in range(12)]
    found = found_in(rows, [asked, f"{template} {sentence(99)}"])
    assert pairs_of(found.ngram) == []
    assert pairs_of(found.whole) == [(i, 0) for i in range(12)]
    assert found.templates == 18 + 1
    # ten rows are no template, and nothing is counted twice
    few = found_in(rows[:9], [asked])
    assert len(few.ngram.row) == 9 and not len(few.whole.row)


@pytest.mark.parametrize(
    "text",
    [
        "请用不超过五十个字的篇幅概括下面这篇文章的主要内容",
        "以下の文章の要点を五十字以内でまとめてください",
        "กรุณาสรุปเนื้อหาสำคัญของบทความต่อไปนี้ภายในห้าสิบคำ",
    ],
)
def test_scripts_without_spaces_have_a_word_per_letter(text):
    rows = [
        demonstration(f"{sentence(2)}: {text} {sentence(3)}"), demonstration("另外" + text + "谢"),
        demonstration(text[:11])
    ]  # fmt: skip
    assert pairs_of(found_in(rows, [text + "。" + text[:-5] + "是"]).ngram) == [(0, 0), (1, 0)]


def test_a_system_prompt_hides_nothing():
    """Nor do other turns: a user's turn alone is compared too, and so is a conversation without its system prompt."""
    system, user = {"role": "system", "content": sentence(7)}, lambda text: {"role": "user", "content": text}
    said = {"role": "assistant", "content": "so."}
    short = "Why is the sky blue?"
    rows = [
        {"messages": [system, user(short), said]},
        {"messages": [user(sentence(1)), said, user(short), said]},
        {"messages": [system, user(sentence(2) + " more"), said]},
        {"messages": [user(sentence(3)), said, user("See: " + sentence(4)), said]},
        {"prompt": [system, user("a"), said, user("b")], "completion": [said]},
    ]
    found = found_in([row for row in rows if "messages" in row], [short, sentence(2), sentence(4)])
    assert pairs_of(found.exact) == [(0, 0), (1, 0)]
    assert pairs_of(found.near) == [(0, 0), (1, 0), (2, 1), (3, 2)]
    assert pairs_of(found.ngram) == [(2, 1), (3, 2)]
    assert pairs_of(found_in(rows[4:], ["a\n\nso.\n\nb"]).exact) == [(0, 0)]


def test_near_and_exact_prompts():
    rows = [pair(sentence(1), "a", "b"), pair(sentence(2) + " more", "a", "b"), pair(sentence(2) + " more", "c", "d")]
    found = found_in(rows, [sentence(2), sentence(1).upper(), sentence(3)])
    assert pairs_of(found.exact) == [(0, 1)]
    assert pairs_of(found.near) == [(0, 1), (1, 0), (2, 0)]
    assert found.near.first() == {0: 1, 1: 0, 2: 0}


def test_nothing_to_look_for():
    found = found_in([demonstration(sentence(1))], [sentence(2), "short"])
    assert [len(hits.row) for hits in found.ways.values()] == [0, 0, 0, 0]


def test_settings_are_checked():
    with pytest.raises(DataError, match="ngram is 5"):
        Overlap(ngram=5)
