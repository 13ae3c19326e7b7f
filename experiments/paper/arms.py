"""The arms: each is a recipe of `experiments/recipes` and what differs from it.

An arm becomes one recipe per stage, so that arms which begin alike share that beginning: the three sequential arms of
a seed train one supervised stage between them.
"""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from uft.recipe import RecipeError, override, read_yaml

RECIPES = Path(__file__).resolve().parents[1] / "recipes"
DPO, KTO, UNA = (f"paper_sequential_{method}" for method in ("dpo", "kto", "una"))
UNIFIED = "paper_unified"


@dataclass(frozen=True)
class Arm:
    """`recipe` is None for the base model.

    changes   over the recipe, keys as on the command line of `uft train`
    on        the data sets that are used, by default all; for recipes without stages
    stages    the stages that are run, by default all
    """

    label: str
    recipe: str | None
    changes: Mapping[str, Any] = field(default_factory=dict)
    on: tuple[str, ...] = ()
    stages: tuple[str, ...] = ()
    family: str = "sequential"


INSTRUCTIONS = ("ultrachat",)
BOTH = ("ultrachat", "helpsteer2")
MAIN = {
    "base": Arm("base model", None, family="control"),
    "sft": Arm("SFT", DPO, stages=("sft",), family="control"),
    "uft_instructions": Arm("UFT, instructions only", UNIFIED, on=INSTRUCTIONS, family="unified"),
    "sft_dpo": Arm("SFT → DPO", DPO),
    "sft_kto": Arm("SFT → KTO", KTO),
    "sft_una": Arm("SFT → UNA", UNA),
    "uft": Arm("UFT, mixed", UNIFIED, family="unified"),
}
RATIO = {
    f"uft_{k}k": Arm(f"UFT, {k}k + 20k", UNIFIED, {"train_dataset.ultrachat.limit": k * 1000}, family="unified")
    for k in (16, 32, 65, 130, 260)
}
SFT_LR = {
    f"sft_{rate:g}": Arm(
        f"SFT, rate {rate:g}", DPO, {"stages.0.learning_rate": rate}, stages=("sft",), family="control"
    )
    for rate in (3e-6, 1e-5, 3e-5, 3e-4)
}
LR_BETA = {
    f"uft_{rate:g}_{beta:g}": Arm(
        f"UFT, instr., rate {rate:g}, beta {beta:g}", UNIFIED, {"learning_rate": rate, "objective.beta": beta},
        on=INSTRUCTIONS, family="unified",
    )
    for rate in (1e-4, 3e-5, 1e-5, 3e-6)
    for beta in (0.01, 0.03, 0.1, 0.3)
    if (rate, beta) != (3e-5, 0.01)  # that is uft_instructions
}  # fmt: skip
DIRECT = {
    "dpo": Arm("DPO, no SFT", DPO, stages=("dpo",), family="control"),
    "kto": Arm("KTO, no SFT", KTO, stages=("kto",), family="control"),
    "una": Arm("UNA, no SFT", UNA, stages=("una",), family="control"),
}


def _joint(name: str, objective: Any, rate: float) -> dict[str, Any]:
    return {"stages": [{"name": name, "objective": objective, "on": list(BOTH), "learning_rate": rate}]}


OURS = {
    "sft_chosen": Arm("SFT, also on chosen", DPO, _joint("sft_chosen", "sft_chosen", 1e-4), family="control"),
    "dpo_nll": Arm(
        "one stage, DPO + NLL", DPO, _joint("dpo_nll", {"preset": "dpo_nll", "beta": 0.03}, 3e-5), family="unified"
    ),
}
GROUPS = {"main": MAIN, "ratio": RATIO, "sft_lr": SFT_LR, "lr_beta": LR_BETA, "direct": DIRECT, "ours": OURS}
ABOUT = {
    "main": "Tables 1 to 3 of the paper",
    "ratio": "Tables 4 to 6: demonstrations to feedback (20k + 20k is the arm `uft`)",
    "sft_lr": "Tables 7 and 8: learning rate of SFT (1e-4 is the arm `sft`)",
    "lr_beta": "Tables 9 and 10: learning rate and beta of UFT on instructions (3e-5 and 0.01 is `uft_instructions`)",
    "direct": "UNA's paper: feedback alone, whose DPO and KTO beat the UFT paper's SFT → DPO and SFT → KTO on MT-Bench",
    "ours": "not in the paper: likelihood on demonstrations and chosen answers (a control), and one stage of DPO + NLL",
}
ARMS: dict[str, Arm] = {name: arm for group in GROUPS.values() for name, arm in group.items()}

# what the paper does not say, and what is done here; the recipes' first lines say it for training
UNSTATED = {
    "epochs, batch size, schedule": "2 epochs, batches of 16, cosine with 10 % warm-up (epochs and schedule of the "
    "same authors' UNA scripts)",
    "LoRA beyond r = 16": "alpha 16, no dropout, all linear layers but the head",
    "learning rate and beta of DPO, KTO and UNA as second stages": "UNA scripts: beta 0.03; 5e-6 for DPO and KTO, 3e-5 "
    "for UNA",
    "longest sequence": "2048 tokens; rows whose response does not fit are dropped and counted",
    "single turns of UltraChat": "conversations are kept whole, with a loss on every turn of the assistant. The hub's "
    "train_sft has about 208,000 of them, so that 260k means all",
    "pairs of HelpSteer2": "Atsunori/HelpSteer2-DPO, about 7,200 pairs of unequal helpfulness; the paper says 20k for "
    "every method",
    "score of HelpSteer2": "(0.65 helpfulness + 0.8 correctness + 0.45 coherence) / (1.9 * 4), of the UNA scripts",
    "seeds and variance": "the published numbers are single runs; ours are means over seeds with t-intervals",
    "prompts of the evaluation": "no chat template (lm-eval's default), weights in bfloat16 on a GPU",
    "metric of ifeval": "mean of strict accuracy over prompts and over instructions, as the leaderboard has it",
    "metric of math-hard": "lm-eval's `exact_match_original`; since that task's version 3 `exact_match` extracts "
    "answers in another way",
    "metric of gsm8k": "strict match",
    "normalisation of the new leaderboard": "none: raw accuracies (29.53 for the base on gpqa, were it normalised, "
    "would be 47 % right)",
}


def stage_recipes(
    name: str, common: Sequence[str] = (), local: Mapping[str, str] | None = None
) -> list[dict[str, Any]]:
    """One recipe per stage, each with a single stage in it and only the data that it uses.

    common   words of a command line that go over every arm's recipe
    local    files that stand for data sets of the hub, by the ids of these
    """
    arm = ARMS[name]
    if arm.recipe is None:
        return []
    changes = [f"--{key}={json.dumps(value)}" for key, value in arm.changes.items()]
    recipe = override(_read(arm.recipe), changes)
    known = set(recipe["train_dataset"])
    recipe = override(recipe, common)
    # what is said of all arms may name data sets that one of them does not have
    recipe["train_dataset"] = {
        key: _located(source, local or {}) for key, source in recipe["train_dataset"].items() if key in known
    }
    stages = recipe.pop("stages", None)
    if not isinstance(stages, (list, type(None))):
        raise RecipeError(f"arm {name!r}: the recipe {arm.recipe} has no stages, of which the command line speaks")
    if stages is None:
        stages = [{"name": "unified", "objective": recipe.pop("objective"), "on": list(arm.on)}]
    recipe.pop("output_dir", None)
    chosen = [stage for stage in stages if not arm.stages or stage["name"] in arm.stages]
    return [_alone(recipe, stage, first=k == 0) for k, stage in enumerate(chosen)]


@cache
def _read(recipe: str) -> dict[str, Any]:
    return read_yaml(str(RECIPES / f"{recipe}.yaml"))


def _located(source: Mapping[str, Any], local: Mapping[str, str]) -> dict[str, Any]:
    if source["path"] not in local:
        return dict(source)
    # a file has no splits
    return {key: value for key, value in source.items() if key != "split"} | {"path": local[source["path"]]}


def _alone(recipe: Mapping[str, Any], stage: Mapping[str, Any], first: bool) -> dict[str, Any]:
    if not first and (stage.get("reference", "previous") != "previous" or stage.get("boundary", "merge") != "merge"):
        raise RecipeError(
            f"stage {stage['name']!r}: want the reference of the previous stage and a merged adapter, since stages run "
            "one by one here"
        )
    on = stage.get("on") or list(recipe["train_dataset"])
    names = [on] if isinstance(on, str) else on
    alone = copy.deepcopy(dict(recipe))
    alone["train_dataset"] = {name: alone["train_dataset"][name] for name in names}
    return alone | {"stages": [{**copy.deepcopy(dict(stage)), "on": list(names)}]}


def key_of(recipes: Sequence[Mapping[str, Any]]) -> str:
    """Of what a model was trained by: the recipes of its stages, and the content of local files that they name."""
    files = {}
    for recipe in recipes:
        for source in recipe["train_dataset"].values():
            path = Path(source["path"] if isinstance(source, Mapping) else source)
            if path.is_file():
                files[str(path)] = hashlib.sha256(path.read_bytes()).hexdigest()
    content = json.dumps([list(recipes), files], sort_keys=True, default=str)
    return hashlib.sha256(content.encode()).hexdigest()[:20]
