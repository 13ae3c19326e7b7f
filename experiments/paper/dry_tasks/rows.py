"""The rows of the local tasks, and what scores them where lm-eval's own tasks have functions of their own."""

import json
from functools import cache
from pathlib import Path

from datasets import Dataset, DatasetDict


def rows(part: str = "all", **_) -> DatasetDict:
    """`part` is all rows, or one of the two parts of a group, of unequal size."""
    return _rows(part)


@cache
def _rows(part: str) -> DatasetDict:
    found = [json.loads(line) for line in (Path(__file__).parent / "rows.jsonl").read_text().splitlines()]
    shown, asked = found[:3], found[3:]
    asked = {"all": asked, "first": asked[:3], "second": asked[3:]}[part]
    return DatasetDict({"train": Dataset.from_list(shown), "test": Dataset.from_list(asked)})


def probability_of_truth(doc, results):
    """As truthfulqa_mc2: the share of the probability that is on the true answer."""
    from math import exp

    likelihood = [exp(logp) for logp, _ in results]
    return {"acc": likelihood[doc["label"]] / (sum(likelihood) or 1.0)}


def two_ways(doc, results):
    """As leaderboard_math_hard: two metrics, the second of which is the one that is reported."""
    right = doc["choices"][doc["label"]] in results[0]
    return {"exact_match": 0, "exact_match_original": int(right)}


def instructions(doc, results):
    """As leaderboard_ifeval: two instructions for each prompt, no comma and at most 40 characters."""
    followed = ["," not in results[0], len(results[0]) <= 40]
    return {
        "prompt_level_strict_acc": all(followed), "inst_level_strict_acc": followed,
        "prompt_level_loose_acc": all(followed), "inst_level_loose_acc": followed,
    }  # fmt: skip


def mean_of_lists(items):
    flat = [item for each in items for item in each]
    return sum(flat) / len(flat)
