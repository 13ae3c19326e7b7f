"""The arms of the lab's comparisons, as data: stages, and the ranges in which each arm's settings are searched."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from .lab.reinforcement import Reinforcement
from .lab.training import LabStage
from .runs import Settings
from .search import Space

REPLAY = 0.25  # share of the draws of demonstrations (or as many documents) that a second stage draws again
DOCUMENTS = 0.2  # share of documents in both stages of the sequence that has them in both
RANK = 16  # of adapters that are trained apart

Stages = Callable[[Settings, str], tuple[LabStage, ...]]
"""(settings, kind of equality: "flops" or "examples") -> the stages behind the shared one."""


@dataclass(frozen=True)
class Arm:
    """What is compared.

    stages      behind the shared supervised stage, where there is one; None: untrained
    space       the range of each setting that is searched; `noisy` other ranges for noisy preferences, where more than
                a few nats of margin mean believing noise
    after_sft   the shared supervised stage comes before
    family      control, sequential or unified
    """

    label: str
    stages: Stages | None = None
    space: Space | None = None
    after_sft: bool = False
    family: str = "sequential"
    noisy: Space | None = None

    def space_for(self, variant: str) -> Space:
        return {**self.space, **(self.noisy or {})} if variant.startswith("noisy") else self.space


def one_stage(objective: Any, demonstrations: float = 0.0, preferences: float = 1.0, **options: Any) -> Stages:
    """A single stage with these shares of the design's draws.  `objective` gets the searched beta, as `preset` or, in
    terms, wherever a beta is None."""

    def stages(settings: Settings, equal: str) -> tuple[LabStage, ...]:
        budget = "rest" if equal == "flops" else "examples"
        return (
            LabStage(
                _name(objective), with_beta(objective, settings.get("beta")), settings["learning_rate"],
                demonstrations, preferences, budget, **options,
            ),
        )  # fmt: skip

    return stages


def with_beta(objective: Any, beta: float | None) -> Any:
    if beta is None:
        return objective
    if isinstance(objective, str):
        return {"preset": objective, "beta": beta}
    if "preset" in objective:
        return {**objective, "beta": beta}
    return {
        name: {k: beta if v is None else v for k, v in term.items()} if isinstance(term, Mapping) else term
        for name, term in objective.items()
    }


def _name(objective: Any) -> str:
    return objective if isinstance(objective, str) else objective.get("preset", "+".join(objective))


def preferences_first(settings: Settings, equal: str) -> tuple[LabStage, ...]:
    """DPO from the base model, then the demonstrations."""
    return (
        LabStage("dpo", with_beta("dpo", settings["beta"]), settings["first_rate"], 0.0, 1.0),
        LabStage("sft", "sft", settings["learning_rate"], 1.0, budget="rest" if equal == "flops" else "examples"),
    )


def both_stages(last: Stages, documents: float = 0.0) -> Stages:
    """A supervised stage of the arm's own, whose rate is searched together with the last stage's settings.

    documents   their share of its draws
    """

    def stages(settings: Settings, equal: str) -> tuple[LabStage, ...]:
        [final] = last(settings, equal)
        # equal examples: what the last stage replays of the demonstrations is not drawn before
        share = 1.0 - (final.demonstrations if equal == "examples" else documents)
        return LabStage("sft", "sft", settings["first_rate"], share, documents=documents), final

    return stages


def parallel(merge: str) -> Stages:
    """PAFT (arXiv:2406.17923): adapters of likelihood and DPO, trained apart from the base model and added up."""

    def stages(settings: Settings, equal: str) -> tuple[LabStage, ...]:
        rate, budget = settings["learning_rate"], "rest" if equal == "flops" else "examples"
        branches = (
            LabStage("sft", "sft", rate, 1.0),
            LabStage("dpo", with_beta("dpo", settings["beta"]), rate, 0.0, 1.0, budget),
        )
        return (LabStage(f"parallel {merge}", None, rate, lora=RANK, parallel=branches, merge=merge),)

    return stages


def joint(preference: Mapping[str, Any], likelihood_on: str = "demonstrations", **more: Any) -> Stages:
    """Likelihood and a preference loss, written out."""
    return one_stage({"sft": {"loss": "nll", "on": likelihood_on}, "preference": preference, **more}, 1.0)


def reinforced(advantage: str, **options: Any) -> Stages:
    """A reward model on preferences, then the policy against it; beta is the coefficient of the KL.

    Rewards have deviation 1, so that the same coefficient means about the same in every run.
    """

    def stages(settings: Settings, equal: str) -> tuple[LabStage, ...]:
        how = Reinforcement(advantage, settings["beta"], **options)
        budget = "rest" if equal == "flops" else "examples"
        return (LabStage(advantage, None, settings["learning_rate"], budget=budget, rl=how),)

    return stages


# MPO, CPO and ORPO ask for the likelihood of chosen answers; demonstrations join it, under one denominator
WITH_CHOSEN = "demonstrations+chosen"
FROM_BASE = (1e-4, 2.5e-3)
AFTER_SFT = (2e-5, 1.5e-3)
LIKELIHOOD = {"learning_rate": FROM_BASE}
NOISY_DPO = {"beta": (0.003, 1.0)}
BOTH = {"learning_rate": AFTER_SFT, "beta": (0.2, 20.0), "first_rate": FROM_BASE}


def _space(rates: tuple[float, float], low: float, high: float) -> Space:
    return {"learning_rate": rates, "beta": (low, high)}


def _after(label: str, objective: Any, low: float, high: float, noisy: Space | None = None, **options: Any) -> Arm:
    return Arm(label, one_stage(objective, **options), _space(AFTER_SFT, low, high), True, noisy=noisy)


def _unified(label: str, stages: Stages, low: float, high: float, noisy: Space | None = None) -> Arm:
    return Arm(label, stages, _space(FROM_BASE, low, high), family="unified", noisy=noisy)


ARMS: dict[str, Arm] = {
    "base": Arm("base model", family="control"),
    "sft": Arm("SFT only", one_stage("sft", 1.0, 0.0), LIKELIHOOD, family="control"),
    "sft_chosen": Arm("SFT on demonstrations + chosen", one_stage("sft_chosen", 1.0), LIKELIHOOD, family="control"),
    "sft_chosen_documents": Arm(
        "SFT on demonstrations + chosen + documents",
        one_stage("sft_chosen", 1.0, documents=REPLAY),
        LIKELIHOOD,
        family="control",
    ),
    # ---- one after the other ----
    "sft_dpo": _after("SFT → DPO", "dpo", 0.3, 60.0, {"beta": (0.03, 5.0)}),
    "sft_ipo": _after("SFT → IPO", "ipo", 0.02, 2.0),
    "sft_kto": _after("SFT → KTO", "kto", 0.2, 15.0),
    "sft_simpo": _after("SFT → SimPO", "simpo", 0.5, 40.0),
    "sft_una": _after("SFT → UNA", "una", 0.1, 10.0),
    "sft_orpo": _after("SFT → ORPO", "orpo", 0.05, 10.0),
    "sft_dpo_replay": _after("SFT → DPO + replay", "dpo_nll", 0.2, 20.0, NOISY_DPO, demonstrations=REPLAY),
    "sft_dpo_documents": _after("SFT → DPO + documents", "dpo_nll", 0.2, 20.0, NOISY_DPO, documents=REPLAY),
    # the shared stage is chosen by what it keeps; these choose it by where they end
    "sft_dpo_replay_both": Arm(
        "SFT → DPO + replay, both tuned", both_stages(one_stage("dpo_nll", REPLAY)), BOTH, noisy=NOISY_DPO
    ),
    "sft_dpo_documents_both": Arm(
        "SFT → DPO + documents, both tuned", both_stages(one_stage("dpo_nll", documents=REPLAY)), BOTH, noisy=NOISY_DPO
    ),
    # what joint training has at every step, in the order of the sequence
    "sft_dpo_all_both": Arm(
        "SFT → DPO, documents in both, both tuned",
        both_stages(one_stage("dpo_nll", DOCUMENTS, documents=DOCUMENTS), DOCUMENTS),
        BOTH,
        noisy=NOISY_DPO,
    ),
    "dpo_sft": Arm(
        "DPO → SFT",
        preferences_first,
        {"learning_rate": FROM_BASE, "beta": (0.2, 20.0), "first_rate": (3e-5, 1.5e-3)},
        noisy=NOISY_DPO,
    ),
    "paft_linear": Arm("parallel adapters, sum", parallel("linear"), _space((3e-4, 2e-2), 0.2, 20.0), noisy=NOISY_DPO),
    "paft_ties": Arm("parallel adapters, TIES", parallel("ties"), _space((3e-4, 2e-2), 0.2, 20.0), noisy=NOISY_DPO),
    # ---- the classical last stage: a reward model, and reinforcement learning against it ----
    "sft_rm_ppo": Arm("SFT → RM → PPO", reinforced("gae"), _space((5e-5, 2e-3), 0.01, 1.0), True),
    "sft_rm_rloo": Arm("SFT → RM → RLOO", reinforced("rloo"), _space((5e-5, 2e-3), 0.01, 1.0), True),
    # ---- together ----
    "dpo_nll": _unified("unified DPO + NLL", one_stage("dpo_nll", 1.0), 0.2, 20.0, NOISY_DPO),
    "dpo_nll_documents": _unified(
        "unified DPO + NLL + documents", one_stage("dpo_nll", 1.0, documents=REPLAY), 0.2, 20.0, NOISY_DPO
    ),
    "mpo": _unified(
        "unified MPO",
        joint(
            {"loss": "dpo", "beta": None, "weight": 0.8},
            WITH_CHOSEN,
            quality={"loss": "bco_pair", "beta": None, "weight": 0.2},
        ),
        0.2,
        20.0,
        NOISY_DPO,
    ),
    "cpo": _unified("unified CPO", joint({"loss": "cpo", "beta": None}, WITH_CHOSEN), 0.1, 10.0, NOISY_DPO),
    # the weight of the odds ratio is what ORPO has for a beta
    "orpo": _unified("unified ORPO", joint({"loss": "orpo", "weight": None}, WITH_CHOSEN), 0.05, 10.0),
    "kto_nll": _unified("unified KTO + NLL", joint({"loss": "kto", "beta": None}), 0.05, 5.0),
    # its gradient per response is at most 0.3 beta and vanishes with the margin: it wants small betas and large rates
    "uft": Arm(
        "unified UFT (Wang et al.)",
        one_stage("uft", 1.0),
        _space((2e-4, 6e-3), 0.003, 0.3),
        family="unified",
        noisy={"beta": (0.0002, 0.02)},
    ),
    "uft_nll": _unified("unified UNA + NLL", one_stage("uft_nll", 1.0), 0.02, 2.0),
    "alright": _unified(
        "ALRIGHT (DPO, NLL)", one_stage({"preset": "dpo_nll", "balance": "alright"}, 1.0), 0.2, 20.0, NOISY_DPO
    ),
    "maxright": _unified(
        "MAXRIGHT (DPO, NLL)",
        one_stage(
            {"preset": "dpo_nll", "balance": {"method": "maxright", "optimum": {"sft": 0.0, "preference": 0.0}}}, 1.0
        ),
        0.2,
        20.0,
        NOISY_DPO,
    ),
}
TRAINED = [name for name, arm in ARMS.items() if arm.stages is not None]
