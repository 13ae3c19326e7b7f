"""Losses as pure functions of log-probabilities: an equation each, nothing reduced over the batch.

The tables below are what configuration names.  A new loss is a function in one of the files and a line here; which
quantities it gets follows from the names of its arguments.
"""

import inspect
from collections.abc import Callable

from uft.losses.likelihood import chord_phi, dft, sequence_mean_nll, token_nll
from uft.losses.likelihood import implicit_reward as implicit_reward
from uft.losses.likelihood import response_logp as response_logp
from uft.losses.odds import orpo
from uft.losses.pairwise import (
    apo_down,
    apo_zero,
    bco_pair,
    cal_dpo,
    cdpo,
    cpo,
    discopop,
    dpo,
    dpo_norm,
    dpop,
    exo,
    hinge,
    ipo,
    nca,
    robust_dpo,
    simpo,
    sppo,
)
from uft.losses.pointwise import RunningMean as RunningMean
from uft.losses.pointwise import (
    apo_zero_unpaired,
    bco,
    grpo,
    kto,
    reinforce,
    reinforce_negative,
    reinforce_positive,
    reinforce_tokens,
    una_bce,
    una_mse,
)

# per token, or per sequence if it takes `in_response`
LIKELIHOOD = {
    "nll": token_nll,
    "sequence_mean_nll": sequence_mean_nll,
    "dft": dft,
    "chord_phi": chord_phi,
}

PAIRWISE = {
    "dpo": dpo,
    "cdpo": cdpo,
    "robust_dpo": robust_dpo,
    "dpo_norm": dpo_norm,
    "dpop": dpop,
    "cpo": cpo,
    "simpo": simpo,
    "orpo": orpo,
    "hinge": hinge,
    "ipo": ipo,
    "exo": exo,
    "discopop": discopop,
    "cal_dpo": cal_dpo,
    "sppo": sppo,
    "nca": nca,
    "bco_pair": bco_pair,
    "apo_zero": apo_zero,
    "apo_down": apo_down,
}

POINTWISE = {
    "una_mse": una_mse,
    "una_bce": una_bce,
    "kto": kto,
    "bco": bco,
    "apo_zero_unpaired": apo_zero_unpaired,
}

# the target of these is an advantage, of any sign; per response, or per token if it takes `token_logp`
POLICY_GRADIENT = {
    "reinforce": reinforce,
    "reinforce_tokens": reinforce_tokens,
    "grpo": grpo,
    "reinforce_positive": reinforce_positive,
    "reinforce_negative": reinforce_negative,
}


def needs_reference(loss: Callable) -> bool:
    """Whether a loss asks for a reward or a log-probability of the reference."""
    return any(name.endswith(("reward", "reference_logp")) for name in inspect.signature(loss).parameters)
