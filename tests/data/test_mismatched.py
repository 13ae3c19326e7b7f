"""Mismatched responses made when they are asked for are those that `uft.feedback.mismatched` makes of a list."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.data.same import same
from tests.mixed import dataset, trainer
from uft.data.columns import in_memory
from uft.data.mismatched import Mismatched
from uft.data.mixture import FeedbackDataset
from uft.feedback import Example, Response, mismatched

KINDS = frozenset(["pair", "label"])


@st.composite
def judged(draw):
    """Few different prompts, so that runs of equal ones are common; with and without BOS (1)."""
    kind = draw(st.sampled_from(["pair", "label", "score"]))
    prompt = draw(st.sampled_from([(1, 5), (1, 6), (1, 6, 7, 8), (6, 7), (1, 7, 8, 9, 5)]))
    answers = draw(st.lists(st.integers(1, 5), min_size=1, max_size=2))
    responses = tuple(Response(np.arange(10, 10 + n, dtype=np.int32), target=1.0) for n in answers)
    return Example(kind, np.array(prompt, dtype=np.int32), responses, row=draw(st.integers(0, 99)))


@settings(max_examples=150, deadline=None)
@given(st.lists(judged(), min_size=1, max_size=9), st.sampled_from([None, 6, 8]), st.sampled_from([None, 1]))
def test_the_same_as_of_a_list(rows, max_length, bos):
    try:
        wanted = mismatched(rows, max_length, KINDS, bos)
    except ValueError as error:
        with pytest.raises(ValueError) as found:
            Mismatched(in_memory(rows), KINDS, max_length, bos)
        assert str(found.value) == str(error)
        return
    found = Mismatched(in_memory(rows), KINDS, max_length, bos)
    assert same(found, wanted) and same(found[::-1], wanted[::-1])
    assert same(found.named("b"), [type(e)(e.kind, e.prompt, e.responses, e.preferences, "b", e.row) for e in wanted])
    data = FeedbackDataset({"train": found})
    assert data.lengths.tolist() == [example.tokens for example in wanted]
    assert found.fingerprint == Mismatched(in_memory(rows), KINDS, max_length, bos).fingerprint
    assert (found.fingerprint == in_memory(rows).fingerprint) is False


def test_fingerprints_tell_how_they_were_made():
    rows = in_memory(dataset(("labels",)))
    made = [Mismatched(rows, KINDS, None, None), Mismatched(rows, KINDS, 8, None), Mismatched(rows, {"pair"}, 8, None)]
    assert len({rows.fingerprint, *(each.fingerprint for each in made)}) == 4


def test_the_trainer_holds_none_of_them():
    run = trainer("kto", dataset(("labels",)))
    assert isinstance(run.train_dataset.examples["labels"], Mismatched)
    kinds = run.objective.kinds_with_mismatched
    assert same(run.train_dataset, mismatched(dataset(("labels",))[:], run.args.max_length, kinds, 1))
    # what is put into another trainer gets them anew, not twice
    again = run.train_dataset.with_mismatched(kinds, None, 1)
    assert same(again, mismatched(dataset(("labels",))[:], None, kinds, 1))
