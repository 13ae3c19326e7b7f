"""Evaluation prompts planted in training rows, and templates that are none."""

import pytest

from tests.data.quality.planted import corpus, pair, sentence
from uft.data.quality.contamination import Overlap, look_for
from uft.data.rows import DataError


def found_in(rows, evaluation, **options):
    made = corpus(train=rows)
    prompts = [item.prompt for item in made.items]
    return look_for(evaluation, prompts, made.row_words, Overlap(**options), made.words)


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


def test_near_and_exact_prompts():
    rows = [pair(sentence(1), "a", "b"), pair(sentence(2) + " more", "a", "b"), pair(sentence(2) + " more", "c", "d")]
    found = found_in(rows, [sentence(2), sentence(1).upper(), sentence(3)])
    assert pairs_of(found.exact) == [(0, 1)]
    assert pairs_of(found.near) == [(0, 1), (1, 0), (2, 0)]
    assert found.near.first() == {0: 1, 1: 0, 2: 0}


def test_nothing_to_look_for():
    found = found_in([demonstration(sentence(1))], [sentence(2), "short"])
    assert [len(hits.row) for hits in found.ways.values()] == [0, 0, 0]


def test_settings_are_checked():
    with pytest.raises(DataError, match="ngram is 5"):
        Overlap(ngram=5)
