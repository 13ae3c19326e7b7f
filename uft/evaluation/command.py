"""`uft eval`: a recipe that says which model is measured, against what, and on what."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from uft.evaluation.config import FIELDS, EvaluationConfig
from uft.evaluation.data import read_data
from uft.evaluation.report import Report, must_be_the_same
from uft.evaluation.suite import evaluate
from uft.loading import load_for_use, load_tokenizer
from uft.model_card import update_measures
from uft.models import AdapterReference, is_peft
from uft.recipe import RecipeError, _known

_OWN = (
    "model", "tokenizer", "reference", "reward_model", "before", "judge", "output_dir", "dtype", "attn_implementation",
    "trust_remote_code", "device",
)  # fmt: skip


@dataclass(frozen=True)
class EvaluationRecipe:
    """What `uft eval` runs.

    config       what is measured, on which data
    model        hub id or path of a model, or of an adapter, which is put onto its base model
    tokenizer    by default the model's
    reference    hub id or path; "adapter": the same model without its adapter; by default that where there is one
    reward_model hub id or folder; judges the pairs of `harmlessness` beside the model
    judge        "package.module:function", for answers against those of `before`; see `uft.evaluation.judge`
    before       evaluation.json of an earlier evaluation of the same data, or its folder
    output_dir   where evaluation.json and evaluation.md go; by default the model's folder, or runs/<name> for a hub id
    dtype        of the weights; auto is the checkpoint's
    attn_implementation, trust_remote_code   as in `UnifiedConfig`
    device       auto (a GPU where there is one), cpu, cuda, cuda:1, ...
    """

    config: EvaluationConfig
    model: str
    tokenizer: str | None = None
    reference: str | None = None
    reward_model: str | None = None
    before: str | None = None
    judge: str | None = None
    output_dir: str | None = None
    dtype: str = "auto"
    attn_implementation: str | None = None
    trust_remote_code: bool = False
    device: str = "auto"

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> EvaluationRecipe:
        """Checks every key.  Raises `RecipeError`."""
        for key in values:
            _known(key, (*_OWN, *FIELDS), "")
        own = {key: value for key, value in values.items() if key in _OWN and value is not None}
        if not own.get("model"):
            raise RecipeError("key 'model' is missing")
        for key, value in own.items():
            wanted = bool if key == "trust_remote_code" else str
            if not isinstance(value, wanted):
                raise RecipeError(f"{key} is {value!r}; want {'true or false' if wanted is bool else 'a text'}")
        if own.get("dtype", "auto") != "auto" and not isinstance(getattr(torch, own["dtype"], None), torch.dtype):
            raise RecipeError(f"dtype is {own['dtype']!r}; want auto, float32, bfloat16 or float16")
        return cls(EvaluationConfig.of({key: value for key, value in values.items() if key in FIELDS}), **own)

    @property
    def folder(self) -> Path:
        if self.output_dir:
            return Path(self.output_dir)
        return Path(self.model) if Path(self.model).is_dir() else Path("runs") / Path(self.model).name


def run(values: Mapping[str, Any]) -> tuple[Report, Path]:
    """The report, and where it was written.  Raises ValueError and OSError in one sentence."""
    recipe = EvaluationRecipe.of(values)
    before = None if recipe.before is None else Report.of(recipe.before)  # first: it may be missing
    judge = None
    if recipe.judge is not None:
        from uft.evaluation.judge import load_judge

        judge = load_judge(recipe.judge)
    tokenizer = load_tokenizer(recipe.tokenizer or recipe.model, recipe.trust_remote_code)
    model = loaded(recipe.model, recipe)
    if recipe.reference == "adapter":
        if not is_peft(model):
            raise RecipeError("reference is 'adapter', and the model has none; want a hub id or a path")
        reference = AdapterReference()
    else:
        reference = None if recipe.reference is None else loaded(recipe.reference, recipe)
    rewards = None if recipe.reward_model is None else _rewards(recipe, tokenizer, model)
    report = evaluate(model, tokenizer, recipe.config, reference, before, judge=judge, rewards=rewards)
    report.info["model"] = recipe.model
    if isinstance(reference, nn.Module):
        report.info["reference"] = recipe.reference
    written = report.write(recipe.folder)
    update_measures(recipe.folder)  # of the model card, where the folder is a trained model's
    return report, written


def looked_over(values: Mapping[str, Any]) -> str:
    """What `run` would measure, with all data read and no weights loaded.  Raises as `run` does."""
    recipe = EvaluationRecipe.of(values)
    before = None if recipe.before is None else Report.of(recipe.before)
    tokenizer = load_tokenizer(recipe.tokenizer or recipe.model, recipe.trust_remote_code)
    ids = read_data(recipe.config, tokenizer).ids()
    if before is not None:
        must_be_the_same(ids, before, whole=False)
    lines = [f"{name}: {len(found):,} rows" for name, found in ids.items()]
    lines += [f"divergence: prompts of {', '.join(recipe.config.divergence)}"] if recipe.config.divergence else []
    compared = "" if before is None else f", compared with {before.info.get('model', recipe.before)}"
    return "\n".join(
        [f"{recipe.model}{compared}; report in {recipe.folder}", *lines, "Nothing was measured or written: --dry-run."]
    )


def _rewards(recipe: EvaluationRecipe, tokenizer: Any, model: nn.Module) -> Any:
    from uft.rlhf.reward_model import RewardModel

    found = RewardModel.load(recipe.reward_model, device=next(model.parameters()).device)
    if found.tokenizer.get_vocab() != tokenizer.get_vocab():
        raise RecipeError(f"reward_model {recipe.reward_model}: found another vocabulary; want the model's tokens")
    return found


def loaded(name: str, recipe: EvaluationRecipe) -> nn.Module:
    return load_for_use(
        name, dtype=recipe.dtype, device=recipe.device, attn_implementation=recipe.attn_implementation,
        trust_remote_code=recipe.trust_remote_code,
    )  # fmt: skip
