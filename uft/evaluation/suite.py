"""The whole evaluation: reads the data once, measures a model on them, compares with an earlier evaluation.

report = evaluate(model, tokenizer, EvaluationConfig.read("eval.yaml"), reference=base, before="runs/base")
report.write("runs/mine")
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from numbers import Real
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn
from transformers import PreTrainedTokenizerBase

from uft.collation import Collator
from uft.data.mixture import FeedbackDataset
from uft.evaluation.config import PROMPTS, EvaluationConfig, GenerationSettings
from uft.evaluation.data import EvaluationData, read_data
from uft.evaluation.measuring import Measuring, Metrics
from uft.evaluation.report import Report, Samples, changes, must_be_the_same
from uft.head import causal_model, fuse_head, has_fused_head, is_peft
from uft.loading import lay_out
from uft.models import AdapterReference, FrozenReference, Reference
from uft.record import environment
from uft.undisturbed import undisturbed

if TYPE_CHECKING:  # which imports this package
    from uft.rlhf.sampling import Rewards


def evaluate(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    config: EvaluationConfig,
    reference: nn.Module | Reference | None = None,
    before: Report | Mapping[str, Any] | str | Path | None = None,
    *,
    judge: Callable | None = None,
    data: EvaluationData | None = None,
    collate: Collator | None = None,
    rewards: Rewards | None = None,
) -> Report:
    """Everything the configuration asks for, of one model.  The model is left as it was, but for a fused head and an
    attention that can read packed rows, which change nothing that it computes.

    reference   what implicit rewards and divergences are relative to: a model, which is frozen, or a `Reference`; by
                default the base model under an adapter, and none for a full model
    before      an earlier evaluation of the same samples, or its evaluation.json: forgetting and backward transfer are
                reported against it
    judge       for `uft.evaluation.judge.win_rate`: our answers against those of `before`
    data        what `read_data` gave for this configuration, where several models are evaluated
    collate     how batches are laid out, where the model has been prepared already (by a trainer)
    rewards     a reward model, whose ranking of the pairs of `harmlessness` is measured beside the policy's

    Raises ValueError where a divergence has no reference, and where `before` is of other samples or of answers that
    were asked for or judged in another way; `BadRow` and `DataError` for data; all of them before any model runs.
    """
    reference = as_reference(model, reference)
    if config.divergence and reference is None:
        raise ValueError("divergence needs a reference; want a model, or a policy with an adapter")
    if isinstance(reference, FrozenReference):
        _check_vocabulary(model, reference.model, len(tokenizer), bool(config.divergence))
    data = read_data(config, tokenizer) if data is None else data
    if before is not None:
        before = Report.of(before)
        must_be_the_same(data.ids(), before, whole=False)
        _must_be_asked_alike(config, before)
    if judge is not None and before is None:
        raise ValueError("a judge compares two models' answers; want `before`")
    others = [reference.model] if isinstance(reference, FrozenReference) else []
    with undisturbed(model, *others):
        if collate is None:
            collate = prepared(model, reference, tokenizer, config)
        measuring = Measuring(model, tokenizer, config, reference, collate, rewards)
        metrics, samples = measuring.all(data)
    if before is not None:
        metrics |= changes(samples, before)
        if judge is not None:
            metrics |= _judged(samples, before, judge)
    sections = list(dict.fromkeys(name.partition("/")[0] for name in metrics))
    metrics = {name: metrics[name] for name in sorted(metrics, key=lambda n: sections.index(n.partition("/")[0]))}
    info = {"reference": _name(reference), "config": _plain(config), **environment()}
    info["model"] = getattr(causal_model(model).config, "_name_or_path", "") or type(causal_model(model)).__name__
    if before is not None:
        info["compared_with"] = before.info.get("model", "an earlier evaluation")
    return Report(metrics, samples, info, None if before is None else before.metrics)


def as_reference(model: nn.Module, reference: nn.Module | Reference | None) -> Reference | None:
    """Raises ValueError for a reference that is the model itself."""
    if isinstance(reference, Reference):
        return reference
    if reference is None:
        return AdapterReference() if is_peft(model) else None
    if {id(p) for p in model.parameters()} & {id(p) for p in reference.parameters()}:
        raise ValueError("reference is the model that is evaluated; want another one")
    return FrozenReference(reference)


def _must_be_asked_alike(config: EvaluationConfig, before: Report) -> None:
    """Raises ValueError where answers were generated, or are judged, in another way than those of `before`; a report
    without its configuration is taken at its word."""
    then, now = before.info.get("config"), _plain(config)
    if not isinstance(then, Mapping):
        return
    sections = [name for name in PROMPTS if name != "divergence" and getattr(config, name)]
    plain = _plain(dataclasses.asdict(GenerationSettings()))
    ways = [("generation", *(plain | each.get("generation", {}) for each in (then, now)))] if sections else []
    for section in sections:
        for name, each in now[section].items():
            ways.append((f"{section}.{name}", _way(then.get(section, {}).get(name, {})), _way(each)))
    for where, theirs, ours in ways:
        for key in ours:
            if key != "batch_size" and theirs.get(key) != ours[key]:
                raise ValueError(
                    f"{where}: the earlier evaluation has {key} {theirs.get(key)!r} and this one {ours[key]!r}; want "
                    "the same before and after, or what differs would count as forgetting"
                )


def _way(prompts: Mapping[str, Any]) -> dict[str, Any]:
    """How the prompts of a set are put and their answers judged."""
    own = {key: prompts.get(key) for key in ("verify", "options", "should_refuse")}
    return own | {key: bool(prompts.get("source", {}).get(key)) for key in ("chat", "special_tokens")}


def _check_vocabulary(model: nn.Module, reference: nn.Module, tokens: int, divergence: bool) -> None:
    """Embeddings may be padded, so those of two models with one tokenizer may differ in number."""
    ours, theirs = (causal_model(m).get_input_embeddings().weight.shape[0] for m in (model, reference))
    if theirs < tokens or (divergence and theirs != ours):
        why = "a divergence compares the same tokens" if theirs >= tokens else f"the tokenizer has {tokens:,}"
        raise ValueError(f"reference: found a vocabulary of {theirs:,} and {ours:,} in the model; {why}")


def prepared(
    model: nn.Module, reference: Reference | None, tokenizer: PreTrainedTokenizerBase, config: EvaluationConfig
) -> Collator:
    """How batches are laid out, once heads are fused and rows packed where the configuration allows it and the models
    can."""
    for each in [model, *([reference.model] if isinstance(reference, FrozenReference) else [])]:
        if config.fused_head and not has_fused_head(each):
            fuse_head(each)
    pad = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    return Collator(pad, packed=lay_out(model, reference, config))  # which reads max_length and layout alone


def _judged(samples: Samples, before: Report, judge: Callable) -> Metrics:
    from uft.evaluation.judge import win_rate

    found: Metrics = {}
    for section, columns in samples.items():
        if "text" in columns:
            theirs = dict(zip(before.samples[section]["id"], before.samples[section]["text"]))
            texts = [theirs[each] for each in columns["id"]]
            rates = win_rate(columns["prompt"], columns["text"], texts, judge)
            rates = dataclasses.asdict(rates) if dataclasses.is_dataclass(rates) else rates
            found |= {f"{section}/judge/{name}": float(v) for name, v in rates.items() if isinstance(v, Real)}
    return found


def _name(reference: Reference | None) -> str | None:
    if reference is None:
        return None
    if isinstance(reference, FrozenReference):
        found = causal_model(reference.model)
        return getattr(found.config, "_name_or_path", "") or type(found).__name__
    return "the same model without its adapter" if getattr(reference, "adapter", None) is None else "an earlier adapter"


def _plain(value: Any) -> Any:
    """A configuration as JSON holds it: data in memory by what they are."""
    if isinstance(value, FeedbackDataset):
        return repr(value)
    if dataclasses.is_dataclass(value):
        kept = [(f, getattr(value, f.name)) for f in dataclasses.fields(value)]
        return {f.name: _plain(v) for f, v in kept if f.name != "data" and v not in (None, f.default, {})}
    if isinstance(value, Mapping):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(v) for v in value]
    return value if isinstance(value, (str, int, float, bool, type(None))) else str(value)
