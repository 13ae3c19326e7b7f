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

On responses that the policy writes in training (`uft.rlhf.online`):

online_una       scored responses by implicit reward           [UNA]  arXiv:2408.15339 Eq. 13
chord, chord_phi policy gradient and likelihood, weights mu    [CHORD] arXiv:2508.11408
srft             the same, weights from the policy's entropy   [SRFT] arXiv:2506.19767
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from uft import losses
from uft.balance import EntropyWeights, make_balancer
from uft.objective import Objective
from uft.schedules import Cosine, Rest, make_weight
from uft.terms import Divergence, Likelihood, Pairwise, Pointwise, Term, Weight

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


def online_una(beta: float = 0.03, loss: str = "una_mse") -> Objective:
    """UNA's online form: the implicit reward is regressed on the squashed reward of the policy's own responses."""
    return Objective((Pointwise("preference", "scores", function=_pointwise(loss), beta=beta),), "online_una")


CHORD_MU = Cosine(0.9, 0.05)


def chord(sft_weight: Weight = CHORD_MU, loss: str = "nll") -> Objective:
    """CHORD-mu: (1 - mu) L_GRPO + mu L_SFT, each averaged over its tokens.  Advantages are GRPO's (target "grpo").

    Differs from the paper: mu falls over the whole run, not over its first 200 steps, and every response is used for
    one update, in which GRPO's ratio is 1 and its clipping idle.
    """
    rest = Rest(sft_weight) if callable(sft_weight) else Rest(sft_weight)(0.0)
    terms = (
        Likelihood("sft", DEMONSTRATED, sft_weight, losses.LIKELIHOOD[loss]),
        Pointwise("rl", "scores", rest, losses.reinforce_tokens),
    )
    return Objective(terms, "chord")


def chord_phi(sft_weight: Weight = 0.1) -> Objective:
    """CHORD-phi: mu stays 0.1, and a demonstrated token weighs p (1 - p).  Otherwise as `chord`."""
    return replace(chord(sft_weight, "chord_phi"), name="chord_phi")


def srft(
    sft_weight: Weight = 0.5, positive_weight: Weight = 0.1, negative_weight: Weight = 1.0, on: str = "scores"
) -> Objective:
    """0.5 exp(-H) NLL of demonstrations, 0.1 exp(H) and 1 times the policy gradient of responses with rewards +1, -1.

    H is the policy's mean entropy per token on the step's own responses, measured before the step (target "signed").
    Differs from the paper: without its third part, the group-normalised gradient on demonstrations as if the policy had
    written them, and averages are over tokens, of which the paper says nothing.
    """
    terms = (
        Likelihood("sft", DEMONSTRATED, sft_weight),
        Pointwise("positive", on, positive_weight, losses.reinforce_positive),
        Pointwise("negative", on, negative_weight, losses.reinforce_negative),
    )
    return Objective(terms, "srft", EntropyWeights(falls=("sft",), rises=("positive",), on=on))


_ALL = (
    sft, sft_chosen, dpo, dpo_nll, dpo_chosen_nll, rpo, mpo, cpo, orpo, simpo, kto, bco, una, uft, uft_nll, online_una,
    chord, chord_phi, srft,
)  # fmt: skip
PRESETS: dict[str, Callable[..., Objective]] = {f.__name__: f for f in _ALL}


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
    objective = _of_preset(spec)
    return replace(objective, balancer=balancer or objective.balancer)


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
        objective = replace(objective, terms=(*objective.terms, term))
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
    if loss in losses.POLICY_GRADIENT:
        if beta or options:
            raise ValueError(f"term {name!r}: a policy gradient has no option {', '.join([*beta, *options])}")
        return Pointwise(name, **{"on": "scores", **common}, function=losses.POLICY_GRADIENT[loss])
    known = ", ".join([*losses.LIKELIHOOD, *losses.PAIRWISE, *losses.POINTWISE, *losses.POLICY_GRADIENT])
    raise ValueError(f"term {name!r}: loss is {loss!r}; want one of {known}")


def _pairwise(name: str) -> Callable[..., Any]:
    return _known(losses.PAIRWISE, name, "pairwise")


def _pointwise(name: str) -> Callable[..., Any]:
    return _known(losses.POINTWISE, name, "pointwise")


def _known(table: Mapping[str, Callable[..., Any]], name: str, what: str) -> Callable[..., Any]:
    if name not in table:
        raise ValueError(f"{what} loss {name!r} is unknown; want one of {', '.join(table)}")
    return table[name]
