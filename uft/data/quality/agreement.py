"""Agreement of annotators, corrected for chance.

    Cohen's κ = (p_o − p_e) / (1 − p_e),  p_o observed agreement of two raters, p_e that of independent raters with
                their own frequencies                                                                  [Cohen 1960]
    Krippendorff's α = 1 − D_o / D_e,     any number of raters and missing judgements            [Krippendorff 2011]
                D_o = Σ_u Σ_{i≠j in u} δ²(v_i, v_j) / (m_u − 1) / n,   D_e = Σ_{i≠j} δ²(v_i, v_j) / (n (n − 1))
                over the n judgements of items that have at least two; δ² is 0 or 1 (nominal) or (v − w)² (interval)

[Cohen 1960]         A coefficient of agreement for nominal scales, Educational and Psychological Measurement 20
[Krippendorff 2011]  Computing Krippendorff's alpha-reliability, University of Pennsylvania
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Hashable, Iterable, Mapping, Sequence
from itertools import combinations
from typing import Any

from uft.data.quality.items import Item

LEVELS = ("nominal", "interval")


def cohen_kappa(first: Sequence[Hashable], second: Sequence[Hashable]) -> float:
    """κ of two raters who judged the same items; NaN where both always give one and the same answer.

    Raises `ValueError` for numbers of judgements that differ, or none.
    """
    if len(first) != len(second) or not len(first):
        raise ValueError(f"found {len(first)} and {len(second)} judgements; want the same number, at least one")
    n = len(first)
    observed = sum(a == b for a, b in zip(first, second)) / n
    one, other = Counter(first), Counter(second)
    chance = sum(one[value] * other[value] for value in one) / n**2
    return (observed - chance) / (1 - chance) if chance < 1 else math.nan


def krippendorff_alpha(units: Iterable[Sequence[Any]], level: str = "nominal") -> float:
    """α of items, each with its judgements; those with fewer than two say nothing.  NaN where nothing differs or no
    item has two.  Raises `ValueError` for another level."""
    if level not in LEVELS:
        raise ValueError(f"level is {level!r}; want {' or '.join(LEVELS)}")
    judged = [list(unit) for unit in units if len(unit) > 1]
    everything = [value for unit in judged for value in unit]
    n = len(everything)
    apart = _nominal if level == "nominal" else _interval
    expected = apart(everything) / (n * (n - 1)) if n else 0.0
    if not expected:
        return math.nan
    observed = sum(apart(unit) / (len(unit) - 1) for unit in judged) / n
    return 1 - observed / expected


def _nominal(values: Sequence[Hashable]) -> float:
    """Ordered pairs of values that differ."""
    return len(values) ** 2 - sum(count**2 for count in Counter(values).values())


def _interval(values: Sequence[float]) -> float:
    """Σ_{i≠j} (v_i − v_j)² = 2 n Σ (v − mean)²"""
    mean = math.fsum(values) / len(values)
    return 2 * len(values) * math.fsum((value - mean) ** 2 for value in values)


# ---- judgements in data ----


def judgements(items: Iterable[Item]) -> dict[str, dict[Hashable, list[tuple[str | None, Any]]]]:
    """By kind and item: who judged it, and how.  The item of a pair is its prompt and two responses in either order,
    and the judgement says which of them is better."""
    found: dict[str, dict[Hashable, list[tuple[str | None, Any]]]] = {"pair": {}, "label": {}, "score": {}}
    for item in items:
        if item.kind == "pair":
            for better, worse in item.preferences:
                a, b = item.response_keys[better], item.response_keys[worse]
                if a != b:
                    found["pair"].setdefault((min(a, b), max(a, b)), []).append((item.annotator, a < b))
        elif item.kind in found:
            found[item.kind].setdefault(item.row_key, []).append((item.annotator, item.targets[0]))
    return found


def agreement(items: Iterable[Item]) -> dict[str, dict[str, Any]]:
    """By kind: how many items were judged more than once, α of them, and κ of every two annotators who are named.

    Of one annotator's several judgements of an item the first counts, for α and κ: that somebody agrees with themselves
    says nothing of others.  `own_repeats` are those that were left out.  Judgements without a name count each.

    κ needs to know who judged: where rows are merely repeated there is α alone.  Scores have no κ, which knows only
    same and different.
    """
    result = {}
    for kind, everything in judgements(items).items():
        units = {key: _one_each(said) for key, said in everything.items()}
        several = {key: said for key, said in units.items() if len(said) > 1}
        if not several:
            continue
        values = [[value for _, value in said] for said in several.values()]
        result[kind] = {
            "items": len(units),
            "judged_more_than_once": len(several),
            "judgements": sum(map(len, values)),
            "own_repeats": sum(map(len, everything.values())) - sum(map(len, units.values())),
            "level": "interval" if kind == "score" else "nominal",
            "alpha": krippendorff_alpha(values, "interval" if kind == "score" else "nominal"),
            "unanimous": sum(len(set(each)) == 1 for each in values) / len(values),
            "kappa": {} if kind == "score" else _kappas(several),
        }
    return result


def _one_each(said: Sequence[tuple[str | None, Any]]) -> list[tuple[str | None, Any]]:
    """The first judgement of each annotator who is named, and all others."""
    seen: set[str | None] = {None}
    kept = []
    for name, value in said:
        if name is None or name not in seen:
            kept.append((name, value))
        seen.add(name)
    return kept


def _kappas(units: Mapping[Hashable, Sequence[tuple[str | None, Any]]]) -> dict[str, dict[str, Any]]:
    both: dict[tuple[str, str], tuple[list, list]] = {}
    for said in units.values():
        by_name = {name: value for name, value in said if name is not None}
        for a, b in combinations(sorted(by_name), 2):
            first, second = both.setdefault((a, b), ([], []))
            first.append(by_name[a])
            second.append(by_name[b])
    return {f"{a}, {b}": {"items": len(x), "kappa": cohen_kappa(x, y)} for (a, b), (x, y) in both.items()}
