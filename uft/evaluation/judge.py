"""Which of two runs answers better, by a judge that the user plugs in.

A judge is one of two functions:

    (prompt, a, b) -> probability that a is the better response, in [0, 1]; 0.5 is a tie
    (prompt, response) -> score, any finite number; then P(a better) = sigmoid(score(a) - score(b)), Bradley-Terry

The first kind is asked in both orders, so that a liking for the first position, or the second, cancels:

    p            = (judge(x, a, b) + 1 - judge(x, b, a)) / 2                  a wins if p > 0.5, ties if p = 0.5
    win_rate     = (wins + ties / 2) / n
    position     = mean of judge(x, a, b) + judge(x, b, a) - 1                > 0: what stands first is liked better

Length-controlled: had both responses been equally long (AlpacaEval LC 2.0, arXiv:2404.04475, without its terms for the
instruction), by logistic regression of p on the difference in length d = len(a) - len(b), s its standard deviation:

    logit P(a better) = theta + phi * tanh(d / s)                             length_controlled = sigmoid(theta)

with theta and phi at the least cross-entropy with p, plus phi^2 / 200, which keeps phi finite where length decides all.
Where a is always longer, or always shorter, theta is extrapolated.
"""

from __future__ import annotations

import importlib
import inspect
import math
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from scipy import optimize, special, stats
from tqdm import tqdm

from uft.data.readers import TextExample
from uft.data.rows import DataError, Messages
from uft.data.template import Template
from uft.evaluation.generation import Generation

PairJudge = Callable[[Any, str, str], float]
Score = Callable[[Any, str], float]


@dataclass(frozen=True)
class WinRate:
    """How often the responses of run a are better than those of run b.  See the top of the file.

    win, tie, loss      shares of prompts
    low, high           interval of win_rate over prompts
    preference          mean of p
    position_bias       in [-1, 1]; 0 for a judge that scores each response
    length_controlled   what `preference` would be at equal lengths; NaN where lengths always differ by the same
    length_effect       phi; > 0: longer responses are liked better
    length_a, length_b  mean lengths
    probabilities       p of each prompt
    """

    n: int
    win: float
    tie: float
    loss: float
    win_rate: float
    low: float
    high: float
    preference: float
    position_bias: float
    length_controlled: float
    length_effect: float
    length_a: float
    length_b: float
    probabilities: tuple[float, ...]


def win_rate(
    prompts: Sequence[str | Messages],
    a: Sequence[Generation | str],
    b: Sequence[Generation | str],
    judge: PairJudge | Score | RewardModelJudge,
    *,
    length: Callable[[str], float] = len,
    confidence: float = 0.95,
    method: str = "wilson",
) -> WinRate:
    """Compares two runs' responses to the same prompts.  See the top of the file.

    length   of a response; by default in characters, as AlpacaEval has it
    method   of the interval: "wilson" or "exact" (Clopper-Pearson), see `interval`

    Raises `ValueError` that names the prompt if a judge says what it may not, or a generation is of another prompt.
    """
    if not len(prompts) == len(a) == len(b) > 0:
        raise ValueError(f"found {len(prompts)} prompts, {len(a)} and {len(b)} responses; want as many, and at least 1")
    texts_a, texts_b = _texts(prompts, a), _texts(prompts, b)
    first, second = _both_orders(as_judge(judge), prompts, texts_a, texts_b)
    p = (first + second) / 2
    p = np.where(np.abs(p - 0.5) < 1e-12, 0.5, p)  # 0.3 and 0.7 from both orders are a tie, whatever rounding says
    win, tie, loss = float(np.mean(p > 0.5)), float(np.mean(p == 0.5)), float(np.mean(p < 0.5))
    rate = win + tie / 2
    low, high = interval(rate, len(p), confidence, method)
    lengths_a = np.array([length(text) for text in texts_a], dtype=float)
    lengths_b = np.array([length(text) for text in texts_b], dtype=float)
    controlled, effect = length_controlled(p, lengths_a - lengths_b)
    return WinRate(
        n=len(p),
        win=win,
        tie=tie,
        loss=loss,
        win_rate=rate,
        low=low,
        high=high,
        preference=float(p.mean()),
        position_bias=float(np.mean(first - second)),
        length_controlled=controlled,
        length_effect=effect,
        length_a=float(lengths_a.mean()),
        length_b=float(lengths_b.mean()),
        probabilities=tuple(p.tolist()),
    )


def _texts(prompts: Sequence[str | Messages], responses: Sequence[Generation | str]) -> list[str]:
    for i, (prompt, response) in enumerate(zip(prompts, responses)):
        if isinstance(response, Generation) and response.prompt != prompt:
            raise ValueError(
                f"prompt {i}: found a response to {str(response.prompt)[:60]!r}; want to {str(prompt)[:60]!r}"
            )
    return [response if isinstance(response, str) else response.text for response in responses]


# ---- statistics ----


def interval(rate: float, n: int, confidence: float = 0.95, method: str = "wilson") -> tuple[float, float]:
    """Of a share of n prompts: Wilson's score interval, or the exact binomial one of Clopper and Pearson.

        wilson   (rate + z^2 / 2n ± z sqrt(rate (1 - rate) / n + z^2 / 4n^2)) / (1 + z^2 / n)
        exact    the beta quantiles B(alpha / 2; k, n - k + 1) and B(1 - alpha / 2; k + 1, n - k), k = rate * n

    Ties count as half a win, which varies less than a win or a loss: with many of them the interval is too wide.
    """
    if method == "wilson":
        z = stats.norm.ppf(0.5 + confidence / 2)
        centre, scale = rate + z**2 / (2 * n), 1 + z**2 / n
        half = z * math.sqrt(rate * (1 - rate) / n + z**2 / (4 * n**2))
        return max(0.0, float((centre - half) / scale)), min(1.0, float((centre + half) / scale))
    if method == "exact":
        k, tail = rate * n, (1 - confidence) / 2
        low = stats.beta.ppf(tail, k, n - k + 1) if k > 0 else 0.0
        high = stats.beta.ppf(1 - tail, k + 1, n - k) if k < n else 1.0
        return float(low), float(high)
    raise ValueError(f"method: found {method!r}; want wilson or exact")


RIDGE = 0.01


def length_controlled(p: np.ndarray, difference: np.ndarray) -> tuple[float, float]:
    """(sigmoid(theta), phi) of the regression at the top of the file; NaN if the lengths always differ by the same."""
    scale = difference.std()
    if not scale:
        return (float("nan"), float("nan")) if difference.any() else (float(p.mean()), 0.0)
    x = np.tanh(difference / scale)

    def loss(parameters: np.ndarray) -> tuple[float, np.ndarray]:
        theta, phi = parameters
        z = theta + phi * x
        residual = special.expit(z) - p
        value = np.sum(np.logaddexp(0.0, z) - p * z) + RIDGE / 2 * phi**2
        return float(value), np.array([residual.sum(), residual @ x + RIDGE * phi])

    # sigmoid(±30) is 0 or 1 to thirteen digits: theta stays finite where one side always wins
    found = optimize.minimize(
        loss, np.zeros(2), jac=True, method="L-BFGS-B", bounds=[(-30, 30), (None, None)],
        options={"ftol": 1e-15, "gtol": 1e-10, "maxiter": 1000},
    )  # fmt: skip
    return float(special.expit(found.x[0])), float(found.x[1])


# ---- judges ----


def as_judge(judge: Any) -> Any:
    """What asks in one way: a function of three arguments as it is, or an object with `scores(prompts, responses)`."""
    if hasattr(judge, "scores") and not inspect.isclass(judge):
        return judge
    wanted = "a function (prompt, a, b) or (prompt, response), or an object with `scores`"
    if inspect.isclass(judge) or not callable(judge):
        raise ValueError(f"judge: found {judge!r}; want {wanted}")
    arguments = _arguments(judge)
    if arguments not in (2, 3):
        found = f"{judge!r} of {'any number of' if arguments is None else arguments} arguments"
        raise ValueError(f"judge: found {found}; want {wanted}")
    return judge if arguments == 3 else _Scores(judge)


def _arguments(function: Callable) -> int | None:
    """How many are to be given, by place; None if that cannot be known."""
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):
        return None
    if any(p.kind is p.VAR_POSITIONAL for p in parameters):
        return None
    return sum(p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD) and p.default is p.empty for p in parameters)


@dataclass(frozen=True)
class _Scores:
    score: Score

    def scores(self, prompts: Sequence[str | Messages], responses: Sequence[str]) -> list[float]:
        return [self.score(prompt, response) for prompt, response in zip(_bar(prompts), responses)]


def _both_orders(
    judge: Any, prompts: Sequence[str | Messages], a: Sequence[str], b: Sequence[str]
) -> tuple[np.ndarray, np.ndarray]:
    """P(a better), float [prompts], by the judge who saw a first, and who saw b first."""
    if hasattr(judge, "scores"):
        scores = [_checked(judge.scores(prompts, each), "a score", -math.inf, math.inf) for each in (a, b)]
        p = special.expit(scores[0] - scores[1])
        return p, p
    asked = [(judge(x, y, z), judge(x, z, y)) for x, y, z in zip(_bar(prompts), a, b)]
    first, second = (_checked(values, "a probability in [0, 1]", 0.0, 1.0) for values in zip(*asked))
    return first, 1 - second


def _checked(values: Sequence[Any], wanted: str, low: float, high: float) -> np.ndarray:
    found = []
    for i, value in enumerate(values):
        try:
            found.append(float(value))
        except (TypeError, ValueError):
            found.append(math.nan)
        if not math.isfinite(found[-1]) or not low <= found[-1] <= high:
            raise ValueError(f"prompt {i}: the judge says {value!r}; want {wanted}")
    return np.array(found)


def _bar(prompts: Sequence) -> Any:
    return tqdm(prompts, "judging", unit=" prompts", disable=None, delay=1, leave=False)


class RewardModelJudge:
    """A reward model: a sequence classifier with one output, which scores a prompt with a response.

    max_length   of both, in tokens; prompts lose tokens on the left, a response that does not fit is refused.  By
                 default what the model has positions for

    The tokens are those of training: the chat template, or the two texts, one BOS, and EOS at the end.
    """

    def __init__(self, model: Any, tokenizer: Any, *, batch_size: int = 8, max_length: int | None = None):
        outputs = getattr(model.config, "num_labels", None)
        if outputs != 1:
            raise ValueError(f"reward model: found {outputs} outputs; want 1, the score")
        max_length = max_length or getattr(model.config.get_text_config(), "max_position_embeddings", None)
        self.model, self.batch_size, self.template = model, batch_size, Template(tokenizer, max_length)

    @classmethod
    def from_pretrained(cls, name: str, **options: Any) -> RewardModelJudge:
        """By path or hub id; options are those of `AutoModelForSequenceClassification.from_pretrained`."""
        from transformers import AutoModelForSequenceClassification, AutoTokenizer

        model = AutoModelForSequenceClassification.from_pretrained(name, **options)
        return cls(model, AutoTokenizer.from_pretrained(name))

    def __call__(self, prompt: str | Messages, response: str) -> float:
        return float(self.scores([prompt], [response])[0])

    @torch.no_grad()
    def scores(self, prompts: Sequence[str | Messages], responses: Sequence[str]) -> np.ndarray:
        """float64 [prompts]"""
        encoded = [self._encoded(i, prompt, response) for i, (prompt, response) in enumerate(zip(prompts, responses))]
        order = sorted(range(len(encoded)), key=lambda i: -len(encoded[i]))
        pad = self.model.config.get_text_config().pad_token_id
        # which token is the last is found by the padding; without any, each stands alone
        size = 1 if pad is None else self.batch_size
        found = np.zeros(len(encoded))
        modes = [(module, module.training) for module in self.model.modules()]
        self.model.eval()
        try:
            with tqdm(total=len(order), desc="scoring", unit=" responses", disable=None, delay=1, leave=False) as bar:
                for start in range(0, len(order), size):
                    batch = order[start : start + size]
                    found[batch] = self._scores([encoded[i] for i in batch], pad)
                    bar.update(len(batch))
        finally:
            for module, training in modes:
                module.training = training
        return found

    def _scores(self, encoded: Sequence[list[int]], pad: int | None) -> np.ndarray:
        longest, device = max(map(len, encoded)), self.model.device
        ids = torch.tensor([row + [pad] * (longest - len(row)) for row in encoded], device=device)
        mask = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in encoded], device=device)
        return self.model(input_ids=ids, attention_mask=mask).logits[:, 0].double().cpu().numpy()

    def _encoded(self, i: int, prompt: str | Messages, response: str) -> list[int]:
        written = response if isinstance(prompt, str) else [{"role": "assistant", "content": response}]
        try:
            example = self.template(TextExample("demonstration", prompt, (written,), (math.nan,))).examples[0]
        except DataError as error:
            raise ValueError(f"prompt {i}: {error}") from None
        return [*example.prompt.tolist(), *example.responses[0].tokens.tolist()]


def load_judge(name: str) -> Any:
    """The judge that a configuration names as "package.module:function"; modules are also looked for where one stands.

    What is named may be a judge of any kind, but not a class: `make_judge = MyJudge(...)` in the module, and its name.
    """
    module, colon, attribute = name.partition(":")
    if not (colon and module and attribute):
        raise ValueError(f'judge: found {name!r}; want "package.module:function"')
    here = os.getcwd()
    added = here not in sys.path
    if added:
        sys.path.append(here)
    try:
        found: Any = importlib.import_module(module)
    finally:
        if added:
            sys.path.remove(here)
    for part in attribute.split("."):
        if not hasattr(found, part):
            raise ValueError(f"judge: found no {attribute!r} in {module}; want the name of a function there")
        found = getattr(found, part)
    as_judge(found)
    return found
