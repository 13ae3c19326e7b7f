"""Iterated rounds: the model answers prompts, the answers are labelled, it is trained on them beside the old data.

    model, lineages = run_rounds(
        "Qwen/Qwen3-0.6B", prompts, reward_model, {"instructions": demonstrations}, 3, args, tokenizer, "dpo_nll"
    )

Each round is a folder, whole or absent:

    round-00/responses.jsonl   prompt, response, tokens, ended, score: all that was written
             feedback.jsonl    what became of it: prompt, chosen, rejected | prompt, completion, score
             training/         run.json, and checkpoints where args save some
             model/            the policy after it, with its tokenizer
             lineage.json      where it comes from: parent model, data, labeller, seeds, counts, objective, compute

Started again, finished rounds are skipped, and an unfinished one goes on from what was labelled and its last
checkpoint; the result is that of one uninterrupted run.  [IRPO] Pang et al. 2024, arXiv:2404.19733, is this with pairs
that a verifier labels and likelihood of the chosen answer, each round's reference being the policy it begins with.
"""

from __future__ import annotations

import copy
import dataclasses
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from uft.checkpoint import last_checkpoint, publish
from uft.config import UnifiedConfig
from uft.data.mixture import FeedbackDataset, load_feedback
from uft.data.sources import Source
from uft.models import AdapterReference, FrozenReference, Reference, is_peft, load_with_adapter
from uft.objective import Objective
from uft.presets import make_objective
from uft.record import write_json
from uft.rlhf.labelling import Prompt
from uft.rlhf.lineage import LINEAGE, SETTINGS, begin, data_files, files_of, finished, parent_of, settings_of
from uft.rlhf.writing import RoundOptions, write_feedback
from uft.stages import save_after_stages
from uft.trainer import UnifiedTrainer

__all__ = ["RoundOptions", "run_rounds"]


def run_rounds(
    model: Any,
    prompts: Sequence[Prompt],
    label: Any,
    data: Any,
    rounds: int,
    args: UnifiedConfig,
    tokenizer: Any,
    objective: Any = "dpo_nll",
    *,
    options: RoundOptions | None = None,
    evaluate: Callable[[nn.Module, int], Mapping[str, float]] | None = None,
    labeller: str | None = None,
    peft_config: Any = None,
) -> tuple[nn.Module, list[dict[str, Any]]]:
    """The policy after the last round, and what lineage.json holds of each.  See the top of the file.

    model       path, hub id or model, which is then trained in place
    prompts     strings that a model goes on from, or messages
    label       see `uft.rlhf.labelling`
    data        what is trained on beside, as `load_feedback` takes it, or a `FeedbackDataset`; None for nothing
    args        of each round's training; args.output_dir is the folder of all rounds, round r has seed args.seed + r
    evaluate    (model, round) -> measures, kept in the lineage
    labeller    the name of `label` in records; by default its own

    Raises ValueError for rounds that are there already but were made otherwise, and `DataError` for a round in which no
    response says anything (all cut or tied).
    """
    if args.world_size > 1:
        raise ValueError(f"found {args.world_size} ranks; want one: rounds write their responses on one")
    if rounds < 1 or isinstance(prompts, str) or not len(prompts):
        raise ValueError(f"found {rounds} rounds and {len(prompts)} prompts; want at least 1, and a list")
    options = options or RoundOptions()
    objective, old = make_objective(objective), _old_data(data, tokenizer, args)
    labeller = labeller or getattr(label, "__qualname__", type(label).__qualname__)
    run = _Rounds(
        model, list(prompts), label, labeller, old, args, tokenizer, objective, options, evaluate, peft_config,
        settings_of(prompts, labeller, old, args, objective, options, model),
        _base(model, args) if options.reference == "base" else None,
    )  # fmt: skip
    lineages = []
    for r in range(rounds):
        if not (run.folder(r) / LINEAGE).exists():
            run.round(r)
        lineages.append(finished(run.folder(r), run.settings))
    # always from the disk, so that it is the same after an interruption
    return _load(run.parent(rounds), args), lineages


@dataclass(frozen=True)
class _Rounds:
    """What all rounds of a run have in common."""

    model: Any
    prompts: list[Prompt]
    label: Any
    labeller: str
    old: FeedbackDataset | None
    args: UnifiedConfig
    tokenizer: Any
    objective: Objective
    options: RoundOptions
    evaluate: Callable[[nn.Module, int], Mapping[str, float]] | None
    peft_config: Any
    settings: dict[str, Any]
    base: nn.Module | None

    def folder(self, r: int) -> Path:
        return Path(self.args.output_dir) / _name(r)

    def parent(self, r: int) -> Any:
        """The model that round r begins with."""
        return self.folder(r - 1) / "model" if r else self.model

    def round(self, r: int) -> None:
        """Makes the folder of round r, or the rest of it."""
        aside = self.folder(r).with_suffix(".partial")
        begin(aside, self.settings)
        policy, written = _load(self.parent(r), self.args), aside / "written.json"
        if not written.exists():  # it is the last of what is labelled
            seed = [self.args.seed, r]
            made = write_feedback(policy, self.prompts, self.label, self.tokenizer, aside, self.options, seed)
            write_json(written, made)
        made = json.loads(written.read_text())
        files = self.feedback_files(aside, r)
        train, dropped = _mixture(self.old, files, self.tokenizer, self.args, self.options.share)
        trainer = UnifiedTrainer(
            model=policy,
            objective=self.objective,
            args=dataclasses.replace(self.args, output_dir=str(aside / "training"), seed=self.args.seed + r),
            train_dataset=train,
            processing_class=self.tokenizer,
            reference=_reference(policy, self.base),
            peft_config=None if is_peft(policy) else copy.deepcopy(self.peft_config),
        )
        trainer.train(resume_from_checkpoint=last_checkpoint(aside / "training"))
        save_after_stages(trainer.model, (), str(aside / "model"))
        self.tokenizer.save_pretrained(aside / "model")
        training = trainer.record()["compute"]
        lineage = {
            "round": r,
            "seed": self.args.seed + r,
            "parent": parent_of(self.parent(r), self.settings),
            "labeller": self.labeller,
            "counts": made["counts"] | {"dropped": dropped},
            "scores": made["scores"],
            "data": data_files(self.old, aside / "responses.jsonl", files),
            "rows": dict(zip(train.sources, train.sizes)),
            "weights": dict(zip(train.sources, train.weights)),
            "objective": {"name": self.objective.name, "terms": self.objective.describe()},
            "options": dataclasses.asdict(self.options),
            "model": files_of(aside / "model"),
            "compute": {"writing": made["compute"], "training": training,
                        "flops": made["compute"]["flops"] + training.get("flops", 0)},
            "measures": dict(self.evaluate(trainer.model, r)) if self.evaluate is not None else {},
            "settings": self.settings,
        }  # fmt: skip
        write_json(aside / LINEAGE, lineage)
        written.unlink()
        (aside / SETTINGS).unlink()
        publish(aside, self.folder(r))

    def feedback_files(self, aside: Path, r: int) -> dict[str, Path]:
        """By name: the feedback that round r trains on, the own last."""
        earlier = range(r if self.options.keep == "all" else 0)
        files = {_name(k): self.folder(k) / "feedback.jsonl" for k in earlier}
        return files | {_name(r): aside / "feedback.jsonl"}


def _name(r: int) -> str:
    return f"round-{r:02d}"


# ---- data ----


def _old_data(data: Any, tokenizer: Any, args: UnifiedConfig) -> FeedbackDataset | None:
    if data is None or isinstance(data, FeedbackDataset):
        return data
    return load_feedback(data, tokenizer, args.max_length, on_bad_row=args.on_bad_row, cache=args.data_cache)[0]


def _mixture(
    old: FeedbackDataset | None, files: Mapping[str, Path], tokenizer: Any, args: UnifiedConfig, share: float | None
) -> tuple[FeedbackDataset, int]:
    """Old data and feedback of rounds, and how many rows of the last of them could not be used."""
    sources = [Source(name, str(path), on_bad_row="drop") for name, path in files.items()]
    new, report = load_feedback(sources, tokenizer, args.max_length)
    dropped = len(report.sources[-1].bad_rows)
    if old is None:
        return new, dropped
    if taken := set(old.sources) & set(new.sources):
        raise ValueError(f"data: found a data set called {min(taken)!r}; want another name, that of a round is taken")
    weights = dict(zip(old.sources, old.weights))
    if share is not None:
        draws = sum(size * weight for size, weight in zip(old.sizes, old.weights))
        weights |= dict.fromkeys(new.sources, share / (1 - share) * draws / len(new))
    return FeedbackDataset({**old.examples, **new.examples}, weights), dropped


# ---- models ----


def _load(model: Any, args: UnifiedConfig) -> nn.Module:
    """A path, a hub id or a model as one that is to be trained."""
    return load_with_adapter(
        str(model) if isinstance(model, Path) else model, trained=True, dtype=args.dtype,
        attn_implementation=args.attn_implementation, trust_remote_code=args.trust_remote_code,
    )  # fmt: skip


def _base(model: Any, args: UnifiedConfig) -> nn.Module:
    """The first policy, kept as it is."""
    return copy.deepcopy(model) if isinstance(model, nn.Module) else _load(model, args)


def _reference(policy: nn.Module, base: nn.Module | None) -> Reference | None:
    """None stands for the policy as it is, in the form that args say."""
    if base is None:
        return None
    # weights under an adapter never change, so the base needs no copy
    return AdapterReference() if is_peft(policy) and not is_peft(base) else FrozenReference(base)
