"""Which pairs to label next, and how different the pairs of a set are.

    random         as they come out of a seed
    margin         smallest |m|, m = r(x, a) − r(x, b): what the reward is least sure of (uncertainty sampling)
    disagreement   largest standard deviation of m over the members of an ensemble of rewards (as in arXiv:1706.03741,
                   Sec. 2.2.4)
    change         largest expected norm of the gradient of the pair's loss −log σ(±m) (expected gradient length,
                   Settles et al. 2007) in the reward's last layer, r = w · h:
                       E‖∇_w‖ = σ(m) (1 − σ(m)) ‖Δh‖ + (1 − σ(m)) σ(m) ‖Δh‖ = 2 σ(m) (1 − σ(m)) ‖Δh‖,  Δh = h_a − h_b
    coverage       k-center greedy (arXiv:1708.00489, Algorithm 1): again and again what is farthest from everything
                   labelled or chosen

All but `coverage` look at one pair at a time: a batch of them may hold the same thing several times.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import NamedTuple

import numpy as np

from uft.data.queue import refuse_loss
from uft.data.rows import DataError


@dataclass(frozen=True)
class Pool:
    """What is known of n pairs without a label; None for what no rule asks for.

    margins     float [members, n], r(x, a) − r(x, b) of each reward of an ensemble, in nats
    features    float [n, d], h_a − h_b: last hidden states that the first reward's linear head reads
    embedding   float [n, e], see `uft.data.embedding`
    labelled    float [m, e], embeddings of what is labelled already
    size        n, where nothing else says it
    """

    margins: np.ndarray | None = None
    features: np.ndarray | None = None
    embedding: np.ndarray | None = None
    labelled: np.ndarray | None = None
    size: int | None = None

    def __post_init__(self):
        for name, axes in (
            ("margins", "members, n"),
            ("features", "n, d"),
            ("embedding", "n, e"),
            ("labelled", "m, e"),
        ):
            value = getattr(self, name)
            if value is not None and value.ndim != 2:
                raise ValueError(f"{name}: found {list(value.shape)}; want [{axes}]")
            if value is not None and not np.isfinite(value).all():
                raise ValueError(f"{name}: found numbers that are not finite; want finite ones")
        sizes = {
            "margins": None if self.margins is None else self.margins.shape[1],
            "features": None if self.features is None else len(self.features),
            "embedding": None if self.embedding is None else len(self.embedding),
            "size": self.size,
        }
        given = {name: size for name, size in sizes.items() if size is not None}
        if len(set(given.values())) != 1:
            raise ValueError(f"found {given or 'nothing'} pairs; want one number of pairs")
        object.__setattr__(self, "size", next(iter(given.values())))

    def need(self, name: str, rule: str) -> np.ndarray:
        value = getattr(self, name)
        if value is None:
            has = ", ".join(f.name for f in fields(self) if getattr(self, f.name) is not None)
            raise ValueError(f"rule {rule!r} needs {name}; found {has}")
        return value


class Chosen(NamedTuple):
    """What a rule chose.

    order   int64 [count], positions in the pool, the most wanted first
    value   float64 [count], the rule's number for each; larger is more wanted
    """

    order: np.ndarray
    value: np.ndarray


# ---- rules ----


def by_random(pool: Pool, count: int, seed: int) -> Chosen:
    value = np.random.default_rng(seed).random(pool.size)
    return _largest(value, count, seed)


def by_margin(pool: Pool, count: int, seed: int) -> Chosen:
    return _largest(-np.abs(pool.need("margins", "margin").mean(0)), count, seed)


def by_disagreement(pool: Pool, count: int, seed: int) -> Chosen:
    margins = pool.need("margins", "disagreement")
    if len(margins) < 2:
        raise ValueError("rule 'disagreement': found one reward; want at least two")
    return _largest(margins.std(0), count, seed)


def by_change(pool: Pool, count: int, seed: int) -> Chosen:
    margin, features = pool.need("margins", "change")[0], pool.need("features", "change")
    return _largest(expected_change(margin, features), count, seed)


def by_coverage(pool: Pool, count: int, seed: int) -> Chosen:
    return k_center(pool.need("embedding", "coverage"), count, pool.labelled, seed)


Rule = Callable[[Pool, int, int], Chosen]
RULES: dict[str, Rule] = {
    "random": by_random,
    "margin": by_margin,
    "disagreement": by_disagreement,
    "change": by_change,
    "coverage": by_coverage,
}


def select(rule: str, pool: Pool, count: int, seed: int = 0) -> Chosen:
    """The `count` pairs of the pool that a rule wants most; `seed` breaks ties.

    Raises ValueError for an unknown rule, a count that the pool does not hold, and what a rule needs and is not there.
    """
    if rule not in RULES:
        raise ValueError(f"rule is {rule!r}; want one of {', '.join(RULES)}")
    if not 1 <= count <= pool.size:
        raise ValueError(f"count is {count}; want 1 to {pool.size}, the pairs of the pool")
    return RULES[rule](pool, count, seed)


def expected_change(margin: np.ndarray, features: np.ndarray) -> np.ndarray:
    """float64 [n]: 2 σ(m) (1 − σ(m)) ‖Δh‖, see the top of the file.  margin [n] in nats, features [n, d]."""
    if margin.ndim != 1 or len(margin) != len(features):
        raise ValueError(f"found margins {list(margin.shape)} and features {list(features.shape)}; want [n] and [n, d]")
    # σ(m) (1 − σ(m)) = (1 − tanh²(m / 2)) / 4
    uncertain = 0.25 * (1 - np.tanh(0.5 * margin.astype(np.float64)) ** 2)
    return 2 * uncertain * np.linalg.norm(features.astype(np.float64), axis=1)


def k_center(embedding: np.ndarray, count: int, labelled: np.ndarray | None = None, seed: int = 0) -> Chosen:
    """k-center greedy, arXiv:1708.00489, Algorithm 1; its value is the distance to the nearest centre when chosen.

    embedding   float [n, e]
    labelled    float [m, e], centres that are there; without any the first is drawn by the seed
    """
    points = np.asarray(embedding, dtype=np.float64)
    nearest = np.full(len(points), np.inf)
    for centre in () if labelled is None else np.asarray(labelled, dtype=np.float64):
        nearest = np.minimum(nearest, _distances(points, centre))
    order, value = [], []
    for _ in range(count):
        first = not np.isfinite(nearest).any()
        i = int(np.random.default_rng(seed).integers(len(points))) if first else int(np.argmax(nearest))
        order.append(i)
        value.append(nearest[i])
        nearest = np.minimum(nearest, _distances(points, points[i]))
        nearest[i] = -np.inf  # chosen once, also where all that is left are its doubles
    return Chosen(np.array(order, dtype=np.int64), np.array(value))


def _largest(value: np.ndarray, count: int, seed: int) -> Chosen:
    # ties would otherwise go to the rows that stand first, which may be alike
    mixed = np.random.default_rng(seed).permutation(len(value))
    order = mixed[np.argsort(-value[mixed], kind="stable")][:count]
    return Chosen(order, value[order].astype(np.float64))


def _distances(points: np.ndarray, centre: np.ndarray) -> np.ndarray:
    return np.sqrt(((points - centre) ** 2).sum(1))


# ---- diversity ----


class Diversity(NamedTuple):
    """How different the members of a set are.

    distance   mean Euclidean distance of two of them
    nearest    mean distance to the nearest other one: 0 where all have doubles
    vendi      effective number of different ones, exp(−Σ λ log λ) over the eigenvalues of K / n with K the cosines of
               embeddings: 1 where all point the same way, n where all are orthogonal (arXiv:2210.02410, Eq. 1)
    radius     largest distance of anything in the pool to the set: what k-center makes small; NaN without a pool
    """

    distance: float
    nearest: float
    vendi: float
    radius: float


def diversity(embedding: np.ndarray, pool: np.ndarray | None = None) -> Diversity:
    """See `Diversity`.  embedding float [n, e] of a set; pool float [m, e] that it was chosen from.

    Embeddings of zeros have cosine 0 with all others.  Raises ValueError for fewer than two.
    """
    points = np.asarray(embedding, dtype=np.float64)
    if points.ndim != 2 or len(points) < 2:
        raise ValueError(f"embedding: found {list(points.shape)}; want [n, e] with at least two")
    apart = _all_distances(points, points)
    off = apart[~np.eye(len(points), dtype=bool)].reshape(len(points), -1)
    unit = points / np.maximum(np.linalg.norm(points, axis=1, keepdims=True), 1e-12)
    # of the smaller of the two products, which has the same eigenvalues but for zeros; zeros keep a 1 on the diagonal
    empty = int((np.linalg.norm(points, axis=1) == 0).sum())
    product = unit @ unit.T if len(unit) <= unit.shape[1] else unit.T @ unit
    eigenvalues = np.concatenate([np.linalg.eigvalsh(product), np.ones(empty)]) / len(points)
    eigenvalues = eigenvalues[eigenvalues > 1e-12]
    vendi = float(np.exp(-(eigenvalues * np.log(eigenvalues)).sum()))
    radius = (
        float("nan") if pool is None else float(_all_distances(np.asarray(pool, dtype=np.float64), points).min(1).max())
    )
    return Diversity(float(off.mean()), float(off.min(1).mean()), vendi, radius)


def _all_distances(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """float64 [a, b], a block of rows at a time: their differences never exist all at once."""
    found = np.empty((len(a), len(b)))
    for start in range(0, len(a), 256):
        part = a[start : start + 256]
        squared = (part**2).sum(1)[:, None] + (b**2).sum(1) - 2 * part @ b.T
        found[start : start + 256] = np.sqrt(np.maximum(squared, 0))
    return found


# ---- uft data select ----

JUDGED = ("margin", "disagreement", "change")  # what asks for rewards


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "uft data select",
        description="Chooses pairs to be labelled next.",
        epilog="example: uft data select pool.jsonl --rule coverage --count 200 --model Qwen/Qwen3-0.6B-Base "
        "--output queue.jsonl",
    )
    parser.add_argument("path", metavar="FILE", help="prompt, response_a, response_b; or chosen, rejected, unseen")
    parser.add_argument("--rule", choices=RULES, default="random")
    parser.add_argument("--count", type=int, required=True, help="pairs to be labelled")
    parser.add_argument("--output", type=Path, required=True, help="the queue, as JSON lines")
    parser.add_argument("--overwrite", action="store_true", help="replace a queue that is there already")
    parser.add_argument("--model", help="language model: embeddings; with --labelled also the rewards' start")
    parser.add_argument("--reward_model", nargs="+", default=[], metavar="FOLDER", help="several for disagreement")
    parser.add_argument("--labelled", help="pairs that have labels: left out, and rewards are trained on them")
    parser.add_argument("--members", type=int, default=3, help="rewards that are trained for disagreement")
    parser.add_argument("--learning_rate", type=float, default=1e-5)
    parser.add_argument("--epochs", type=float, default=1.0)
    parser.add_argument("--batch_size", type=int, default=32, help="pairs per step")
    parser.add_argument("--max_length", type=int, default=1024, help="longest prompt + response in tokens")
    parser.add_argument("--chat", action="store_true", help="strings are what a user and an assistant say")
    parser.add_argument("--seed", type=int, default=0, help="of sides, ties, and rewards that are trained")
    return parser


def main(words: Sequence[str]) -> int:
    """`uft data select`: writes a queue for `uft.data.queue`."""
    given = parser().parse_args(list(words))
    if given.output.suffix != ".jsonl":
        raise DataError(f"output is {str(given.output)!r}; want a file ending in .jsonl")
    refuse_loss([given.output], given.overwrite, [given.path, *([given.labelled] if given.labelled else [])])
    trains = given.model is not None and given.labelled is not None
    if given.rule in JUDGED and not given.reward_model and not trains:
        raise DataError(f"rule {given.rule!r} needs rewards; want --reward_model, or --model and --labelled")
    if given.rule == "coverage" and given.model is None and not given.reward_model:
        raise DataError("rule 'coverage' needs hidden states; want --model or --reward_model")
    from uft.data.candidates import run_select

    print("\n".join(run_select(given)))
    return 0
