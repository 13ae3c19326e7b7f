"""Equations and papers of losses and objectives, as their docstrings say them."""

from __future__ import annotations

import inspect
import re
import sys
from collections.abc import Callable
from typing import Any, NamedTuple

from uft import losses
from uft.presets import PRESETS

_ARXIV = re.compile(r"arXiv:(\d{4}\.\d{4,5})")
# "[DPO]  Rafailov et al. 2023, arXiv:2305.18290", several of them side by side on a line
_PAPER = re.compile(r"\[([\w-]+)\]\s+((?:(?!\s{3,}\[)[^\n])*)")
_TAG = re.compile(r"\[([\w-]+)\]")
TABLES = (losses.LIKELIHOOD, losses.PAIRWISE, losses.POINTWISE, losses.POLICY_GRADIENT)
DIVERGENCES = {
    "policy_reference": "KL(π ‖ π_ref) over the vocabulary, per token, in nats",
    "reference_policy": "KL(π_ref ‖ π) over the vocabulary, per token, in nats",
}


class Described(NamedTuple):
    """equation   one line of mathematics; "" where the function says none
    papers     what is cited, such as "Rafailov et al. 2023, arXiv:2305.18290"
    """

    equation: str = ""
    papers: tuple[str, ...] = ()


def loss_described(name: str) -> Described:
    """Of a loss by the name of its function; a loss that no table holds is not described."""
    found = {loss.__name__: loss for table in TABLES for loss in table.values()}
    return _described(found[name]) if name in found else Described()


def preset_papers(name: str) -> tuple[str, ...]:
    """The papers that the list of presets names for one; () where its terms are the paper's."""
    listed = inspect.getdoc(sys.modules[PRESETS["dpo"].__module__]) or ""
    found = re.search(rf"^(?:\w+, )*{re.escape(name)}(?:, \w+)* (.+(?:\n {{3,}}.+)*)", listed, re.MULTILINE)
    return () if found is None else tuple(f"arXiv:{number}" for number in _ARXIV.findall(found[1]))


def linked(paper: str) -> str:
    """Markdown in which arXiv's numbers are links."""
    return _ARXIV.sub(r"[arXiv:\1](https://arxiv.org/abs/\1)", paper)


def _described(loss: Callable[..., Any]) -> Described:
    doc = inspect.getdoc(loss) or ""
    first = doc.split("\n\n")[0].replace("\n", " ")
    module = inspect.getdoc(sys.modules[loss.__module__]) or ""
    known = {tag: " ".join(paper.split()) for tag, paper in _PAPER.findall(module)}
    cited = [known[tag] for tag in dict.fromkeys(_TAG.findall(first)) if tag in known]
    # papers that stand in the function's own text alone
    cited += [f"arXiv:{number}" for number in _ARXIV.findall(doc) if not any(number in paper for paper in cited)]
    # the first sentence: where the equation is from comes behind two spaces
    return Described(re.split(r"\. {2,}|\. (?=[A-Z])|\.$", first)[0].strip(), tuple(cited))
