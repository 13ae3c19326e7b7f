"""Trains the transformer from the base policy, stage by stage, and measures exactly where it is on the way."""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import LlamaForCausalLM, TrainerCallback

from uft.data.mixture import FeedbackDataset
from uft.stages import Budget

from ... import runs
from ...jobs import code_fingerprint
from ...runs import DEMONSTRATIONS, DOCUMENTS, PREFERENCES
from . import exact
from .policy import fresh_model, policy_of, tokenizer_of
from .world import World

BASE_SEED, BASE_RATE = 0, 3e-3


@dataclass(frozen=True)
class Scale:
    """steps        optimiser steps of every arm, all its stages together
    batch_size   examples of a step, whatever their kind
    base_steps   of the base policy, on documents
    points       measurements of a path
    beta         of the implicit reward against the base, in which all paths are measured
    """

    steps: int
    base_steps: int
    batch_size: int = 64
    points: int = 10
    beta: float = 0.3
    width: int = 48


@dataclass(frozen=True)
class PathStage:
    """share           of the arm's steps
    demonstrations, preferences   how many of each are in a step, on average, as shares of it
    reference       "base", or "start": the model before the stage
    """

    name: str
    objective: Any
    learning_rate: float
    share: float = 1.0
    demonstrations: float = 0.0
    preferences: float = 0.0
    reference: str = "base"


@dataclass(frozen=True)
class Plan:
    """One training run.  Its key is the hash of its content and of the code."""

    stages: tuple[PathStage, ...]
    seed: int
    scale: Scale
    world: World = field(default_factory=World)

    @property
    def key(self) -> str:
        return _key(asdict(self))

    def prefix(self, stages: int) -> Plan:
        return Plan(self.stages[:stages], self.seed, self.scale, self.world)


def _key(content: Any) -> str:
    text = json.dumps([content, code_fingerprint(Path(__file__))], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:20]


def load_base(world: World, scale: Scale, cache: Path) -> LlamaForCausalLM:
    """The base policy, trained on documents when it is first asked for, and kept in `cache`."""
    path = cache / "bases" / _key([asdict(world), scale.base_steps, scale.batch_size, scale.width])
    if not path.exists():
        count = scale.base_steps * scale.batch_size
        data = FeedbackDataset({DOCUMENTS: _named(world.draw_documents(count, BASE_SEED), DOCUMENTS)})
        model, budget = fresh_model(world, BASE_SEED, scale.width), Budget(steps=scale.base_steps)
        trainer = runs.fit(
            model, "sft", data, tokenizer_of(world), budget,
            learning_rate=BASE_RATE, batch_size=scale.batch_size, seed=BASE_SEED,
        )  # fmt: skip
        _kept(trainer.model, path)
    return LlamaForCausalLM.from_pretrained(path, dtype=torch.float32)


def _kept(model: LlamaForCausalLM, path: Path) -> None:
    """Written aside and renamed; when two processes arrive at once the later finds it there."""
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    model.save_pretrained(aside)
    try:
        aside.rename(path)
    except OSError:
        if not (path / "config.json").exists():
            raise
        shutil.rmtree(aside)


def base_policy(world: World, scale: Scale, cache: str | Path) -> Tensor:
    """[P, Y]: the reference of all exact quantities."""
    return policy_of(load_base(world, scale, Path(cache)), world)


def run_base(world: World, scale: Scale, cache: str) -> dict[str, Any]:
    """How near the base came to its documents; afterwards it is in `cache`."""
    policy, documents = base_policy(world, scale, cache), world.documents.log()
    return {
        "kl_from_documents": exact.sequence_kl(documents, policy).item(),
        **measured(world, policy, policy, scale.beta),
    }


def run_plan(plan: Plan, cache: str, *, keep_last: bool = False) -> dict[str, Any]:
    """Trains what is not cached yet and returns the record: per stage its objective, compute and path."""
    folder = Path(cache)
    base = load_base(plan.world, plan.scale, folder)
    reference = policy_of(base, plan.world)

    def train(stage: PathStage, model: LlamaForCausalLM, spent: float):
        path = _Path(plan, reference, max(2, round(plan.scale.points * stage.share)))
        kept = base if stage.reference == "base" else model
        trainer = runs.fit(
            _copied(model), stage.objective, _data(plan, stage), tokenizer_of(plan.world),
            Budget(steps=round(plan.scale.steps * stage.share)), learning_rate=stage.learning_rate,
            batch_size=plan.scale.batch_size, seed=plan.seed, reference=_copied(kept), callbacks=[path],
        )  # fmt: skip
        told = runs.told(trainer)
        del told["training"]
        return trainer.model, {
            "stage": stage.name, "learning_rate": stage.learning_rate, "path": path.points, **told,
            "measures": path.points[-1],
        }  # fmt: skip

    def load(at: Path) -> LlamaForCausalLM:
        return LlamaForCausalLM.from_pretrained(at, dtype=torch.float32)

    records = runs.run_stages(plan, _copied(base), folder / "stages", keep_last, train, load)
    return {
        "seed": plan.seed, "stages": records, "compute": runs.added_up(records), "measures": records[-1]["measures"],
    }  # fmt: skip


def _data(plan: Plan, stage: PathStage) -> FeedbackDataset:
    """As many examples as the stage draws: none is seen twice, so the data are the distribution."""
    world, draws = plan.world, plan.scale.steps * stage.share * plan.scale.batch_size
    whole, parts = stage.demonstrations + stage.preferences, {}
    for name, share, draw in (
        (DEMONSTRATIONS, stage.demonstrations, world.draw_demonstrations),
        (PREFERENCES, stage.preferences, world.draw_pairs),
    ):
        if share:
            parts[name] = _named(draw(math.ceil(draws * share / whole), plan.seed), name)
    return FeedbackDataset(parts)


def _named(examples: list, source: str) -> list:
    return [replace(example, source=source) for example in examples]


def _copied(model: LlamaForCausalLM) -> LlamaForCausalLM:
    copy = LlamaForCausalLM(model.config)
    copy.load_state_dict(model.state_dict())
    return copy


class _Path(TrainerCallback):
    """Measures before the first step and after some, the first of which lie close together."""

    def __init__(self, plan: Plan, reference: Tensor, points: int):
        self.plan, self.reference, self.wanted = plan, reference, points
        self.points: list[dict[str, float]] = []

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        self.steps = {round(state.max_steps * (k / self.wanted) ** 2) for k in range(1, self.wanted + 1)}
        self._measure(model, 0)

    def on_step_end(self, args, state, control, model=None, **kwargs):
        if state.global_step in self.steps:
            self._measure(model, state.global_step)

    def _measure(self, model, step: int) -> None:
        policy = policy_of(model, self.plan.world)
        found = measured(self.plan.world, policy, self.reference, self.plan.scale.beta)
        self.points.append({"step": step, **found})


def measured(world: World, policy: Tensor, base: Tensor, beta: float) -> dict[str, float]:
    """Everything exact that a figure or table shows of a policy.

    sft                      -log π of demonstrations, nats per token; also by whether preferences are about the prompt
    dpo                      DPO's loss against the base, nats per pair
    accuracy                 how often the chosen response has the higher implicit reward
    reward, reward_uncovered expected reward on prompts that preferences are and are not about
    kl_base, kl_from_base    KL(π ‖ base), KL(base ‖ π), nats per response, covered prompts; `_uncovered` on the others
    token_kl_base            the first of them in nats per token
    kl_optimal               KL(π ‖ π*), π* = base exp(reward / beta) / Z, covered prompts
    length, ended            tokens of a response, and how likely it ends
    """
    on, off = world.covered, ~world.covered
    ended = torch.tensor([response[-1] == world.vocabulary[0] for response in world.responses], dtype=torch.float64)
    best = exact.optimal_policy(base, world.reward, beta).logp
    found = {
        "sft": exact.sft_loss(world, policy),
        "sft_covered": exact.sft_loss(world, policy, on),
        "sft_uncovered": exact.sft_loss(world, policy, off),
        "dpo": exact.pairwise_loss(world, policy, base, beta),
        "accuracy": torch.tensor(exact.preferred_share(world, policy, base)),
        "reward": exact.expected(world.reward, policy, on),
        "reward_uncovered": exact.expected(world.reward, policy, off),
        "kl_base": exact.sequence_kl(policy, base, on),
        "kl_from_base": exact.sequence_kl(base, policy, on),
        "kl_base_uncovered": exact.sequence_kl(policy, base, off),
        "kl_from_base_uncovered": exact.sequence_kl(base, policy, off),
        "token_kl_base": exact.token_kl(world, policy, base, on),
        "kl_optimal": exact.sequence_kl(policy, best, on),
        "length": exact.expected(world.length, policy),
        "ended": exact.expected(ended, policy),
    }
    return {name: float(value) for name, value in found.items()}
