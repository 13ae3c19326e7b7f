"""How a policy ranks pairs: by likelihood, by implicit reward, and whether the two agree; and what became of each side.

    r(x, y) = β [log π(y | x) − log π_ref(y | x)]

    likelihood/accuracies        share of pairs with log π(y_w | x) > log π(y_l | x); a tie is half right
    likelihood/token_accuracies  the same by the mean over tokens, which does not favour short answers
    rewards/accuracies           share with r(x, y_w) > r(x, y_l)
    rewards/margins, /chosen, /rejected   means of r_w − r_l, r_w, r_l
    agreement                    share of pairs that likelihood and implicit reward rank alike (arXiv:2602.11902): a
                                 policy whose reward ranks well still writes what is likely
    logps/chosen, /rejected      means of log π(y | x), nats per response
    drift/chosen, /rejected      means of log π(y | x) − log π_ref(y | x)
    displaced                    share of pairs whose chosen answer has become less likely than under the reference:
                                 likelihood displacement (arXiv:2410.08847)

Without a reference, only what needs none.
"""

from __future__ import annotations

import numpy as np

from uft.evaluation.likelihood import by_source
from uft.evaluation.scoring import Scores


def ranked(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """float64 [n]: 1 where the first is larger, 1/2 where they are equal."""
    return (first > second) + 0.5 * (first == second)


def preference(
    logp: np.ndarray, length: np.ndarray, reference_logp: np.ndarray | None = None, *, beta: float = 0.1
) -> dict[str, float]:
    """The measures above.

    logp, reference_logp   float64 [pairs, 2], chosen and rejected, nats per response
    length                 float64 [pairs, 2], tokens

    Raises ValueError for other shapes and for no pairs.
    """
    for name, column in (("logp", logp), ("length", length), ("reference_logp", reference_logp)):
        if column is not None and (column.ndim != 2 or column.shape[1] != 2 or column.shape != logp.shape):
            raise ValueError(f"{name}: found {list(column.shape)}; want [pairs, 2], as logp is")
    if not len(logp):
        raise ValueError("found no pairs; want at least one")
    if not beta > 0:
        raise ValueError(f"beta is {beta}; want a number > 0")
    per_token = logp / np.maximum(length, 1)
    likelier = ranked(logp[:, 0], logp[:, 1])
    found = {
        "likelihood/accuracies": likelier.mean(),
        "likelihood/token_accuracies": ranked(per_token[:, 0], per_token[:, 1]).mean(),
        "logps/chosen": logp[:, 0].mean(),
        "logps/rejected": logp[:, 1].mean(),
    }
    if reference_logp is not None:
        drift = logp - reference_logp
        better = ranked(drift[:, 0], drift[:, 1])
        found |= {
            "rewards/accuracies": better.mean(),
            "rewards/margins": beta * (drift[:, 0] - drift[:, 1]).mean(),
            "rewards/chosen": beta * drift[:, 0].mean(),
            "rewards/rejected": beta * drift[:, 1].mean(),
            "agreement": 1 - np.abs(likelier - better).mean(),  # where one is a tie, half
            "drift/chosen": drift[:, 0].mean(),
            "drift/rejected": drift[:, 1].mean(),
            "displaced": (drift[:, 0] < 0).mean(),
        }
    return {name: float(value) for name, value in found.items()}


def pair_preference(scores: Scores, beta: float = 0.1) -> dict[str, float]:
    """`preference` of every (better, worse) of a data set, over all and by source."""
    if not len(scores.preferences):
        raise ValueError(f"data sets {', '.join(scores.names)}: found no pairs; want prompt, chosen, rejected")
    pairs, reference = scores.preferences, scores.reference_logp
    columns = [scores.logp[pairs], scores.length[pairs], *([] if reference is None else [reference[pairs]])]
    return by_source(lambda *c: preference(*c, beta=beta), scores, scores.source[pairs[:, 0]], *columns)
