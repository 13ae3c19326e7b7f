"""What a batch of feedback is inside: prompts, responses that belong to them, relations between responses.

Every kind of example that people collect is read into this one form:

    kind            columns                                      responses    target        preferences
    document        text                                         1            –             –
    demonstration   prompt, completion  |  messages              1            1             –
    pair            prompt, chosen, rejected                     2            1, 0          chosen over rejected
                    (optional score_chosen, score_rejected)                   the scores
    label           prompt, completion, label                    1            0 or 1        –
    score           prompt, completion, score                    1            in [0, 1]     –

so K responses to one prompt, rankings and rollouts need a new reader and no new batch.
`target` is how good the response is said to be; terms that do not ask for it ignore it.
A column `weight` (>= 0, any kind) multiplies the losses of the row; denominators stay counts.
Nothing here knows of models, losses or trainers.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

# The position in this tuple is the code in `Batch.kind`.  "mismatched" is never read from a file: it is another
# row's response put behind this prompt, from which KTO estimates its KL.
KINDS = ("document", "demonstration", "pair", "label", "score", "mismatched")

# What a term can be `on`, as the kinds of response it means.  Chosen and rejected are the two sides of a pair.
ROWS = {
    "documents": ("document",),
    "demonstrations": ("demonstration",),
    "pairs": ("pair",),
    "labels": ("label",),
    "scores": ("score",),
    "responses": ("pair", "label", "score"),
    "mismatched": ("mismatched",),
}
SIDES = ("chosen", "rejected")


@dataclass(frozen=True, slots=True)
class Response:
    """One tokenised response.

    tokens      int32 [n], the end-of-sequence token included
    in_loss     bool [n], which tokens were written by the assistant; None means all of them
    target      how good it is said to be: 1 desired, 0 undesired, between them a score, NaN unknown
    weight      factor on its loss
    mismatched  written for another prompt; only statistics may use it
    prompt      what stands before it in place of the example's prompt
    """

    tokens: np.ndarray
    in_loss: np.ndarray | None = None
    target: float = float("nan")
    weight: float = 1.0
    mismatched: bool = False
    prompt: np.ndarray | None = None


@dataclass(frozen=True, slots=True)
class Example:
    """One tokenised row: a prompt, its responses, and which of them is preferred to which.

    prompt        int32 [m], the beginning-of-sequence token included
    preferences   (better, worse) positions in `responses`
    source, row   where it came from: name of the source, row number in it (0-based)
    index         position among the examples of its source, once it is in a data set; chunks of a document share a row
    """

    kind: str
    prompt: np.ndarray
    responses: tuple[Response, ...]
    preferences: tuple[tuple[int, int], ...] = ()
    source: str = "train"
    row: int = 0
    index: int | None = None

    def __post_init__(self):
        if self.kind not in KINDS:
            raise ValueError(f"kind is {self.kind!r}; want one of {', '.join(KINDS)}")

    @property
    def tokens(self) -> int:
        """Tokens that a forward pass over this example sees, with the prompt once per response."""
        prompts = (self.prompt if response.prompt is None else response.prompt for response in self.responses)
        return sum(len(prompt) + len(response.tokens) for prompt, response in zip(prompts, self.responses))


def mismatched(
    examples: Sequence[Example], max_length: int | None = None, kinds: Collection[str] = ROWS["responses"],
    bos: int | None = None,
) -> list[Example]:  # fmt: skip
    """Each example of these kinds with responses to another prompt behind its own prompt.

    KTO's KL estimate needs (x, y') with y' written for another prompt ([KTO] arXiv:2402.01306, Sec. 4.1).  These are
    the responses of the nearest example before it that has another prompt, so they are fixed by the data set, not by
    the micro-batch, and the loss does not depend on the batch layout.  Both sides of a pair are taken: the chosen
    ones alone, which training makes likelier, would raise the estimate.  The prompt is cut from the left, behind its
    `bos`, where both do not fit into `max_length`.  Examples of other kinds come back unchanged.

    Raises ValueError where all prompts are the same.
    """
    at = [i for i, example in enumerate(examples) if example.kind in kinds]
    result = list(examples)
    for position, i in enumerate(at):
        others = (examples[at[position - back]] for back in range(1, len(at)))
        partner = next((e for e in others if not np.array_equal(e.prompt, examples[i].prompt)), None)
        if partner is None:
            raise ValueError(f"source {examples[i].source!r}: KTO's KL needs answers to at least two different prompts")
        result[i] = with_responses_of(partner, examples[i], max_length, bos)
    return result


def with_responses_of(partner: Example, own: Example, max_length: int | None, bos: int | None) -> Example:
    """The example with its partner's responses, marked as mismatched, behind its own."""
    extra = tuple(
        Response(each.tokens, each.in_loss, mismatched=True, prompt=_fitting(own.prompt, each, max_length, bos))
        for each in partner.responses
    )
    return replace(own, responses=(*own.responses, *extra))


def _fitting(prompt: np.ndarray, response: Response, max_length: int | None, bos: int | None) -> np.ndarray | None:
    """The end of the prompt, behind its BOS, that fits before the response; None where all of it does."""
    if max_length is None or len(prompt) + len(response.tokens) <= max_length:
        return None
    # responses fit with a token of context to spare, see uft.data.template
    room = max_length - len(response.tokens)
    if bos is None or prompt[0] != bos:
        return prompt[len(prompt) - room :]
    return np.concatenate([prompt[:1], prompt[len(prompt) - room + 1 :]])


@dataclass(frozen=True)
class Need:
    """What an objective does with a response.

    gradient     some term is on it
    reference    the reference scores it as well
    statistics   names of the terms that want it scored without gradient before the step
    terms        names of the terms that are on it, where some of them rest at times: it then runs apart from what other
                 terms are on
    """

    gradient: bool = True
    reference: bool = False
    statistics: tuple[str, ...] = ()
    terms: tuple[str, ...] = ()


class Batch(dict):
    """A collated batch: a dict of tensors whose entries are also attributes.  What the objective knows of it:

    R responses, P preferences, T tokens of the longest prompt and response, N tokens that count.

    in_loss          bool  [R, T]   True where the token belongs to a response and counts
    length           int64 [R]      tokens of prompt and response
    kind             int64 [R]      position in KINDS
    source           int64 [R]      position in the mixture's list of sources
    row              int64 [R]      row number in the source
    index            int64 [R]      position of the example among those of the source
    response         int64 [R]      which of its example's responses
    prompt           int64 [R]      which prompt of the batch this answers
    target           float32 [R]    NaN where unknown
    weight           float32 [R]
    preferences      int64 [P, 2]   (better, worse) rows of this batch
    side             int64 [R]      1 where it is the better of some pair, 2 the worse, 3 both; kept by `select`
    reference_logp   float32 [R]    only where it was computed beforehand
    need             Need, the same for all responses; only where an objective has cut the batch (`uft.collation`)

    The token at position t is predicted at t - 1, so per-token quantities are [R, T - 1] and `shifted` is their mask.

    What the model reads:

    input_ids        int64 [R, T], prompt and response, padded; or [1, L], packed
    attention_mask   int64 [R, T], of a padded batch
    position_ids     int64 [1, L], of a packed one
    segments         uft.segments.Segments, of a packed one: which tokens see which
    predicts         int64 [N]      the position, in input_ids laid flat, at which each counted token is predicted
    answers          int64 [N]      these tokens, in the order of `shifted`
    """

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError:
            raise AttributeError(name) from None

    @property
    def shifted(self) -> Tensor:
        """bool [R, T - 1]: which next-token predictions count."""
        return self["in_loss"][:, 1:]

    def rows(self, on: str) -> Tensor:
        """bool [R]: the responses a term that is `on` these applies to; names may be joined with `+`."""
        chosen = torch.zeros_like(self["kind"], dtype=torch.bool)
        for name in on.split("+"):
            name = name.strip()
            if name in SIDES:
                chosen |= (self["side"] & (1 << SIDES.index(name))) > 0
            elif name in ROWS:
                for kind in ROWS[name]:
                    chosen |= self["kind"] == KINDS.index(kind)
            else:
                raise ValueError(f"on: {name!r} is unknown; want {', '.join([*ROWS, *SIDES])}, or several joined by +")
        return chosen

    @property
    def packed(self) -> bool:
        return "segments" in self

    def select(self, rows: Tensor) -> Batch:
        """The part of a padded batch with these responses (bool [R]); relations with a missing side are left out."""
        if self.packed:
            raise ValueError("a packed batch is one row; want its responses chosen before it is packed")
        new_index = rows.cumsum(0) - 1
        inside = rows[self["preferences"]].all(-1)
        part = {name: value[rows] for name, value in self.items() if name not in _OF_THE_WHOLE}
        return Batch(part, preferences=new_index[self["preferences"][inside]])

    def to(self, device: Any, non_blocking: bool = False) -> Batch:
        return Batch({k: v.to(device, non_blocking=non_blocking) if hasattr(v, "to") else v for k, v in self.items()})

    def pin_memory(self) -> Batch:
        """As torch's DataLoader asks for it."""
        return Batch({k: v.pin_memory() if hasattr(v, "pin_memory") else v for k, v in self.items()})


# what has no entry per response
_OF_THE_WHOLE = ("preferences", "need", "predicts", "answers")
