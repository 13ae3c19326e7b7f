"""Trains and evaluates arms; every finished stage and every score is kept under the content of what made it.

    cache/stages/<hash of the recipes so far>/     adapter (or weights), run.json; checkpoints while it trains
    cache/scores/<hash of these, seed, task, ...>.json

An interrupted run goes on: within a stage from its newest whole checkpoint, otherwise from the first score that is not
there.  The library's code is not part of the names, since days of training would not survive the correction of a
comment; each result holds its commit, and the report names all of them.
"""

from __future__ import annotations

import gc
import hashlib
import json
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer, PreTrainedModel

from uft.models import load_policy, merged
from uft.recipe import parse
from uft.record import commit, write_json
from uft.stages import run_stages

from .arms import key_of, stage_recipes
from .tasks import Task, as_lm, evaluate, lm_eval, lm_eval_version

Record = dict[str, Any]
SUMS = ("flops", "tokens", "response_tokens", "policy_forwards", "backwards", "reference_forwards", "seconds")


@dataclass(frozen=True)
class Setting:
    """What all arms share.

    common     words of a command line over every recipe
    local      files that stand for data sets of the hub, by the ids of these
    batch_size, limit, chat   of the evaluation, see `experiments.paper.tasks`
    tasks_in   folders with lm-eval tasks, instead of lm-eval's own
    """

    model: str
    cache: Path
    tasks: tuple[Task, ...]
    common: tuple[str, ...] = ()
    local: Mapping[str, str] = field(default_factory=dict)
    batch_size: int = 8
    limit: float | None = None
    chat: bool = False
    tasks_in: str | None = None

    @cached_property
    def manager(self) -> Any:
        # looking through all of lm-eval's own tasks takes seconds
        return lm_eval().tasks.TaskManager(include_path=self.tasks_in, include_defaults=self.tasks_in is None)

    def recipes(self, arm: str, seed: int) -> list[dict[str, Any]]:
        return stage_recipes(arm, (*self.common, f"--model={self.model}", f"--seed={seed}"), self.local)

    def folder(self, recipes: Sequence[Any]) -> Path:
        return self.cache / "stages" / key_of(recipes)

    def score_file(self, arm: str, seed: int, task: Task) -> Path:
        """The base model has no seed: it is evaluated once."""
        recipes = self.recipes(arm, seed)
        trained = key_of(recipes) if recipes else "base"
        content = [self.model, trained, asdict(task), self.limit, self.chat, self.tasks_in, lm_eval_version()]
        return self.cache / "scores" / f"{hashlib.sha256(json.dumps(content).encode()).hexdigest()[:20]}.json"


def finished(setting: Setting, arm: str, seed: int) -> Record:
    """What is there of an arm and a seed: {"seed", "scores": {column: ...}, "stages": [...], "compute"}."""
    recipes = setting.recipes(arm, seed)
    runs = [setting.folder(recipes[: k + 1]) / "run.json" for k in range(len(recipes))]
    done = [path for path in runs if _is_done(path.parent)]
    stages = [json.loads(path.read_text())["stages"][0] for path in done]
    files = {task.column: setting.score_file(arm, seed, task) for task in setting.tasks}
    scores = {column: json.loads(path.read_text()) for column, path in files.items() if path.exists()}
    return {"seed": seed, "scores": scores, "stages": stages, "compute": added_up(stages)}


def run(setting: Setting, arm: str, seed: int, say: Callable[[str], None] = print) -> Record:
    """Trains what is not trained yet and evaluates what is not evaluated yet."""
    todo = [task for task in setting.tasks if not setting.score_file(arm, seed, task).exists()]
    if todo:
        recipes = setting.recipes(arm, seed)
        for k in range(len(recipes)):
            if not _is_done(setting.folder(recipes[: k + 1])):
                say(f"training stage {recipes[k]['stages'][0]['name']!r}")
                train(setting, recipes[: k + 1])
        tokenizer = AutoTokenizer.from_pretrained(setting.model)
        # a GPU evaluates in bfloat16, which halves what the weights take
        with trained_model(setting, recipes, torch.bfloat16 if torch.cuda.is_available() else torch.float32) as model:
            lm = as_lm(model, tokenizer, setting.batch_size)
            for task in todo:
                say(f"evaluating {task.name}")
                found = evaluate(lm, task, setting.manager, limit=setting.limit, chat=setting.chat)
                about = {"arm": arm, "seed": seed if recipes else None, "commit": commit()}
                write_json(setting.score_file(arm, seed, task), found | about)
    return finished(setting, arm, seed)


def train(setting: Setting, recipes: Sequence[dict[str, Any]]) -> None:
    """The last of these stages, from what the others left."""
    folder = setting.folder(recipes)
    plan = parse(recipes[-1] | {"output_dir": str(folder / "training")})
    tokenizer = AutoTokenizer.from_pretrained(plan.tokenizer, trust_remote_code=plan.args.trust_remote_code)
    if plan.args.dtype == "auto":
        raise ValueError("dtype is auto; want its name, since adapters of earlier stages are folded in in float32")
    with trained_model(setting, recipes[:-1], getattr(torch, plan.args.dtype)) as start:
        policy, records = run_stages(start, plan.stages, plan.train_dataset, plan.args, tokenizer, resume=True)
        policy.save_pretrained(folder / "weights")
        records[0] |= {"recipe": recipes[-1]}
        del policy
    # its presence says that the stage is finished
    write_json(folder / "run.json", {"stages": records})
    shutil.rmtree(folder / "training")


def _is_done(folder: Path) -> bool:
    return (folder / "run.json").exists()


@contextmanager
def trained_model(setting: Setting, recipes: Sequence[dict[str, Any]], dtype: torch.dtype) -> Iterator[PreTrainedModel]:
    """The base model with the adapters of these stages folded in, or the weights that the last one left."""
    model = load_policy(setting.model, dtype=torch.float32)
    for k in range(len(recipes)):
        weights = setting.folder(recipes[: k + 1]) / "weights"
        if (weights / "adapter_config.json").exists():
            from peft import PeftModel

            model = merged(PeftModel.from_pretrained(model, weights))
        else:
            model = load_policy(str(weights), dtype=torch.float32)
    for parameter in model.parameters():  # not the buffers: positions would lose their digits
        parameter.data = parameter.data.to(dtype)
    try:
        yield model.to("cuda" if torch.cuda.is_available() else "cpu").eval()
    finally:
        del model
        if torch.cuda.is_available():
            gc.collect()
            torch.cuda.empty_cache()


def added_up(stages: Sequence[Record]) -> dict[str, float]:
    """The cost of all stages; the peak is that of the largest.  Shared stages count for each arm that begins so."""
    if not stages:
        return {}
    total = {name: sum(stage["compute"].get(name, 0) for stage in stages) for name in SUMS}
    total["steps"] = sum(stage["steps"] for stage in stages)
    total["peak_memory_bytes"] = max(stage["compute"]["peak_memory_bytes"] for stage in stages)
    return total
