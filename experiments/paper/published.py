"""What is published: numbers of papers, by table, as printed there.

[UFT]  Wang et al. 2024, arXiv:2410.21438, version 1: Mistral-7B-v0.1, one run each, no intervals
[UNA]  Wang et al. 2024, arXiv:2408.15339, version 2: Mistral-7B-v0.1 without a supervised stage, averages only

Scores are percentages, MT-Bench is out of 10, `length` is AlpacaEval's mean length of an answer (characters).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

NEW = ("bbh", "gpqa", "mmlu-pro", "musr", "ifeval", "math-hard")
OLD = ("gsm8k", "truthful", "winogrande", "arc", "hellaswag", "mmlu")
AVG_NEW, AVG_OLD = "avg new", "avg old"
AVERAGES = {AVG_NEW: NEW, AVG_OLD: OLD}
GENERATION = ("mt-bench", "alpaca lc-wr", "length")


@dataclass(frozen=True)
class Table:
    """Rows are named by the arm of ours that answers to them (`experiments.paper.arms`)."""

    number: str
    title: str
    columns: tuple[str, ...]
    rows: Mapping[str, tuple[float, ...]]

    def value(self, arm: str, column: str) -> float | None:
        return self.rows[arm][self.columns.index(column)] if arm in self.rows and column in self.columns else None


TABLES = (
    Table(
        "UFT, Table 1", "new leaderboard", (*NEW, AVG_NEW),
        {
            "base": (44.11, 29.53, 30.11, 41.79, 23.22, 2.92, 28.61),
            "sft": (46.04, 28.72, 29.35, 42.94, 29.5, 2.66, 29.87),
            "uft_instructions": (46.55, 29.24, 30.25, 41.73, 28.89, 3.87, 30.09),
            "sft_dpo": (44.52, 29.98, 29.95, 40.31, 26.64, 3.13, 29.09),
            "sft_kto": (42.89, 31, 30.48, 40.59, 25.17, 2.94, 28.85),
            "sft_una": (43.74, 30.78, 30.09, 40.56, 26.82, 2.96, 29.16),
            "uft": (45.46, 31.15, 30.05, 41.06, 46.03, 3.13, 32.81),
        },
    ),
    Table(
        "UFT, Table 2", "old leaderboard", (*OLD, AVG_OLD),
        {
            "base": (38.02, 42.58, 77.58, 61.43, 83.44, 62.51, 60.93),
            "sft": (39.65, 51.06, 78.53, 63.99, 83.78, 61.99, 63.17),
            "uft_instructions": (45.57, 51.18, 78.93, 63.82, 83.54, 62.44, 64.25),
            "sft_dpo": (42.19, 47.83, 78.45, 62.16, 84.03, 62.38, 62.84),
            "sft_kto": (42.57, 49.67, 79.4, 61.86, 83.83, 62.06, 63.23),
            "sft_una": (39.99, 49.54, 79.72, 62.46, 84.08, 62.3, 63.02),
            "uft": (41.59, 54.05, 79.79, 63.82, 84.44, 62.33, 64.34),
        },
    ),
    Table(
        "UFT, Table 3", "generation", GENERATION,
        {
            "base": (3.15, 0.31, 6554),
            "sft": (6.33, 8.07, 908),
            "uft_instructions": (6.55, 7.27, 974),
            "sft_dpo": (4.81, 1.05, 5654),
            "sft_kto": (4.76, 0.64, 6215),
            "sft_una": (5.24, 1.34, 4945),
            "uft": (6.78, 8.28, 1317),
        },
    ),
    Table(
        "UFT, Tables 4 to 6", "demonstrations to feedback", (AVG_NEW, AVG_OLD, "ifeval", "truthful", *GENERATION),
        {
            "uft_16k": (31.92, 64.78, 44.21, 56.69, 6.25, 7.9, 1378),
            "uft": (32.81, 64.34, 46.03, 54.05, 6.78, 8.28, 1317),
            "uft_32k": (32.52, 64.45, 46.76, 54.38, 6.54, 8.23, 1324),
            "uft_65k": (31.28, 64.15, 41.91, 52.35, 6.3, 9.92, 1338),
            "uft_130k": (31.66, 63.62, 44.2, 50.17, 6.83, 7.43, 1361),
            "uft_260k": (32.39, 63.82, 45.8, 50.17, 6.45, 6.85, 1378),
        },
    ),
    Table(
        "UFT, Tables 7 and 8", "learning rate of SFT", (AVG_NEW, AVG_OLD),
        {
            "sft_3e-06": (29.45, 62.96),
            "sft_1e-05": (29.6, 63.28),
            "sft_3e-05": (29.75, 63.72),
            "sft": (29.87, 63.17),
            "sft_0.0003": (26.98, 55.18),
        },
    ),
    Table(
        "UFT, Tables 9 and 10", "learning rate and beta of UFT on instructions alone", (AVG_NEW, AVG_OLD),
        {
            "uft_0.0001_0.01": (30.08, 63.71),
            "uft_0.0001_0.03": (29.93, 63.51),
            "uft_0.0001_0.1": (29.8, 62.5),
            "uft_0.0001_0.3": (29.37, 61.07),
            "uft_instructions": (30.09, 64.25),
            "uft_3e-05_0.03": (29.86, 63.88),
            "uft_3e-05_0.1": (29.55, 62.96),
            "uft_3e-05_0.3": (29.45, 61.35),
            "uft_1e-05_0.01": (28.99, 63.4),
            "uft_1e-05_0.03": (29.02, 63.27),
            "uft_1e-05_0.1": (29.81, 62.79),
            "uft_1e-05_0.3": (29.3, 61.7),
            "uft_3e-06_0.01": (29.32, 62.46),
            "uft_3e-06_0.03": (29.2, 62.54),
            "uft_3e-06_0.1": (29.48, 61.85),
            "uft_3e-06_0.3": (28.73, 61.39),
        },
    ),
    Table(
        "UNA", "feedback alone, no demonstrations",
        (AVG_NEW, "ifeval", AVG_OLD, "truthful", "mt-bench", "alpaca lc-wr"),
        {
            "dpo": (28.53, 26.3, 62.26, 44.75, 6.1, 3.67),
            "kto": (28.56, 24.18, 62.74, 47.72, 5.99, 4.46),
            "una": (30.92, 37.25, 64.35, 55.09, 6.72, 8.78),
        },
    ),
)  # fmt: skip

# what the paper concludes, as differences between arms
CLAIMS = (
    ("uft_instructions", "sft", "UFT on instructions alone is better than SFT"),
    ("sft_dpo", "sft", "a second stage costs what the first one taught"),
    ("sft_kto", "sft", "... also with KTO"),
    ("sft_una", "sft", "... also with UNA"),
    ("uft", "sft_dpo", "one stage is better than SFT → DPO"),
    ("uft", "sft_kto", "... than SFT → KTO"),
    ("uft", "sft_una", "... than SFT → UNA"),
)
CLAIMED = (AVG_NEW, AVG_OLD, "ifeval", "truthful")


def published(arm: str, column: str) -> float | None:
    """The number of the first table that has it; equal rows of several tables are equal in all of them."""
    return next((found for table in TABLES if (found := table.value(arm, column)) is not None), None)
