"""Each section of an evaluation: its metrics, and what was found sample by sample."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from torch import nn
from transformers import PreTrainedTokenizerBase

from uft.collation import Collator
from uft.data.mixture import FeedbackDataset
from uft.evaluation.config import EvaluationConfig
from uft.evaluation.data import EvaluationData, check_of, example_ids, should_refuse
from uft.evaluation.divergence import divergence_along
from uft.evaluation.generation import Generation, behaviour, generate, is_refusal, refusal_rates
from uft.evaluation.likelihood import demonstration_likelihood, imitated
from uft.evaluation.preference import pair_preference
from uft.evaluation.prompts import Prompt
from uft.evaluation.report import Samples
from uft.evaluation.safety import group_of, harmlessness, refusal_by_group
from uft.evaluation.scoring import Scores, score_data
from uft.evaluation.verifiable import accuracy
from uft.models import Reference

if TYPE_CHECKING:  # which imports this package
    from uft.rlhf.sampling import Rewards

Metrics = dict[str, float]
Columns = dict[str, list]
PromptSets = Mapping[str, Sequence[Prompt]]
Written = dict[str, list[Generation]]


@dataclass(frozen=True)
class Measuring:
    """A model in evaluation mode, and what it is measured with; `rewards` also judge the pairs of `harmlessness`."""

    model: nn.Module
    tokenizer: PreTrainedTokenizerBase
    config: EvaluationConfig
    reference: Reference | None
    collate: Collator
    rewards: Rewards | None = None

    def all(self, data: EvaluationData) -> tuple[Metrics, Samples]:
        metrics: Metrics = {}
        samples: Samples = {}

        def add(section: str, found: Metrics, rows: Columns | None = None) -> None:
            metrics.update({f"{section}/{name}": value for name, value in found.items()})
            if rows is not None:
                samples[section] = rows

        if data.demonstrations is not None:
            add("demonstrations", *self.demonstrations(data.demonstrations))
        if data.pairs is not None:
            add("pairs", *self.pairs(data.pairs))
        if data.harmlessness is not None:
            add("harmlessness", *self.harmlessness(data.harmlessness, data.groups))
        for name, each in self.config.divergence.items():
            for along in each.along:
                add(f"divergence/{name}/{along}", self.divergence(name, along, data))
        if sets := data.prompts.get("verifiable"):
            add("verifiable", *self.verifiable(sets))
        if sets := data.prompts.get("refusals"):
            add("refusals", *self.refusals(sets))
        if sets := data.prompts.get("prompts"):
            add("prompts", *self.prompts(sets))
        return metrics, samples

    def _scored(self, data: FeedbackDataset, reference: Reference | None, label: str) -> Scores:
        budget = self.config.token_budget
        return score_data(self.model, data, self.collate, reference=reference, token_budget=budget, label=label)

    # -- by likelihood --

    def demonstrations(self, data: FeedbackDataset) -> tuple[Metrics, Columns]:
        scores, ids = self._scored(data, None, "demonstrations"), example_ids(data)
        rows = imitated(scores)
        columns = {"nll": (-scores.logp[rows]).tolist(), "tokens": scores.length[rows].astype(int).tolist()}
        return demonstration_likelihood(scores), {"id": _several(ids, scores.example[rows])} | columns

    def pairs(self, data: FeedbackDataset) -> tuple[Metrics, Columns]:
        scores, ids = self._scored(data, self.reference, "pairs"), example_ids(data)
        better, worse = scores.preferences.T
        columns: Columns = {
            "id": _several(ids, scores.example[better]),
            "correct": (scores.logp[better] > scores.logp[worse]).tolist(),
            "options": [2] * len(better),
            "logp_chosen": scores.logp[better].tolist(),
            "logp_rejected": scores.logp[worse].tolist(),
        }
        if scores.reference_logp is not None:
            columns["reference_logp_chosen"] = scores.reference_logp[better].tolist()
            columns["reference_logp_rejected"] = scores.reference_logp[worse].tolist()
        return pair_preference(scores, self.config.beta), columns

    def harmlessness(self, data: FeedbackDataset, of_examples: Sequence[str]) -> tuple[Metrics, Columns]:
        scores, ids = self._scored(data, self.reference, "harmlessness"), example_ids(data)
        pairs, reference = scores.preferences, scores.reference_logp
        better, worse = pairs.T
        by = {"likelihood": scores.logp[pairs]}
        if reference is not None:
            by["rewards"] = scores.logp[pairs] - reference[pairs]
        if self.rewards is not None:
            flat = np.array([value for each in self.rewards(list(data[:])) for value in each])
            by["reward_model"] = flat[pairs]
        groups = [of_examples[i] for i in scores.example[better]]
        columns: Columns = {
            "id": _several(ids, scores.example[better]), "group": groups, "options": [2] * len(pairs),
            "correct": (scores.logp[better] > scores.logp[worse]).tolist(),
            **{f"{name}_{side}": values[:, k].tolist() for name, values in by.items()
               for k, side in enumerate(("harmless", "harmful"))},
        }  # fmt: skip
        return harmlessness(by, groups if len(set(groups)) > 1 else None), columns

    def divergence(self, name: str, along: str, data: EvaluationData) -> Metrics:
        settings = self.config.generation
        return divergence_along(
            self.model, self.reference, along, self.collate, data=data.responses.get(name), prompts=data.tokens[name],
            eos=self.tokenizer.eos_token_id, max_new_tokens=settings.max_new_tokens, seed=settings.seed,
            batch_size=settings.batch_size, token_budget=self.config.token_budget, label=f"divergence {name}",
        )  # fmt: skip

    # -- by generating --

    def answers(self, section: str, sets: PromptSets) -> tuple[Written, Metrics, Columns]:
        """What is written to each set; how, over all and by set where there are several; and all of it as columns."""
        settings, written = dataclasses.asdict(self.config.generation), {}
        for name, prompts in sets.items():
            meant = getattr(self.config, section)[name].source.special_tokens
            asked = [prompt.prompt for prompt in prompts]
            written[name] = list(generate(self.model, self.tokenizer, asked, special_tokens=meant, **settings))
        found = _by_set(behaviour, written)
        columns = {
            "id": [prompt.id for prompt in _flat(sets)],
            "prompt": [prompt.prompt for prompt in _flat(sets)],
            "text": [each.text for each in _flat(written)],
            "tokens": [each.tokens for each in _flat(written)],
        }
        return written, {f"behaviour/{name}": value for name, value in found.items()}, columns

    def prompts(self, sets: PromptSets) -> tuple[Metrics, Columns]:
        return self.answers("prompts", sets)[1:]

    def verifiable(self, sets: PromptSets) -> tuple[Metrics, Columns]:
        """Rows are checked by `uft.evaluation.verifiable.accuracy`, which also says what it makes of each kind."""
        written, found, columns = self.answers("verifiable", sets)
        rows, options = [], []
        for name, prompts in sets.items():
            for prompt in prompts:
                kind, k = check_of(prompt.values, self.config.verifiable[name])
                rows.append({"source": name, "meta": None} | dict(prompt.values) | {"kind": kind})
                options.append(k)
        by_kind, correct = accuracy(_flat(written), rows)
        known = [each for each in correct if each is not None]  # a judge's are None
        whole = {"accuracy": float(np.mean(known))} if known else {}
        return whole | by_kind | found, columns | {"correct": correct, "options": options}

    def refusals(self, sets: PromptSets) -> tuple[Metrics, Columns]:
        written, found, columns = self.answers("refusals", sets)
        should = {name: [should_refuse(p.values, self.config.refusals[name]) for p in sets[name]] for name in sets}
        rates = refusal_rates(_flat(written), _flat(should))
        for name in sets if len(sets) > 1 else ():
            rates |= {f"{name}/{key}": value for key, value in refusal_rates(written[name], should[name]).items()}
        if any(self.config.refusals[name].group for name in sets):
            groups = [self._group(name, prompt) for name in sets for prompt in sets[name]]
            rates |= refusal_by_group(_flat(written), _flat(should), groups)
            columns["group"] = groups
        correct = [bool(is_refusal(each.text)) == wanted for each, wanted in zip(_flat(written), _flat(should))]
        return rates | found, columns | {"should_refuse": _flat(should), "correct": correct}

    def _group(self, name: str, prompt: Prompt) -> str:
        column = self.config.refusals[name].group
        return name if column is None else group_of(prompt.values.get(column))


def _by_set(measure: Callable[[list], Metrics], sets: Mapping[str, list]) -> Metrics:
    """What `measure` says of all, and of each set as `<set>/...` where there are several."""
    found = dict(measure(_flat(sets)))
    for name in sets if len(sets) > 1 else ():
        found |= {f"{name}/{key}": value for key, value in measure(sets[name]).items()}
    return found


def _flat(sets: Mapping[str, Sequence]) -> list:
    return [each for part in sets.values() for each in part]


def _several(ids: Sequence[str], examples: np.ndarray) -> list[str]:
    """The ids of these examples; the second entry of an example and those after it are told apart by ~1, ~2, ..."""
    seen: dict[int, int] = {}
    found = []
    for example in examples.tolist():
        n = seen[example] = seen.get(example, -1) + 1
        found.append(ids[example] + (f"~{n}" if n else ""))
    return found
