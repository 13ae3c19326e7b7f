"""How often do likelihood, implicit reward and reward model rank the harmless answer first, and in which groups?

Pairs     the rows of hh-rlhf (harmless) in pairs.parquet; a quarter of the prompts is held out, by digest
Models    0.4 M parameters from scratch, one seed: likelihood of chosen answers, then from there (the reference) DPO,
          and a reward model; an epoch each
Groups    how many turns the person has taken: 1, 2, 3 or more
Measured  uft.evaluation, section harmlessness, with Wilson's and Newcombe's intervals
Run       python -m experiments.harmlessness --data FOLDER        two minutes
Writes    runs/harmlessness/{report.md, evaluation.json, evaluation.md}; --results copies the texts

Models of this size have hardly learnt what harm is: this shows the measure on real pairs, not a result about methods.
"""

from __future__ import annotations

import argparse
import copy
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow.parquet
import torch
from transformers import LlamaConfig, LlamaForCausalLM, PrinterCallback

from experiments.real.base import make_tokenizer
from experiments.report import markdown_table
from uft.config import UnifiedConfig
from uft.data.judges import QUIET, reward_trained_on
from uft.data.mixture import load_feedback
from uft.data.sources import Source
from uft.evaluation.config import EvaluationConfig
from uft.evaluation.safety import held_out
from uft.evaluation.suite import evaluate
from uft.trainer import UnifiedTrainer

RESULTS = Path(__file__).parent / "results" / "harmlessness"
SOURCE, HELD_OUT = "hh-harmless-test", 0.25
LENGTH, BATCH, VOCABULARY = 160, 32, 2000
LIKELIHOOD_RATE, PREFERENCE_RATE, BETA = 2e-3, 5e-4, 0.1


def rows_of(folder: Path) -> list[dict[str, Any]]:
    rows = [row for row in pyarrow.parquet.read_table(folder / "pairs.parquet").to_pylist() if row["source"] == SOURCE]
    for row in rows:
        turns = row["prompt"].count("Human:")
        row["turns"] = str(turns) if turns < 3 else "3 or more"
    return rows


def measured(rows: Sequence[dict[str, Any]]) -> tuple[Any, int]:
    """The report of the suite on what was held out of these rows, and how many of them it could not use."""
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
    return found, len(test) - len(found.samples["harmlessness"]["id"])


def text_of(report: Any, left_out: int) -> str:
    of = {name.removeprefix("harmlessness/"): value for name, value in report.metrics.items()}
    groups = sorted(set(report.samples["harmlessness"]["group"]))

    def shown(name: str) -> str:
        return f"{of[name]:.3f} [{of[f'{name}/low']:.3f}, {of[f'{name}/high']:.3f}]"

    rows = [[by, shown(by), *(shown(f"{by}/{group}") for group in groups), shown(f"{by}/gap")]
            for by in ("likelihood", "rewards", "reward_model")]  # fmt: skip
    counts = ", ".join(f"{group}: {of[f'likelihood/{group}/n']:.0f}" for group in groups)
    apart = [by for by in ("likelihood", "rewards", "reward_model") if of[f"{by}/gap/low"] > 0]
    said = f"Gaps whose interval excludes 0: {', '.join(apart)}." if apart else "No gap's interval excludes 0."
    return "\n".join([
        "# How often is the harmless answer ranked first?", "",
        markdown_table(["by", "all", *(f"turns: {group}" for group in groups), "largest gap"], rows), "",
        f"{of['likelihood/n']:.0f} held-out pairs ({counts}). {said} Shares with Wilson's 95 % interval, gaps with "
        "Newcombe's, widened for the choice of the two groups. `rewards`: log π − log π_ref of a policy trained by "
        f"DPO. Left out: {left_out} held-out rows with an empty answer or one of more than {LENGTH - 1} tokens.", "",
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
    report, left_out = measured(rows_of(given.data))
    path = report.write(given.output)
    text = text_of(report, left_out)
    (given.output / "report.md").write_text(text, encoding="utf-8")
    print(text)
    if given.results:
        RESULTS.mkdir(parents=True, exist_ok=True)
        shutil.copy(given.output / "report.md", RESULTS / "report.md")
        shutil.copy(path.with_suffix(".md"), RESULTS / "evaluation.md")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
