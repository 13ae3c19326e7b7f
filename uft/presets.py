"""Named objectives.  Each is a function of its hyperparameters; `make_objective` reads names and mappings.

sft              -log pi on demonstrations (and documents)
sft_chosen       the control: -log pi on demonstrations and chosen answers alike
dpo              pairs only
dpo_nll          pairs + likelihood of demonstrations: the joint objective of two data sets
dpo_chosen_nll   pairs + likelihood of the chosen answers ([TRL] loss_type=["sigmoid", "sft"])
rpo              the same, likelihood averaged per sequence   [IRPO] arXiv:2404.19733 Eq. 1-2
mpo              0.8 DPO + 0.2 BCO + 1.0 likelihood of chosen [MPO]  arXiv:2411.10442 Eq. 3
cpo, orpo, simpo, kto, bco, una
uft              Wang et al. exactly: demonstrations are responses with score 1, one pointwise loss
                 [UFT] arXiv:2410.21438 Eq. 7
uft_nll          demonstrations by likelihood, feedback by implicit reward
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from uft import losses
from uft.balance import make_balancer
from uft.objective import Objective
from uft.schedules import make_weight
from uft.terms import Divergence, Likelihood, Pairwise, Pointwise, Term

DEMONSTRATED = "demonstrations+documents"


def sft(weight: float = 1.0, loss: str = "nll") -> Objective:
    return Objective((Likelihood("sft", DEMONSTRATED, weight, losses.LIKELIHOOD[loss]),), "sft")


def sft_chosen(weight: float = 1.0) -> Objective:
    return Objective((Likelihood("sft", DEMONSTRATED + "+chosen", weight),), "sft_chosen")


def dpo(beta: float = 0.1, loss: str = "dpo", **options: Any) -> Objective:
    """Any pairwise loss by name, on pairs alone."""
    return Objective((Pairwise("preference", function=_pairwise(loss), beta=beta, options=options),), loss)


def dpo_nll(
    beta: float = 0.1, sft_weight: float = 1.0, preference_weight: float = 1.0, loss: str = "dpo", **options: Any
) -> Objective:
    preference = Pairwise("preference", weight=preference_weight, function=_pairwise(loss), beta=beta, options=options)
    return Objective((Likelihood("sft", DEMONSTRATED, sft_weight), preference), "dpo_nll")


def dpo_chosen_nll(
    beta: float = 0.1, sft_weight: float = 1.0, preference_weight: float = 1.0, loss: str = "dpo", **options: Any
) -> Objective:
    preference = Pairwise("preference", weight=preference_weight, function=_pairwise(loss), beta=beta, options=options)
    return Objective((Likelihood("sft", "chosen", sft_weight), preference), "dpo_chosen_nll")


def rpo(beta: float = 0.1, sft_weight: float = 1.0) -> Objective:
    likelihood = Likelihood("sft", "chosen", sft_weight, losses.sequence_mean_nll)
    return Objective((likelihood, Pairwise("preference", function=losses.dpo, beta=beta)), "rpo")


def mpo(
    beta: float = 0.1, preference_weight: float = 0.8, quality_weight: float = 0.2, sft_weight: float = 1.0
) -> Objective:
    terms = (
        Likelihood("sft", "chosen", sft_weight),
        Pairwise("preference", weight=preference_weight, function=losses.dpo, beta=beta),
        Pairwise("quality", weight=quality_weight, function=losses.bco_pair, beta=beta),
    )
    return Objective(terms, "mpo")


def cpo(beta: float = 0.1, sft_weight: float = 1.0, **options: Any) -> Objective:
    terms = (
        Likelihood("sft", "chosen", sft_weight),
        Pairwise("preference", function=losses.cpo, beta=beta, options=options),
    )
    return Objective(terms, "cpo")


def orpo(beta: float = 0.1, sft_weight: float = 1.0) -> Objective:
    """`beta` is the weight of the odds-ratio term (lambda in the paper)."""
    terms = (
        Likelihood("sft", "chosen", sft_weight),
        Pairwise("preference", weight=beta, function=losses.orpo, beta=beta),
    )
    return Objective(terms, "orpo")


def simpo(beta: float = 2.0, **options: Any) -> Objective:
    return Objective((Pairwise("preference", function=losses.simpo, beta=beta, options=options),), "simpo")


def kto(beta: float = 0.1, **options: Any) -> Objective:
    return Objective((Pointwise("preference", function=losses.kto, beta=beta, options=options),), "kto")


def bco(beta: float = 0.1, **options: Any) -> Objective:
    return Objective((Pointwise("preference", function=losses.bco, beta=beta, options=options),), "bco")


def una(beta: float = 0.03, loss: str = "una_mse") -> Objective:
    return Objective((Pointwise("preference", function=_pointwise(loss), beta=beta),), "una")


def uft(beta: float = 0.01, loss: str = "una_mse") -> Objective:
    """One pointwise loss over responses and demonstrations alike; a demonstration's score is 1."""
    term = Pointwise("preference", "responses+demonstrations", function=_pointwise(loss), beta=beta)
    return Objective((term,), "uft")


def uft_nll(
    beta: float = 0.1, sft_weight: float = 1.0, preference_weight: float = 1.0, loss: str = "una_mse", **options: Any
) -> Objective:
    preference = Pointwise(
        "preference", weight=preference_weight, function=_pointwise(loss), beta=beta, options=options
    )
    return Objective((Likelihood("sft", DEMONSTRATED, sft_weight), preference), "uft_nll")


PRESETS: dict[str, Callable[..., Objective]] = {
    f.__name__: f
    for f in (sft, sft_chosen, dpo, dpo_nll, dpo_chosen_nll, rpo, mpo, cpo, orpo, simpo, kto, bco, una, uft, uft_nll)
}


def make_objective(spec: str | Mapping[str, Any] | Objective) -> Objective:
    """An objective from a preset's name, from {preset: name, option: value, ...}, or from a mapping of terms:

        sft: {loss: nll, on: demonstrations}
        preference: {loss: dpo, beta: 0.1, weight: 2.0}
        kl: {direction: reference_policy, weight: 0.05, on: demonstrations}

    `kl_weight` beside a preset adds a KL-to-reference term; every weight may be {schedule: cosine, start: 1, end: 0}
    (`uft.schedules`).  `balance`, beside a preset or terms, says what decides the weights from what was measured, such
    as alright or {method: forgetting_budget, quantity: eval_demonstrations/nll, rise: 0.05} (`uft.balance`).  Raises
    ValueError naming what is unknown.
    """
    if isinstance(spec, Objective):
        return spec
    if isinstance(spec, str):
        spec = {"preset": spec}
    if not isinstance(spec, Mapping):
        raise ValueError(f"objective is {spec!r}; want a preset's name or a mapping of terms")
    spec = dict(spec)
    balancer = make_balancer(spec.pop("balance", None))
    if "preset" not in spec:
        return Objective(tuple(_term(name, dict(options)) for name, options in spec.items()), balancer=balancer)
    return replace(_of_preset(spec), balancer=balancer)


def _of_preset(spec: dict[str, Any]) -> Objective:
    name = spec.pop("preset")
    spec = {key: make_weight(value, key) if key.endswith("weight") else value for key, value in spec.items()}
    if name not in PRESETS and name not in losses.PAIRWISE:
        raise ValueError(f"objective {name!r} is unknown; want one of {', '.join({**PRESETS, **losses.PAIRWISE})}")
    kl = {key: spec.pop(key) for key in ("kl_weight", "kl_direction", "kl_on") if key in spec}
    preset = PRESETS.get(name) or (lambda **options: dpo(loss=name, **options))
    try:
        objective = preset(**spec)
    except TypeError as error:
        raise ValueError(f"objective {name!r}: {str(error).split('() ')[-1]}") from None
    if kl:
        term = Divergence(
            "kl", kl.get("kl_on", "demonstrations+responses"), kl.get("kl_weight", 1.0),
            kl.get("kl_direction", "policy_reference"),
        )  # fmt: skip
        objective = Objective((*objective.terms, term), objective.name)
    return objective


def _term(name: str, options: dict[str, Any]) -> Term:
    common = {key: options.pop(key) for key in ("on", "weight") if key in options}
    if "weight" in common:
        common["weight"] = make_weight(common["weight"], f"weight of term {name!r}")
    loss = options.pop("loss", None)
    if "direction" in options or name == "kl":
        return Divergence(name, **common, direction=options.pop("direction", "policy_reference"))
    beta = {"beta": options.pop("beta")} if "beta" in options else {}
    if loss in losses.LIKELIHOOD:
        if beta or options:
            raise ValueError(f"term {name!r}: likelihood has no option {', '.join([*beta, *options])}")
        return Likelihood(name, **{"on": DEMONSTRATED, **common}, function=losses.LIKELIHOOD[loss])
    if loss in losses.PAIRWISE:
        return Pairwise(name, **common, function=losses.PAIRWISE[loss], options=options, **beta)
    if loss in losses.POINTWISE:
        return Pointwise(name, **common, function=losses.POINTWISE[loss], options=options, **beta)
    known = ", ".join([*losses.LIKELIHOOD, *losses.PAIRWISE, *losses.POINTWISE])
    raise ValueError(f"term {name!r}: loss is {loss!r}; want one of {known}")


def _pairwise(name: str) -> Callable:
    return _known(losses.PAIRWISE, name, "pairwise")


def _pointwise(name: str) -> Callable:
    return _known(losses.POINTWISE, name, "pointwise")


def _known(table: Mapping[str, Callable], name: str, what: str) -> Callable:
    if name not in table:
        raise ValueError(f"{what} loss {name!r} is unknown; want one of {', '.join(table)}")
    return table[name]
