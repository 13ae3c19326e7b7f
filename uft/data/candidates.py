"""Pairs that may be labelled: read from a file, and looked at by models, for `uft data select`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import AutoTokenizer

from uft.data.embedding import pair_embedding, pair_features
from uft.data.judges import reward_trained_on
from uft.data.mixture import load_feedback
from uft.data.noise import margins
from uft.data.quality.writing import write_lines
from uft.data.queue import item_id, queue_items
from uft.data.readers import TextExample, read_text
from uft.data.rows import BadRow, DataError
from uft.data.selection import JUDGED, Pool, by_random, diversity, select
from uft.data.sources import Source, open_table
from uft.feedback import Example
from uft.models import load_policy
from uft.rlhf.reward_model import RewardModel, padding_of

SIDES = ("response_a", "response_b")


@dataclass(frozen=True)
class Candidates:
    """Pairs as text and as tokens, in the same order.

    doubles    rows left out since a row before has the same prompt and responses
    labelled   rows left out since they are labelled already
    """

    texts: list[TextExample]
    pairs: list[Example]
    doubles: int = 0
    labelled: int = 0


def pair_source(path: str, chat: bool = False) -> Source:
    """A file with prompt, response_a, response_b, or with prompt, chosen, rejected, whose labels are not looked at."""
    columns = open_table(Source("pairs", path)).columns
    named = dict(zip(("chosen", "rejected"), SIDES)) if set(SIDES) <= set(columns) else {}
    return Source("pairs", path, kind="pair", columns=named, chat=chat)


def read_pairs(source: Source, tokenizer: Any, max_length: int | None) -> tuple[list[TextExample], list[Example]]:
    """Every pair of the source as text and, given a tokenizer, as tokens.  Raises `BadRow` for the first bad row."""
    texts = []
    for text in read_text(source).examples:
        if isinstance(text, BadRow):
            raise text
        texts.append(text)
    if tokenizer is None:
        return texts, []
    return texts, list(load_feedback([source], tokenizer, max_length)[0][:])


def read_candidates(
    source: Source, tokenizer: Any = None, max_length: int | None = None, exclude: Sequence[TextExample] = ()
) -> Candidates:
    """Every pair of the source once, without those of `exclude`; without a tokenizer only as text.

    Raises `BadRow` for a row that cannot be used, and `DataError` where none is left.
    """
    read, examples = read_pairs(source, tokenizer, max_length)
    known = {_id(text) for text in exclude}
    kept: dict[str, int] = {}
    doubles = labelled = 0
    for i, text in enumerate(read):
        name = _id(text)
        if name in known:
            labelled += 1
        elif name in kept:
            doubles += 1
        else:
            kept[name] = i
    if not kept:
        raise DataError(f"{source.where}: found {labelled} labelled pairs and no other; want pairs without a label")
    pairs = [examples[i] for i in kept.values()] if examples else []
    return Candidates([read[i] for i in kept.values()], pairs, doubles, labelled)


def _id(text: TextExample) -> str:
    return item_id(text.prompt, *text.responses)


def look_at(
    candidates: Candidates, rule: str, rewards: Sequence[RewardModel], body: nn.Module | None, pad_token_id: int,
    labelled: Sequence[Example] = (),
) -> Pool:  # fmt: skip
    """What `rule` asks for, by these models; embeddings also where there is a body, since diversity is told of them."""
    pairs = candidates.pairs
    return Pool(
        margins=np.stack([margins(reward, pairs) for reward in rewards]) if rewards else None,
        features=pair_features(rewards[0], pairs) if rewards and rule == "change" else None,
        embedding=None if body is None else pair_embedding(body, pairs, pad_token_id),
        labelled=pair_embedding(body, labelled, pad_token_id) if body is not None and labelled else None,
        size=len(candidates.texts),
    )


# ---- uft data select ----


def run_select(given: Any) -> list[str]:
    """Reads, looks, chooses and writes; what was done, line by line.  `given` are the words of the command line."""
    tokenizer, policy, rewards = _models(given)
    known, labelled = [], []
    if given.labelled is not None:
        known, labelled = read_pairs(pair_source(given.labelled, given.chat), tokenizer, given.max_length)
    candidates = read_candidates(pair_source(given.path, given.chat), tokenizer, given.max_length, known)
    if given.rule in JUDGED and not rewards:
        options = {"learning_rate": given.learning_rate, "num_train_epochs": given.epochs,
                   "per_device_train_batch_size": given.batch_size, "max_length": given.max_length}  # fmt: skip
        members = given.members if given.rule == "disagreement" else 1
        rewards = [reward_trained_on(labelled, policy, tokenizer, given.seed + k, **options) for k in range(members)]
    body = policy.base_model if policy is not None else rewards[0].model.base_model if rewards else None
    pad = 0 if tokenizer is None else padding_of(tokenizer)
    judges = rewards if given.rule in JUDGED else []
    pool = look_at(candidates, given.rule, judges, body, pad, labelled)
    chosen = select(given.rule, pool, given.count, given.seed)
    texts = [candidates.texts[i] for i in chosen.order]
    items = queue_items([(t.prompt, *t.responses) for t in texts], given.rule, chosen.value.tolist(), given.seed)
    given.output.parent.mkdir(parents=True, exist_ok=True)
    write_lines(given.output, items)
    lines = [
        f"{len(items)} of {pool.size} pairs in {given.output}, by {given.rule}",
        f"left out: {candidates.doubles} doubles, {candidates.labelled} labelled already",
    ]
    if pool.embedding is not None and len(items) > 1:
        told = diversity(pool.embedding[chosen.order], pool.embedding)._asdict()
        other = diversity(pool.embedding[by_random(pool, given.count, given.seed).order], pool.embedding)
        lines += [f"{name}: {value:.4g} (random: {getattr(other, name):.4g})" for name, value in told.items()]
    return lines


def _models(given: Any) -> tuple[Any, Any, list]:
    """(tokenizer, language model or None, reward models).  Raises `DataError` where they read different tokens."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    rewards = [RewardModel.load(folder, device=device) for folder in given.reward_model]
    named = [(folder, reward.tokenizer) for folder, reward in zip(given.reward_model, rewards)]
    policy = None
    if given.model is not None:
        policy = load_policy(given.model, dtype="float32").eval().to(device)
        named.insert(0, (given.model, AutoTokenizer.from_pretrained(given.model)))
    for folder, tokenizer in named[1:]:
        if tokenizer.get_vocab() != named[0][1].get_vocab():
            raise DataError(f"{folder}: found another vocabulary than that of {named[0][0]}; want the same tokens")
    return (named[0][1] if named else None), policy, rewards
