"""Comparing examples, of which `==` would compare arrays, and making all sorts of them."""

import numpy as np
from hypothesis import strategies as st

from uft.feedback import KINDS, Example, Response


def facts(example: Example) -> tuple:
    """All of an example but its index, as something that `==` can compare.  NaN is equal to itself here."""

    def array(values):
        return None if values is None else (str(values.dtype), values.tolist())

    def response(r):
        return (array(r.tokens), array(r.in_loss), repr(r.target), repr(r.weight), r.mismatched, array(r.prompt))

    responses = tuple(map(response, example.responses))
    return (example.kind, array(example.prompt), responses, example.preferences, example.source, example.row)


def same(some, others) -> bool:
    some, others = list(some), list(others)
    return len(some) == len(others) and all(facts(a) == facts(b) for a, b in zip(some, others))


tokens = st.lists(st.integers(0, 2**31 - 1), max_size=5).map(lambda ids: np.array(ids, dtype=np.int32))
numbers = st.one_of(st.just(float("nan")), st.floats(0, 1))


@st.composite
def responses(draw):
    ids = draw(tokens)
    mask = draw(st.one_of(st.none(), st.lists(st.booleans(), min_size=len(ids), max_size=len(ids))))
    mask = None if mask is None else np.array(mask, dtype=bool)
    prompt = draw(st.one_of(st.none(), tokens))
    return Response(ids, mask, draw(numbers), draw(st.floats(0, 3)), draw(st.booleans()), prompt)


@st.composite
def examples(draw):
    answers = tuple(draw(st.lists(responses(), max_size=3)))
    pairs = st.tuples(st.integers(0, 2), st.integers(0, 2))
    preferences = tuple(draw(st.lists(pairs, max_size=2)))
    row = draw(st.integers(0, 2**40))
    return Example(draw(st.sampled_from(KINDS)), draw(tokens), answers, preferences, "train", row)
