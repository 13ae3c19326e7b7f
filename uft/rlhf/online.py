"""Online unified training: responses that the policy writes enter an optimiser step beside demonstrations and pairs.

    OnlineTrainer(
        model, objective="chord", args=args, processing_class=tokenizer,
        train_dataset={"instructions": demonstrations, "prompts": rows_with_prompts},
        online=Online(reward_model, samples=8, target="grpo"),
    ).train()

Rows of an online data set are prompts: before each step, and after the update of the one before, the policy writes
`samples` responses to each, the reward function scores them, and they join the step as responses of kind "score" whose
target is a squashed reward (UNA's and UFT's terms) or an advantage (policy gradients).  Every response is used for one
update.

[UNA]    Wang et al. 2024, arXiv:2408.15339: its online form
[CHORD]  Zhang et al. 2025, arXiv:2508.11408: likelihood of demonstrations and GRPO in one step
"""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from uft import losses
from uft.collation import MicroBatches
from uft.config import UnifiedConfig
from uft.data.columns import Examples
from uft.data.mismatched import Mismatched
from uft.data.mixture import FeedbackDataset, load_feedback
from uft.data.rows import is_number
from uft.feedback import KINDS, Example
from uft.head import causal_model
from uft.loader import SHARDED, make_loader
from uft.models import Scored
from uft.objective import Objective
from uft.responding import ends_of
from uft.rlhf.rollouts import correlation
from uft.rlhf.sampling import Rewards, ended, sample, with_targets
from uft.rlhf.targets import ADVANTAGES, OF_GROUPS, SCORES, TARGETS, asked, reward_costs
from uft.terms import Pointwise, Sums
from uft.trainer import UnifiedTrainer


@dataclass(frozen=True)
class Online:
    """How responses are written in training, and what becomes of their rewards.

    rewards          examples -> a reward for each response of each (`uft.rlhf.sampling.Rewards`)
    sources          names of the data sets whose rows are prompts
    samples          responses per prompt and step
    max_new_tokens   of a response; one that is cut there has no EOS
    temperature      1 is the policy itself, which policy gradients want
    target           a score in [0, 1]:   sigmoid (of the reward), score (the reward, which lies there)
                     an advantage:        rloo, grpo (reward against the other responses to the prompt), reward, signed
                                          (2 r - 1: +1 and -1 for right and wrong)
    batch_size       responses written at once
    spread           examples -> how much the members of an ensemble disagree on each response, to be logged
    name             of the reward function, in records; by default its own
    """

    rewards: Rewards
    sources: tuple[str, ...] = ("prompts",)
    samples: int = 4
    max_new_tokens: int = 128
    temperature: float = 1.0
    target: str = "sigmoid"
    batch_size: int = 64
    spread: Rewards | None = None
    name: str | None = None

    def __post_init__(self):
        object.__setattr__(self, "sources", (self.sources,) if isinstance(self.sources, str) else tuple(self.sources))
        if not callable(self.rewards):
            raise ValueError(f"online: rewards is {self.rewards!r}; want a function of examples")
        for name in ("samples", "max_new_tokens", "batch_size"):
            if not isinstance(value := getattr(self, name), int) or value < 1:
                raise ValueError(f"online: {name} is {value!r}; want a whole number of at least 1")
        if self.target not in TARGETS:
            raise ValueError(f"online: target is {self.target!r}; want one of {', '.join(TARGETS)}")
        if self.target in OF_GROUPS and self.samples < 2:
            raise ValueError(f"online: target is {self.target!r} and samples 1; want at least 2 responses to compare")
        if not is_number(self.temperature) or not 0 < self.temperature < math.inf:
            raise ValueError(f"online: temperature is {self.temperature!r}; want a number > 0")
        if self.target in ADVANTAGES and self.temperature != 1:
            raise ValueError(f"online: temperature is {self.temperature} for advantages; want 1, the policy itself")

    def described(self) -> dict[str, Any]:
        """As plain data, for records and for what a checkpoint must agree with."""
        own = self.name or getattr(self.rewards, "__qualname__", type(self.rewards).__qualname__)
        kept = {name: value for name, value in vars(self).items() if name not in ("rewards", "spread", "batch_size")}
        return kept | {"name": own, "sources": list(self.sources)}


class OnlineTrainer(UnifiedTrainer):
    """`UnifiedTrainer` some of whose data sets are prompts that the policy answers in training.

    online   see `Online`; the other arguments are those of `UnifiedTrainer`

    Logs `online/reward`, `online/length` (tokens), `online/ended` (share that ended by itself), `online/distinct_2`
    (distinct of the bigrams of tokens of a step), `online/ties` (share of prompts whose responses all had one reward),
    `online/length_reward_correlation` (Pearson's, per step), `online/kl` where there is a reference (nats per response)
    and `online/spread`; `uft.rlhf.guards` reads them.
    Counts `generated_tokens`, and in `flops` a forward pass over prompt and response, as a cache has it, and one of a
    reward model; of other reward functions the cost is not known.

    Raises ValueError where objective and targets do not fit, a prompt leaves no room, or weights are in shards.
    """

    def __init__(self, *args: Any, online: Online, **kwargs: Any):
        self.online = online
        super().__init__(*args, **kwargs)
        if self.train_dataset is None:
            raise ValueError("train_dataset is missing; want data with prompts")
        _check_objective(self.objective, online, self.train_dataset)
        if self.objective.needs_reference and self.reference is None:
            raise ValueError("reference is 'cached', which holds no response that is yet to be written; want another")
        if self.accelerator.distributed_type in SHARDED:
            raise ValueError(f"weights are in shards ({self.accelerator.distributed_type}); want them whole on a rank")
        self._check_room()
        self.reward_costs = reward_costs(online.rewards)
        self._eos = ends_of(self.model, self.processing_class)

    # ---- data ----

    def _usable(self, data: Any, tokenizer: Any, args: UnifiedConfig, split: str) -> Any:
        if split != "train" or data is None:
            return super()._usable(data, tokenizer, args, split)
        if not isinstance(data, FeedbackDataset):
            data, self.reports[split] = load_feedback(
                data, tokenizer, max_length=args.max_length, on_bad_row=args.on_bad_row, cache=args.data_cache
            )
        return super()._usable(prompts_of(data, self.online.sources), tokenizer, args, split)

    def _check_room(self) -> None:
        own = getattr(causal_model(self.model).config.get_text_config(), "max_position_embeddings", None)
        room = min(self.args.max_length, own or self.args.max_length)
        for name in self.online.sources:
            examples = self.train_dataset.examples[name]
            longest = int(np.argmax(examples.prompt_lengths))
            if (n := int(examples.prompt_lengths[longest])) + self.online.max_new_tokens > room:
                raise ValueError(
                    f"row {examples[longest].row} of {name!r}: found a prompt of {n} tokens and "
                    f"{self.online.max_new_tokens} to come; want at most {room} (max_length, or the model's positions)"
                )

    def get_train_dataloader(self):
        # examples as they are: a loader works ahead, and responses must be those of the policy before the step
        return make_loader(self.train_dataset, self.batches_of(self.train_dataset, training=True), list, self.args)

    # ---- the step ----

    def get_batch_samples(self, epoch_iterator, num_batches: int, device: torch.device):
        self.guard.begin()
        return self.planner.plan(self._answered(list(itertools.islice(epoch_iterator, num_batches))))

    def _answered(self, items: Sequence[Sequence[Example]]) -> list[MicroBatches]:
        """The micro-batches of a step, in which the policy's answers stand for the prompts."""
        prompts = [example for item in items for example in item if example.source in self.online.sources]
        written = iter(self._written(prompts))
        return [
            self.data_collator([next(written) if e.source in self.online.sources else e for e in item])
            for item in items
        ]

    def _written(self, prompts: Sequence[Example]) -> list[Example]:
        online, places = self.online, self._places(prompts)
        if not prompts:
            return []
        with self.compute_loss_context_manager():
            examples = sample(
                self.model, self.processing_class, prompts, samples=online.samples,
                max_new_tokens=online.max_new_tokens, temperature=online.temperature,
                seed=[self.args.seed, self.state.global_step], places=places, batch_size=online.batch_size,
            )  # fmt: skip
        rewards = asked(online.rewards, examples, self.processing_class)
        self._tell(examples, rewards)
        targets = TARGETS[online.target](rewards.flatten(), online.samples)
        return with_targets(examples, targets.reshape(rewards.shape).tolist())

    def _places(self, prompts: Sequence[Example]) -> list[tuple[int, int, int]]:
        """What decides a prompt's luck in a step: which it is, and the how manieth of its kind; so what is written does
        not depend on ranks and micro-batches."""
        own = [(self.train_dataset.sources.index(example.source), example.index) for example in prompts]
        lower = self._gather([own])[: self.args.process_index] if self.args.world_size > 1 else []
        seen = Counter(each for others in lower for each in others)
        places = []
        for each in own:
            places.append((*each, seen[each]))
            seen[each] += 1
        return places

    def _tell(self, examples: Sequence[Example], rewards: Tensor) -> None:
        responses = [response for example in examples for response in example.responses]
        written = np.array([len(response.tokens) for response in responses])
        whole = written + np.repeat([len(example.prompt) for example in examples], self.online.samples)
        grams = [gram for r in responses for gram in itertools.pairwise(r.tokens.tolist())]
        ties = (rewards == rewards[:, :1]).all(-1)
        n = len(responses)
        if self.online.spread is not None:
            spread = asked(self.online.spread, examples, self.processing_class)
            self.run_state.add({"online/spread": _sum(spread.sum(), n)})
        self.run_state.add(
            {
                "online/reward": _sum(rewards.sum(), n),
                "online/length": _sum(written.sum(), n),
                "online/ended": _sum(sum(ended(response, self._eos) for response in responses), n),
                "online/distinct_2": _sum(len(set(grams)), len(grams)),
                "online/ties": _sum(ties.sum(), len(examples)),
                "online/length_reward_correlation": _sum(correlation(written, rewards.flatten()), 1),
            }
        )
        flops = self.meter.cost.forward(whole, written).sum()
        asks = 1 + (self.online.spread is not None)
        flops += asks * sum(cost.forward(whole).sum() for cost in self.reward_costs)
        self.run_state.count(
            generated_tokens=int(written.sum()), policy_forwards=n, reward_forwards=asks * n * len(self.reward_costs),
            flops=int(flops),
        )  # fmt: skip

    # ---- records ----

    def by_source(self, scored: Scored) -> Sums:
        """Without the likelihood of online responses, most of which nobody wants imitated; with their KL."""
        found = super().by_source(scored)
        if not self.is_in_train:
            return found
        own = {f"{name}/nll" for name in self.online.sources}
        found = {name: value for name, value in found.items() if name not in own}
        if scored.reference_logp is not None:
            codes = [self.data_collator.sources.index(name) for name in self.online.sources]
            rows = torch.isin(scored.batch.source, torch.tensor(codes, device=scored.batch.source.device))
            if rows.any():
                ratio = (scored.logp - scored.reference_logp).detach()[rows]
                found["online/kl"] = (ratio.sum(), rows.sum())
        return found

    def run_identity(self) -> dict[str, Any]:
        return super().run_identity() | {"online": self.online.described()}

    def record(self, counters: Mapping[str, float] | None = None) -> dict[str, Any]:
        return super().record(counters) | {"online": self.online.described()}


def prompts_of(data: FeedbackDataset, sources: Sequence[str]) -> FeedbackDataset:
    """The data with the rows of these sources as examples of kind "score", to be answered.  No token is copied.

    Their own responses stay, for a verifier to read.  Raises ValueError for an unknown name and for documents.
    """
    if unknown := [name for name in sources if name not in data.sources]:
        raise ValueError(f"online: found no data set {unknown[0]!r} among {', '.join(data.sources)}")

    def prompted(examples: Examples | Mismatched) -> Examples | Mismatched:
        if examples.source not in sources:
            return examples
        if "document" in examples.kinds:
            raise ValueError(f"online: data set {examples.source!r} holds documents; want rows with a prompt")
        columns = dict((examples.examples if isinstance(examples, Mismatched) else examples).columns)
        columns["kind"] = np.full(len(examples), KINDS.index("score"), dtype=np.uint8)
        return Examples(columns, examples.source)

    return data.mapped(prompted)


def _sum(total: Any, n: int) -> tuple[Tensor, Tensor]:
    return torch.tensor(float(total), dtype=torch.float64), torch.tensor(float(n))


def _check_objective(objective: Objective, online: Online, data: FeedbackDataset) -> None:
    """Raises ValueError where the targets of online responses would be read as what they are not."""
    gradients = set(losses.POLICY_GRADIENT.values())
    advantages = online.target in ADVANTAGES
    for term in objective.terms:
        if not isinstance(term, Pointwise) or "score" not in Objective((term,)).kinds:
            continue
        if (term.function in gradients) != advantages:
            found = f"term {term.name!r} has loss {term.function.__name__} and online responses target"
            raise ValueError(
                f"{found} {online.target!r}; want one of {', '.join(SCORES if advantages else ADVANTAGES)}"
            )
    if "score" in objective.kinds_with_mismatched:
        raise ValueError("a term on online responses wants KTO's KL, of responses to other prompts; want another loss")
    others = [name for name, kinds in data.kinds().items() if "score" in kinds and name not in online.sources]
    if advantages and others:
        raise ValueError(f"data set {others[0]!r} holds scores, which would be taken for advantages; want none beside")
