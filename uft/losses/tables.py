"""The losses that configuration names, by what they are of; and how another one becomes known.

What a loss is handed follows from the names of its arguments; its hyperparameters are keyword-only.
"""

import inspect
from collections.abc import Callable
from typing import Any

from uft.losses.likelihood import chord_phi, dft, sequence_mean_nll, token_nll
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

Loss = Callable[..., Any]  # of tensors by the names of its arguments; one number per token, response or pair

# per token, or per sequence if it takes `in_response`
LIKELIHOOD: dict[str, Loss] = {
    "nll": token_nll,
    "sequence_mean_nll": sequence_mean_nll,
    "dft": dft,
    "chord_phi": chord_phi,
}

PAIRWISE: dict[str, Loss] = {
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

POINTWISE: dict[str, Loss] = {
    "una_mse": una_mse,
    "una_bce": una_bce,
    "kto": kto,
    "bco": bco,
    "apo_zero_unpaired": apo_zero_unpaired,
}

# the target of these is an advantage, of any sign; per response, or per token if it takes `token_logp`
POLICY_GRADIENT: dict[str, Loss] = {
    "reinforce": reinforce,
    "reinforce_tokens": reinforce_tokens,
    "grpo": grpo,
    "reinforce_positive": reinforce_positive,
    "reinforce_negative": reinforce_negative,
}


def needs_reference(loss: Loss) -> bool:
    """Whether a loss asks for a reward or a log-probability of the reference."""
    return any(name.endswith(("reward", "reference_logp")) for name in inspect.signature(loss).parameters)


# what a term can give a loss, by the name of the argument
_OF_RESPONSE = ("logp", "length", "reference_logp", "reward")
_QUANTITIES = (
    (LIKELIHOOD, ("token_logp", "in_response")),
    (PAIRWISE, (*(f"{side}_{name}" for side in ("chosen", "rejected") for name in _OF_RESPONSE), "beta")),
    (POINTWISE, (*_OF_RESPONSE, "target", "beta", "token_logp", "kl", "delta")),
)
_REGISTERED: set[str] = set()


def register(loss: Loss) -> Loss:
    """Makes a function known under its own name, as if it stood in one of the tables; also as a decorator:

        @losses.register
        def squared_gap(chosen_reward, rejected_reward, *, gap=1.0):
            return (chosen_reward - rejected_reward - gap).square()

        make_objective({"sft": {"loss": "nll"}, "preference": {"loss": "squared_gap", "beta": 0.1, "gap": 2.0}})

    Arguments before the star say what it gets and so which table is its own: `chosen_reward`, `rejected_logp`, ... are
    a pairwise loss's, `reward`, `target`, ... a pointwise one's, `token_logp` and `in_response` a likelihood's.  Those
    behind it are hyperparameters.  A name registered before is replaced, so that a notebook's cell may run again.

    Raises ValueError for a name that the library has, an argument that nothing gives, an option without a default.
    """
    name, parameters = loss.__name__, inspect.signature(loss).parameters.values()
    if not name.isidentifier():
        raise ValueError(f"the loss is called {name!r}; want a function with a name")
    known = {**LIKELIHOOD, **PAIRWISE, **POINTWISE, **POLICY_GRADIENT}
    if name in known and name not in _REGISTERED:
        raise ValueError(f"loss {name!r} is one of the library's; want another name")
    for parameter in parameters:
        if parameter.kind is parameter.KEYWORD_ONLY and parameter.default is parameter.empty:
            raise ValueError(f"option {parameter.name!r} of loss {name!r} has no default; want one")
    given = [parameter.name for parameter in parameters if parameter.kind is not parameter.KEYWORD_ONLY]
    fitting = [table for table, quantities in _QUANTITIES if set(given) <= set(quantities)]
    if not fitting or set(given) <= {"beta"}:
        wanted = "; or ".join(", ".join(quantities) for _, quantities in _QUANTITIES)
        raise ValueError(f"loss {name!r} takes {', '.join(given) or 'nothing'}; want some of {wanted}")
    for table, _ in _QUANTITIES:
        table.pop(name, None)
    fitting[0][name] = loss
    _REGISTERED.add(name)
    return loss
