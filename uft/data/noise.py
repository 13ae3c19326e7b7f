"""Which judgements of pairs are wrong, and how many: labels against rewards that never saw them.

Prompts are divided into K folds; the pairs of a fold are judged by a reward trained on the other folds:

    m_i = r_{-k(i)}(x_i, chosen_i) − r_{-k(i)}(x_i, rejected_i)            margin, in nats of log-odds
    flagged_i = m_i < −threshold                                          the reward prefers the rejected answer

r is a reward model's, or β [log π − log π_ref] of a policy trained on the other folds.  Three estimates of the share
ε of judgements that are turned round:

    disagreement   mean 1[m < 0]: also counts where the reward is wrong
    confident      confident learning (arXiv:1911.00068, Eq. 1 and 2) with p_i = σ(m_i), the label's probability.  Which
                   answer stands first means nothing, so both classes have the threshold t = mean p_i, and
                   ε = #{1 − p_i ≥ t, p_i < 1/2} / (#{1 − p_i ≥ t, p_i < 1/2} + #{p_i ≥ t, p_i ≥ 1/2})
    likelihood     ε and a that maximise Σ log[(1 − ε) σ(a m_i) + ε σ(−a m_i)]: Bradley–Terry, then a share ε turned
                   round (the model of arXiv:2403.00409), with the reward's scale a left open

Where r is as good as chance nothing can be told: all three go towards what noise of one half would give.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Hashable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from tqdm import tqdm

from uft.data.judges import BY
from uft.data.mixture import load_feedback
from uft.data.quality.writing import write_lines
from uft.data.queue import refuse_loss
from uft.data.rows import DataError
from uft.data.sources import Source, read_rows
from uft.feedback import Example
from uft.record import environment, plain, write_json
from uft.rlhf.sampling import Rewards

MOST = 0.5  # beyond it the labels would be the wrong way round as a whole


# ---- numbers ----


class NoiseRate(NamedTuple):
    """Estimates of the share of judgements that are turned round, see the top of the file; `scale` is a."""

    disagreement: float
    confident: float
    likelihood: float
    scale: float


class Detection(NamedTuple):
    """How well flags find what is known to be wrong.

    precision, recall   NaN where nothing is flagged, and where nothing is wrong
    auroc               P(a wrong row has the smaller margin than a right one), a tie being half; NaN without both
    """

    precision: float
    recall: float
    auroc: float
    flagged: int
    wrong: int


def folds_by_prompt(prompts: Sequence[Hashable], folds: int, seed: int = 0) -> np.ndarray:
    """int64 [rows]: the fold of each row.  Rows with one prompt share a fold; folds have as many prompts, or one more.

    Raises ValueError for fewer than two folds, and for fewer prompts than folds.
    """
    distinct = list(dict.fromkeys(prompts))
    if not 2 <= folds <= len(distinct):
        raise ValueError(f"found {len(distinct)} prompts and {folds} folds; want at least 2 folds, a prompt for each")
    order = np.random.default_rng(seed).permutation(len(distinct))
    fold = {distinct[prompt]: place % folds for place, prompt in enumerate(order)}
    return np.array([fold[prompt] for prompt in prompts], dtype=np.int64)


def flagged(margin: np.ndarray, threshold: float = 0.0) -> np.ndarray:
    """bool [rows]: where the reward prefers the rejected answer by more than the threshold (nats, >= 0)."""
    if not threshold >= 0:
        raise ValueError(f"threshold is {threshold}; want a number >= 0")
    return margin < -threshold


def noise_rate(margin: np.ndarray) -> NoiseRate:
    """The three estimates from margins that no reward was trained on, float [rows], in nats.

    Raises ValueError for none, and for margins that are not finite.
    """
    margin = _margins(margin)
    epsilon, scale = _likelihood(margin)
    return NoiseRate(float(np.mean(margin < 0)), confident_rate(margin), epsilon, scale)


def confident_rate(margin: np.ndarray) -> float:
    """Confident learning's estimate, see the top of the file; NaN where no row reaches the threshold either way."""
    right = _sigmoid(_margins(margin))
    threshold = right.mean()
    kept = np.sum((right >= threshold) & (right >= 0.5))
    turned = np.sum((1 - right >= threshold) & (right < 0.5))
    return float(turned / (turned + kept)) if turned + kept else math.nan


def probability_right(margin: np.ndarray, rate: NoiseRate) -> np.ndarray:
    """float64 [rows]: P(the judgement was not turned round | it, m) under the model of `likelihood`."""
    # (1 − ε) σ(a m) / [(1 − ε) σ(a m) + ε σ(−a m)], by log-odds: both terms may be 0 for a label that looks impossible
    epsilon = rate.likelihood
    odds = math.log((1 - epsilon) / epsilon) if epsilon > 0 else math.inf
    return _sigmoid(odds + rate.scale * margin)


def bayes_threshold(rate: NoiseRate) -> float:
    """The threshold beyond which a judgement is more likely wrong than right, nats: log[(1 − ε) / ε] / a.

    Infinite where ε is 0, so that nothing is flagged.
    """
    epsilon = rate.likelihood
    return math.log((1 - epsilon) / epsilon) / rate.scale if epsilon > 0 else math.inf


def detection(margin: np.ndarray, wrong: np.ndarray, flags: np.ndarray) -> Detection:
    """How well the flags, and the order of the margins, find the rows that are known to be wrong; all [rows]."""
    if not len(margin) == len(wrong) == len(flags):
        raise ValueError(f"found {len(margin)} margins, {len(wrong)} truths and {len(flags)} flags; want as many")
    hits = int(np.sum(flags & wrong))
    n_flagged, n_wrong = int(flags.sum()), int(wrong.sum())
    precision = hits / n_flagged if n_flagged else math.nan
    recall = hits / n_wrong if n_wrong else math.nan
    return Detection(precision, recall, _auroc(-np.asarray(margin, dtype=float), wrong), n_flagged, n_wrong)


def _auroc(score: np.ndarray, positive: np.ndarray) -> float:
    """Mann and Whitney's U over its maximum."""
    n, m = int(positive.sum()), int((~positive).sum())
    if not n or not m:
        return math.nan
    _, place, counts = np.unique(score, return_inverse=True, return_counts=True)
    rank = (np.cumsum(counts) - (counts - 1) / 2)[place]  # tied scores share the mean of their ranks
    return float((rank[positive].sum() - n * (n + 1) / 2) / (n * m))


def _likelihood(margin: np.ndarray, rounds: int = 5) -> tuple[float, float]:
    """(ε, a) of the largest likelihood, by grids around the best point so far; a within a factor of 1000 of 1 / |m|."""
    size = float(np.sqrt(np.mean(margin**2)))
    if size == 0:
        return MOST, 1.0  # margins that say nothing
    epsilon, log_scale = np.linspace(0.0, MOST, 26), np.linspace(-3, 3, 31)
    for _ in range(rounds):
        best = (-math.inf, 0.0, 0.0)
        for log_a in log_scale:
            right = _sigmoid(10**log_a / size * margin)
            # rows that the model holds to be impossible would decide alone
            for e in epsilon:
                found = float(np.log(np.maximum((1 - e) * right + e * (1 - right), 1e-300)).sum())
                if found > best[0]:
                    best = (found, e, log_a)
        _, e, log_a = best
        step, log_step = epsilon[1] - epsilon[0], log_scale[1] - log_scale[0]
        epsilon = np.linspace(max(e - step, 0.0), min(e + step, MOST), 11)
        log_scale = np.clip(np.linspace(log_a - log_step, log_a + log_step, 11), -3, 3)
    return float(e), float(10**log_a / size)


def _sigmoid(x: np.ndarray) -> np.ndarray:
    return 0.5 * (1 + np.tanh(0.5 * x))  # overflows nowhere


def _margins(margin: np.ndarray) -> np.ndarray:
    margin = np.asarray(margin, dtype=np.float64)
    if margin.ndim != 1 or not len(margin):
        raise ValueError(f"margins: found {list(margin.shape)}; want [rows], at least one")
    if not np.isfinite(margin).all():
        i = int(np.flatnonzero(~np.isfinite(margin))[0])
        raise ValueError(f"margins: found {margin[i]} in row {i}; want finite numbers")
    return margin


# ---- rewards of the other folds ----


def margins(reward: Rewards, pairs: Sequence[Example]) -> np.ndarray:
    """float64 [pairs]: the reward of the better minus that of the worse answer, nats.  Raises ValueError for others."""
    for example in pairs:
        if len(example.preferences) != 1:
            raise ValueError(
                f"source {example.source!r}, row {example.row}: found {len(example.preferences)} preferences in an "
                f"example of kind {example.kind}; want a pair"
            )
    found = []
    for example, rewards in zip(pairs, reward(pairs), strict=True):
        better, worse = example.preferences[0]
        found.append(float(rewards[better]) - float(rewards[worse]))
    return np.array(found, dtype=np.float64)


def cross_validated(
    pairs: Sequence[Example], train: Callable[[list[Example]], Rewards], folds: int = 5, seed: int = 0
) -> tuple[np.ndarray, np.ndarray]:
    """(margin float64 [pairs], fold int64 [pairs]): each margin by what `train` makes of the other folds' pairs."""
    fold = folds_by_prompt([example.prompt.tobytes() for example in pairs], folds, seed)
    margin = np.full(len(pairs), np.nan)
    # disable=None: a bar only where stderr is a terminal
    for k in tqdm(range(folds), "folds", disable=None, delay=1, leave=False):
        reward = train([pair for pair, its in zip(pairs, fold) if its != k])
        inside = np.flatnonzero(fold == k)
        margin[inside] = margins(reward, [pairs[i] for i in inside])
    return margin, fold


# ---- uft data noise ----


FILES = ("rows.jsonl", "suspects.jsonl", "report.json", "report.md")


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "uft data noise",
        description="Which judgements of pairs are likely wrong.",
        epilog="example: uft data noise pairs.jsonl --model Qwen/Qwen3-0.6B-Base --output runs/noise --threshold bayes",
    )
    parser.add_argument("path", metavar="FILE", help="pairs: prompt, chosen, rejected")
    parser.add_argument("--model", required=True, help="hub id or folder of a language model to start rewards from")
    parser.add_argument("--output", type=Path, required=True, help="folder for rows, suspects and report")
    parser.add_argument("--overwrite", action="store_true", help="replace what an earlier run left in that folder")
    parser.add_argument("--by", choices=BY, default="reward", help="a reward model, or DPO's implicit reward")
    parser.add_argument("--folds", type=int, default=5)
    parser.add_argument("--threshold", default="0", help="nats of margin against the label, or bayes; default 0")
    parser.add_argument("--learning_rate", type=float, default=1e-5)
    parser.add_argument("--epochs", type=float, default=1.0)
    parser.add_argument("--batch_size", type=int, default=32, help="pairs per step")
    parser.add_argument("--max_length", type=int, default=1024, help="longest prompt + response in tokens")
    parser.add_argument("--on_bad_row", choices=("error", "drop"), default="error")
    parser.add_argument("--chat", action="store_true", help="strings are what a user and an assistant say")
    parser.add_argument("--seed", type=int, default=0)
    return parser


def main(words: Sequence[str]) -> int:
    """`uft data noise`: see the top of the file."""
    given = parser().parse_args(list(words))
    threshold = _threshold(given.threshold)
    refuse_loss([given.output / name for name in FILES], given.overwrite, [given.path])
    source = Source("pairs", given.path, kind="pair", chat=given.chat)

    from transformers import AutoTokenizer

    from uft.models import load_policy

    tokenizer = AutoTokenizer.from_pretrained(given.model)
    data, read = load_feedback([source], tokenizer, given.max_length, on_bad_row=given.on_bad_row)
    print(read)
    policy = load_policy(given.model, dtype="float32")
    options = {
        "learning_rate": given.learning_rate, "num_train_epochs": given.epochs,
        "per_device_train_batch_size": given.batch_size, "max_length": given.max_length,
    }  # fmt: skip
    pairs = list(data[:])
    margin, fold = cross_validated(
        pairs, lambda others: BY[given.by](others, policy, tokenizer, given.seed, **options), given.folds, given.seed
    )
    lines = write_noise(given.output, source, pairs, margin, fold, threshold, {**vars(given), **options})
    print("\n".join(lines))
    print(f"{', '.join(FILES)} in {given.output}")
    return 0


def _threshold(text: str) -> float | None:
    """Nats, or None for Bayes'."""
    if text == "bayes":
        return None
    try:
        value = float(text)
        flagged(np.zeros(1), value)
    except ValueError:
        raise DataError(f"threshold is {text!r}; want nats >= 0, or bayes") from None
    return value


def write_noise(
    folder: Path, source: Source, pairs: Sequence[Example], margin: np.ndarray, fold: np.ndarray,
    threshold: float | None, settings: dict[str, Any],
) -> list[str]:  # fmt: skip
    """Writes what was found and returns the lines of the report.

    rows.jsonl       of every pair its row in the file, fold, margin, probability of a right label, and flag
    suspects.jsonl   of every flagged row what is in the file (NaN as null, dates as text), and `noise` with
                     the same numbers, worst first
    threshold        nats; None for Bayes'
    """
    rate = noise_rate(margin)
    threshold = bayes_threshold(rate) if threshold is None else threshold
    flags, right = flagged(margin, threshold), probability_right(margin, rate)
    rows = [
        {"row": pair.row, "fold": int(fold[i]), "margin": float(margin[i]), "probability_right": float(right[i]),
         "flagged": bool(flags[i])}
        for i, pair in enumerate(pairs)
    ]  # fmt: skip
    folder.mkdir(parents=True, exist_ok=True)
    write_lines(folder / "rows.jsonl", rows)
    suspects = {row["row"]: row for row in sorted(rows, key=lambda row: row["margin"]) if row["flagged"]}
    by_fold = [float(np.mean(margin[fold == k] > 0)) for k in range(int(fold.max()) + 1)]
    lines = [
        f"# Judgements of {source.where} against rewards that did not see them",
        "",
        f"- pairs: {len(pairs)}; flagged: {int(flags.sum())} (margin below {-threshold:.3g} nats)",
        f"- agreement with the labels, by fold: {', '.join(f'{each:.3f}' for each in by_fold)}",
        f"- share of wrong labels: {rate.likelihood:.3f} by likelihood, {rate.confident:.3f} by confident learning, "
        f"{rate.disagreement:.3f} disagree",
        "- a flag says that the reward prefers the other answer; where the reward is wrong, so is the flag",
    ]
    write_json(
        folder / "report.json",
        {"noise_rate": rate._asdict(), "threshold": threshold, "pairs": len(pairs), "flagged": int(flags.sum()),
         "agreement_by_fold": by_fold, "settings": {k: str(v) for k, v in settings.items()}, **environment()},
    )  # fmt: skip
    (folder / "report.md").write_text("\n".join(lines) + "\n", encoding="utf-8")
    # last: rows may hold what no file can, and the rewards took long
    texts = {row.number: row.values for row in read_rows(source) if row.number in suspects}
    listed = (plain({**texts[row], "noise": found}) for row, found in suspects.items())
    write_lines(folder / "suspects.jsonl", listed)
    return lines
