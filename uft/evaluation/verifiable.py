"""Answers that can be checked without a judge: numbers, exact matches, instructions of the IFEval kind.

A row says what is asked and how the answer is checked:

    prompt, answer
    kind      number   the number that the text gives as its answer equals `answer`
              exact    the text's answer is `answer`, up to case, white space and the marks around it
              ifeval   the text follows all of `meta`'s instructions (strictly); `answer` is not used
              judge    no check can tell: see `uft.evaluation.judge`
    source    where the row comes from (optional); accuracies are also given by source
    meta      of ifeval: {"instruction_id_list": [...], "kwargs": [{...}, ...]}, as JSON or as a mapping

Where a text gives its answer: behind "####" if a number stands there, in \\boxed{}, behind "answer is" or "Answer:", in
this order of precedence; of several the first "####" (what follows may be another question) and the last of the others.
Without any of these it is the last number, or the text as a whole.
"""

from __future__ import annotations

import json
import random
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from decimal import Decimal
from fractions import Fraction
from importlib import import_module
from typing import Any, NamedTuple

from uft.evaluation.generation import Generation


def verify(kind: str, text: str, answer: str | None = None, meta: Any = None) -> bool:
    """Whether a response is right.  Raises `ValueError` for what cannot be checked."""
    if kind == "ifeval":
        return all(ifeval(text, meta).strict)
    if kind not in ("number", "exact"):
        raise ValueError(f"kind: found {kind!r}; want number, exact or ifeval, which can be checked")
    answer = "" if answer is None else str(answer)
    if kind == "exact":
        if not answer.strip():
            raise ValueError(f"answer: found {answer!r}; want what is right")
        return exact_match(text, answer)
    wanted = extract_number(answer)
    if wanted is None:
        raise ValueError(f"answer: found {answer!r}; want a number")
    return same_number(extract_number(text), wanted)


def accuracy(
    generations: Sequence[Generation | str], rows: Sequence[Mapping[str, Any]]
) -> tuple[dict[str, float], list[bool | None]]:
    """Shares that are right, by `<kind>` and by `<kind>/<source>`; and for each row whether it is, None for a judge's.

    Rows of kind ifeval add the three other numbers that are reported of it: `ifeval_loose` (a text may be taken without
    its first line, its last, and its asterisks), and `ifeval_instructions`, `ifeval_instructions_loose`, the shares of
    single instructions.
    """
    if len(generations) != len(rows):
        raise ValueError(f"found {len(generations)} generations and {len(rows)} rows; want as many")
    counts: dict[str, list[bool]] = {}
    results: list[bool | None] = []
    for i, (generation, row) in enumerate(zip(generations, rows)):
        text = generation if isinstance(generation, str) else generation.text
        try:
            right, followed = _checked(text, row)
        except ValueError as error:
            raise ValueError(f"row {i}: {error}") from None
        results.append(right)
        if followed is not None:
            counts.setdefault("ifeval_loose", []).append(all(followed.loose))
            counts.setdefault("ifeval_instructions", []).extend(followed.strict)
            counts.setdefault("ifeval_instructions_loose", []).extend(followed.loose)
        if right is not None:
            for key in (row["kind"], f"{row['kind']}/{row['source']}") if row.get("source") else (row["kind"],):
                counts.setdefault(key, []).append(right)
    return {key: sum(values) / len(values) for key, values in sorted(counts.items())}, results


def _checked(text: str, row: Mapping[str, Any]) -> tuple[bool | None, Followed | None]:
    kind = row.get("kind")
    if kind == "judge":
        return None, None
    if kind == "ifeval":
        followed = ifeval(text, row.get("meta"))
        return all(followed.strict), followed
    return verify(kind, text, row.get("answer")), None


# ---- where the answer is ----

# a number, and not that of a heading: "#### 1. Read the question"
_HASHES = re.compile(r"####\s*+(?=[-$€£\s]*\.?[0-9])(?![0-9]+[.):]\s+[A-Za-z])")
_SAID = re.compile(r"\banswers?\b[\s*]*(?:\bis\b|\bare\b|=|:)[\s:*]*", re.IGNORECASE)


def answer_part(text: str) -> tuple[str, bool]:
    """The text from where it gives its answer, and whether it says where that is.  See the top of the file."""
    if found := _HASHES.search(text):
        return text[found.end() :], True
    if boxed := _boxed(text):
        return boxed, True
    said = list(_SAID.finditer(text))
    return (text[said[-1].end() :], True) if said else (text, False)


def _boxed(text: str) -> str:
    """What stands in the last \\boxed{...}, whose braces may hold others."""
    start = text.rfind("\\boxed{")
    if start < 0:
        return ""
    start += len("\\boxed{")
    depth = 1
    for i in range(start, len(text)):
        depth += {"{": 1, "}": -1}.get(text[i], 0)
        if not depth:
            return text[start:i]
    return text[start:]


# ---- numbers ----

_DIGITS = r"(?:[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])|[0-9]+)"
_DECIMAL = rf"(?:{_DIGITS}(?:\.[0-9]+)?|(?<![0-9])\.[0-9]+)(?:[eE][+-]?[0-9]{{1,3}}(?![A-Za-z0-9]))?"
_NUMBER = re.compile(
    r"(?<![A-Za-z0-9_])"  # "x2" holds no number
    r"(?P<minus>(?<!\))- ?(?=[$€£]? ?[0-9.]))?"  # nor does "5-3" hold -3; for "5 - 3" see _is_minus
    r"(?:[$€£] ?(?P<behind>-)?)?"
    rf"(?:(?P<whole>{_DIGITS}) +(?=[0-9]+ ?/ ?[0-9]))?"  # 1 3/4
    rf"(?P<top>{_DECIMAL})"
    rf"(?P<over>(?: ?/ ?{_DECIMAL})*)"
)
_LATEX = re.compile(r"\\[dt]?frac\s*\{\s*(-?[0-9,.]+)\s*\}\s*\{\s*([0-9,.]+)\s*\}")
# a calculation in front of its result: "5 + 6 =", "x =", "(3 * 4) / 2 = 12 / 2 ="
_CALCULATION = re.compile(r"(?:[A-Za-z]?[0-9.,$€£()+\-*/×÷·%\s]*=)+")


def extract_number(text: str) -> Fraction | None:
    """The number that a text gives as its answer, exactly; None if it has none.

    Reads "1,450,000", "$-18.50", "-$18.50", ".5", "3/4", "1 3/4", "\\frac{3}{4}", "1.5e3", and 50 of "50%" and of "50
    apples".  Behind a mark (see the top of the file) it is the first, or the result of the calculation that stands
    there; else the last.
    """
    text = _plain(text)
    part, said = answer_part(text)
    if said:
        part = part.lstrip()
        calculation = _CALCULATION.match(part)
        found = _NUMBER.search(part, calculation.end() if calculation else 0) or _NUMBER.search(part)
        if found is not None:
            return _value(found)
    # also where no number follows the mark: "The answer is as above."
    numbers = list(_NUMBER.finditer(text))
    return _value(numbers[-1]) if numbers else None


def same_number(a: Fraction | None, b: Fraction | None) -> bool:
    """Equal up to a millionth, of one or of b if that is less, so that 0.3333333 is 1/3 and no whole number another."""
    return a is not None and b is not None and abs(a - b) <= min(1, abs(b)) / 1_000_000


def _plain(text: str) -> str:
    """Without what TeX and Markdown write around and inside of numbers."""
    text = text.replace("\u2212", "-").replace("**", "").replace("`", "")
    text = text.replace("\\$", "$").replace("\\%", "%").replace("{,}", ",").replace("\\!", "").replace("\\,", "")
    # a space in 1\frac{3}{4}, none in -\frac{3}{4}
    return _LATEX.sub(
        lambda found: f"{' ' * text[found.start() - 1 : found.start()].isdigit()}{found[1]}/{found[2]}", text
    )


def _value(found: re.Match) -> Fraction:
    def fraction(digits: str) -> Fraction:
        # Decimal: a model may write more digits than int() reads
        return Fraction(Decimal(digits.replace(",", "").strip()))

    parts = [fraction(digits) for digits in (found["top"] + found["over"]).split("/")]
    if len(parts) == 2 and parts[1]:
        value = parts[0] / parts[1] + fraction(found["whole"] or "0")
    else:
        value = parts[-1]  # of a date, its last number
    return -value if found["behind"] or _is_minus(found) else value


def _is_minus(found: re.Match) -> bool:
    """In "9 - 5" it subtracts, in "- 5 apples" it may open a line of a list; "x = - 5" and "is -5" are negative."""
    before = found.string[: found.start()].rstrip(" ")
    return found["minus"] == "-" or (found["minus"] is not None and before.endswith(("=", "(")))


# ---- exact matches ----

_OPTION = re.compile(r"\(([A-Za-z])\)")
_AROUND = " \t\n\"'“”‘’*`$.,!;:"


def normalised(text: str) -> str:
    """Without case, runs of white space, and quotes, emphasis and full stops around it; brackets stay."""
    return " ".join(text.split()).strip(_AROUND).casefold()


def exact_match(text: str, answer: str) -> bool:
    """Whether the answer part, its first line or its first sentence is the answer.

    An answer of one word may be followed by others ("Yes, because").  An option "(B)" may be written B, B), B. or (B),
    with its text behind it, or stand anywhere if it is the only one in parentheses.
    """
    part, _ = answer_part(text)
    part = part.strip()
    wanted = normalised(answer)
    if option := _OPTION.fullmatch(answer.strip()):
        return _option(part) == option[1].upper()
    line = part.split("\n", 1)[0]
    if wanted in (normalised(part), normalised(line), normalised(re.split(r"[.!?]\s", line, maxsplit=1)[0])):
        return True
    first = re.match(r"\w+", part.lstrip(_AROUND))
    return wanted.isalpha() and first is not None and first[0].casefold() == wanted


def _option(part: str) -> str | None:
    part = part.lstrip(_AROUND)
    if found := re.match(r"\(([A-Za-z])\)|([A-Z])(?=\s*$|\s*\n|[).:,*])", part):
        return (found[1] or found[2]).upper()
    named = {letter.upper() for letter in _OPTION.findall(part)}
    return named.pop() if len(named) == 1 else None


# ---- IFEval ----


class Followed(NamedTuple):
    """For each instruction whether the text follows it, as it stands and leniently."""

    strict: tuple[bool, ...]
    loose: tuple[bool, ...]


def ifeval(text: str, meta: Any) -> Followed:
    """Checks a text by the instructions of a row, with lm-eval's checkers (Zhou et al. 2023, arXiv:2311.07911).

    Raises `ImportError` without the extra `eval`, `ValueError` for a meta that is none.
    """
    meta = _instructions(meta)
    checkers, langdetect = _checkers()
    example = checkers.InputExample(
        key=meta.get("key", 0),
        instruction_id_list=meta["instruction_id_list"],
        prompt=meta.get("prompt", ""),
        kwargs=meta["kwargs"],
    )
    with _same_luck(langdetect):
        try:
            strict = checkers.test_instruction_following_strict(example, text).follow_instruction_list
            loose = checkers.test_instruction_following_loose(example, text).follow_instruction_list
        except KeyError as error:
            raise ValueError(f"meta: found the instruction {error}; want one that lm-eval knows") from None
        except LookupError as error:
            raise LookupError(
                "checks that count sentences or words in capitals need a file of nltk: "
                "python -m nltk.downloader punkt_tab"
            ) from error
    return Followed(tuple(map(bool, strict)), tuple(map(bool, loose)))


@contextmanager
def _same_luck(langdetect: Any) -> Iterator[None]:
    """The checkers guess languages, and fill in what an instruction leaves open, by random numbers: always the same."""
    state, seed = random.getstate(), langdetect.DetectorFactory.seed
    random.seed(0)
    langdetect.DetectorFactory.seed = 0
    try:
        yield
    finally:
        random.setstate(state)
        langdetect.DetectorFactory.seed = seed


def _instructions(meta: Any) -> Mapping[str, Any]:
    try:
        found = json.loads(meta) if isinstance(meta, str) else meta
        if len(found["instruction_id_list"]) == len(found["kwargs"]) > 0:
            return found
    except (ValueError, TypeError, KeyError):
        pass
    wanted = "instruction_id_list and kwargs, equally long, as JSON or as a mapping"
    raise ValueError(f"meta: found {str(meta)[:80]!r}; want {wanted}")


def _checkers() -> tuple[Any, Any]:
    try:
        return import_module("lm_eval.tasks.ifeval.utils"), import_module("langdetect")
    except ImportError as error:
        raise ImportError(
            f"checks of kind ifeval need the extra `eval` ({error}): pip install 'unified-finetuning[eval]'"
        ) from error
