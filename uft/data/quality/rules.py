"""The rules of `uft data filter`, in the order in which they are applied.

A row is dropped for one reason, that of the first rule that finds something; a rule sees the rows that those before it
have left.  Rules on single rows come first, so that of several copies the first good one stays.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import Any

from uft.data.quality.row_rules import Context, Endings, LengthRatio, Lengths, Scripts, Unsafe
from uft.data.quality.set_rules import Contamination, Contradictions, Cycles, ExactDuplicates, NearDuplicates

RULES: dict[str, Callable[..., Any]] = {
    "lengths": Lengths,
    "endings": Endings,
    "scripts": Scripts,
    "unsafe": Unsafe,
    "length_ratio": LengthRatio,
    "contamination": Contamination,
    "contradictions": Contradictions,
    "cycles": Cycles,
    "exact_duplicates": ExactDuplicates,
    "near_duplicates": NearDuplicates,
}


def apply(
    rules: Mapping[str, Any], context: Context, on: Mapping[str, Collection[str]] | None = None
) -> dict[int, tuple[str, str]]:
    """Position of each row that is dropped -> the rule, and what it found.  Rules are applied in the order of `RULES`,
    each to the rows of the groups it is `on` (all by default)."""
    items, on = context.corpus.items, on or {}
    dropped: dict[int, tuple[str, str]] = {}
    for name in RULES:
        if name in rules:
            left = [i for i, item in enumerate(items) if i not in dropped and item.group in on.get(name, (item.group,))]
            for i, found in rules[name](left, context):
                dropped.setdefault(i, (name, found))
    return dropped
