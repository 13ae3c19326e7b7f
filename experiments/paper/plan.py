"""What a run would be, before anything is loaded: data, steps, tokens, memory and time of each stage of each arm."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, MistralConfig, PretrainedConfig

from uft.compute import Cost
from uft.memory import estimate
from uft.recipe import Recipe, parse

from ..memory import GIB, RATE
from ..report import markdown_table
from .arms import ARMS, UNSTATED, key_of
from .running import Setting

# rows on the hub, about; and tokens of an example with all its responses, which are assumptions, not measurements
ROWS = {"HuggingFaceH4/ultrachat_200k": 208_000, "nvidia/HelpSteer2": 20_300, "Atsunori/HelpSteer2-DPO": 7_200}
TOKENS = {"HuggingFaceH4/ultrachat_200k": 1200, "nvidia/HelpSteer2": 600, "Atsunori/HelpSteer2-DPO": 900}
PAIRS = ("Atsunori/HelpSteer2-DPO",)
HEADER = ("arm", "stage", "data", "learning rate", "beta", "steps", "M tokens", "peak GiB", "H100 hours")


@cache
def config_of(model: str) -> PretrainedConfig | None:
    """None where it cannot be had, for want of a network."""
    if model == "mistralai/Mistral-7B-v0.1":
        return MistralConfig()  # transformers' defaults are its shape
    try:
        return AutoConfig.from_pretrained(model)
    except OSError:
        return None


def stage_row(label: str, plan: Recipe) -> tuple[list[str], float]:
    """A line of the table, and the hours of the stage (NaN where something is not known)."""
    (stage,), args = plan.stages, plan.args
    settings = {**vars(args), **stage.args}
    rows = {name: _rows(source) for name, source in plan.train_dataset.items()}
    total = sum(n or math.nan for n in rows.values())
    batch = settings["per_device_train_batch_size"] * settings["gradient_accumulation_steps"]
    steps = settings["max_steps"] if settings["max_steps"] > 0 else total * settings["num_train_epochs"] / batch
    lengths = [TOKENS.get(str(source.path), math.nan) for source in plan.train_dataset.values()]
    mean = sum((n or math.nan) * length for n, length in zip(rows.values(), lengths)) / total
    tokens = steps * batch * mean
    hours = tokens * _flops_per_token(plan.model, bool(stage.objective.kinds_with_reference)) / RATE / 3600
    betas = sorted({f"{term.beta:g}" for term in stage.objective.terms if hasattr(term, "beta")})
    cells = [
        label, stage.name, ", ".join(f"{name} {_count(n)}" for name, n in rows.items()),
        f"{settings['learning_rate']:g}", ", ".join(betas) or "–", _count(steps), _count(tokens / 1e6),
        _memory(plan, settings), _count(hours, 1),
    ]  # fmt: skip
    return cells, hours


def _rows(source: Any) -> int | None:
    known = ROWS.get(str(source.path))
    return min(filter(None, (known, source.limit)), default=None)


def _count(n: float | None, digits: int = 0) -> str:
    return "?" if n is None or not math.isfinite(n) else f"{n:,.{digits}f}"


def _flops_per_token(model: str, with_reference: bool) -> float:
    """Of adapters at a thousand tokens of which half count, their own products left out; see `uft.compute`."""
    if (config := config_of(model)) is None:
        return math.nan
    n = 1000
    with torch.device("meta"):
        cost = Cost.of(AutoModelForCausalLM.from_config(config))
    forward = cost.forward(n, n // 2)
    return ((2 if with_reference else 1) * forward + forward + cost.attention * n**2) / n


def _memory(plan: Recipe, settings: dict[str, Any]) -> str:
    """Of the longest rows there may be."""
    if (config := config_of(plan.model)) is None:
        return "?"
    paired = any(str(source.path) in PAIRS for source in plan.train_dataset.values())
    reference = "none" if not plan.stages[0].objective.kinds_with_reference else "adapter"
    found = estimate(
        config, tokens=settings["max_length"] * settings["per_device_train_batch_size"] * (2 if paired else 1),
        lora_r=settings["lora_r"] if settings["use_peft"] else 0,
        reference=reference if settings["use_peft"] or reference == "none" else "frozen",
        autocast=torch.bfloat16 if settings["bf16"] else None,
        gradient_checkpointing=settings["gradient_checkpointing"], passes=settings["gradient_accumulation_steps"],
    )  # fmt: skip
    return f"{found.total / GIB:.0f}"


def plan_text(setting: Setting, arms: Sequence[str], seeds: Sequence[int]) -> str:
    rows, hours = [], {}
    for arm in arms:
        recipes = setting.recipes(arm, seeds[0])
        for k, recipe in enumerate(recipes):
            # planned where there may be no GPU
            row, cost = stage_row(ARMS[arm].label, parse(recipe | {"output_dir": "unused", "use_cpu": True}))
            key = key_of(recipes[: k + 1])
            rows.append(row if key not in hours else [*row[:-1], "shared"])
            hours.setdefault(key, cost)
        if not recipes:
            rows.append([ARMS[arm].label, "–", *["–"] * (len(HEADER) - 2)])
    settings = f"Model: {setting.model}. Seeds: {', '.join(map(str, seeds))}."
    tasks = [[t.column, t.name, str(t.shots), ", ".join(t.metrics)] for t in setting.tasks]
    return "\n".join([
        settings, "", markdown_table(HEADER, rows), "",
        f"Training, all arms and seeds: {_count(sum(hours.values()) * len(seeds))} H100 hours, if one runs at 40 % of "
        "its data sheet's bfloat16 rate. Tokens assume means of " +
        ", ".join(f"{n:,} for an example of {name}" for name, n in TOKENS.items()) +
        ". Memory is the formula of uft/memory.py for the longest rows that may come. Evaluation is not in it. None of "
        "this was measured.", "",
        markdown_table(["column", "task of lm-eval", "shots", "metric"], tasks), "",
        "What the paper does not state, and what is done here:", "",
        *(f"- {what}: {choice}." for what, choice in UNSTATED.items()),
    ])  # fmt: skip
