"""Reward models: a language model's body with one linear output, read at the last token of prompt and response.

    r(x, y) = (w · h_n − centre) / scale,   h_n the last hidden state of [x, y]          arXiv:1909.08593, Sec. 2

They are sequence classification models with one label, so plain transformers and TRL load what is saved here.
"""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm
from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from uft.attention import NAME as PACKED
from uft.checkpoint import ASIDE, publish
from uft.collation import Collator, Row, rows_of
from uft.feedback import Batch, Example
from uft.head import causal_model, is_peft, unwrapped
from uft.models import load_with_adapter
from uft.record import write_json
from uft.undisturbed import undisturbed

RECORD = "reward.json"


def scores(model: PreTrainedModel, batch: Batch) -> Tensor:
    """The output of the head at the last token of each prompt and response, float32 [responses], differentiable.

    The attention mask says where that is.  transformers takes the last token that is not the padding token, which is
    another one where responses end with the padding token.
    """
    if batch.packed:
        raise ValueError("a reward model reads padded batches; found a packed one")
    mask = batch.attention_mask
    more = {}
    if not bool(mask[:, 0].all()):  # left padding: absolute positions must not count it
        more["position_ids"] = (mask.cumsum(-1) - 1).clamp(min=0)
    hidden = model.base_model(input_ids=batch.input_ids, attention_mask=mask, use_cache=False, **more).last_hidden_state
    last = (torch.arange(mask.shape[1], device=mask.device) * mask).argmax(-1)
    at_last = hidden[torch.arange(len(mask), device=mask.device), last]
    # an empty batch holds one row for the model to run on, and no response
    return model.score(at_last).float().squeeze(-1)[: len(batch.length)]


class RewardModel:
    """Examples -> a reward for each response of each; an `uft.rlhf.sampling.Rewards`.

    model            a sequence classification model of transformers with one label and a head called `score`
    tokenizer        the model's; only its padding token is used, and it is saved beside the model
    center, scale    subtracted from the head's output, and what is left divided by
    training_record  what training cost and reached, see `uft.rlhf.reward_training`; empty before

    Raises ValueError for another kind of model, and for a scale that is not positive.
    """

    def __init__(
        self, model: PreTrainedModel, tokenizer: Any, center: float = 0.0, scale: float = 1.0,
        training_record: dict[str, Any] | None = None,
    ):  # fmt: skip
        if getattr(model.config, "num_labels", None) != 1 or not isinstance(getattr(model, "score", None), nn.Module):
            labels = getattr(model.config, "num_labels", None)
            raise ValueError(
                f"{type(model).__name__} with {labels} labels is no reward model; want a sequence classification "
                "model with one label and a head called `score`"
            )
        if not (np.isfinite(center) and np.isfinite(scale) and scale > 0):
            raise ValueError(f"center is {center} and scale {scale}; want finite numbers and a scale > 0")
        self.model, self.tokenizer = model, tokenizer
        self.center, self.scale = float(center), float(scale)
        self.training_record = dict(training_record or {})
        self.pad_token_id = padding_of(tokenizer)
        model.config.get_text_config().pad_token_id = self.pad_token_id

    @classmethod
    def of(
        cls, policy: str | nn.Module, tokenizer: Any = None, *, seed: int = 0, dtype: str | torch.dtype = torch.float32
    ) -> RewardModel:
        """The body of a causal language model (a model, its adapter folded in, or a hub id or folder) as it is now, in
        weights of its own, and a fresh head.

        seed    of the head, whose weights are N(0, 1 / (d + 1)) for hidden states of d numbers   arXiv:2009.01325
        dtype   of weights that are loaded by name; a model's copy has the model's

        A finished reward model comes from `load`, which keeps its head.
        """
        if isinstance(policy, str):
            tokenizer = AutoTokenizer.from_pretrained(policy) if tokenizer is None else tokenizer
            policy = load_with_adapter(policy, trained=False, dtype=dtype)
        if tokenizer is None:
            raise ValueError("tokenizer is missing; want the policy's")
        if is_peft(policy):
            policy = copy.deepcopy(unwrapped(policy)).merge_and_unload()
        policy = causal_model(policy)
        config = copy.deepcopy(policy.config)
        config.num_labels, config.use_cache = 1, False
        # its weights are replaced, so the caller's random numbers stay as they are
        with torch.random.fork_rng():
            model = AutoModelForSequenceClassification.from_config(
                config, dtype=policy.dtype, attn_implementation=_plain(config._attn_implementation)
            )
        model.base_model.load_state_dict(policy.base_model.state_dict())
        found = cls(model, tokenizer)
        weight = model.score.weight
        drawn = torch.randn(weight.shape, generator=torch.Generator().manual_seed(seed)) / (weight.shape[1] + 1) ** 0.5
        with torch.no_grad():
            weight.copy_(drawn)
            if model.score.bias is not None:
                model.score.bias.zero_()
        model.to(policy.device).eval()  # as what transformers loads
        return found

    # ---- rewards ----

    def rewards(self, batch: Batch) -> Tensor:
        """float32 [responses] of a padded batch on the model's device, differentiable."""
        return (scores(self.model, batch) - self.center) / self.scale

    def __call__(self, examples: Sequence[Example], batch_size: int = 64) -> list[list[float]]:
        """The reward of every response of every example.

        batch_size   responses of a pass; alike lengths share one, and what shares a pass changes nothing
        """
        if batch_size < 1:
            raise ValueError(f"batch_size is {batch_size}; want at least 1")
        rows = [row for i, example in enumerate(examples) for row in rows_of(example, i)]
        order = sorted(range(len(rows)), key=lambda i: -_length(rows[i]))
        collate = Collator(self.pad_token_id, tuple(dict.fromkeys(example.source for example in examples)))
        found: list[list[float]] = [[0.0] * len(example.responses) for example in examples]
        bar = tqdm(total=len(rows), desc="rewards", unit=" responses", disable=None, delay=1, leave=False)
        with undisturbed(self.model), bar:
            for start in range(0, len(order), batch_size):
                part = [rows[i] for i in order[start : start + batch_size]]
                values = self.rewards(collate.batch(part).to(self.model.device))
                for row, value in zip(part, values.tolist()):
                    found[row.nth][row.k] = value
                bar.update(len(part))
        return found

    def calibrated(self, examples: Sequence[Example], batch_size: int = 64) -> RewardModel:
        """The same model with centre and scale such that the rewards of these examples have mean 0 and standard
        deviation 1; the order of responses stays.

        Raises ValueError for fewer than two responses, and where all rewards are the same.
        """
        rewards = np.array([value for each in self(examples, batch_size) for value in each])
        if len(rewards) < 2 or not rewards.std() > 0:
            raise ValueError(f"found {len(rewards)} responses to calibrate on; want two with different rewards")
        # of what this model's own centre and scale were taken from
        center, scale = self.center + self.scale * rewards.mean(), self.scale * rewards.std()
        return RewardModel(self.model, self.tokenizer, center, scale, self.training_record)

    # ---- files ----

    def save(self, folder: str | Path) -> None:
        """Weights in safetensors, tokenizer, and reward.json: written aside and renamed, so whole or absent.

        An earlier reward model in the folder is replaced.  Raises ValueError where something else is there.
        """
        folder = Path(folder)
        if folder.exists() and (found := sorted(each.name for each in folder.iterdir())) and RECORD not in found:
            raise ValueError(f"{folder}: holds {found[0]} and no {RECORD}; want an empty folder, or a reward model's")
        aside = folder.parent / f"{folder.name}.{ASIDE}"
        shutil.rmtree(aside, ignore_errors=True)
        self.model.save_pretrained(aside)
        if hasattr(self.tokenizer, "save_pretrained"):
            self.tokenizer.save_pretrained(aside)
        write_json(
            aside / RECORD, {"center": self.center, "scale": self.scale, "training_record": self.training_record}
        )
        if folder.exists():
            old = folder.parent / f"{folder.name}.old"
            shutil.rmtree(old, ignore_errors=True)
            folder.rename(old)
            publish(aside, folder)
            shutil.rmtree(old)
        else:
            publish(aside, folder)

    @classmethod
    def load(
        cls, folder: str | Path, tokenizer: Any = None, *, dtype: str | torch.dtype = torch.float32,
        device: str | torch.device = "cpu",
    ) -> RewardModel:  # fmt: skip
        """What `save` wrote, or any sequence classification model with one label, by folder or hub id.

        Raises ValueError for a language model, whose head for rewards would be drawn at random.
        """
        config = AutoConfig.from_pretrained(folder)
        if not any("SequenceClassification" in name for name in config.architectures or ()):
            raise ValueError(f"{folder}: found {config.architectures}; want a reward model, or RewardModel.of it")
        model = AutoModelForSequenceClassification.from_pretrained(folder, dtype=dtype, use_safetensors=True)
        if tokenizer is None:
            tokenizer = AutoTokenizer.from_pretrained(folder)
        path = Path(folder) / RECORD
        record = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
        return cls(model.to(device), tokenizer, **record)


class RewardEnsemble:
    """Several reward models as one; a `Rewards` that is the mean of its members.

    members   reward models that differ in data, seed or base (arXiv:2312.09244: those that differ in their pretraining
              disagree most where it matters)
    """

    def __init__(self, members: Sequence[Callable[[Sequence[Example]], Sequence[Sequence[float]]]]):
        self.members = list(members)
        if not self.members:
            raise ValueError("found no members; want at least one reward model")

    def __call__(self, examples: Sequence[Example], batch_size: int = 64) -> list[list[float]]:
        return self._combined(examples, lambda values: values.mean(0), batch_size)

    def spread(self, examples: Sequence[Example], batch_size: int = 64) -> list[list[float]]:
        """The standard deviation over the members (of a population, as in arXiv:2310.02743) per response."""
        self._several()
        return self._combined(examples, lambda values: values.std(0), batch_size)

    def conservative(self, k: float) -> Callable[[Sequence[Example]], list[list[float]]]:
        """A `Rewards`: mean − k · spread, which is low where the members disagree.

        arXiv:2310.02743, Sec. 3.3, subtracts the variance instead; with the deviation k has no unit.
        """
        self._several()
        if not k >= 0:
            raise ValueError(f"k is {k}; want a number >= 0")

        def rewards(examples: Sequence[Example], batch_size: int = 64) -> list[list[float]]:
            return self._combined(examples, lambda values: values.mean(0) - k * values.std(0), batch_size)

        rewards.members = self.members  # whose passes are counted
        return rewards

    def _several(self) -> None:
        if len(self.members) < 2:
            raise ValueError("found one member; want at least two to disagree")

    def _combined(
        self, examples: Sequence[Example], combine: Callable[[np.ndarray], np.ndarray], batch_size: int
    ) -> list[list[float]]:
        of_members = [
            member(examples, batch_size) if isinstance(member, (RewardModel, RewardEnsemble)) else member(examples)
            for member in self.members
        ]
        return [combine(np.array(values)).tolist() for values in zip(*of_members, strict=True)]


def padding_of(tokenizer: PreTrainedTokenizerBase | Any) -> int:
    """The id to pad with: one that does not end responses, where there is one.

    transformers reads the reward at the last token that is not padding, so padding with the end of the sequence would
    make it read another token than this module does.
    """
    for name in ("pad_token_id", "unk_token_id", "bos_token_id"):
        found = getattr(tokenizer, name, None)
        if found is not None and found != tokenizer.eos_token_id:
            return found
    return tokenizer.eos_token_id


def _plain(attention: str | None) -> str | None:
    """The attention implementation, unless it is the one that reads packed rows."""
    return "sdpa" if attention == PACKED else attention


def _length(row: Row) -> int:
    return len(row.prompt) + len(row.tokens)
