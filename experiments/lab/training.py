"""Trains an arm in the lab: stages from the base model of a seed, measured on the way and after every stage."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from transformers import LlamaForCausalLM, PreTrainedModel, TrainerCallback

from uft.collation import Collator
from uft.data.mixture import FeedbackDataset
from uft.feedback import Example
from uft.presets import make_objective
from uft.stages import Budget

from .. import runs
from ..expected_cost import expected_steps
from ..jobs import code_fingerprint
from ..runs import DEMONSTRATIONS, DOCUMENTS, PREFERENCES
from . import reinforcement
from .base import WIDTH, lab_config, load_base
from .data import demonstrations, documents, examples, preferences
from .measures import logp, measure, skill_tasks
from .reinforcement import Reinforcement
from .tokenizer import lab_tokenizer
from .world import MARKS, TEST, VALIDATION, make_world

PRIOR = "prior"  # what was known before, as evaluation data of a balancer


@dataclass(frozen=True)
class Scale:
    """How large the problem is.  The draws are those of the sequential design, supervised stage and then DPO; what
    they cost is the compute that every arm gets."""

    demonstrations: int
    preferences: int
    sft_draws: int
    preference_draws: int
    batch_size: int = 64
    per_operator: int = 64
    points: int = 6  # measurements along each stage, for the curves
    width: int = WIDTH  # of the model


@dataclass(frozen=True)
class LabStage:
    """One stage.

    objective      as `uft.presets.make_objective` takes it
    demonstrations, preferences   shares of the design's draws; their ratio is the mixture
    documents      replayed as in pretraining; a share of the design's draws of demonstrations
    budget         "examples": these draws; "rest": what is left of the design's FLOPs
    reference      "start": the model before the stage; "base"; "moving": the first, moved towards the policy;
                   "anew@0.6": the first, and the policy as it is when that share of the stage is done
    parallel       instead of all that: stages that each train an adapter of rank `lora` on the same model, which are
                   then added up by `merge`: "linear" (task arithmetic) or "ties"
    rl         instead of all that: a reward model on the preferences, and the policy trained against it
    """

    name: str
    objective: Any
    learning_rate: float
    demonstrations: float = 0.0
    preferences: float = 0.0
    budget: str = "examples"
    documents: float = 0.0
    reference: str = "start"
    lora: int = 0
    parallel: tuple[LabStage, ...] = ()
    merge: str = "linear"
    rl: Reinforcement | None = None


@dataclass(frozen=True)
class Plan:
    """One training run.  Its key is the hash of its content and of the code."""

    stages: tuple[LabStage, ...]
    seed: int
    variant: str
    scale: Scale

    @property
    def key(self) -> str:
        content = [asdict(self), code_fingerprint(Path(__file__))]
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:20]

    def prefix(self, stages: int) -> Plan:
        return Plan(self.stages[:stages], self.seed, self.variant, self.scale)


def lab_data(plan: Plan, stage: LabStage) -> FeedbackDataset:
    """The stage's mixture, in which one epoch is the design's draws times the stage's shares."""
    scale, parts, weights = plan.scale, {}, {}
    if stage.demonstrations:
        parts[DEMONSTRATIONS] = _rows(DEMONSTRATIONS, scale.demonstrations, plan.seed)
        weights[DEMONSTRATIONS] = stage.demonstrations * scale.sft_draws / scale.demonstrations
    if stage.documents:
        count = scale.demonstrations
        parts[DOCUMENTS] = _rows(DOCUMENTS, count, plan.seed)
        weights[DOCUMENTS] = stage.documents * scale.sft_draws / count
    if stage.preferences:
        parts[PREFERENCES] = _rows(PREFERENCES, scale.preferences, plan.seed, plan.variant)
        weights[PREFERENCES] = stage.preferences * scale.preference_draws / scale.preferences
    return FeedbackDataset(parts, weights)


@lru_cache(maxsize=8)
def _rows(source: str, count: int, seed: int, variant: str = "") -> list[Example]:
    world = make_world(seed)
    if source == DEMONSTRATIONS:
        rows = demonstrations(world, count, seed)
    elif source == DOCUMENTS:  # of the distribution of pretraining, none of the very documents
        rows = documents(world, count, f"replay {seed}")
    else:
        rows = preferences(world, variant, count, seed)
    return examples(rows, source)


def watched_data(plan: Plan) -> dict[str, FeedbackDataset]:
    """What a balancer may measure on: demonstrations of strings that training never draws, and facts."""
    tasks = [*skill_tasks(VALIDATION, 16), *skill_tasks(VALIDATION, 2, MARKS[0])]
    rows = [{"prompt": task.prompt, "completion": task.best} for task in tasks]
    facts = [{"text": f"{subject}:{value}"} for subject, value in make_world(plan.seed).facts_of(VALIDATION).items()]
    return {
        DEMONSTRATIONS: FeedbackDataset({DEMONSTRATIONS: examples(rows, DEMONSTRATIONS)}),
        PRIOR: FeedbackDataset({DOCUMENTS: examples(facts, DOCUMENTS)}),
    }


def watched_nll(model: PreTrainedModel, plan: Plan) -> dict[str, float]:
    """Nats per token of what a balancer may measure on, whether or not one did."""
    collate = Collator(lab_tokenizer().pad_token_id, (DEMONSTRATIONS, DOCUMENTS))
    found = {}
    for name, data in watched_data(plan).items():
        batch = collate(list(data))
        found[name] = -(logp(model, batch).sum() / batch.shifted.sum()).item()
    return found


def design_flops(plan: Plan) -> float:
    """What the sequential design costs, which every arm gets."""
    return _design_flops(Plan((), plan.seed, plan.variant, plan.scale))


@lru_cache(maxsize=64)
def _design_flops(plan: Plan) -> float:
    design = LabStage("design", "sft", 0.0, 1.0, 1.0)
    return runs.design_flops(LlamaForCausalLM(lab_config(plan.scale.width)), lab_data(plan, design), "una")


def run_plan(
    plan: Plan, cache: str, *, part: str = TEST, curves: bool = True, keep_last: bool = False
) -> dict[str, Any]:
    """Trains what is not cached yet and returns the record: per stage its configuration, compute, curve and measures.

    part        of the prompts and facts that measure: VALIDATION or TEST
    keep_last   also keep the last stage's weights, for plans that go on from there
    """
    bases = Path(cache) / "bases"
    base = load_base(plan.seed, plan.scale.width, bases)

    def train(stage: LabStage, model: LlamaForCausalLM, spent: float):
        return _train(plan, stage, model, base, spent, part, curves)

    def load(folder: Path) -> LlamaForCausalLM:
        return LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32)

    records = runs.run_stages(
        plan, load_base(plan.seed, plan.scale.width, bases), Path(cache) / "stages" / part, keep_last, train, load
    )
    if not plan.stages:
        records = [{"stage": "base", "measures": _measure(base, base, base, plan, part), "compute": {}}]
    return {
        "seed": plan.seed,
        "variant": plan.variant,
        "stages": records,
        "compute": runs.added_up(records),
        "measures": records[-1]["measures"],
    }


def _train(plan: Plan, stage: LabStage, model, base, spent: float, part: str, curves: bool):
    if stage.parallel:
        return _train_parallel(plan, stage, model, base, spent, part)
    if stage.rl is not None:
        return _reinforce(plan, stage, model, base, spent, part, curves)
    before, start = _copy(model), time.perf_counter()
    curve = _Curve(plan, base, before, part, plan.scale.points if curves else 0)
    trainer = _fit(plan, stage, model, base, spent, [curve])
    told = runs.told(trainer)
    told["compute"]["seconds"] -= curve.seconds
    return trainer.model, {
        "stage": stage.name,
        "learning_rate": stage.learning_rate,
        **told,
        "wall_seconds": time.perf_counter() - start,
        "measuring_seconds": curve.seconds,
        "curve": curve.points,
        "watched": watched_nll(trainer.model, plan),
        "measures": _measure(trainer.model, base, before, plan, part),
    }


def _fit(plan: Plan, stage: LabStage, model, base, spent: float, callbacks: Sequence[TrainerCallback]):
    scale, callbacks = plan.scale, list(callbacks)
    objective, data = make_objective(stage.objective), lab_data(plan, stage)
    watched = watched_data(plan) if objective.balancer is not None and objective.balancer.quantity else None
    reference = _copy(base if stage.reference == "base" else model)
    kind, _, share = stage.reference.partition("@")
    if kind == "moving":
        callbacks.append(MovingReference(reference))
    elif kind == "anew":
        callbacks.append(ReferenceAnew(reference, float(share)))
    elif kind not in ("start", "base"):
        raise ValueError(f"reference is {stage.reference!r}; want start, base, moving or anew@SHARE")
    return runs.fit(
        model, objective, data, lab_tokenizer(), _budget(plan, stage, objective, model, data, spent, watched),
        learning_rate=stage.learning_rate, batch_size=scale.batch_size, seed=plan.seed, reference=reference,
        callbacks=callbacks, lora=stage.lora, eval_data=watched,
    )  # fmt: skip


def _budget(plan: Plan, stage: LabStage, objective, model, data: FeedbackDataset, spent: float, watched) -> Budget:
    scale, balancer = plan.scale, objective.balancer
    if stage.budget == "rest":
        left = design_flops(plan) - spent
        if not objective.rests and balancer is None:
            return Budget(flops=left)
        measured = watched[DEMONSTRATIONS] if watched else None
        return Budget(steps=expected_steps(model, objective, data, scale.batch_size, left, measured))
    draws = (stage.demonstrations + stage.documents) * scale.sft_draws + stage.preferences * scale.preference_draws
    # where one of two kinds rests in every step, twice as many are drawn for as many to be trained on
    scheduled = any(callable(term.weight) for term in objective.terms)
    one_at_a_time = balancer.rests if balancer is not None else objective.rests and scheduled
    return Budget(examples=round(draws * (2 if one_at_a_time else 1)))


def _train_parallel(plan: Plan, stage: LabStage, model, base, spent: float, part: str):
    """Adapters trained side by side on copies of one model, which then gets all of them (PAFT, arXiv:2406.17923)."""
    start, trainers = time.perf_counter(), []
    for branch in stage.parallel:
        branch = replace(branch, lora=stage.lora)
        trainers.append(_fit(plan, branch, _copy(model, train=True), base, spent, []))
        spent += trainers[-1].record()["compute"]["flops"]
    told = [runs.told(trainer) for trainer in trainers]
    merged = merged_adapters(model, [trainer.model for trainer in trainers], stage.merge)
    return merged, {
        "stage": stage.name,
        "learning_rate": stage.learning_rate,
        "objective": [each["objective"] for each in told],
        "steps": sum(each["steps"] for each in told),
        "compute": runs.added_up(told),
        "training": [entry for each in told for entry in each["training"]],
        "wall_seconds": time.perf_counter() - start,
        "measuring_seconds": 0.0,
        "curve": [],
        "measures": _measure(merged, base, _copy(model), plan, part),
    }


def _reinforce(plan: Plan, stage: LabStage, model, base, spent: float, part: str, curves: bool):
    """A reward model and reinforcement learning against it, on the preferences alone."""
    scale, before = plan.scale, _copy(model)
    curve = _Curve(plan, base, before, part, scale.points if curves else 0)
    trained, record = reinforcement.train(
        model, _rows(PREFERENCES, scale.preferences, plan.seed, plan.variant), stage.rl, stage.learning_rate,
        draws=scale.preference_draws, flops=design_flops(plan) - spent if stage.budget == "rest" else None,
        batch_size=scale.batch_size, seed=plan.seed, callbacks=[curve],
    )  # fmt: skip
    record["compute"]["seconds"] -= curve.seconds
    return trained, {
        "stage": stage.name,
        "learning_rate": stage.learning_rate,
        **record,
        "wall_seconds": record["compute"]["seconds"] + curve.seconds,
        "measuring_seconds": curve.seconds,
        "curve": curve.points,
        "watched": watched_nll(trained, plan),
        "measures": _measure(trained, base, before, plan, part),
    }


def merged_adapters(model: PreTrainedModel, adapted: Sequence[PeftModel], how: str) -> PreTrainedModel:
    """The model with the changes of all the adapters that were trained on copies of it: "linear", their sum (task
    arithmetic, arXiv:2212.04089), or "ties" (arXiv:2306.01708), half of each change kept."""
    names = [f"branch{i}" for i in range(len(adapted))]
    together = get_peft_model(_copy(model, train=True), adapted[0].peft_config["default"], names[0])
    for name, trained in zip(names, adapted):
        if name != names[0]:
            together.add_adapter(name, trained.peft_config["default"])
        set_peft_model_state_dict(together, get_peft_model_state_dict(trained), adapter_name=name)
    # of the products: peft's "linear" and "ties" work on the factors, whose sums mix adapters
    ranks = sum(trained.peft_config["default"].r for trained in adapted)
    options = {"linear": {"combination_type": "cat"},
               "ties": {"combination_type": "ties_svd", "density": 0.5, "svd_rank": ranks}}[how]  # fmt: skip
    together.add_weighted_adapter(names, [1.0] * len(names), "all", **options)
    together.set_adapter("all")
    return together.merge_and_unload()


class MovingReference(TrainerCallback):
    """TR-DPO's soft update (arXiv:2404.09656, eq. 5): every so often the reference moves towards the policy."""

    def __init__(self, reference: PreTrainedModel, rate: float = 0.6, every: int = 32):
        self.reference, self.rate, self.every = reference, rate, every

    @torch.no_grad()
    def on_step_end(self, args, state, control, model=None, **kwargs):
        if state.global_step % self.every == 0:
            for theirs, ours in zip(self.reference.parameters(), model.parameters()):
                theirs.lerp_(ours, self.rate)


class ReferenceAnew(TrainerCallback):
    """The reference becomes the policy once, when this share of the steps is done: what a second stage would have."""

    def __init__(self, reference: PreTrainedModel, share: float):
        self.reference, self.share, self.done = reference, share, False

    @torch.no_grad()
    def on_step_end(self, args, state, control, model=None, **kwargs):
        if not self.done and state.global_step >= self.share * state.max_steps:
            self.reference.load_state_dict(model.state_dict())
            self.done = True


class _Curve(TrainerCallback):
    """Measures at a few evenly spaced steps, on an eighth of the prompts."""

    def __init__(self, plan: Plan, base, reference, part: str, points: int):
        self.plan, self.base, self.reference, self.part, self.wanted = plan, base, reference, part, points
        self.points: list[dict[str, Any]] = []
        self.seconds = 0.0  # spent here, not in training

    def on_train_begin(self, args, state, control, **kwargs):
        self.steps = {round(state.max_steps * k / self.wanted) for k in range(1, self.wanted)} if self.wanted else set()

    def on_step_end(self, args, state, control, model=None, **kwargs):
        if state.global_step in self.steps:
            start = time.perf_counter()
            few = max(4, self.plan.scale.per_operator // 8)
            model = getattr(model, "policy", model)  # reinforcement trains a critic beside it
            found = _measure(model, self.base, self.reference, self.plan, self.part, per_operator=few)
            self.points.append({"step": state.global_step, "of": state.max_steps, **found})
            self.seconds += time.perf_counter() - start


def _measure(model, base, reference, plan: Plan, part: str, per_operator: int | None = None) -> dict[str, float]:
    world = make_world(plan.seed)
    count = per_operator or plan.scale.per_operator
    return measure(model, base, reference, world, plan.variant, part=part, per_operator=count)


def _copy(model: LlamaForCausalLM, *, train: bool = False) -> LlamaForCausalLM:
    copy = LlamaForCausalLM(model.config)
    copy.load_state_dict(model.state_dict())
    return copy if train else copy.eval().requires_grad_(False)
