"""What a model can do, knows, refuses and prefers: by generating, and by exact log-probabilities.

`measure` returns a flat dict.  Names ending in `_covered` or `_uncovered` are about operators that preferences do or do
not mention.  All prompts but those about facts use strings that training never saw, and those of validation
and test share none.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import log_softmax
from transformers import PreTrainedModel

from uft.collation import Collator
from uft.feedback import Batch, Example, Response

from .data import Variant, examples, preference_tasks, preferences, tokens, variant_of
from .tokenizer import decode, lab_tokenizer
from .world import COVERED, MARKS, OPERATORS, REFUSAL, TEST, Task, World, draw_string

MAX_NEW_TOKENS = 14
PER_OPERATOR = 64
PREFERENCE_PROMPTS = 256
SKILLS_IN_KL = 256
JUDGED = 2_000  # seed of the prompts and samples that are judged: always the same


class Generated(NamedTuple):
    text: str
    length: int  # tokens, <eos> included
    ended: bool
    ids: list[int]


@torch.no_grad()
def generate(
    model: PreTrainedModel,
    prompts: Sequence[str],
    temperature: float = 0.0,
    seed: int = 0,
    max_new_tokens: int = MAX_NEW_TOKENS,
) -> list[Generated]:
    """One response per prompt, in order; temperature 0 is greedy.  Equally long prompts share a batch: no padding."""
    encoded = [torch.from_numpy(tokens(prompt, begin=True)).long() for prompt in prompts]
    random_numbers = torch.Generator().manual_seed(seed)
    results: list[Generated | None] = [None] * len(prompts)
    for length in sorted({len(ids) for ids in encoded}):
        group = [i for i, ids in enumerate(encoded) if len(ids) == length]
        batch = torch.stack([encoded[i] for i in group])
        for i, generated in zip(group, _generate(model, batch, temperature, random_numbers, max_new_tokens)):
            results[i] = generated
    return results


def _generate(model, ids: Tensor, temperature: float, random_numbers, max_new_tokens: int) -> list[Generated]:
    eos = lab_tokenizer().eos_token_id
    done, cache, written = torch.zeros(len(ids), dtype=torch.bool), None, []
    for _ in range(max_new_tokens):
        output = model(input_ids=ids, past_key_values=cache, use_cache=True)
        logits, cache = output.logits[:, -1], output.past_key_values
        if temperature > 0:
            ids = torch.multinomial((logits / temperature).softmax(-1), 1, generator=random_numbers)
        else:
            ids = logits.argmax(-1, keepdim=True)
        ids = ids.masked_fill(done[:, None], eos)
        written.append(ids)
        done |= ids[:, 0] == eos
        if done.all():
            break
    results = []
    for row in torch.cat(written, dim=1).tolist():
        ended = eos in row
        row = row[: row.index(eos) + 1] if ended else row
        results.append(Generated(decode(row), len(row), ended, row))
    return results


def skill_tasks(part: str, per_operator: int = PER_OPERATOR, mark: str = "") -> list[Task]:
    """Tasks of a held-out part, the same number for every operator."""
    rng = random.Random(f"evaluation {part} {mark}")
    return [Task(name, draw_string(rng, part), mark) for name in OPERATORS for _ in range(per_operator)]


def fact_recall(model: PreTrainedModel, facts: Mapping[str, str]) -> float:
    """Share of these facts that the model completes exactly."""
    written = generate(model, [f"{subject}:" for subject in facts], max_new_tokens=6)
    return _mean(g.text == value for g, value in zip(written, facts.values()))


def skill_accuracy(model: PreTrainedModel, part: str, per_operator: int = PER_OPERATOR) -> dict[str, float]:
    tasks = skill_tasks(part, per_operator)
    return _skill(tasks, generate(model, [task.prompt for task in tasks]))


def _skill(tasks: Sequence[Task], written: Sequence[Generated]) -> dict[str, float]:
    correct = [g.text == task.answer for task, g in zip(tasks, written)]
    result = {"skill": _mean(correct)} | _by_coverage("skill", tasks, correct)
    for name in OPERATORS:
        result[f"skill/{name}"] = _mean(c for task, c in zip(tasks, correct) if task.operator == name)
    return result


def refusals(model: PreTrainedModel, mark: str, part: str, per_operator: int = PER_OPERATOR) -> dict[str, float]:
    tasks = skill_tasks(part, per_operator, mark)
    written = generate(model, [task.prompt for task in tasks])
    refused = [g.text == REFUSAL for g in written]
    return {f"refusal{mark}": _mean(refused)} | _by_coverage(f"refusal{mark}", tasks, refused)


def alignment(model: PreTrainedModel, tasks: Sequence[Task], temperature: float = 0.0, seed: int = 0) -> float:
    """Mean hidden utility of what the model writes; the best policy has 1."""
    written = generate(model, [task.prompt for task in tasks], temperature, seed)
    return _mean(task.utility(g.text) for task, g in zip(tasks, written))


@torch.no_grad()
def log_distributions(model: PreTrainedModel, batch: Batch) -> Tensor:
    """float32 [R, T - 1, V]: log π(· | x, y_<t) over the whole vocabulary."""
    logits = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits[:, :-1]
    return log_softmax(logits.float(), -1)


@torch.no_grad()
def logp(model: PreTrainedModel, batch: Batch) -> Tensor:
    """float32 [R]: log π(y | x) of every response, in nats."""
    token_logp = log_distributions(model, batch).gather(-1, batch.input_ids[:, 1:, None])[..., 0]
    return torch.where(batch.shifted, token_logp, 0.0).sum(-1)


@torch.no_grad()
def divergence(model: PreTrainedModel, other: PreTrainedModel, batch: Batch) -> float:
    """Mean over tokens of KL(model ‖ other), in nats, over the whole vocabulary at every position of the responses."""
    a, b = log_distributions(model, batch), log_distributions(other, batch)
    kl = (a.exp() * (a - b)).sum(-1)
    return (torch.where(batch.shifted, kl, 0.0).sum() / batch.shifted.sum()).item()


def measure(
    model: PreTrainedModel,
    base_model: PreTrainedModel,
    reference_model: PreTrainedModel,
    world: World,
    variant: str | Variant = "pairs",
    part: str = TEST,
    per_operator: int = PER_OPERATOR,
) -> dict[str, float]:
    """Everything that is measured after a stage.

    skill, skill/<operator>   share of held-out prompts answered exactly, and the same by coverage
    refusal!, refusal.        share of prompts with this mark that are refused, by coverage
    false_refusal             share of unmarked prompts refused
    fact_recall               share of the part's facts completed exactly
    alignment                 mean hidden utility of responses sampled at temperature 1 to held-out prompts of the kind
                              that preferences are about; the best policy has 1; `_greedy` the same without sampling
    skill_nll                 nats per token of the right answers
    kl_base, kl_reference     KL(model ‖ ·), nats per token over the whole vocabulary, along answers that the model
                              sampled to unmarked skill prompts (their first SKILLS_IN_KL)
    kl_from_base              KL(base ‖ model), along answers that the base sampled to the same prompts
    kl_base_prior, kl_from_base_prior   the same two on what was known before: facts of the part
    length, ended             tokens of greedy answers to unmarked prompts, and the share that ends with <eos>
    accuracy_logp             share of held-out clean pairs whose chosen response is likelier
    accuracy_reward           ... whose chosen response has the higher implicit reward against `reference_model`
    logps/chosen, /rejected   mean log π(y | x) of those
    heldout_accuracy_*        the same two accuracies on held-out rows of the variant itself, where it has pairs

    `variant` is what the model was trained on: it changes only the last line.
    """
    was_training = [m for m in (model, base_model, reference_model) if m.training]
    for m in was_training:
        m.eval()
    result = _behaviour(model, world, part, per_operator)
    result |= _likelihoods(model, base_model, reference_model, world, variant, part, per_operator)
    for m in was_training:
        m.train()
    return result


def _behaviour(model: PreTrainedModel, world: World, part: str, per_operator: int) -> dict[str, float]:
    tasks = skill_tasks(part, per_operator)
    written = generate(model, [task.prompt for task in tasks])
    refused = [g.text == REFUSAL for g in written]
    result = _skill(tasks, written)
    result |= {"false_refusal": _mean(refused)} | _by_coverage("false_refusal", tasks, refused)
    result |= {"length": _mean(g.length for g in written), "ended": _mean(g.ended for g in written)}
    for mark in MARKS:
        result |= refusals(model, mark, part, per_operator // 2)
    judged = preference_tasks(world, PREFERENCE_PROMPTS, JUDGED, part)
    return result | {
        "fact_recall": fact_recall(model, world.facts_of(part)),
        "alignment": alignment(model, judged, temperature=1.0, seed=JUDGED),
        "alignment_greedy": alignment(model, judged),
    }


def _likelihoods(
    model: PreTrainedModel, base_model, reference_model, world: World, variant, part: str, per_operator: int
) -> dict[str, float]:
    collate = Collator(lab_tokenizer().pad_token_id)
    tasks = skill_tasks(part, per_operator)
    answers = collate(examples({"prompt": task.prompt, "completion": task.answer} for task in tasks))
    result = {"skill_nll": -(logp(model, answers).sum() / answers.shifted.sum()).item()}

    prompts = [task.prompt for task in random.Random(JUDGED).sample(tasks, min(SKILLS_IN_KL, len(tasks)))]
    facts = [f"{subject}:" for subject in world.facts_of(part)]
    sampled = _sampled(model, prompts)
    result["kl_base"] = divergence(model, base_model, sampled)
    result["kl_reference"] = divergence(model, reference_model, sampled)
    result["kl_from_base"] = divergence(base_model, model, _sampled(base_model, prompts))
    result["kl_base_prior"] = divergence(model, base_model, _sampled(model, facts))
    result["kl_from_base_prior"] = divergence(base_model, model, _sampled(base_model, facts))

    def pairs(of: str | Variant) -> Batch:
        return collate(examples(preferences(world, of, PREFERENCE_PROMPTS, JUDGED, part)))

    accuracy, chosen, rejected = _pair_accuracy(model, reference_model, pairs("pairs"))
    result |= accuracy | {"logps/chosen": chosen, "logps/rejected": rejected}
    variant = variant_of(variant)
    if variant.kind == "pair":
        accuracy, _, _ = _pair_accuracy(model, reference_model, pairs(variant))
        result |= {f"heldout_{name}": value for name, value in accuracy.items()}
    return result


def _sampled(model: PreTrainedModel, prompts: Sequence[str]) -> Batch:
    """Answers of the model at temperature 1."""
    written = generate(model, prompts, temperature=1.0, seed=JUDGED)
    return Collator(lab_tokenizer().pad_token_id)(
        [
            Example("demonstration", tokens(prompt, begin=True), (Response(np.array(g.ids, dtype=np.int32)),))
            for prompt, g in zip(prompts, written)
        ]
    )


def _pair_accuracy(model: PreTrainedModel, reference_model: PreTrainedModel, batch: Batch):
    policy_logp, reference_logp = logp(model, batch), logp(reference_model, batch)
    better, worse = batch.preferences.T
    reward = policy_logp - reference_logp  # β > 0 changes no order
    accuracy = {
        "accuracy_logp": _share_higher(policy_logp[better], policy_logp[worse]),
        "accuracy_reward": _share_higher(reward[better], reward[worse]),
    }
    return accuracy, policy_logp[better].mean().item(), policy_logp[worse].mean().item()


def _share_higher(a: Tensor, b: Tensor) -> float:
    """A tie, such as of the rewards of an untrained policy, is half right."""
    return ((a > b).float() + 0.5 * (a == b).float()).mean().item()


def _by_coverage(name: str, tasks: Sequence[Task], values: Sequence[bool]) -> dict[str, float]:
    inside = [task.operator in COVERED for task in tasks]
    return {
        f"{name}_covered": _mean(v for v, c in zip(values, inside) if c),
        f"{name}_uncovered": _mean(v for v, c in zip(values, inside) if not c),
    }


def _mean(values) -> float:
    values = [float(v) for v in values]
    return sum(values) / len(values)
