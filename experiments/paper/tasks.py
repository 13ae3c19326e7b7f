"""The twelve tasks of the two leaderboards: their names in lm-eval, numbers of examples shown, and metrics.  One table.

column   name in lm-eval           shots  metric
"""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.metadata import version
from typing import Any
from unittest.mock import patch

import numpy as np

from .published import NEW, OLD


@dataclass(frozen=True)
class Task:
    """`metrics` are lm-eval's keys, "metric,filter"; the score is their mean.  `n` counts documents of a group, too."""

    column: str
    name: str
    shots: int
    metrics: tuple[str, ...]
    answers: bool = False  # free answers, whose length says something

    @property
    def board(self) -> str:
        return "new" if self.column in NEW else "old"


TASKS = (
    Task("bbh", "leaderboard_bbh", 3, ("acc_norm,none",)),
    Task("gpqa", "leaderboard_gpqa", 0, ("acc_norm,none",)),
    Task("mmlu-pro", "leaderboard_mmlu_pro", 5, ("acc,none",)),
    Task("musr", "leaderboard_musr", 0, ("acc_norm,none",)),
    Task("ifeval", "leaderboard_ifeval", 0, ("prompt_level_strict_acc,none", "inst_level_strict_acc,none"), True),
    Task("math-hard", "leaderboard_math_hard", 4, ("exact_match_original,none",)),
    Task("gsm8k", "gsm8k", 5, ("exact_match,strict-match",)),
    Task("truthful", "truthfulqa_mc2", 0, ("acc,none",)),
    Task("winogrande", "winogrande", 5, ("acc,none",)),
    Task("arc", "arc_challenge", 25, ("acc_norm,none",)),
    Task("hellaswag", "hellaswag", 10, ("acc_norm,none",)),
    Task("mmlu", "mmlu", 5, ("acc,none",)),
)
MISSING = "lm-eval is not installed; want the extra `eval`: pip install -c constraints.txt -e '.[eval]'"
assert {task.column for task in TASKS} == {*NEW, *OLD}


def lm_eval() -> Any:
    """The package; raises ImportError in one sentence where it is missing."""
    try:
        import lm_eval
        import lm_eval.evaluator
        import lm_eval.models.huggingface
        import lm_eval.tasks
    except ImportError as error:
        raise ImportError(MISSING if (error.name or "").startswith("lm_eval") else f"{MISSING} ({error})") from None
    logging.getLogger("lm_eval").setLevel(logging.ERROR)  # it warns of every model that it did not load itself
    return lm_eval


@cache
def lm_eval_version() -> str:
    lm_eval()
    return version("lm_eval")


def as_lm(model: Any, tokenizer: Any, batch_size: int = 8) -> Any:
    """A model in memory as lm-eval wants it."""
    return lm_eval().models.huggingface.HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size)


def evaluate(lm: Any, task: Task, manager: Any, *, limit: float | None = None, chat: bool = False) -> dict[str, Any]:
    """What lm-eval finds, as the score of a table (in percent) and all it is made of.

    lm        an `lm_eval.api.model.LM`
    manager   an `lm_eval.tasks.TaskManager` that knows the task
    limit     only the first so many documents of each of its parts, or below 1 this share; for trying out
    chat      put prompts into the chat template
    """
    harness, start = lm_eval(), time.perf_counter()
    # it would ask pip for a list of packages with each task
    with patch.object(harness.evaluator, "add_env_info", create=True):
        found = harness.simple_evaluate(
            lm, tasks=[task.name], num_fewshot=task.shots, limit=limit, bootstrap_iters=0, task_manager=manager,
            apply_chat_template=chat, log_samples=task.answers,
        )  # fmt: skip
    parts = {name: found["n-samples"][name]["effective"] for name in found["n-samples"]}
    metrics = {metric: _mean(found["results"], parts, metric) for metric in _metrics(found["results"], parts)}
    if wrong := {name: found["n-shot"][name] for name in parts if found["n-shot"][name] != task.shots}:
        raise ValueError(f"{task.name}: found {wrong} examples shown; want {task.shots}")
    for metric in task.metrics:
        if metric not in metrics:
            raise ValueError(f"{task.name} of lm-eval {lm_eval_version()} gives {', '.join(metrics)}; want {metric}")
    return {
        "task": task.name,
        "score": 100 * float(np.mean([metrics[metric] for metric in task.metrics])),
        "metrics": metrics,
        "documents": parts,
        "versions": {name: found["versions"].get(name) for name in parts},
        "answers": answers(found["samples"], lm.tokenizer) if task.answers else None,
        "limit": limit,
        "lm_eval": lm_eval_version(),
        "seconds": time.perf_counter() - start,
    }


def _metrics(results: Mapping[str, Mapping[str, Any]], parts: Mapping[str, int]) -> list[str]:
    """Those that every part of the task has."""
    first, *others = parts
    names = [key for key, value in results[first].items() if "," in key and isinstance(value, (int, float))]
    return [name for name in names if all(name in results[other] for other in others)]


def _mean(results: Mapping[str, Any], parts: Mapping[str, int], metric: str) -> float:
    """Over all documents: lm-eval's groups leave out metrics that are not their main one."""
    return float(np.average([results[part][metric] for part in parts], weights=list(parts.values())))


def answers(samples: Mapping[str, Sequence[Mapping[str, Any]]], tokenizer: Any) -> dict[str, float]:
    """Mean length of the free answers, in characters and in tokens."""
    texts = [text for part in samples.values() for sample in part for answer in sample["resps"] for text in answer]
    tokens = [len(tokenizer(text, add_special_tokens=False)["input_ids"]) for text in texts]
    return {
        "n": len(texts),
        "characters": float(np.mean([len(text) for text in texts])),
        "tokens": float(np.mean(tokens)),
    }
