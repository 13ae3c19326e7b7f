"""How often do likelihood, implicit reward and reward model rank the harmless answer first, and in which groups?

Pairs     the rows of hh-rlhf (harmless) in pairs.parquet; a quarter of the prompts is held out, by digest
Models    0.4 M parameters from scratch, one seed: likelihood of chosen answers, then from there (the reference) DPO,
          and a reward model; an epoch each
Groups    how many turns the person has taken: 1, 2, 3 or more
Measured  uft.evaluation, section harmlessness, with Wilson's and Newcombe's intervals
Baseline  "shorter is better" on the same pairs, by tokens; each model against it by pairs that one of the two alone
          ranks right (sign test, which without ties is McNemar's exact test), Holm's correction over the three
Run       python -m experiments.harmlessness --data FOLDER        two minutes
Writes    runs/harmlessness/{report.md, evaluation.json, evaluation.md}; --results copies the texts

Models of this size have hardly learnt what harm is: this shows the measure on real pairs, not a result about methods.
"""

from __future__ import annotations

import argparse
import copy
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet
import torch
from scipy import stats
from transformers import LlamaConfig, LlamaForCausalLM, PrinterCallback

from uft.comparison.statistics import holm
from uft.config import UnifiedConfig
from uft.data.judges import QUIET, reward_trained_on
from uft.data.mixture import FeedbackDataset, load_feedback
from uft.data.sources import Source
from uft.evaluation.config import EvaluationConfig
from uft.evaluation.data import example_ids
from uft.evaluation.preference import ranked
from uft.evaluation.safety import harmlessness, held_out
from uft.evaluation.suite import evaluate
from uft.trainer import UnifiedTrainer

from .real.base import make_tokenizer
from .report import markdown_table

RESULTS = Path(__file__).parent / "results" / "harmlessness"
SOURCE, HELD_OUT = "hh-harmless-test", 0.25
LENGTH, BATCH, VOCABULARY = 160, 32, 2000
LIKELIHOOD_RATE, PREFERENCE_RATE, BETA = 2e-3, 5e-4, 0.1
BY, BASELINE = ("likelihood", "rewards", "reward_model"), "shorter is better"


@dataclass(frozen=True)
class Measured:
    """What was found on the held-out pairs.

    report            of the suite
    lengths           float [pairs, 2], tokens of the harmless and of the harmful answer, in the order of its samples
    rows, left_out    held-out rows, and those of them without a pair that fits
    cut, cut_train    pairs that were measured, and trained on, whose prompt lost tokens on the left
    trained           pairs trained on
    """

    report: Any
    lengths: np.ndarray
    rows: int
    left_out: int
    cut: int
    trained: int
    cut_train: int


def rows_of(folder: Path) -> list[dict[str, Any]]:
    rows = [row for row in pyarrow.parquet.read_table(folder / "pairs.parquet").to_pylist() if row["source"] == SOURCE]
    for row in rows:
        turns = row["prompt"].count("Human:")
        row["turns"] = str(turns) if turns < 3 else "3 or more"
    return rows


def response_lengths(data: FeedbackDataset) -> np.ndarray:
    """float [pairs, 2]: how many tokens the better and the worse answer have."""
    return np.array(
        [
            [len(each.responses[k].tokens) for k in pair]
            for each in (data[i] for i in range(len(data)))
            for pair in each.preferences
        ],
        dtype=float,
    )


def measured(rows: Sequence[dict[str, Any]]) -> Measured:
    """The models, trained on some of these rows and measured on those held out."""
    out = held_out([row["prompt"] for row in rows], HELD_OUT)
    train, test = ([row for row, its in zip(rows, out) if its == part] for part in (False, True))
    tokenizer = make_tokenizer([f"{row['prompt']} {row['chosen']}" for row in train], VOCABULARY)
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer), hidden_size=96, intermediate_size=256, num_hidden_layers=2,
            num_attention_heads=4, max_position_embeddings=LENGTH, tie_word_embeddings=True,
            pad_token_id=tokenizer.pad_token_id, bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
        )
    )  # fmt: skip
    source = Source("harmless", data=train, kind="pair", on_bad_row="drop")
    data, report = load_feedback([source], tokenizer, LENGTH)
    print(report)

    def fit(objective: Any, rate: float) -> None:
        with tempfile.TemporaryDirectory() as folder:
            trainer = UnifiedTrainer(
                model=model, objective=objective,
                args=UnifiedConfig(output_dir=folder, use_cpu=True, learning_rate=rate, num_train_epochs=1,
                                   per_device_train_batch_size=BATCH, max_length=LENGTH, **QUIET),
                train_dataset=data, processing_class=tokenizer,
            )  # fmt: skip
            trainer.remove_callback(PrinterCallback)
            trainer.train()

    fit("sft_chosen", LIKELIHOOD_RATE)
    reference = copy.deepcopy(model).eval()
    options = {"learning_rate": PREFERENCE_RATE, "num_train_epochs": 1, "per_device_train_batch_size": BATCH,
               "max_length": LENGTH, "use_cpu": True}  # fmt: skip
    rewards = reward_trained_on(list(data[:]), reference, tokenizer, 0, **options)
    fit({"preset": "dpo", "beta": BETA}, PREFERENCE_RATE)
    config = EvaluationConfig.of(
        {"harmlessness": {"hh": {"data": test, "group": "turns", "kind": "pair"}}, "max_length": LENGTH,
         "on_bad_row": "drop"}
    )  # fmt: skip
    found = evaluate(model.eval(), tokenizer, config, reference, rewards=rewards)
    sources = [each.source for each in config.harmlessness.values()]
    pairs, read = load_feedback(sources, tokenizer, LENGTH, on_bad_row="drop")
    ids = found.samples["harmlessness"]["id"]
    if example_ids(pairs) != ids:
        raise ValueError(f"found {len(pairs)} pairs to take lengths of and {len(ids)} measured; want the same ones")
    return Measured(
        found, response_lengths(pairs), len(test), len(test) - len(pairs), read.sources[0].cut,
        len(data), report.sources[0].cut,
    )  # fmt: skip


# ---- report ----


def against_baseline(right: Mapping[str, np.ndarray], baseline: np.ndarray) -> dict[str, dict[str, float]]:
    """Each ranking against the baseline on the same pairs; right and baseline are float [pairs], a tie is 1/2.

    more, fewer     pairs on which the ranking is the more, or less, right of the two
    difference      of the shares, with its 95 % interval (normal, of the mean of paired differences)
    p, p_holm       two-sided sign test of more against fewer; adjusted over the rankings
    """
    found: dict[str, dict[str, float]] = {}
    for name, values in right.items():
        apart = values - baseline
        more, fewer = int((apart > 0).sum()), int((apart < 0).sum())
        half = stats.norm.ppf(0.975) * float(apart.std(ddof=1)) / np.sqrt(len(apart))
        p = float(stats.binomtest(more, more + fewer).pvalue) if more + fewer else 1.0
        difference = float(apart.mean())
        found[name] = {"more": more, "fewer": fewer, "difference": difference, "low": difference - half,
                       "high": difference + half, "p": p}  # fmt: skip
    adjusted = holm({name: each["p"] for name, each in found.items()})
    return {name: each | {"p_holm": adjusted[name]} for name, each in found.items()}


def said_of_baseline(found: Mapping[str, Mapping[str, float]]) -> str:
    """Which rankings are distinguishable from the baseline at p < 0.05 after Holm's correction, in a sentence."""
    sure = [name for name, each in found.items() if each["p_holm"] < 0.05]
    better = [name for name in sure if found[name]["difference"] > 0]
    worse = [name for name in sure if name not in better]
    if not sure:
        return f'None of the {len(found)} is distinguishable from the rule "{BASELINE}" after Holm\'s correction.'
    return (
        f'Distinguishable from the rule "{BASELINE}" after Holm\'s correction: '
        f"better {', '.join(better) or 'none'}; worse {', '.join(worse) or 'none'}."
    )


def text_of(found: Measured) -> str:
    samples = found.report.samples["harmlessness"]
    of = {name.removeprefix("harmlessness/"): value for name, value in found.report.metrics.items()}
    groups = sorted(set(samples["group"]))
    of |= harmlessness({BASELINE: -found.lengths}, samples["group"] if len(groups) > 1 else None)
    right = {
        by: ranked(np.array(samples[f"{by}_harmless"]), np.array(samples[f"{by}_harmful"])) for by in BY
    }  # fmt: skip
    compared = against_baseline(right, ranked(-found.lengths[:, 0], -found.lengths[:, 1]))

    def shown(name: str) -> str:
        return f"{of[name]:.3f} [{of[f'{name}/low']:.3f}, {of[f'{name}/high']:.3f}]"

    def beside(by: str) -> list[str]:
        c = compared[by]
        return [f"{c['difference']:+.3f} [{c['low']:+.3f}, {c['high']:+.3f}]", f"{c['p']:.3f}", f"{c['p_holm']:.3f}"]

    rows = [[by, shown(by), *(shown(f"{by}/group/{group}") for group in groups), shown(f"{by}/gap")]
            for by in (*BY, BASELINE)]  # fmt: skip
    counts = ", ".join(f"{group}: {of[f'likelihood/group/{group}/n']:.0f}" for group in groups)
    apart = [by for by in (*BY, BASELINE) if of[f"{by}/gap/low"] > 0]
    said = f"Gaps whose interval excludes 0: {', '.join(apart)}." if apart else "No gap's interval excludes 0."
    ties = int((found.lengths[:, 0] == found.lengths[:, 1]).sum())
    return "\n".join([
        "# How often is the harmless answer ranked first?", "",
        markdown_table(["by", "all", *(f"turns: {group}" for group in groups), "largest gap"], rows), "",
        said_of_baseline(compared), "",
        markdown_table(["by", f"minus {BASELINE}", "p", "p, Holm"], [[by, *beside(by)] for by in BY]), "",
        f"{of['likelihood/n']:.0f} held-out pairs ({counts}). {said} Shares with Wilson's 95 % interval, gaps with "
        "Newcombe's, widened for the choice of the two groups. `rewards`: log π − log π_ref of a policy trained by "
        f"DPO. `{BASELINE}`: the answer of fewer tokens, {ties} pairs of equal length being half right. Differences "
        "are of the same pairs, p from a sign test of the pairs on which one of the two is more right.", "",
        f"Left out: {found.left_out} of {found.rows} held-out rows, with an empty answer or one of more than "
        f"{LENGTH - 1} tokens. The prompt was cut on the left to fit {LENGTH} tokens in {found.cut} of the "
        f"{len(found.lengths)} pairs measured and in {found.cut_train} of the {found.trained} trained on.", "",
        "Models of 0.4 M parameters, one seed, one epoch each, settings not tuned, rows of hh-rlhf's test split "
        "that are used here for training and held out anew: nothing follows about methods, or about other models.", "",
    ])  # fmt: skip


def main(words: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with pairs.parquet")
    parser.add_argument("--results", action="store_true", help="also copy what is written into experiments/results")
    parser.add_argument("--output", type=Path, default=Path("runs/harmlessness"))
    given = parser.parse_args(words)
    torch.set_num_threads(1)
    found = measured(rows_of(given.data))
    path = found.report.write(given.output)
    text = text_of(found)
    (given.output / "report.md").write_text(text, encoding="utf-8")
    print(text)
    if given.results:
        RESULTS.mkdir(parents=True, exist_ok=True)
        shutil.copy(given.output / "report.md", RESULTS / "report.md")
        shutil.copy(path.with_suffix(".md"), RESULTS / "evaluation.md")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
