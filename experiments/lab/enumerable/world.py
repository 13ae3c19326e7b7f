"""Prompts and responses short enough to list, and the distributions that they are drawn from.

A prompt is two letters and "=".  A response is at most `max_tokens` tokens: letters and "=", ended by "." (the
end-of-sequence token), or cut off after `max_tokens` of them without an end.  Every sequence that a model can write is
one of the two, so the probabilities of all responses sum to 1 exactly.

    P prompts, Y responses, N nodes (what may stand before a token: responses so far), V tokens, T most tokens
    [P, Y]      a policy or a distribution: every response to every prompt, float64
    [P, N, V]   the same, token by token

The task of "ab=" is to turn it round: "ba.".  Documents are letters, the prompt's more often than others.
Demonstrations show the answer, or at times a copy or a document.  Preferences want the answer and a "=" behind it,
which few demonstrations write; they are about some prompts only (`covered`).  Nothing of it is uncertain:

    reward(x, y)  = letters in the right place (0, 1, 2) + POLITE if "=" stands before the end - CUT if cut off
    P(y beats y') = sigmoid(reward(x, y) - reward(x, y')), Bradley-Terry, and then turned round with probability `flip`
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from itertools import product

import numpy as np
import torch
from torch import Tensor

from uft.feedback import Example, Response

EOS = 0
END, ASK = ".", "="
POLITE, CUT = 1.5, 1.0


@dataclass(frozen=True)
class World:
    """letters      of prompts; responses may also hold "="
    max_tokens   of a response, its end included
    uncovered    how many of the letters begin prompts that preferences are not about
    flip         how often a judgement is turned round
    """

    letters: str = "abc"
    max_tokens: int = 4
    uncovered: int = 1
    flip: float = 0.0

    def __post_init__(self):
        if self.max_tokens < 4:
            raise ValueError(f"max_tokens is {self.max_tokens}; want at least the 4 of the best response")
        if not 0 <= self.uncovered < len(self.letters):
            raise ValueError(f"uncovered is {self.uncovered}; want fewer than the {len(self.letters)} letters")

    # ---- what there is ----

    @cached_property
    def vocabulary(self) -> str:
        """Tokens by id; the first is the end."""
        return END + self.letters + ASK

    @cached_property
    def prompts(self) -> list[str]:
        return [f"{a}{b}{ASK}" for a, b in product(self.letters, repeat=2)]

    @cached_property
    def responses(self) -> list[str]:
        """Those that end, shorter ones first, and then those that are cut off."""
        written = self.vocabulary[1:]
        ended = ["".join(w) + END for n in range(self.max_tokens) for w in product(written, repeat=n)]
        return ended + ["".join(w) for w in product(written, repeat=self.max_tokens)]

    @cached_property
    def nodes(self) -> list[str]:
        """Responses so far: all that stands before some token, shorter ones first."""
        return [response[:-1] for response in self.responses if response.endswith(END)]

    @cached_property
    def covered(self) -> Tensor:
        """bool [P]: the prompts that preferences are about."""
        without = self.letters[len(self.letters) - self.uncovered :]
        return torch.tensor([prompt[0] not in without for prompt in self.prompts])

    @cached_property
    def length(self) -> Tensor:
        """float64 [Y]: tokens, the end included."""
        return torch.tensor([float(len(response)) for response in self.responses], dtype=torch.float64)

    @cached_property
    def _place(self) -> dict[str, int]:
        return {response: i for i, response in enumerate(self.responses)}

    def place(self, response: str) -> int:
        """Where a response stands in the list."""
        return self._place[response]

    def ids(self, text: str) -> np.ndarray:
        return np.array([self.vocabulary.index(c) for c in text], dtype=np.int32)

    def text(self, ids: Tensor | np.ndarray | list[int]) -> str:
        """Up to and including the first end, and at most `max_tokens`: a response, from tokens that a model wrote."""
        written = "".join(self.vocabulary[int(i)] for i in ids)[: self.max_tokens]
        return written[: written.index(END) + 1] if END in written else written

    # ---- from tokens to responses and back ----

    @cached_property
    def _passes(self) -> Tensor:
        """bool [N, V, Y]: whether a response has this token behind this node."""
        passes = torch.zeros(len(self.nodes), len(self.vocabulary), len(self.responses), dtype=torch.bool)
        at = {node: i for i, node in enumerate(self.nodes)}
        for y, response in enumerate(self.responses):
            for t, token in enumerate(response):
                passes[at[response[:t]], self.vocabulary.index(token), y] = True
        return passes

    @cached_property
    def _steps(self) -> tuple[Tensor, Tensor]:
        """int64 [Y, T] and float64 [Y, T]: which of all (node, token) a response takes, and 0 behind its end."""
        at = {node: i for i, node in enumerate(self.nodes)}
        steps = torch.zeros(len(self.responses), self.max_tokens, dtype=torch.int64)
        counts = torch.zeros(len(self.responses), self.max_tokens, dtype=torch.float64)
        for y, response in enumerate(self.responses):
            for t, token in enumerate(response):
                steps[y, t] = at[response[:t]] * len(self.vocabulary) + self.vocabulary.index(token)
                counts[y, t] = 1.0
        return steps, counts

    def summed(self, token_logp: Tensor) -> Tensor:
        """[P, N, V] -> [P, Y]: log-probabilities of responses from those of tokens."""
        steps, counts = self._steps
        return (token_logp.flatten(1)[:, steps] * counts).sum(-1)

    def edge_mass(self, logp: Tensor) -> Tensor:
        """[P, Y] -> [P, N, V]: log of the probability that a response passes this node and goes on with this token."""
        inside = logp[:, None, None, :].masked_fill(~self._passes, -torch.inf)
        return inside.logsumexp(-1)

    def token_logp(self, logp: Tensor) -> Tensor:
        """[P, Y] -> [P, N, V]: the policy token by token."""
        return self.edge_mass(logp).log_softmax(-1)

    # ---- what is drawn ----

    @cached_property
    def documents(self) -> Tensor:
        """[P, Y]: letters one behind the other; the prompt's are likelier, "=" is rare."""
        weights = torch.ones(len(self.prompts), len(self.nodes), len(self.vocabulary), dtype=torch.float64)
        weights[..., -1] = 0.4
        for x, prompt in enumerate(self.prompts):
            for letter in prompt[:2]:
                weights[x, :, self.vocabulary.index(letter)] += 1.0
        weights[..., EOS] = 1.5
        weights[:, 0, EOS] = 0.2  # an empty response is rarer
        return self.summed((weights / weights.sum(-1, keepdim=True)).log()).exp()

    @cached_property
    def demonstrations(self) -> Tensor:
        """[P, Y]: the answer, at times a copy or a document."""
        return 0.6 * self._answers() + 0.15 * self._copies() + 0.25 * self.documents

    @cached_property
    def offered(self) -> Tensor:
        """[P, Y]: what both sides of a pair are drawn from: documents, demonstrations, and those with "=" behind."""
        polite = 0.8 * self._answers(ASK) + 0.2 * self._copies(ASK)
        return 0.4 * self.documents + 0.3 * self.demonstrations + 0.3 * polite

    def _answers(self, behind: str = "") -> Tensor:
        return self._always([prompt[1] + prompt[0] + behind + END for prompt in self.prompts])

    def _copies(self, behind: str = "") -> Tensor:
        return self._always([prompt[:2] + behind + END for prompt in self.prompts])

    def _always(self, texts: list[str]) -> Tensor:
        places = torch.tensor([self.place(text) for text in texts])
        return torch.nn.functional.one_hot(places, len(self.responses)).double()

    @cached_property
    def reward(self) -> Tensor:
        """[P, Y], in the unit of Bradley-Terry's logits."""
        found = torch.zeros(len(self.prompts), len(self.responses), dtype=torch.float64)
        for (x, prompt), (y, response) in product(enumerate(self.prompts), enumerate(self.responses)):
            right = sum(a == b for a, b in zip(response, prompt[1::-1]))
            found[x, y] = right + POLITE * response.endswith(ASK + END) - CUT * (not response.endswith(END))
        return found

    def reward_of(self, prompt: str, response: str) -> float:
        return self.reward[self.prompts.index(prompt), self.place(response)].item()

    def beats(self, x: int) -> Tensor:
        """[Y, Y]: how often the first is preferred to the second, as answers to prompt x."""
        reward = self.reward[x]
        clean = torch.sigmoid(reward[:, None] - reward[None, :])
        return (1 - self.flip) * clean + self.flip * clean.T

    # ---- samples ----

    def sample(self, distribution: Tensor, prompts: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """A response's place for each of these prompts (places in `prompts`)."""
        cumulative = distribution.cumsum(-1).numpy()
        drawn = rng.random(len(prompts)) * cumulative[prompts, -1]
        return np.array([np.searchsorted(cumulative[x], u, side="right") for x, u in zip(prompts, drawn)])

    def draw_documents(self, count: int, seed: int) -> list[Example]:
        """Prompt and response as one text."""
        return [
            Example(
                "document", self.ids(""), (Response(self.ids(self.prompts[x] + self.responses[y])),), (), "train", i
            )
            for i, (x, y) in enumerate(self._drawn(self.documents, count, seed, "documents"))
        ]

    def draw_demonstrations(self, count: int, seed: int) -> list[Example]:
        drawn = self._drawn(self.demonstrations, count, seed, "demonstrations")
        return [self._example("demonstration", x, [(y, 1.0)], i) for i, (x, y) in enumerate(drawn)]

    def draw_pairs(self, count: int, seed: int) -> list[Example]:
        """Two responses drawn from `offered`, the preferred one first."""
        rng = _generator(seed, "pairs")
        prompts = rng.choice(self.covered.nonzero()[:, 0].numpy(), count)
        first, second = (self.sample(self.offered, prompts, rng) for _ in range(2))
        odds = self.reward.numpy()[prompts, first] - self.reward.numpy()[prompts, second]
        wins = (rng.random(count) < 1 / (1 + np.exp(-odds))) != (rng.random(count) < self.flip)
        chosen, rejected = np.where(wins, first, second), np.where(wins, second, first)
        sides = zip(prompts, chosen, rejected)
        return [
            self._example("pair", x, [(better, 1.0), (worse, 0.0)], i) for i, (x, better, worse) in enumerate(sides)
        ]

    def responses_of(self, policy: Tensor, count: int, seed: int) -> list[Example]:
        """What a policy (log-probabilities [P, Y]) writes, `count` times to every prompt."""
        rng, prompts = _generator(seed, "responses"), np.repeat(np.arange(len(self.prompts)), count)
        drawn = zip(prompts, self.sample(policy.exp(), prompts, rng))
        return [self._example("demonstration", x, [(y, 1.0)], i) for i, (x, y) in enumerate(drawn)]

    def every_response(self, x: int) -> list[Example]:
        """All responses to prompt x, in their order."""
        return [self._example("demonstration", x, [(y, 1.0)], y) for y in range(len(self.responses))]

    def _drawn(self, distribution: Tensor, count: int, seed: int, what: str):
        rng = _generator(seed, what)
        prompts = rng.integers(len(self.prompts), size=count)
        return zip(prompts, self.sample(distribution, prompts, rng))

    def _example(self, kind: str, x: int, responses: list[tuple[int, float]], row: int) -> Example:
        written = tuple(Response(self.ids(self.responses[y]), target=target) for y, target in responses)
        return Example(kind, self.ids(self.prompts[x]), written, ((0, 1),) if kind == "pair" else (), "train", row)


def _generator(seed: int, what: str) -> np.random.Generator:
    return np.random.default_rng([seed, *what.encode()])
