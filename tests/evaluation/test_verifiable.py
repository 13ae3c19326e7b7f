"""Right and wrong answers as models write them, numbers in every form, and IFEval's checks by lm-eval where it is."""

import json
import random
import sys
from fractions import Fraction
from importlib.util import find_spec
from types import SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from uft.evaluation.generation import Generation
from uft.evaluation.verifiable import accuracy, exact_match, extract_number, ifeval, same_number, verify

# --- numbers ------------------------------------------------------------------------------------------------------

NUMBERS = {
    "18": 18,
    "She pays 9 * 2 = $18 each day.": 18,
    "It takes 2 days, then 3 more.\n#### 5": 5,
    "#### 1,450,000": 1_450_000,
    "#### 18\n\nQuestion: Another one with 7.\n#### 9": 18,  # what follows is not asked
    "####": None,
    "#### Step 1\nIt is 7.\n#### 2. Check\nIt is 8": 8,  # headings
    "#### \n-$1,200": -1200,
    "no 3 #### none": 3,
    "The answer is 18 because 9 + 9 is 18 and it took 2 days.": 18,
    "The answer is 5 + 6 = 11.": 11,
    "Answer: (3 * 4) / 2 = 12 / 2 = 6 apples of 10": 6,
    "**Answer:** **42**": 42,
    "First the answer is 3. No, the answer is 4.": 4,
    "With 17 in all, the answer is as above.": 17,
    "\\boxed{x = 5} of 7": 5,
    "so \\boxed{\\frac{3}{4}}": Fraction(3, 4),
    "-\\frac{3}{4}": Fraction(-3, 4),
    "1\\frac{3}{4}": Fraction(7, 4),
    "$-18.50": Fraction(-37, 2),
    "-$18.50": Fraction(-37, 2),
    "it is −7 degrees": -7,  # the mathematical minus
    "9 - 5": 5,
    "9-5": 5,
    "(9)-5": 5,
    "x = - 5": -5,
    "Result:\n- 18 apples": 18,  # a list
    "2.": 2,
    "Is it 2.50?": Fraction(5, 2),
    ".5 of it": Fraction(1, 2),
    "3/4": Fraction(3, 4),
    "-1 1/2 cups": Fraction(-3, 2),
    "10/16/1924": 1924,
    "5/0": 0,
    "50%": 50,
    "18th": 18,
    "1, 2, 3": 3,
    "1,234,567.25": Fraction(4_938_269, 4),
    "1{,}450": 1450,
    "\\$1,200": 1200,
    "1.5e3": 1500,
    "x2": None,
    "COVID-19": 19,
    "eighteen": None,
    "": None,
    "1e999999999999": 1,  # no exponent that would fill the memory, and "e999..." is no number of its own
}


@pytest.mark.parametrize("text", NUMBERS)
def test_the_number_of_a_text(text):
    assert extract_number(text) == NUMBERS[text]


def test_endless_digits_are_a_number_too():
    assert extract_number("7" * 10_000) > 10**9_999
    assert extract_number("1," * 10_000 + "2") == 2
    assert extract_number("5" + " " * 10_000 + "#" * 10_000) == 5


SHAPES = {
    "plain": "{}",
    "sentence": "I think it is {}.",
    "dollars": "He pays ${} in total",
    "hashes": "He had 3 and got 4.\n#### {}",
    "hashes, more": "#### {}\n\nQuestion: what is 2 + 2?",
    "answer": "In 3 days 4 cows eat. The answer is {}, not 12.",
    "bold": "Final answer: **{}**\nI used 3 steps.",
    "boxed": "So $\\boxed{{{}}}$ after 3 steps.",
    "calculation": "The answer is 3 + 4 * 5 = {}",
    "unit": "That makes {} apples",
    "last": "First 3, then 4, and finally {}!",
}


@settings(max_examples=150, deadline=None)
@given(
    st.integers(-(10**9), 10**9),
    st.integers(0, 3),
    st.booleans(),
    st.sampled_from(sorted(SHAPES)),
)
def test_a_number_written_in_many_ways_is_found(n, places, commas, shape):
    value = Fraction(n, 10**places)
    digits = f"{abs(n):0{places + 1}d}"
    whole, behind = (digits[:-places], digits[-places:]) if places else (digits, "")
    whole = f"{int(whole):,}" if commas else str(int(whole))
    text = SHAPES[shape].format(("-" if n < 0 else "") + whole + (f".{behind}" if behind else ""))
    assert extract_number(text) == value, text
    assert verify("number", text, f"{n / 10**places:.3f}") and not verify("number", text, str(value + 1))


@settings(max_examples=60, deadline=None)
@given(
    st.integers(0, 500), st.integers(0, 500), st.integers(1, 60), st.sampled_from(["{}", "about {}.", "#### {} cups"])
)
def test_fractions_are_exact(whole, top, bottom, shape):
    mixed = f"{whole} {top}/{bottom}" if whole else f"{top}/{bottom}"
    assert extract_number(shape.format(mixed)) == whole + Fraction(top, bottom)


@settings(max_examples=200, deadline=None)
@given(st.text(alphabet="0123456789.,/-$%#= eE\n{}()\\answeris", max_size=40))
def test_any_text_is_read(text):
    found = extract_number(text)
    assert found is None or isinstance(found, Fraction)


def test_what_is_the_same_number():
    assert same_number(Fraction("0.3333333"), Fraction(1, 3)) and not same_number(Fraction("0.333"), Fraction(1, 3))
    assert same_number(Fraction("42.0"), Fraction(42))
    assert not same_number(Fraction(10**9), Fraction(10**9 + 1))
    assert not same_number(Fraction(10**9), Fraction(10**9) + Fraction(1, 2))
    assert not same_number(Fraction("1e-7"), Fraction("2e-7"))
    assert not same_number(None, Fraction(0)) and not same_number(None, None)


# --- exact --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text, answer, right",
    [
        ("Yes", "yes", True),
        (" yes.\n", "Yes", True),
        ("Yes, because he did.", "Yes", True),
        ("No. Yes would be wrong.", "Yes", False),
        ("invalid", "valid", False),
        ("The argument is clear. The answer is **valid**.", "valid", True),
        ("Answer: valid\nBecause ...", "valid", True),
        ("#### Thoughts\nHard.\n**Answer**: valid", "valid", True),
        ("Yesterday", "Yes", False),
        ("(B)", "(B)", True),
        ("B", "(B)", True),
        ("b", "(B)", False),
        ("B.", "(B)", True),
        ("(b) fiberglass", "(B)", True),
        ("B) fiberglass", "(B)", True),
        ("(A)", "(B)", False),
        ("So the answer is (B).", "(B)", True),
        ("So the answer is (A), not (B).", "(B)", False),
        ("The right option must be (B), a sweater.", "(B)", True),
        ("It is (A) or (B).", "(B)", False),
        ("A sweater", "(A)", False),  # an article
        ("} ] }", "} ] }", True),
        ("}  ] }\n", "} ] }", True),
        ("} ] } )", "} ] }", False),
        ("-9", "-9", True),
        ("The answer is -9.", "-9", True),
        ("-9.5", "-9", False),
        ("9", "-9", False),
        ("24.5", "24", False),
        ("bonito dreamboat haggard", "bonito dreamboat haggard", True),
        ("bonito haggard dreamboat", "bonito dreamboat haggard", False),
        ("bonito dreamboat haggard nose", "bonito dreamboat haggard", False),
        ('"Monsters, Inc."', "Monsters, Inc", True),
        ("24. That is all.", "24", True),
        ("", "Yes", False),
    ],
)
def test_exact_answers(text, answer, right):
    assert exact_match(text, answer) is verify("exact", text, answer) is right


@settings(max_examples=60, deadline=None)
@given(
    st.text(alphabet="abcXYZ ()[]-", min_size=1).filter(str.strip),
    st.sampled_from(["{}", " {}\n", "The answer is {}."]),
)
def test_an_answer_matches_itself(answer, shape):
    assert exact_match(shape.format(answer), answer)


# --- IFEval -------------------------------------------------------------------------------------------------------

META = {
    "key": 7,
    "instruction_id_list": ["punctuation:no_comma", "detectable_format:number_bullet_lists", "startend:end_checker"],
    "kwargs": [{}, {"num_bullets": 2}, {"end_phrase": "Bye."}],
}


def test_a_missing_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(ImportError, match=r"pip install 'unified-finetuning\[eval\]'"):
        verify("ifeval", "text", "", META)


def test_what_the_checkers_are_asked(monkeypatch):
    """A stand-in for lm-eval's functions, which are given the row, a seed for langdetect, and the text as it is."""
    seen = []
    detector = SimpleNamespace(seed=None)

    def strictly(example, text):
        seen.append((example.instruction_id_list, example.kwargs, text, detector.seed, random.random()))
        return SimpleNamespace(follow_instruction_list=[True, False, True])

    def loosely(example, text):
        return SimpleNamespace(follow_instruction_list=[True, True, True])

    utils = SimpleNamespace(
        InputExample=lambda **fields: SimpleNamespace(**fields),
        test_instruction_following_strict=strictly,
        test_instruction_following_loose=loosely,
    )
    for name in ("lm_eval", "lm_eval.tasks", "lm_eval.tasks.ifeval"):
        monkeypatch.setitem(sys.modules, name, SimpleNamespace(__path__=[]))
    monkeypatch.setitem(sys.modules, "lm_eval.tasks.ifeval.utils", utils)
    monkeypatch.setitem(sys.modules, "langdetect", SimpleNamespace(DetectorFactory=detector))

    assert ifeval(" as it is ", json.dumps(META)) == ((True, False, True), (True, True, True))
    random.seed(123)
    state = random.getstate()
    ifeval(" as it is ", META)
    asked = (META["instruction_id_list"], META["kwargs"], " as it is ", 0, random.Random(0).random())
    assert seen == [asked, asked] and detector.seed is None and random.getstate() == state
    assert verify("ifeval", "text", "", META) is False
    rows = [{"kind": "ifeval", "source": "ifeval", "meta": META}, {"kind": "judge", "answer": ""}]
    assert accuracy(["text", "text"], rows) == (
        {
            "ifeval": 0.0,
            "ifeval/ifeval": 0.0,
            "ifeval_loose": 1.0,
            "ifeval_instructions": pytest.approx(2 / 3),
            "ifeval_instructions_loose": 1.0,
        },
        [False, None],
    )


@pytest.mark.parametrize("meta", ["", None, "{", "[]", "{}", {"instruction_id_list": ["a"], "kwargs": []}])
def test_a_meta_that_is_none(meta):
    with pytest.raises(ValueError, match="meta: found"):
        ifeval("text", meta)


@pytest.mark.skipif(find_spec("lm_eval") is None or find_spec("langdetect") is None, reason="needs the extra `eval`")
def test_with_the_real_checkers():
    good = "* one\n* two\nBye."
    assert ifeval(good, META) == ((True,) * 3, (True,) * 3)
    assert verify("ifeval", good, "", json.dumps(META))
    assert ifeval("* one, two\n* three\nBye.", META).strict == (False, True, True)
    # a preface is forgiven leniently
    assert ifeval("Sure, here:\n" + good, META) == ((False, True, True), (True,) * 3)
    assert ifeval("", META).loose == (False,) * 3
    with pytest.raises(ValueError, match="meta: found the instruction 'no:such'"):
        ifeval("text", {"instruction_id_list": ["no:such"], "kwargs": [{}]})
    language = {"instruction_id_list": ["language:response_language"], "kwargs": [{"language": "en"}]}
    # letter "#" is none to lm-eval, which draws another
    letter = {"let_relation": "at least", "letter": "#", "let_frequency": 4}
    drawn = {"instruction_id_list": ["keywords:letter_frequency"], "kwargs": [letter]}
    assert len({ifeval("aaaa bbbb cccc dddd eeee", drawn).strict for _ in range(20)}) == 1
    assert len({ifeval("per se ok la si", language).strict for _ in range(20)}) == 1


# --- many rows ----------------------------------------------------------------------------------------------------


def test_accuracy_by_hand():
    rows = [
        {"kind": "number", "source": "gsm8k-test", "answer": "18", "meta": ""},
        {"kind": "number", "source": "gsm8k-test", "answer": "2,125", "meta": ""},
        {"kind": "number", "source": "svamp", "answer": "42.0", "meta": ""},
        {"kind": "exact", "source": "bbh-navigate", "answer": "Yes", "meta": ""},
        {"kind": "exact", "answer": "(C)"},
        {"kind": "judge", "source": "mt-bench", "answer": "", "meta": "{}"},
    ]
    texts = ["so 18 apples", "2124", "#### 42", "No", "(C)", "whatever"]
    wanted = {
        "number": pytest.approx(2 / 3),
        "number/gsm8k-test": 0.5,
        "number/svamp": 1.0,
        "exact": 0.5,
        "exact/bbh-navigate": 0.0,
    }
    results = [True, False, True, False, True, None]
    assert accuracy(texts, rows) == (wanted, results)
    assert accuracy([Generation("", text, 1, True) for text in texts], rows) == (wanted, results)
    assert accuracy([], []) == ({}, [])


def test_what_is_refused():
    with pytest.raises(ValueError, match="1 generations and 0 rows"):
        accuracy(["text"], [])
    with pytest.raises(ValueError, match="row 1: kind: found 'essay'"):
        accuracy(["1", "text"], [{"kind": "number", "answer": 1}, {"kind": "essay", "answer": ""}])
    with pytest.raises(ValueError, match="row 0: answer: found 'many'; want a number"):
        accuracy(["text"], [{"kind": "number", "answer": "many"}])
    with pytest.raises(ValueError, match="row 0: answer: found ''"):
        accuracy(["text"], [{"kind": "exact"}])
    with pytest.raises(ValueError, match="kind: found 'judge'"):
        verify("judge", "text")
