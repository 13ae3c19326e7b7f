"""What a reward model says on held-out data: how often it is right, how surely, and what it likes besides quality.

    pairs/...            accuracy with its interval, margins, and calibration: of a `RewardModel` with its scale undone,
                         since σ(r_w − r_l) was trained to be a probability             `uft.rlhf.calibration`
    pairs/longer_chosen/accuracy, shorter_chosen, as_long    the same where the chosen answer is the longer one, ...
    length/pearson, /spearman        of reward and tokens of the response, over all responses
    length/within_pairs              Spearman of difference in reward and difference in tokens: prompts drop out
    feature/<name>/share             responses that have it
    feature/<name>/difference        mean reward of those that have it less that of the others
    feature/<name>/preferred         of the pairs in which one side has it, the share whose rewards prefer that side ...
    feature/<name>/chosen            ... and the share in which it was chosen; the difference is the model's own bias
    targets/spearman                 of reward and target, for labels and scores
    spread/...                       standard deviation over the members of an ensemble

A correlation with what does not vary is not defined: NaN in metrics, null in JSON, – in tables.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from scipy import stats

from uft.evaluation.generation import is_refusal
from uft.evaluation.judge import interval
from uft.evaluation.preference import ranked
from uft.feedback import Example
from uft.record import environment, write_json
from uft.rlhf import calibration as calibrations
from uft.rlhf.calibration import Calibration, calibration, pair_margins
from uft.rlhf.reward_model import RewardEnsemble, RewardModel
from uft.rlhf.sampling import Rewards

NAME = "rewards"
FEATURES: dict[str, Callable[[str], bool]] = {
    "list": lambda text: re.search(r"^\s*(?:[-*•]|\d+[.)])\s+\S", text, re.MULTILINE) is not None,
    "bold": lambda text: re.search(r"\*\*\S.*?\*\*|__\S.*?__", text) is not None,
    "code": lambda text: re.search(r"```|`[^`\n]+`", text) is not None,
    "exclamation": lambda text: "!" in text,
    "refusal": is_refusal,
}


@dataclass(frozen=True)
class RewardReport:
    """metrics as at the top of the file; `samples` hold a row per response."""

    metrics: dict[str, float]
    calibration: Calibration | None
    samples: dict[str, list]
    info: dict[str, Any] = field(default_factory=dict)

    def write(self, folder: str | Path) -> Path:
        """rewards.json, rewards.md and rewards.png in the folder; returns the path of the first."""
        path = Path(folder) / f"{NAME}.json"
        bins = [vars(each) for each in self.calibration.bins] if self.calibration else []
        write_json(path, {"metrics": self.metrics, "reliability": bins, "info": self.info, "samples": self.samples})
        path.with_suffix(".md").write_text(self.markdown() + "\n", encoding="utf-8")
        self.figure(path.with_suffix(".png"))
        return path

    def markdown(self) -> str:
        title = f"# Rewards of {self.info.get('model', 'a reward model')}"
        lines = [f"| {name} | {_shown(value)} |" for name, value in self.metrics.items()]
        return "\n".join([title, "", "| metric | value |", "| :-- | --: |", *lines, "", f"![figure]({NAME}.png)"])

    def __str__(self) -> str:
        width = max(map(len, self.metrics))
        return "\n".join(f"{name.ljust(width)}  {_shown(value):>9}" for name, value in self.metrics.items())

    def figure(self, path: str | Path) -> None:
        """Reliability, accuracy by which side is longer, and reward against length; without pairs the last alone."""
        from matplotlib.figure import Figure

        drawn = Figure(figsize=(10.5 if self.calibration else 4, 3.4), dpi=150, layout="constrained")
        axes = drawn.subplots(1, 3 if self.calibration else 1, squeeze=False)[0]
        if self.calibration:
            calibrations.draw(axes[0], self.calibration)
            axes[0].set_title(f"{self.calibration.pairs} pairs, ECE {self.calibration.ece:.3f}", fontsize=10)
            self._draw_by_length(axes[1])
        axes[-1].scatter(self.samples["tokens"], self.samples["reward"], s=6, alpha=0.4, linewidth=0)
        axes[-1].set(xlabel="tokens of the response", ylabel="reward")
        rho = _shown(self.metrics["length/spearman"])
        axes[-1].set_title(f"Spearman {rho} over {len(self.samples['reward'])} responses", fontsize=10)
        drawn.savefig(path)

    def _draw_by_length(self, axes: Any) -> None:
        names = {"longer_chosen": "chosen\nlonger", "shorter_chosen": "chosen\nshorter", "as_long": "as\nlong"}
        for place, (name, label) in enumerate(names.items()):
            n = int(self.metrics[f"pairs/{name}"])
            if n:
                accuracy = self.metrics[f"pairs/{name}/accuracy"]
                error = np.abs(np.array(interval(accuracy, n)) - accuracy)[:, None]
                axes.bar(place, accuracy, yerr=error, width=0.6, color="C0", capsize=3)
            axes.text(place, 0.02, f"{label}\nn = {n}", ha="center", va="bottom", color="white" if n else "0.4")
        axes.axhline(0.5, color="0.6", linestyle="--", linewidth=1)
        axes.set(xticks=[], ylim=(0, 1.05), ylabel="share of pairs ranked right")
        axes.set_title("accuracy by length", fontsize=10)


def reward_report(
    rewards: Rewards,
    examples: Sequence[Example],
    tokenizer: Any,
    *,
    features: dict[str, Callable[[str], bool]] = FEATURES,
    info: dict[str, Any] | None = None,
) -> RewardReport:
    """Measures a reward model, an ensemble of them, or any other `Rewards` on examples that it was not trained on.

    Raises ValueError for no examples, and for a reward that is not finite, by source and row.
    """
    if not examples:
        raise ValueError("found no examples; want at least one")
    found = [list(map(float, each)) for each in rewards(examples)]
    for example, each in zip(examples, found, strict=True):
        if len(each) != len(example.responses) or not np.isfinite(each).all():
            where = f"data set {example.source!r}, row {example.row}"
            raise ValueError(f"{where}: found rewards {each}; want {len(example.responses)} finite numbers")
    responses = [response for example in examples for response in example.responses]
    reward = np.array([value for each in found for value in each])
    tokens = np.array([len(response.tokens) for response in responses])
    texts = [tokenizer.decode(response.tokens.tolist(), skip_special_tokens=True) for response in responses]
    first = np.cumsum([0, *(len(example.responses) for example in examples)])
    pairs = np.array(
        [(first[i] + b, first[i] + w) for i, example in enumerate(examples) for b, w in example.preferences],
        dtype=np.int64,
    ).reshape(-1, 2)

    metrics: dict[str, float] = {"examples": len(examples), "responses": len(responses)}
    metrics |= {"reward/mean": reward.mean(), "reward/std": reward.std()}
    metrics |= {"reward/min": reward.min(), "reward/max": reward.max()}
    # a reward model's own probabilities: those of its margins before they were scaled to unit deviation
    nats = rewards.scale if isinstance(rewards, RewardModel) else 1.0
    calibrated = calibration(nats * pair_margins(found, examples)) if len(pairs) else None
    if calibrated is not None:
        metrics |= _of_pairs(reward[pairs], tokens[pairs], calibrated)
    metrics |= _of_length(reward, tokens, pairs)
    flags = {name: np.array([bool(has(text)) for text in texts]) for name, has in features.items()}
    for name, flag in flags.items():
        metrics |= {f"feature/{name}/{key}": value for key, value in feature_bias(reward, flag, pairs).items()}
    single = np.ones(len(responses), dtype=bool)
    single[pairs.ravel()] = False
    target = np.array([response.target for response in responses])
    single &= ~np.isnan(target)
    if single.any():
        metrics |= {"targets": int(single.sum()), "targets/spearman": correlation(reward[single], target[single])}
    samples: dict[str, list] = {
        "source": [example.source for example in examples for _ in example.responses],
        "row": [example.row for example in examples for _ in example.responses],
        "response": [k for example in examples for k in range(len(example.responses))],
        "reward": reward.tolist(),
        "tokens": tokens.tolist(),
    }
    if isinstance(rewards, RewardEnsemble) and len(rewards.members) > 1:
        spread = np.array([value for each in rewards.spread(examples) for value in each])
        metrics |= _of_spread(spread, reward, pairs)
        samples["spread"] = spread.tolist()
    metrics = {name: value if isinstance(value, int) else float(value) for name, value in metrics.items()}
    return RewardReport(metrics, calibrated, samples, {**(info or {}), **environment()})


def _of_pairs(reward: np.ndarray, tokens: np.ndarray, calibrated: Calibration) -> dict[str, float]:
    """reward, tokens: [pairs, 2], chosen and rejected."""
    found = {("pairs" if name == "pairs" else f"pairs/{name}"): v for name, v in calibrated.metrics().items()}
    found |= {"pairs/margin": (reward[:, 0] - reward[:, 1]).mean()}
    right, longer = ranked(reward[:, 0], reward[:, 1]), np.sign(tokens[:, 0] - tokens[:, 1])
    for name, sign in (("longer_chosen", 1), ("shorter_chosen", -1), ("as_long", 0)):
        here = longer == sign
        found[f"pairs/{name}"] = int(here.sum())
        found[f"pairs/{name}/accuracy"] = right[here].mean() if here.any() else math.nan
    return found


def _of_length(reward: np.ndarray, tokens: np.ndarray, pairs: np.ndarray) -> dict[str, float]:
    found = {
        "length/mean": tokens.mean(),
        "length/pearson": correlation(reward, tokens, stats.pearsonr),
        "length/spearman": correlation(reward, tokens),
    }
    if len(pairs):
        better, worse = pairs.T
        found["length/within_pairs"] = correlation(reward[better] - reward[worse], tokens[better] - tokens[worse])
    return found


def feature_bias(reward: np.ndarray, has: np.ndarray, pairs: np.ndarray) -> dict[str, float]:
    """`feature/<name>/...` at the top of the file.

    reward float [responses], has bool [responses], pairs int [pairs, 2] (better, worse)
    """
    found = {"share": has.mean()}
    found["difference"] = reward[has].mean() - reward[~has].mean() if 0 < has.sum() < len(has) else math.nan
    better, worse = pairs.T
    decided = has[better] != has[worse]
    found["pairs"] = int(decided.sum())
    if decided.any():
        better, worse = better[decided], worse[decided]
        of_better = has[better]
        better_wins = ranked(reward[better], reward[worse])
        found["preferred"] = np.where(of_better, better_wins, 1 - better_wins).mean()
        found["chosen"] = of_better.mean()
    return found


def _of_spread(spread: np.ndarray, reward: np.ndarray, pairs: np.ndarray) -> dict[str, float]:
    found = {"spread/mean": spread.mean(), "spread/max": spread.max()}
    if len(pairs):
        right, of_pair = ranked(reward[pairs[:, 0]], reward[pairs[:, 1]]), spread[pairs].mean(1)
        found["spread/chosen"], found["spread/rejected"] = spread[pairs].mean(0)
        for name, here in (("right", right == 1), ("wrong", right < 1)):
            found[f"spread/{name}"] = of_pair[here].mean() if here.any() else math.nan
    return found


def correlation(x: np.ndarray, y: np.ndarray, of: Callable = stats.spearmanr) -> float:
    """Spearman's, or `of` scipy.stats; NaN where one of the two does not vary."""
    if len(x) < 2 or np.ptp(x) == 0 or np.ptp(y) == 0:
        return math.nan
    return float(of(x, y).statistic)


def _shown(value: float | None) -> str:
    if value is None or math.isnan(value):
        return "–"
    return str(value) if isinstance(value, int) else f"{value:.4g}"
