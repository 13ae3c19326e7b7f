"""What a script written for TRL says, in our terms: its config, its objective, its data.

    trainer = UnifiedTrainer(model, args=UnifiedConfig(beta=0.1, loss_type=["sigmoid", "sft"]), train_dataset=pairs)

`uft.trl_names` has the table of names, docs/from_trl.md the move from one to the other.
"""

from __future__ import annotations

import copy
from collections.abc import Collection, Mapping
from dataclasses import fields
from typing import Any

from torch import nn
from transformers import TrainingArguments
from transformers.utils import logging

from uft import losses
from uft.config import UnifiedConfig
from uft.data.mixture import FeedbackDataset
from uft.objective import Objective
from uft.presets import DEMONSTRATED, make_objective
from uft.terms import Likelihood, Pairwise, Pointwise, Term
from uft.trl_names import ARGUMENTS, KNOWN, LIKELIHOOD, NAMES, OF_OBJECTIVE, translated

logger = logging.get_logger(__name__)

# TRL's loss_type: our loss, and its options by TRL's names
PAIRWISE: dict[str, tuple[str, dict[str, str]]] = {
    "sigmoid": ("dpo", {}),
    "sigmoid_norm": ("dpo_norm", {}),
    "robust": ("robust_dpo", {"label_smoothing": "label_smoothing"}),
    "hinge": ("hinge", {}),
    "ipo": ("ipo", {}),
    "exo_pair": ("exo", {"label_smoothing": "label_smoothing"}),
    "nca_pair": ("nca", {}),
    "bco_pair": ("bco_pair", {}),
    "sppo_hard": ("sppo", {}),
    "apo_zero": ("apo_zero", {}),
    "apo_down": ("apo_down", {}),
    "discopop": ("discopop", {"discopop_tau": "tau"}),
}
_SIDES = {"desirable_weight": "desirable_weight", "undesirable_weight": "undesirable_weight"}
POINTWISE = {"kto": ("kto", _SIDES), "apo_zero_unpaired": ("apo_zero_unpaired", _SIDES)}
# rows of these kinds have likelihood alone
SHOWN = {"demonstration", "document"}
# the objective of data of one kind; of several it is uft_nll
OF_KIND = {"pair": "dpo", "label": "kto", "score": "una"}


# ---- config ----


def config_of(args: Any) -> UnifiedConfig:
    """A UnifiedConfig from nothing, from one, from TRL's configs (whose values and defaults are kept) or from
    transformers' arguments.  Raises ValueError for what is refused."""
    if args is None:
        return UnifiedConfig(output_dir="runs/unified")
    if isinstance(args, UnifiedConfig):
        return _with_what_was_set_later(args)
    if not isinstance(args, TrainingArguments):
        raise ValueError(f"args is {type(args).__name__}; want a UnifiedConfig, or a config of TRL or transformers")
    known = {field.name for field in fields(UnifiedConfig)}
    given = {field.name: getattr(args, field.name) for field in fields(args) if field.init}
    if theirs := [each.__name__ for each in type(args).__mro__ if each.__module__.split(".")[0] == "trl"]:
        given = _chosen(theirs[0], given)
        given.setdefault("disable_dropout", False)  # SFTConfig has no such field and trains with dropout
    given = translated(given, known)
    if unknown := set(given) - known:
        raise ValueError(f"{type(args).__name__}.{min(unknown)} is unknown; want a config of TRL 1.16")
    # fields that differ in the two on purpose, and the older of two names for one thing
    for name in ("remove_unused_columns", "logging_nan_inf_filter", "gradient_checkpointing", "_n_gpu"):
        if name != "gradient_checkpointing" or "activation_checkpointing" in known:
            given.pop(name, None)
    return UnifiedConfig(**given)


def _chosen(config: str, given: Mapping[str, Any]) -> dict[str, Any]:
    """What differs from the defaults of one of TRL's configs, and all that the config shares with transformers."""
    defaults = {row.name: row.default for row in NAMES if config in row.of}
    if not defaults:
        raise ValueError(f"args is a {config}; want an SFTConfig, DPOConfig or KTOConfig of TRL, or a UnifiedConfig")
    chosen = {name: value for name, value in given.items() if name not in defaults or value != defaults[name]}
    if chosen.get("pad_to_multiple_of", 1) is None:  # what "auto" has become
        del chosen["pad_to_multiple_of"]
    if chosen.get("train_sampling_strategy") == "sequential":  # KTOConfig's; our pairs do not depend on the order
        del chosen["train_sampling_strategy"]
    if "disable_dropout" in defaults:
        chosen["disable_dropout"] = given["disable_dropout"]
    return chosen


def _with_what_was_set_later(args: UnifiedConfig) -> UnifiedConfig:
    """`args.beta = 0.3`, behind the constructor, counts as well."""
    known = {field.name for field in fields(args)}
    later = {name: value for name, value in vars(args).items() if name in KNOWN and name not in known}
    if not later:
        return args
    args = copy.copy(args)
    for name, value in translated(later | {"from_trl": args.from_trl}, known).items():
        setattr(args, name, value)
    for name in later:
        delattr(args, name)
    return args


def with_trl_arguments(objective: Any, reference: Any, kwargs: dict[str, Any], args: UnifiedConfig) -> tuple[Any, Any]:
    """Objective and reference; takes TRL's arguments out of `kwargs`.

    TRL calls the reference ref_model, and has it where the objective is, behind the model: a model there is one.
    Raises ValueError for what is refused, and for what is said twice.
    """
    if isinstance(objective, TrainingArguments):
        raise ValueError(f"objective is a {type(objective).__name__}; want args=... by name")
    if isinstance(objective, nn.Module):
        kwargs.setdefault("ref_model", objective)
        objective = None
    said = [name for name in OF_OBJECTIVE if name in (args.from_trl or {})]
    if objective is not None and said:
        raise ValueError(f"objective is given, and {', '.join(said)} in args; want one of them")
    if kwargs.pop("quantization_config", None) is not None:
        raise ValueError(f"quantization_config is given: {_argument('quantization_config')}")
    ref_model = kwargs.pop("ref_model", None)
    if ref_model is None:
        return objective, reference
    if reference is not None:
        raise ValueError("reference and ref_model are given, which are two names for one; want one of them")
    if args.reference == "cached":
        logger.warning("ref_model is given and stays in memory; log-probabilities are cached of the policy alone")
    return objective, ref_model


def _argument(name: str) -> str:
    return next(row.text for row in ARGUMENTS if row.name == name)


# ---- objective ----


def kinds_of(data: FeedbackDataset | None) -> set[str]:
    """The kinds of example, of all sources."""
    return set().union(*data.kinds().values()) - {"mismatched"} if data is not None else set()


def objective_of(kinds: Collection[str], names: Mapping[str, Any] | None = None) -> tuple[Objective, str]:
    """The objective of data of these kinds, and a sentence why; `names` are TRL's (`UnifiedConfig.from_trl`).

    Raises ValueError for losses that are not here, and for options that the losses have not.
    """
    kinds = set(kinds)
    names = {name: value for name, value in (names or {}).items() if name in OF_OBJECTIVE}
    present = ", ".join(sorted(kinds)) or "nothing"
    if not names:
        return make_objective(_preset(kinds)), f"data of kind {present}, and no objective given"
    why = f"{', '.join(names)} of args, and data of kind {present}"
    if "loss_type" not in names and kinds in ({"pair"}, {"label"}):
        names["loss_type"] = "sigmoid" if kinds == {"pair"} else "kto"  # TRL's defaults
    return (_named if "loss_type" in names else _unnamed)(kinds, names), why


def _preset(kinds: set[str]) -> str:
    if kinds and kinds <= SHOWN:
        return "sft"
    return OF_KIND[next(iter(kinds))] if len(kinds) == 1 else "uft_nll"


def _unnamed(kinds: set[str], names: Mapping[str, Any]) -> Objective:
    """Demonstrations, scores, or a mixture, with no loss named."""
    preset = _preset(kinds)
    used = {"beta": names["beta"]} if "beta" in names and preset != "sft" else {}
    _all_used(names, used, f"objective {preset}")
    return make_objective({"preset": preset, **used})


def _named(kinds: set[str], names: Mapping[str, Any]) -> Objective:
    wanted = names["loss_type"]
    wanted = [wanted] if isinstance(wanted, str) else list(wanted)
    weights = names.get("loss_weights") or [1.0] * len(wanted)
    if len(weights) != len(wanted):
        raise ValueError(f"loss_weights has {len(weights)} numbers for {len(wanted)} losses; want one of each")
    if names.get("rpo_alpha") is not None:
        wanted, weights = [*wanted, "sft"], [*weights, names["rpo_alpha"]]
    beta = names.get("beta", KNOWN["beta"].default)
    used, terms = {"loss_type": wanted, "loss_weights": weights, "rpo_alpha": None}, []
    for name, weight in zip(wanted, weights):
        if name in LIKELIHOOD:
            terms.append(Likelihood("sft", DEMONSTRATED, weight, losses.LIKELIHOOD[LIKELIHOOD[name]]))
        elif name == "sft":
            terms.append(Likelihood("sft_chosen" if kinds & SHOWN else "sft", "chosen", weight))
        elif name in PAIRWISE or name in POINTWISE:
            loss, options = (PAIRWISE | POINTWISE)[name]
            values = {ours: names[theirs] for theirs, ours in options.items() if theirs in names}
            if name == "robust":
                values.setdefault("label_smoothing", 0.0)  # as TRL has it
            used |= dict.fromkeys(options) | {"beta": beta}
            term = "preference" if all(t.name != "preference" for t in terms) else loss
            table, make = (losses.PAIRWISE, Pairwise) if name in PAIRWISE else (losses.POINTWISE, Pointwise)
            terms.append(make(term, weight=weight, function=table[loss], beta=beta, options=values))
        else:
            raise ValueError(f"loss_type is {name!r}; want {_known_losses()}{_WHY_NOT.get(name, '')}")
    if kinds & SHOWN and not any(term.name == "sft" for term in terms):
        terms.insert(0, Likelihood("sft", DEMONSTRATED))
    _all_used(names, used, f"loss_type {' + '.join(wanted)}")
    return Objective(tuple(terms), _name_of(terms))


_WHY_NOT = {
    "aot": "; it sorts the pairs of a micro-batch, so that its value depends on how the step is cut up",
    "aot_unpaired": "; it sorts the responses of a micro-batch, so that its value depends on how the step is cut up",
}


def _known_losses() -> str:
    return ", ".join([*PAIRWISE, "sft", *POINTWISE, *LIKELIHOOD])


def _all_used(names: Mapping[str, Any], used: Collection[str], by: str) -> None:
    """What would have no effect is refused, unless it stands at TRL's default."""
    for name, value in names.items():
        if name not in used and value != KNOWN[name].default:
            raise ValueError(f"{name} is {value!r}, which {by} does not use; want it left out")


def _name_of(terms: list[Term]) -> str:
    """A preset's name where this is the preset, else what it is made of."""
    parts = [("chosen_" if term.on == "chosen" else "") + term.function.__name__ for term in terms]
    names = {("token_nll",): "sft", ("dpo", "chosen_token_nll"): "dpo_chosen_nll", ("token_nll", "dpo"): "dpo_nll"}
    return names.get(tuple(parts), "+".join(parts))
