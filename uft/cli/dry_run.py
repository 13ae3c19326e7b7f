"""`uft train --dry-run`: everything is checked but the weights, which are not loaded, and nothing is written.

Data are read and tokenised as training would; sizes come from the model's configuration; cost is that of `uft.compute`
over the rows that would be drawn, memory that of `uft.memory`.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerBase
from transformers.integrations import get_reporting_integration_callbacks
from transformers.utils.peft_utils import find_adapter_config_file

from uft.checkpoint import RECORD, last_checkpoint
from uft.command_line import check_output
from uft.compute import Meter, Tally
from uft.config import UnifiedConfig
from uft.data.mixture import FeedbackDataset, MixtureSampler, load_feedback
from uft.feedback import Example
from uft.loading import idle_terms, usable
from uft.memory import STATES, estimate
from uft.models import is_peft
from uft.objective import Objective, weight_at
from uft.presets import make_objective
from uft.recipe import Recipe
from uft.rlhf.online_recipe import checked
from uft.stages import Budget, Stage, part_of
from uft.watching.samples import must_have_prompts

LOOKED_AT = 2000  # rows of each source whose cost is counted; the others are taken to cost as much
SHOWN = 240  # characters of a prompt and of a response


@dataclass(frozen=True)
class Expected:
    """What one stage would do."""

    steps: int
    draws: Mapping[str, float]  # rows of each source, over the whole stage
    tally: Tally  # likewise


def describe(plan: Recipe, tokenizer: PreTrainedTokenizerBase, online: Mapping[str, Any] | None = None) -> str:
    """What `uft train` would do with a recipe, as text; `online` is what a recipe says of answers in training.

    Raises what training would raise before its first step: `DataError`, `RecipeError`, ValueError, OSError.
    """
    _must_be_possible(plan)
    model = skeleton(plan.model, plan.args)
    load = {"max_length": plan.args.max_length, "on_bad_row": plan.args.on_bad_row, "cache": plan.args.data_cache}
    data, report = load_feedback(plan.train_dataset, tokenizer, **load)
    held_out = None
    if plan.eval_dataset is not None:
        held_out, eval_report = load_feedback(plan.eval_dataset, tokenizer, **load)
    if plan.args.samples and online is None and not plan.stages:
        must_have_prompts(plan.args.samples, held_out)
    lines = [_title("model"), *_model(plan, model), "", _title("data"), str(report)]
    if held_out is not None:
        lines += ["", "evaluation", str(eval_report)]
    lines += ["", _title("the first row of each source, as the model reads it"), *_rows(data, tokenizer)]
    if online is not None:
        checked(online)
        lines += ["", _title("training"), *_objective(make_objective(plan.objective), None)]
        lines += [f"online: {', '.join(f'{key} {value}' for key, value in online.items())}"]
        lines += ["steps, cost and memory follow from the answers, and are not estimated"]
    stages = plan.stages or ((Stage("train", plan.objective),) if online is None else ())
    flops = 0
    for stage in stages:
        lines += ["", _title(f"stage {stage.name}" if plan.stages else "training")]
        args = dataclasses.replace(plan.args, **stage.args) if stage.args else plan.args
        objective = make_objective(stage.objective)
        part = usable(part_of(data, stage.on), objective, args.max_length, tokenizer.bos_token_id)
        expected = expectation(model, objective, part, args, stage.budget)
        flops += expected.tally.flops
        lines += [*_objective(objective, part), *_steps(expected, args), *_memory(model, objective, part, args)]
    if len(stages) > 1:
        lines += ["", f"all stages together: {flops:.3g} FLOPs"]
    lines += ["", _title("output"), *_output(plan), "", "Nothing was trained or written: --dry-run."]
    return "\n".join(lines)


def _must_be_possible(plan: Recipe) -> None:
    """Raises ValueError and OSError for what training notices only once the model is there."""
    get_reporting_integration_callbacks(plan.args.report_to)
    check_output(plan.args.output_dir)


def skeleton(name: str, args: UnifiedConfig) -> nn.Module:
    """The model with its adapter and without weights, on the meta device.  Raises OSError where it is not found."""
    adapter = find_adapter_config_file(name)
    peft_config = args.peft_config()
    if adapter is not None:
        from peft import PeftConfig

        peft_config = PeftConfig.from_pretrained(name)
        name = peft_config.base_model_name_or_path
    config = AutoConfig.from_pretrained(name, trust_remote_code=args.trust_remote_code)
    if Path(name).is_dir() and not list(Path(name).glob("*.safetensors")):
        raise ValueError(f"model {name}: found no *.safetensors in the folder; want weights in that format")
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, trust_remote_code=args.trust_remote_code)
        if peft_config is not None:
            from peft import get_peft_model

            model = get_peft_model(model, peft_config)
    return model


def expectation(
    model: nn.Module, objective: Objective, data: FeedbackDataset, args: UnifiedConfig, budget: Budget
) -> Expected:
    """Steps, draws and cost of a stage; cost is that of the mean row of each source, so expected and not exact."""
    per_step = args.train_batch_size * args.gradient_accumulation_steps * args.world_size
    epoch = MixtureSampler(data.sizes, data.weights, args.seed).draws
    share = np.array(epoch) / sum(epoch)
    meter = Meter(model, objective, objective.needs_reference and args.reference not in ("cached", "none"))
    meter.fused = args.fused_head
    per_row = [_scaled(meter.of_examples(rows := _some(part)), 1 / len(rows)) for part in data.examples.values()]
    flops_per_step = per_step * sum(s * row["flops"] for s, row in zip(share, per_row))
    steps = _number_of_steps(args, budget, sum(epoch), per_step, flops_per_step)
    # the last step of an epoch is a short one
    whole, rest = divmod(steps, math.ceil(sum(epoch) / per_step))
    draws = share * (whole * sum(epoch) + min(rest * per_step, sum(epoch)))
    total = {name: sum(n * row[name] for n, row in zip(draws, per_row)) for name in per_row[0]}
    tally = Tally(**{name: round(n) for name, n in total.items()})
    if objective.needs_reference and args.reference == "cached":
        tally += _cache(meter, objective, data)
    return Expected(steps, dict(zip(data.sources, draws)), tally)


def _cache(meter: Meter, objective: Objective, data: FeedbackDataset) -> Tally:
    """What log-probabilities of the reference cost that are computed once, for every row."""
    passes = flops = 0.0
    for part in data.examples.values():
        rows = _some(part)
        wanted = [(e, r) for e in rows if e.kind in objective.kinds_with_reference for r in e.responses]
        passes += len(wanted) * len(part) / len(rows)
        flops += (meter.of_reference(wanted) if wanted else 0) * len(part) / len(rows)
    return Tally(reference_forwards=round(passes), flops=round(flops))


def _number_of_steps(args: UnifiedConfig, budget: Budget, epoch: int, per_step: int, flops_per_step: float) -> int:
    if budget.steps is not None:
        return budget.steps
    if budget.examples is not None:
        return max(1, round(budget.examples / per_step))
    if budget.flops is not None:
        return max(1, round(budget.flops / flops_per_step))
    if budget.epochs is None and args.max_steps > 0:
        return args.max_steps
    epochs = args.num_train_epochs if budget.epochs is None else budget.epochs
    return math.ceil(math.ceil(epoch / per_step) * epochs)


def _some(part: Any) -> list[Example]:
    """Rows of a source, evenly spaced."""
    return [part[int(i)] for i in np.linspace(0, len(part) - 1, min(len(part), LOOKED_AT)).astype(int)]


def _scaled(tally: Tally, factor: float) -> dict[str, float]:
    return {name: amount * factor for name, amount in vars(tally).items()}


# ---- what is printed ----


def _title(text: str) -> str:
    return f"── {text} " + "─" * max(0, 78 - len(text))


def _model(plan: Recipe, model: nn.Module) -> Iterator[str]:
    bare = model.get_base_model() if is_peft(model) else model
    total = sum(p.numel() for p in model.parameters())
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    how = f"adapter of {trained:,} ({trained / total:.2%})" if is_peft(model) else "all of them trained"
    yield f"{plan.model}: {type(bare).__name__}, {total:,} weights, {how}, {plan.args.dtype}"


def _rows(data: FeedbackDataset, tokenizer: Any) -> Iterator[str]:
    for name, part in data.examples.items():
        example = part[0]
        yield f"{name} ({example.kind}); what is trained on stands in ⟦ ⟧"
        if len(example.prompt):
            yield f"  prompt    {_cut(tokenizer.decode(example.prompt))}"
        chosen = {better for better, _ in example.preferences}
        for k, response in enumerate(example.responses):
            title = ("chosen" if k in chosen else "rejected") if example.preferences else "response"
            target = "" if example.preferences or math.isnan(response.target) else f"   (target {response.target:g})"
            yield f"  {title:<8}  {_marked(response, tokenizer)}{target}"


def _marked(response: Any, tokenizer: Any) -> str:
    mask = np.ones(len(response.tokens), dtype=bool) if response.in_loss is None else response.in_loss
    starts = [0, *(np.flatnonzero(np.diff(mask.astype(int))) + 1), len(mask)]
    parts = (
        ("⟦{}⟧" if mask[a] else "{}").format(tokenizer.decode(response.tokens[a:b]))
        for a, b in itertools.pairwise(starts)
    )  # fmt: skip
    return _cut("".join(parts))


def _cut(text: str) -> str:
    text = text.replace("\n", "⏎")
    return text if len(text) <= SHOWN else f"{text[: SHOWN // 2]} … {text[-SHOWN // 2 :]}"


def _objective(objective: Objective, data: FeedbackDataset | None) -> Iterator[str]:
    """A line per term; without data, rows are not counted."""
    sizes = {} if data is None else dict(zip(data.sources, data.sizes))
    for term, described in zip(objective.terms, objective.describe()):
        kinds = Objective((term,)).kinds
        rows = "" if data is None else f" ({sum(sizes[n] for n, k in data.kinds().items() if k & kinds):,} rows)"
        options = {k: v for k, v in described.items() if k not in ("name", "type", "on", "weight")}
        said = ", ".join(f"{key} {value}" for key, value in options.items())
        weight = f"{weight_at(term.weight, 0.0):g}" + (" at the start" if callable(term.weight) else "")
        yield f"{term.name}: weight {weight}, on {term.on}{rows}{', ' if said else ''}{said}"
    for name in idle_terms(objective, data) if data is not None else ():
        yield f"! term {name!r} has no rows, and no effect"


def _steps(expected: Expected, args: UnifiedConfig) -> Iterator[str]:
    tally = expected.tally
    batch = f"{args.train_batch_size} × {args.gradient_accumulation_steps} × {args.world_size}"
    yield f"{expected.steps:,} steps of {batch} rows (device × accumulation × ranks), rate {args.learning_rate:g}"
    yield "drawn: " + ", ".join(f"{n:,.0f} of {name}" for name, n in expected.draws.items())
    yield (
        f"about {tally.tokens:,} tokens, {tally.response_tokens:,} of them in the loss; {tally.flops:.3g} FLOPs, "
        f"{tally.reference_forwards:,} passes of the reference among them"
    )


def _memory(model: nn.Module, objective: Objective, data: FeedbackDataset, args: UnifiedConfig) -> Iterator[str]:
    longest = int(np.sort(data.lengths)[::-1][: args.train_batch_size].sum())
    tokens = longest if args.token_budget is None else min(longest, args.token_budget)
    passes = args.gradient_accumulation_steps * math.ceil(longest / tokens)
    reference = "none"
    if objective.needs_reference and args.reference != "none":
        adapter = args.reference == "adapter" or (args.reference == "auto" and is_peft(model))
        reference = args.reference if args.reference in ("frozen", "cached") else "adapter" if adapter else "frozen"
    optim = getattr(args.optim, "value", args.optim)
    if optim not in STATES:
        yield f"memory: not estimated, for what {optim} holds is not known"
        return
    dtype = getattr(torch, args.dtype) if args.dtype != "auto" else model.config.dtype or torch.float32
    try:
        found = estimate(
            model, tokens=tokens, lora_r=args.lora_r if is_peft(model) else 0, reference=reference, dtype=dtype,
            autocast=torch.bfloat16 if args.bf16 else torch.float16 if args.fp16 else None, optim=optim,
            gradient_checkpointing=args.gradient_checkpointing, fused_head=args.fused_head,
            packed=args.layout != "padded", passes=passes,
            sharding="ddp" if args.world_size > 1 else "none", ranks=args.world_size,
        )  # fmt: skip
    except (ValueError, AttributeError) as error:
        yield f"memory: not estimated ({error})"
        return
    yield f"memory of a device at most, for a pass of {tokens:,} tokens (the longest rows of a batch together):"
    yield from (f"  {line}" for line in found.table().splitlines())
    room, what = _room()
    if found.total > room:
        yield (
            f"! more than the {room / 2**30:.1f} GiB of {what}: a token_budget, gradient_checkpointing, use_peft or "
            "reference: cached need less"
        )


def _room() -> tuple[int, str]:
    if torch.cuda.is_available():
        return torch.cuda.get_device_properties(0).total_memory, torch.cuda.get_device_name(0)
    import psutil

    return psutil.virtual_memory().total, "this machine"


def _output(plan: Recipe) -> Iterator[str]:
    folder = Path(plan.args.output_dir)
    yield f"{folder}: model, README.md (card), run.json"
    if (folder / RECORD).exists():
        yield "! a finished run lies there, and would be written over"
    first = folder / plan.stages[0].name if plan.stages else folder
    if newest := last_checkpoint(str(first)):
        yield f"a checkpoint lies there: {newest}; " + (
            "training goes on from it" if plan.resume else "want --resume true to go on from it"
        )
    if plan.eval_dataset is None:
        yield "! no eval_dataset: nothing held out will be measured"
    elif plan.args.eval_strategy == "no":
        yield "eval_dataset is measured once, at the end; eval_strategy: steps measures it on the way"
