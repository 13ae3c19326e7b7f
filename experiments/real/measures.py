"""What a model knows, can do and prefers, on rows that it was not trained on.

Everything is at temperature 0 or exact; nats unless a name says otherwise.  Defined before any arm was trained:

    knowledge       2^-(bits per byte - the base's): how likely a byte of held-out text is, against the base; 1 is kept
    demonstrations  1 - NLL per token / the base's, on held-out demonstrations: the share of the surprise that is gone
    skill           word F1 of greedy answers to held-out prompts, mean over the tasks with short answers
    retention       the mean of these three: each lies in [0, 1] or near it, and none needs another arm
    likelier        share of held-out pairs whose chosen response is likelier, mean over collections (politeness, hh)
    likelier_token  the same by the mean over the response's tokens, which does not favour short ones
    polite          share of greedy answers to held-out politeness prompts that end and that a judge calls polite
    alignment       the mean of these three
    score           (retention + alignment) / 2, by which learning rates are chosen, on the validation part
"""

from __future__ import annotations

import math
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import torch
from transformers import LlamaForCausalLM, PreTrainedTokenizerBase
from uft_kernels import token_divergence

from uft.collation import Collator
from uft.feedback import Batch, Example
from uft.models import response_logits, score

from .data import RealData, matches
from .politeness import Judge
from .settings import Scale

BATCH_TOKENS = 8192
RETENTION = ("knowledge", "demonstrations", "skill")
ALIGNMENT = ("likelier", "likelier_token", "polite")
Measures = dict[str, float]


class Logps(NamedTuple):
    """Per example its responses' log-probabilities, and their lengths in tokens."""

    logp: list[np.ndarray]
    length: list[np.ndarray]


class Written(NamedTuple):
    text: str
    ids: list[int]
    ended: bool


def measure(
    model: LlamaForCausalLM, base: LlamaForCausalLM, reference: LlamaForCausalLM, data: RealData, part: str,
    scale: Scale, tokenizer: PreTrainedTokenizerBase, start: Mapping[str, float] | None,
) -> Measures:  # fmt: skip
    """All measures on one part, "validation" or "test"; those that need other tasks or instructions only on "test".

    reference   what implicit rewards are relative to: the policy as it was when the last stage began
    start       what `kept` found for the base on this part; None: the model is the base
    """
    was_training = model.training
    model.eval()
    sizes, collate = scale.sizes, Collator(tokenizer.pad_token_id)
    found = kept(model, data, part, sizes.demonstrations, collate, start)
    found |= answers(model, data, part, scale, tokenizer)
    found |= preferences(model, reference, data.preferences[part], collate, scale.rows.min_source)
    found |= behaviour(model, data, part, sizes.generations, sizes.new_tokens, tokenizer)
    if part == "test":
        found |= divergences(model, base, data, part, sizes.demonstrations, collate)
        found |= elsewhere(model, reference, data, scale, tokenizer, collate)
    found["retention"] = float(np.mean([found[name] for name in RETENTION]))
    found["alignment"] = float(np.mean([found[name] for name in ALIGNMENT]))
    found["score"] = (found["retention"] + found["alignment"]) / 2
    model.train(was_training)
    return found


# ---- what is kept ----


def kept(
    model, data: RealData, part: str, count: int, collate: Collator, start: Mapping[str, float] | None
) -> Measures:
    """Bits per byte of held-out text, in stretches of max_length tokens, and NLL of held-out demonstrations; against
    those of the base, `start`."""
    examples, size = data.text[part]
    bits = -sum(float(each.sum()) for each in logps(model, examples, collate).logp) / math.log(2) / size
    found = {"bits_per_byte": bits, "nll": nll(model, evenly(data.demonstrations[part], count), collate)}
    start = found if start is None else start
    return found | {
        "knowledge": 2 ** (start["bits_per_byte"] - bits),
        "demonstrations": 1 - found["nll"] / start["nll"],
    }


def nll(model, examples: Sequence[Example], collate: Collator) -> float:
    """Nats per response token, over all tokens."""
    found = logps(model, examples, collate)
    return -float(sum(each.sum() for each in found.logp) / sum(each.sum() for each in found.length))


def answers(model, data: RealData, part: str, scale: Scale, tokenizer: PreTrainedTokenizerBase) -> Measures:
    """Per task the mean word F1 of greedy answers and the share that is exact, and the means over tasks."""
    asked = _asked(data, part, scale)
    written = greedy(model, asked, tokenizer, scale.sizes.answer_tokens)
    return _marks(
        [(e.source, w.text if w.ended else w.text + " …", target(e, tokenizer)) for e, w in zip(asked, written)]
    )


def majority(data: RealData, part: str, scale: Scale, tokenizer: PreTrainedTokenizerBase) -> Measures:
    """What the commonest training answer of a task would always get: where learning begins."""
    commonest = {
        task: Counter(target(e, tokenizer) for e in rows).most_common(1)[0][0]
        for task, rows in by_source(data.demonstrations["train"]).items()
    }
    # where all training rows of a task were too long there is no commonest
    return _marks([(e.source, commonest.get(e.source, ""), target(e, tokenizer)) for e in _asked(data, part, scale)])


def _asked(data: RealData, part: str, scale: Scale) -> list[Example]:
    tasks = by_source(e for e in data.demonstrations[part] if matches(e.source, scale.rows.answered))
    return [e for rows in tasks.values() for e in rows[: scale.sizes.answers_per_task]]


def _marks(answered: Iterable[tuple[str, str, str]]) -> Measures:
    marks: dict[str, list[tuple[float, bool]]] = defaultdict(list)
    for task, written, wanted in answered:
        marks[task].append((word_f1(written, wanted), written == wanted))
    means = {task: np.mean(rows, axis=0) for task, rows in sorted(marks.items())}
    result = {"skill": float(np.mean([f1 for f1, _ in means.values()]))}
    result["exact"] = float(np.mean([exact for _, exact in means.values()]))
    return result | {
        f"{name}/{task}": float(m[k]) for k, name in enumerate(("f1", "exact")) for task, m in means.items()
    }


def word_f1(written: str, wanted: str) -> float:
    """Harmonic mean of precision and recall over words, as in SQuAD (Rajpurkar et al. 2016, Sec. 6.1)."""
    ours, theirs = (Counter(re.findall(r"\w+|…", text.lower())) for text in (written, wanted))
    shared = (ours & theirs).total()
    return 2 * shared / (ours.total() + theirs.total()) if shared else 0.0


def target(example: Example, tokenizer: PreTrainedTokenizerBase) -> str:
    return tokenizer.decode(example.responses[0].tokens, skip_special_tokens=True).strip()


# ---- what is gained ----


def preferences(model, reference, pairs: Sequence[Example], collate: Collator, min_source: int) -> Measures:
    """Accuracy by log-likelihood and by implicit reward, margin per token, log-probabilities; per collection."""
    ours, theirs = logps(model, pairs, collate), logps(reference, pairs, collate)
    logp, length = np.array(ours.logp), np.array(ours.length)  # [pairs, (chosen, rejected)]
    reward = logp - np.array(theirs.logp)  # a positive beta changes no order
    columns = {
        "likelier": _higher(logp),
        "likelier_token": _higher(logp / length),
        "accuracy_reward": _higher(reward),
        "margin": (logp / length) @ [1, -1],
        "margin_reward": reward @ [1, -1],
        "logps/chosen": logp[:, 0],
        "logps/rejected": logp[:, 1],
        "drift/chosen": reward[:, 0],
        "drift/rejected": reward[:, 1],
    }
    of = np.array([e.source for e in pairs])
    names = [str(name) for name, n in zip(*np.unique(of, return_counts=True)) if n >= min_source]
    result = {f"{column}/{name}": float(v[of == name].mean()) for column, v in columns.items() for name in names}
    result |= {column: float(np.mean([result[f"{column}/{name}"] for name in names])) for column in columns}
    return result


def _higher(values: np.ndarray) -> np.ndarray:
    """1 where the first column is higher, a half where they are equal."""
    return (values[:, 0] > values[:, 1]) + 0.5 * (values[:, 0] == values[:, 1])


def behaviour(model, data: RealData, part: str, count: int, new_tokens: int, tokenizer) -> Measures:
    """Greedy answers to preference prompts: how many are polite, how long they are, whether they end or repeat."""
    judge = judge_of(data)
    pairs = by_source(data.preferences[part])
    asked = [e for name in ("polite", "hh") for e in pairs.get(name, [])[:count]]
    written = greedy(model, asked, tokenizer, new_tokens)
    polite = [w.ended and judge.polite(w.text) for e, w in zip(asked, written) if e.source == "polite"]
    return {
        "polite": float(np.mean(polite)),
        "length": float(np.mean([len(w.ids) for w in written])),
        "ended": float(np.mean([w.ended for w in written])),
        "repetition": float(np.mean([repetition(w.ids) for w in written])),
    }


_judges: dict[int, Judge] = {}


def judge_of(data: RealData) -> Judge:
    if id(data.polite) not in _judges:
        _judges[id(data.polite)] = Judge.learnt(data.polite, data.plain)
    return _judges[id(data.polite)]


def judge_accuracy(data: RealData, part: str, tokenizer: PreTrainedTokenizerBase) -> float:
    """Balanced accuracy of the judge on held-out pairs that prefer a polite rewriting to a plain answer."""
    judge = judge_of(data)
    plain = {(e.prompt.tobytes(), target(e, tokenizer)) for e in data.demonstrations[part]}
    right: dict[bool, list[bool]] = {True: [], False: []}
    for e in data.preferences[part]:
        chosen, rejected = (tokenizer.decode(r.tokens, skip_special_tokens=True).strip() for r in e.responses)
        if e.source == "polite" and (e.prompt.tobytes(), rejected) in plain:
            right[True].append(judge.polite(chosen))
            right[False].append(not judge.polite(rejected))
    return float(np.mean([np.mean(each) for each in right.values()])) if right[True] else float("nan")


def repetition(ids: Sequence[int], n: int = 4) -> float:
    """Share of the n-grams that came before."""
    grams = [tuple(ids[k : k + n]) for k in range(len(ids) - n + 1)]
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


# ---- how far it went, and what it does elsewhere ----


def divergences(model, base, data: RealData, part: str, count: int, collate: Collator) -> Measures:
    """KL both ways to the base, mean over tokens, along held-out demonstrations and along running text."""
    result, demonstrations = {}, evenly(data.demonstrations[part], count)
    for name, examples in (("demonstrations", demonstrations), ("text", data.text[part][0])):
        kl, reverse, count = 0.0, 0.0, 0
        for _, batch in batches(examples, collate, model.device):
            with torch.no_grad():
                found = token_divergence(response_logits(model, batch), response_logits(base, batch))
            kl, reverse = kl + float(found.kl.sum()), reverse + float(found.reverse_kl.sum())
            count += len(found.kl)
        result |= {f"kl/{name}": kl / count, f"kl_base_policy/{name}": reverse / count}
    return result


def elsewhere(model, reference, data: RealData, scale: Scale, tokenizer, collate: Collator) -> Measures:
    """Out of distribution: tasks without a training row, and pairs about instructions kept apart."""
    tasks = evenly(data.heldout_tasks, scale.sizes.heldout_tasks)
    written = greedy(model, tasks, tokenizer, scale.sizes.answer_tokens)
    marks = _marks([(e.source, w.text, target(e, tokenizer)) for e, w in zip(tasks, written)])
    pairs = preferences(model, reference, data.pairs_eval, collate, 1)
    return {
        "heldout_tasks/nll": nll(model, tasks, collate),
        "heldout_tasks/f1": marks["skill"],
        "heldout_tasks/exact": marks["exact"],
        **{f"pairs_eval/{name}": pairs[name] for name in ("likelier", "likelier_token", "accuracy_reward")},
    }


# ---- running a model ----


def by_source(examples: Iterable[Example]) -> dict[str, list[Example]]:
    result: dict[str, list[Example]] = defaultdict(list)
    for example in examples:
        result[example.source].append(example)
    return result


def evenly(examples: Sequence[Example], count: int) -> list[Example]:
    """At most `count`, as evenly over the sources as their sizes allow."""
    queues = list(by_source(examples).values())
    turns = (queue[k] for k in range(max(map(len, queues), default=0)) for queue in queues if k < len(queue))
    return [example for example, _ in zip(turns, range(count))]


def batches(examples: Sequence[Example], collate: Collator, device) -> Iterator[tuple[list[int], Batch]]:
    """Examples of like length together; with each batch their positions."""
    length = [e.tokens for e in examples]
    group: list[int] = []
    for i in sorted(range(len(examples)), key=length.__getitem__):
        if group and (len(group) + 1) * length[i] > BATCH_TOKENS:
            yield group, _on(collate([replace(examples[k], source="train") for k in group]), device)
            group = []
        group.append(i)
    if group:
        yield group, _on(collate([replace(examples[k], source="train") for k in group]), device)


def _on(batch: Batch, device) -> Batch:
    return Batch({name: value.to(device) for name, value in batch.items()})


@torch.no_grad()
def logps(model, examples: Sequence[Example], collate: Collator) -> Logps:
    logp: list = [None] * len(examples)
    length: list = [None] * len(examples)
    for positions, batch in batches(examples, collate, model.device):
        found = score(model, batch)
        of = batch.prompt.cpu().numpy()
        values, counts = found.logp.double().cpu().numpy(), found.length.cpu().numpy()
        for k, i in enumerate(positions):
            logp[i], length[i] = values[of == k], counts[of == k]
    return Logps(logp, length)


@torch.no_grad()
def greedy(model, examples: Sequence[Example], tokenizer: PreTrainedTokenizerBase, new_tokens: int) -> list[Written]:
    """The likeliest token at each step, in order of the examples; prompts are padded on the left."""
    result: list = [None] * len(examples)
    order = sorted(range(len(examples)), key=lambda i: len(examples[i].prompt))
    for start in range(0, len(order), 64):
        group = order[start : start + 64]
        width = len(examples[group[-1]].prompt)
        ids = torch.full((len(group), width), tokenizer.pad_token_id)
        for k, i in enumerate(group):
            ids[k, width - len(examples[i].prompt) :] = torch.from_numpy(examples[i].prompt).long()
        ids = ids.to(model.device)
        mask = (ids != tokenizer.pad_token_id).long()
        written = model.generate(ids, attention_mask=mask, do_sample=False, max_new_tokens=new_tokens)[:, width:]
        for i, row in zip(group, written.tolist()):
            ended = tokenizer.eos_token_id in row
            row = row[: row.index(tokenizer.eos_token_id)] if ended else row
            result[i] = Written(tokenizer.decode(row, skip_special_tokens=True).strip(), row, ended)
    return result
