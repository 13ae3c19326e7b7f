"""Stages: a stage is data, an objective, a reference and a budget.

Sequential training is two stages (supervised, then preferences against the supervised model); unified training is
one.  Both run through the same `UnifiedTrainer`, so that nothing differs but the list of stages.

    SEQUENTIAL = [Stage("sft", "sft", on=("demonstrations",)), Stage("dpo", "dpo", on=("pairs",), reference="previous")]
    UNIFIED = [Stage("unified", "dpo_nll", on=("demonstrations", "pairs"))]
    model, records = run_stages(model, SEQUENTIAL, data, args, tokenizer)
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn
from transformers import set_seed

from uft.checkpoint import last_checkpoint
from uft.config import UnifiedConfig
from uft.data.mixture import FeedbackDataset, MixtureSampler
from uft.loading import loading_options
from uft.models import FrozenReference, is_peft, load_policy, merged
from uft.objective import Objective
from uft.record import write_json
from uft.trainer import UnifiedTrainer
from uft.watching.places import places_of
from uft.watching.samples import has_prompts

REFERENCES = ("previous", "base")


@dataclass(frozen=True)
class Budget:
    """How long a stage trains.  Exactly one of these; None means what the arguments say (max_steps or epochs).

    steps      optimiser steps
    flops      floating-point operations, reference passes included; the nearest whole step
    examples   examples drawn from all sources together; the nearest whole step
    epochs     passes over the mixture
    """

    steps: int | None = None
    flops: float | None = None
    examples: int | None = None
    epochs: float | None = None

    def __post_init__(self):
        given = [name for name, value in vars(self).items() if value is not None]
        if len(given) > 1:
            raise ValueError(f"a budget is one number; got {', '.join(given)}")
        if any(value is not None and value <= 0 for value in vars(self).values()):
            raise ValueError(f"a budget must be positive; got {self}")

    def apply(self, trainer: UnifiedTrainer) -> None:
        """Sets the trainer's max_steps (or epochs) to what this budget buys with its data, batch and objective."""
        args = trainer.args
        batch = args.train_batch_size * args.gradient_accumulation_steps * args.world_size
        if self.steps is not None:
            args.max_steps = self.steps
        elif self.examples is not None:
            args.max_steps = max(1, round(self.examples / batch))
        elif self.epochs is not None:
            args.max_steps, args.num_train_epochs = -1, self.epochs
        elif self.flops is not None:
            args.max_steps = steps_within(trainer, self.flops)


def steps_within(trainer: UnifiedTrainer, flops: float) -> int:
    """The number of optimiser steps whose cost is nearest to `flops`, found by going through the sampler's order."""
    args, data = trainer.args, trainer.train_dataset
    if trainer.objective.rests or trainer.objective.balancer is not None:
        raise ValueError(
            f"found a budget of FLOPs and objective {trainer.objective.name!r}, whose weights decide in training what "
            "a step costs; want a budget of steps, examples or epochs"
        )
    flops -= trainer.reference_cache.cost(data)[1]
    cost = np.array([trainer.meter.of_examples([example]).flops for example in data], dtype=np.float64)
    sampler: MixtureSampler = trainer._get_train_sampler(data)
    batch = args.train_batch_size * args.world_size
    spent, steps, epoch = 0.0, 0, 0
    while True:
        sampler.set_epoch(epoch)
        order = cost[np.fromiter(sampler, dtype=np.int64)]
        if args.dataloader_drop_last:
            order = order[: len(order) // batch * batch]
        # the last micro-batches of an epoch form a short step, as in training
        micro = np.add.reduceat(order, np.arange(0, len(order), batch))
        per_step = np.add.reduceat(micro, np.arange(0, len(micro), args.gradient_accumulation_steps))
        total = spent + per_step.cumsum()
        if total[-1] >= flops:
            k = int(np.searchsorted(total, flops))
            before = total[k - 1] if k else spent
            return max(1, steps + k + int(total[k] - flops < flops - before))
        spent, steps, epoch = float(total[-1]), steps + len(per_step), epoch + 1


@dataclass(frozen=True)
class Stage:
    """One stage of training.

    name        its folder and its name in records
    objective   a preset's name, a mapping of terms or an `Objective`
    on          names of the data sets it trains on; empty means all
    reference   "previous": the policy as it is when the stage begins; "base": as it was before the first stage
    budget      see `Budget`
    args        fields of UnifiedConfig that differ in this stage, such as learning_rate
    boundary    what happens to an earlier stage's adapter: "merge" (fold it into the weights and start a new one) or
                "keep" (train on, with a frozen copy as the reference)
    """

    name: str
    objective: str | Mapping[str, Any] | Objective
    on: tuple[str, ...] = ()
    reference: str = "previous"
    budget: Budget = Budget()
    args: Mapping[str, Any] = field(default_factory=dict)
    boundary: str = "merge"

    def __post_init__(self):
        if self.reference not in REFERENCES:
            raise ValueError(f"stage {self.name!r}: reference is {self.reference!r}; want {' or '.join(REFERENCES)}")
        if self.boundary not in ("merge", "keep"):
            raise ValueError(f"stage {self.name!r}: boundary is {self.boundary!r}; want merge or keep")


def run_stages(
    model: Any,
    stages: Sequence[Stage],
    data: Mapping[str, Any] | FeedbackDataset,
    args: UnifiedConfig,
    tokenizer: Any,
    *,
    eval_data: Any = None,
    peft_config: Any = None,
    after: Callable[[Stage, nn.Module], Mapping[str, float]] | None = None,
    resume: bool = False,
    **trainer_options: Any,
) -> tuple[nn.Module, list[dict[str, Any]]]:
    """Runs the stages one after the other, each in its own folder below args.output_dir.

    eval_data   what each stage evaluates on, less what bears the name of a data set that the stage is not on
    after       measures the model after each stage; its numbers go into the stage's record under "measures"
    resume      go on from the newest whole checkpoint of the stage that was interrupted; finished stages are read back

    Returns the model after the last stage and one record per stage; they are also written to `run.json`.
    """
    set_seed(args.seed)
    policy = load_policy(model, **loading_options(args))
    peft_config = peft_config or args.peft_config()
    base = None
    if any(stage.reference == "base" for stage in stages[1:]):
        base = FrozenReference(copy.deepcopy(policy))
    places, records = places_of(policy, stages, data, args, part_of), []
    for position, stage in enumerate(stages):
        if position and stage.boundary == "merge":
            policy = merged(policy)
        evaluated = _evaluated(eval_data, data, stage.on)
        own = dict(stage.args) | ({"eval_strategy": "no"} if evaluated is None else {})
        if eval_data is not None and not _answers(evaluated):
            own["samples"] = 0
        own["push_to_hub"] = False  # what is shared is the model after the last stage
        stage_args = dataclasses.replace(args, output_dir=str(Path(args.output_dir) / stage.name), **own)
        trainer = UnifiedTrainer(
            model=policy,
            objective=stage.objective,
            args=stage_args,
            train_dataset=part_of(data, stage.on),
            eval_dataset=evaluated,
            processing_class=tokenizer,
            reference=base if position and stage.reference == "base" else None,
            peft_config=None if is_peft(policy) else peft_config,
            **trainer_options,
        )
        trainer.watched.place = places[position]
        stage.budget.apply(trainer)
        checkpoint = last_checkpoint(stage_args.output_dir) if resume else None
        trainer.train(resume_from_checkpoint=checkpoint)
        policy = trainer.model
        record = {"stage": stage.name, **trainer.record()}
        if after is not None:
            record["measures"] = dict(after(stage, policy))
        records.append(record)
        write_json(Path(args.output_dir) / "run.json", {"stages": records})
    return policy, records


def save_after_stages(model: nn.Module, stages: Sequence[Stage], folder: str) -> None:
    """Saves what loads again by itself.

    An adapter is saved as one only while it stands on the base model's own weights; on the weights of an earlier
    stage, which are saved nowhere else, it is merged into them.
    """
    if is_peft(model) and any(stage.boundary == "merge" for stage in stages[1:]):
        model = merged(model)
    # without the frozen copy that was the reference
    model.save_pretrained(folder, **({"selected_adapters": [model.active_adapter]} if is_peft(model) else {}))


def _evaluated(eval_data: Any, data: Any, on: tuple[str, ...]) -> Any:
    """The evaluation data of a stage; None if there is none."""
    if not on or not isinstance(eval_data, (Mapping, FeedbackDataset)):
        return eval_data
    names, trained = _names(eval_data), _names(data)
    kept = tuple(name for name in names if name in on or name not in trained)
    return part_of(eval_data, kept) if kept else None


def _answers(evaluated: Any) -> bool:
    """Whether the evaluation data of a stage hold prompts; of data that are not read yet, whether there are any."""
    return has_prompts(evaluated) if isinstance(evaluated, FeedbackDataset) else evaluated is not None


def _names(data: Mapping[str, Any] | FeedbackDataset) -> Sequence[str]:
    return data.sources if isinstance(data, FeedbackDataset) else list(data)


def part_of(data: Mapping[str, Any] | FeedbackDataset, names: tuple[str, ...]) -> Any:
    """The data sets of these names; all where none is named.  Raises ValueError for one that is not there."""
    if not names:
        return data
    for name in names:
        if name not in _names(data):
            raise ValueError(f"a stage asks for data set {name!r}; there are {', '.join(_names(data))}")
    if not isinstance(data, FeedbackDataset):
        return {name: data[name] for name in names}
    weights = dict(zip(data.sources, data.weights))
    return FeedbackDataset({n: data.examples[n] for n in names}, {n: weights[n] for n in names}, data.origins)
