"""Batches: what is padded, what counts, and what belongs to what."""

import numpy as np
import pytest
import torch

from uft.collation import Collator
from uft.feedback import KINDS, Example, Response, mismatched


def array(*ids):
    return np.array(ids, dtype=np.int32)


PAIR = Example(
    "pair", array(1, 5, 6), (Response(array(7, 2), target=1.0), Response(array(8, 9, 2), target=0.0)), ((0, 1),), "p", 3
)
DEMONSTRATION = Example(
    "demonstration", array(1, 5), (Response(array(7, 8, 9, 2), np.array([True, False, True, True]), 1.0, 0.5),), (), "d"
)
DOCUMENT = Example("document", array(), (Response(array(1, 4, 2)),), (), "d", 1)


@pytest.mark.parametrize("side", ["right", "left"])
def test_collation_by_hand(side):
    batch = Collator(pad_token_id=0, sources=("p", "d"), padding_side=side)([PAIR, DEMONSTRATION, DOCUMENT])
    rows = [
        ([1, 5, 6, 7, 2], [0, 0, 0, 1, 1]),
        ([1, 5, 6, 8, 9, 2], [0, 0, 0, 1, 1, 1]),
        ([1, 5, 7, 8, 9, 2], [0, 0, 1, 0, 1, 1]),
        ([1, 4, 2], [0, 1, 1]),  # nothing stands before the first token of a document to predict it from
    ]

    def padded(values):
        zeros = [0] * (6 - len(values))
        return zeros + values if side == "left" else values + zeros

    assert batch.input_ids.tolist() == [padded(ids) for ids, _ in rows]
    assert batch.in_loss.int().tolist() == [padded(mask) for _, mask in rows]
    assert batch.attention_mask.tolist() == [padded([1] * len(ids)) for ids, _ in rows]
    assert [KINDS[k] for k in batch.kind] == ["pair", "pair", "demonstration", "document"]
    assert batch.preferences.tolist() == [[0, 1]]
    assert batch.prompt.tolist() == [0, 0, 1, 2]
    assert batch.source.tolist() == [0, 0, 1, 1]
    assert batch.row.tolist() == [3, 3, 0, 1]
    assert batch.target.tolist()[:3] == [1.0, 0.0, 1.0] and batch.target[3].isnan()
    assert batch.weight.tolist() == [1.0, 1.0, 0.5, 1.0]


def test_padding_to_a_multiple():
    assert Collator(0, ("p",), pad_to_multiple_of=8)([PAIR]).input_ids.shape == (2, 8)


def test_select_keeps_whole_relations_only():
    batch = Collator(0, ("p", "d"))([DEMONSTRATION, PAIR, PAIR])
    part = batch.select(torch.tensor([False, True, True, False, True]))
    assert part.preferences.tolist() == [[0, 1]]  # of the second pair only the rejected side is left
    assert len(part.kind) == 3 and part.kind.tolist() == [2, 2, 2]


def test_k_responses_to_a_prompt_need_no_new_batch():
    ranking = Example(
        "pair", array(1), tuple(Response(array(t, 2), target=t / 9) for t in (9, 6, 3)), ((0, 1), (0, 2), (1, 2)), "p"
    )
    batch = Collator(0, ("p",))([PAIR, ranking])
    assert batch.preferences.tolist() == [[0, 1], [2, 3], [2, 4], [3, 4]]
    assert batch.rows("chosen").tolist() == [True, False, True, True, False]


def test_mismatched_puts_the_predecessors_response_behind_each_prompt():
    rows = [Example("label", array(1, k), (Response(array(10 + k, 2), target=1.0),), row=k) for k in range(3)]
    mixed = mismatched([rows[0], DOCUMENT, rows[1], rows[2]])
    assert [e.responses[-1].tokens[0] for e in mixed if e.kind == "label"] == [12, 10, 11]
    assert mixed[1] is DOCUMENT
    batch = Collator(0, ("train", "d"))(mixed)
    assert [KINDS[k] for k in batch.kind] == [
        "label",
        "mismatched",
        "document",
        "label",
        "mismatched",
        "label",
        "mismatched",
    ]
    assert batch.rows("mismatched").sum() == 3 and batch.rows("responses").sum() == 3


def test_mismatched_skips_answers_to_the_same_prompt_and_fits():
    def row(i, prompt, *answer):
        return Example("label", array(*prompt), (Response(array(*answer), target=1.0),), row=i)

    rows = [row(0, (1, 3), 10, 2), row(1, (1, 4, 5, 6), 11, 2), row(2, (1, 4, 5, 6), 12, 13, 14, 2)]
    mixed = mismatched(rows, max_length=6)
    assert [e.responses[-1].tokens[0] for e in mixed] == [12, 10, 10]
    batch = Collator(0)(mixed)
    assert batch.input_ids.shape[1] <= 8  # 4 + 4 of the third row itself, and not a token more
    longest = [int(n) for n, k in zip(batch.attention_mask.sum(-1), batch.kind) if KINDS[k] == "mismatched"]
    assert longest == [6, 6, 6]
    with pytest.raises(ValueError, match="at least two different prompts"):
        mismatched([rows[1], rows[2]])
    assert mismatched(rows, kinds=("pair",)) == rows


def test_mismatched_takes_both_sides_of_a_pair_and_keeps_the_bos():
    def pair(i, *prompt):
        sides = (Response(array(20 + i, 2), target=1.0), Response(array(30 + i, 31, 2), target=0.0))
        return Example("pair", array(*prompt), sides, ((0, 1),), row=i)

    mixed = mismatched([pair(0, 1, 4, 5, 6), pair(1, 1, 7, 8, 9)], max_length=6, bos=1)
    extra = [response for response in mixed[1].responses if response.mismatched]
    assert [response.tokens.tolist() for response in extra] == [[20, 2], [30, 31, 2]]
    assert extra[0].prompt is None and extra[1].prompt.tolist() == [1, 8, 9]


def test_cached_reference_is_looked_up_by_source_and_row():
    collate = Collator(0, ("p", "d"), reference_logps={("p", 3): [-1.0, -2.0]}, reference_kinds=frozenset(["pair"]))
    found = collate([DEMONSTRATION, PAIR]).reference_logp
    assert found[0].isnan() and found[1:].tolist() == [-1.0, -2.0]
    other = Example("pair", PAIR.prompt, PAIR.responses, PAIR.preferences, "p", 4)
    with pytest.raises(ValueError, match="no reference log-probability for row 4 of 'p'"):
        collate([other])


def test_an_unknown_kind_is_refused():
    with pytest.raises(ValueError, match="kind is 'pairs'; want one of document, demonstration"):
        Example("pairs", array(1), ())
