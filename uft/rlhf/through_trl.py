"""RLOO, GRPO and TRL's own reward trainer on our data and our rewards, for methods that are not built here and for
comparison with those that are.

TRL comes with the extra `peers`.  It is imported when one of these functions runs, and nowhere else in this package.

What TRL sees is what every other part sees: prompts are texts that its tokenizer turns into the very tokens of the
examples (or are refused), responses reach the rewards as the tokens that were sampled, and the reference of the KL
penalty is the policy as it is when the trainer is made.  TRL itself would load the reference from where the policy once
came from, which is another model once the policy has been trained.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn
from transformers import TrainingArguments

from uft.feedback import Example, Response
from uft.head import is_peft, unfuse_head
from uft.rlhf.reward_config import RewardConfig
from uft.rlhf.reward_model import RewardModel
from uft.rlhf.sampling import Rewards

PROMPT, NUMBER = "prompt", "example"


@dataclass(frozen=True)
class Online:
    """What a run of RLOO or GRPO through TRL is.

    prompts          per optimiser step and rank, each with `samples` responses, from which its baseline comes
    micro_batch      responses of a backward pass, a divisor of prompts * samples; by default all
    max_new_tokens   longest response
    beta             weight of the KL to the reference; RLOO takes it off the reward (arXiv:2402.14740), GRPO adds it to
                     the loss (arXiv:2402.03300)
    epsilon          clip range of the ratio; it only matters with iterations > 1
    iterations       optimiser steps on the same responses
    options          any other field of trl.RLOOConfig or trl.GRPOConfig
    """

    output_dir: str
    max_steps: int
    learning_rate: float = 1e-6
    prompts: int = 16
    samples: int = 4
    micro_batch: int | None = None
    max_new_tokens: int = 128
    temperature: float = 1.0
    beta: float = 0.05
    epsilon: float = 0.2
    iterations: int = 1
    seed: int = 42
    options: Mapping[str, Any] = field(default_factory=dict)

    def fields(self) -> dict[str, Any]:
        """As fields of TRL's configurations.  Raises ValueError for numbers that do not fit together."""
        responses = self.prompts * self.samples
        micro_batch = self.micro_batch or responses
        if self.samples < 2 or self.prompts < 1 or responses % micro_batch:
            raise ValueError(
                f"found prompts={self.prompts}, samples={self.samples}, micro_batch={self.micro_batch}; want at least "
                "two samples and a micro_batch that divides prompts * samples"
            )
        return dict(
            output_dir=self.output_dir, max_steps=self.max_steps, learning_rate=self.learning_rate,
            per_device_train_batch_size=micro_batch, gradient_accumulation_steps=responses // micro_batch,
            num_generations=self.samples, max_completion_length=self.max_new_tokens, temperature=self.temperature,
            beta=self.beta, epsilon=self.epsilon, num_iterations=self.iterations, seed=self.seed,
            **_PLAIN, **self.options,
        )  # fmt: skip


# TRL's defaults would change the arithmetic, or write and report where nobody asked for it
_PLAIN: dict[str, Any] = {
    "bf16": False, "gradient_checkpointing": False, "report_to": "none", "save_strategy": "no", "logging_steps": 1,
}  # fmt: skip


def rloo_trainer(
    policy: nn.Module, tokenizer: Any, prompts: Sequence[Example], rewards: Rewards | Mapping[str, Rewards],
    settings: Online, **more: Any,
) -> Any:  # fmt: skip
    """A `trl.RLOOTrainer`, whose `train()` trains the policy in place.  REINFORCE with the mean reward of the other
    responses to the same prompt as the baseline, arXiv:2402.14740.

    prompts   examples; their responses do not matter
    rewards   one, or several by name, which are added up
    more      other arguments of TRL's trainer (callbacks, peft_config, ...)

    Raises ImportError without TRL, and ValueError for a prompt whose text is not tokenised as it was.
    """
    trl = _trl()
    return _online(trl.RLOOTrainer, trl.RLOOConfig, policy, tokenizer, prompts, rewards, settings, more)


def grpo_trainer(
    policy: nn.Module, tokenizer: Any, prompts: Sequence[Example], rewards: Rewards | Mapping[str, Rewards],
    settings: Online, **more: Any,
) -> Any:  # fmt: skip
    """A `trl.GRPOTrainer`: advantages are rewards standardised within the responses to a prompt, arXiv:2402.03300.

    TRL's default loss_type is "dapo" (arXiv:2503.14476); options={"loss_type": "grpo"} is the paper's.  Arguments as in
    `rloo_trainer`.
    """
    trl = _trl()
    return _online(trl.GRPOTrainer, trl.GRPOConfig, policy, tokenizer, prompts, rewards, settings, more)


def reward_trainer(model: RewardModel, pairs: Sequence[Example], args: RewardConfig, **more: Any) -> Any:
    """A `trl.RewardTrainer` that trains the reward model in place on the tokens of these pairs.

    TRL divides by the pairs of a micro-batch, not of the step, centres
    without weights, and knows neither labels nor scores.

    Raises ValueError for examples that are no pairs, and for what TRL would leave out without a word.
    """
    trl = _trl()
    from datasets import Dataset

    if (model.center, model.scale) != (0.0, 1.0):
        raise ValueError(f"found center {model.center} and scale {model.scale}; want 0 and 1, as TRL knows neither")
    rows = [_pair(example, args) for example in pairs]
    fields = {each.name: getattr(args, each.name) for each in dataclasses.fields(TrainingArguments) if each.init}
    config = trl.RewardConfig(
        **fields, max_length=args.max_length,
        center_rewards_coefficient=args.center_rewards_coefficient or None, disable_dropout=args.disable_dropout,
    )  # fmt: skip
    return trl.RewardTrainer(
        model=model.model, args=config, train_dataset=Dataset.from_list(rows), processing_class=model.tokenizer, **more
    )


def reward_function(rewards: Rewards, prompts: Sequence[Example], name: str = "rewards") -> Any:
    """Our rewards as one of TRL's reward functions, for a data set with the number of each prompt in column `example`.

    It gets the tokens that were sampled, so nothing is decoded and tokenised again.
    """

    def function(
        prompts: Any, completions: Any, completion_ids: Sequence[Sequence[int]], **columns: Any
    ) -> list[float]:
        asked = [
            Example(
                "score", examples[number].prompt, (Response(np.array(ids, dtype=np.int32)),),
                source=examples[number].source, row=examples[number].row,
            )
            for number, ids in zip(columns[NUMBER], completion_ids, strict=True)
        ]  # fmt: skip
        return [float(reward) for (reward,) in rewards(asked)]

    examples = list(prompts)
    function.__name__ = name  # under which TRL logs it
    return function


def prompt_rows(prompts: Sequence[Example], tokenizer: Any) -> list[dict[str, Any]]:
    """The prompts as texts that the tokenizer turns into the same tokens.

    Raises ValueError for one whose text is tokenised otherwise, by source and row.
    """
    rows = []
    for number, example in enumerate(prompts):
        ids = example.prompt.tolist()
        # special tokens are either put there by the tokenizer, or written out by a chat template
        texts = [tokenizer.decode(ids, skip_special_tokens=skip) for skip in (True, False)]
        text = next((text for text in texts if tokenizer(text)["input_ids"] == ids), None)
        if text is None:
            raise ValueError(
                f"data set {example.source!r}, row {example.row}: found a prompt ({texts[1][:60]!r}) whose text has "
                "other tokens; want one that TRL can tokenise to the same"
            )
        rows.append({PROMPT: text, NUMBER: number})
    return rows


def _online(
    trainer: Any, config: Any, policy: nn.Module, tokenizer: Any, prompts: Sequence[Example],
    rewards: Rewards | Mapping[str, Rewards], settings: Online, more: Mapping[str, Any],
) -> Any:  # fmt: skip
    from datasets import Dataset

    if not len(prompts):
        raise ValueError("found no prompts; want at least one")
    named = rewards if isinstance(rewards, Mapping) else {"rewards": rewards}
    functions = [reward_function(each, prompts, name) for name, each in named.items()]
    unfuse_head(policy)  # TRL puts a head of its own in its place
    if settings.beta and not is_peft(policy) and "peft_config" not in more:
        _as_reference(policy, Path(settings.output_dir) / "reference")
    return trainer(
        model=policy,
        reward_funcs=functions,
        args=config(**settings.fields()),
        train_dataset=Dataset.from_list(prompt_rows(prompts, tokenizer)),
        processing_class=tokenizer,
        **more,
    )


def _as_reference(policy: nn.Module, folder: Path) -> None:
    """TRL loads the reference from the folder that the policy's configuration names."""
    policy.save_pretrained(folder)
    policy.config._name_or_path = str(folder)


def _pair(example: Example, args: RewardConfig) -> dict[str, Any]:
    where = f"data set {example.source!r}, row {example.row}"
    if example.preferences != ((0, 1),):
        raise ValueError(f"{where}: found an example of kind {example.kind}; want a pair")
    chosen, rejected = example.responses
    if chosen.weight != 1:
        raise ValueError(f"{where}: found weight {chosen.weight}; want 1, as TRL knows no weights")
    ids = [[*example.prompt.tolist(), *response.tokens.tolist()] for response in example.responses]
    if (longest := max(map(len, ids))) > args.max_length:
        raise ValueError(f"{where}: found {longest} tokens; want at most max_length, {args.max_length}")
    row: dict[str, Any] = {"chosen_ids": ids[0], "rejected_ids": ids[1]}
    if args.margin:
        unscored = (chosen.target, rejected.target) == (1.0, 0.0)
        row["margin"] = 0.0 if unscored else args.margin_scale * (chosen.target - rejected.target)
    return row


def _trl() -> Any:
    try:
        import trl
    except ImportError as error:
        raise ImportError("TRL is not installed; want the extra `peers`: pip install -e '.[peers]'") from error
    return trl
