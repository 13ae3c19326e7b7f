"""Preferences as a graph for each prompt: an edge from the preferred response to the other.

Judgements contradict each other where a is preferred to b and b to a.  What is left of the edges once these are taken
out may hold cycles a > b > c > a: an edge lies on one if and only if both its ends are in the same strongly connected
component.  No ranking and no Bradley–Terry reward agrees with either.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from scipy.sparse import csr_array
from scipy.sparse.csgraph import connected_components

from uft.data.quality.items import Item


class Preference(NamedTuple):
    """`better` is preferred to `worse`, both with their prompt; `item` is the position of the row that says so."""

    item: int
    better: bytes
    worse: bytes


@dataclass(frozen=True)
class Conflicts:
    """Rows in conflict, by their positions.

    contradictions   groups of rows about the same two responses that do not agree
    cycles           for each strongly connected component of at least three responses: the rows on its cycles, and
    shortest         the rows of a shortest cycle in it
    """

    contradictions: list[list[int]]
    cycles: list[list[int]]
    shortest: list[list[int]]


def preferences_of(items: Iterable[Item]) -> list[Preference]:
    found = []
    for i, item in enumerate(items):
        for better, worse in item.preferences:
            found.append(Preference(i, item.response_keys[better], item.response_keys[worse]))
    # responses that are the same after normalisation say nothing about each other
    return [edge for edge in found if edge.better != edge.worse]


def conflicts(edges: Sequence[Preference]) -> Conflicts:
    between: dict[frozenset[bytes], list[Preference]] = {}
    for edge in edges:
        between.setdefault(frozenset(edge[1:]), []).append(edge)
    contradicting = {two for two, rows in between.items() if len({edge.better for edge in rows}) > 1}
    contradictions = [sorted({edge.item for edge in between[two]}) for two in between if two in contradicting]
    rest = [edge for edge in edges if frozenset(edge[1:]) not in contradicting]
    cycles, shortest = _cycles(rest)
    return Conflicts(contradictions, cycles, shortest)


def _cycles(edges: Sequence[Preference]) -> tuple[list[list[int]], list[list[int]]]:
    if not edges:
        return [], []
    node: dict[bytes, int] = {}
    ends = np.array([[node.setdefault(end, len(node)) for end in edge[1:]] for edge in edges])
    graph = csr_array((np.ones(len(edges)), (ends[:, 0], ends[:, 1])), shape=(len(node), len(node)))
    component = connected_components(graph, directed=True, connection="strong")[1]
    inside: dict[int, list[int]] = {}
    for e in np.flatnonzero(component[ends[:, 0]] == component[ends[:, 1]]).tolist():
        inside.setdefault(int(component[ends[e, 0]]), []).append(e)
    rows = [sorted({edges[e].item for e in each}) for each in inside.values()]
    return rows, [_shortest([edges[e] for e in each]) for each in inside.values()]


def _shortest(edges: Sequence[Preference]) -> list[int]:
    """Rows of a shortest cycle: from each response by breadth first search back to itself."""
    out: dict[bytes, list[Preference]] = {}
    for edge in edges:
        out.setdefault(edge.better, []).append(edge)
    best: list[int] = []
    for start in out:
        came: dict[bytes, Preference] = {}
        queue = deque([start])
        while queue and start not in came:
            for edge in out.get(queue.popleft(), ()):
                if edge.worse not in came:
                    came[edge.worse] = edge
                    queue.append(edge.worse)
        if start in came:
            path, at = [], start
            while not path or at != start:
                path.append(came[at].item)
                at = came[at].better
            if not best or len(path) < len(best):
                best = path[::-1]
    return best


def label_conflicts(items: Iterable[Item]) -> list[list[int]]:
    """Groups of rows that label the same response to the same prompt, and not alike."""
    said: dict[bytes, list[tuple[int, float]]] = {}
    for i, item in enumerate(items):
        if item.kind == "label":
            said.setdefault(item.row_key, []).append((i, item.targets[0]))
    return [[i for i, _ in rows] for rows in said.values() if len({target for _, target in rows}) > 1]
