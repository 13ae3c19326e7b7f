"""The table of TRL's names: complete, true of the installed TRL, and what docs/from_trl.md shows."""

import dataclasses
import inspect
import re
from pathlib import Path

import pytest

from uft import UnifiedConfig
from uft.from_trl import PAIRWISE, POINTWISE, objective_of
from uft.presets import make_objective
from uft.recipe import RecipeError, parse, parse_config
from uft.rlhf.reward_config import RewardConfig
from uft.trl_names import ALL, ARGUMENTS, KNOWN, NAMES, OTHERS, REFUSED, SAME, UNCUT
from uft.trl_tables import DEFAULTS, OF_REWARD, written

PAGE = Path(__file__).parents[1] / "docs" / "from_trl.md"
CPU = {"output_dir": "none", "use_cpu": True, "report_to": "none"}


def config(**names):
    return UnifiedConfig(**CPU, **names)


# ---- the table is true ----


def test_the_page_is_what_the_table_makes():
    assert PAGE.read_text() == written(PAGE.read_text()), "run python -m uft.trl_tables docs/from_trl.md"


def default_of(field):
    factory = field.default_factory
    return field.default if factory is dataclasses.MISSING else factory()


def of_trl(name):
    """{field: default} of one of TRL's configs, without those of transformers."""
    import trl
    from transformers import TrainingArguments

    shared = {field.name for field in dataclasses.fields(TrainingArguments)}
    return {f.name: default_of(f) for f in dataclasses.fields(getattr(trl, name)) if f.name not in shared}


@pytest.mark.peers
@pytest.mark.parametrize("name", [*ALL, "RewardConfig"])
def test_the_table_has_every_field_once_with_its_default(name):
    rows = [(row.name, row.default) for row in (*NAMES, *OF_REWARD) if name in row.of]
    assert len(rows) == len(dict(rows))
    assert dict(rows) == of_trl(name)


@pytest.mark.peers
@pytest.mark.parametrize("name", ["SFTTrainer", "DPOTrainer", "KTOTrainer"])
def test_the_table_has_every_argument_of_the_trainers(name):
    import trl

    wanted = set(inspect.signature(getattr(trl, name).__init__).parameters) - {"self"}
    assert {row.name for row in ARGUMENTS if row.of == ("all",) or name in row.of} == wanted


@pytest.mark.peers
def test_the_defaults_that_differ_are_all_told():
    import trl
    from transformers import TrainingArguments

    fields = {f.name: default_of(f) for f in dataclasses.fields(UnifiedConfig) if f.init}
    shared = [f.name for f in dataclasses.fields(TrainingArguments) if f.init]
    found = {}
    for name in ALL:
        theirs = {f.name: default_of(f) for f in dataclasses.fields(getattr(trl, name)) if f.init}
        found[name] = {n: (theirs[n], fields[n]) for n in shared if theirs[n] != fields[n]}
    told = {name: {row.name: (row.theirs[name], row.ours) for row in DEFAULTS if row.theirs[name] != row.ours}
            for name in ALL}  # fmt: skip
    assert found == told


@pytest.mark.peers
def test_the_losses_are_trls():
    from trl import DPOConfig, KTOConfig

    told = {f.name: f.metadata for f in dataclasses.fields(DPOConfig)}["loss_type"]["help"]
    assert set(re.findall(r"`'(\w+)'`", told)) == {*PAIRWISE, "sft", "aot", "aot_unpaired"}
    choices = {f.name: f.metadata for f in dataclasses.fields(KTOConfig)}["loss_type"]["choices"]
    assert set(choices) == set(POINTWISE)


def test_fields_of_the_reward_config():
    fields = {field.name: default_of(field) for field in dataclasses.fields(RewardConfig)}
    for row in OF_REWARD:
        if row.state == SAME:
            assert fields[row.name] == (row.default or 0.0)
        else:
            with pytest.raises(TypeError, match=row.name):
                RewardConfig(output_dir="none", **{row.name: row.default})


# ---- what becomes of a name ----

ANOTHER = {
    "dataset_kwargs": {"skip_prepare_dataset": True},
    "completion_only_loss": False,
    "packing_strategy": "wrapped",
}


@pytest.mark.parametrize("row", [row for row in (*NAMES, *OTHERS) if row.state == REFUSED], ids=lambda row: row.name)
def test_what_is_refused_is_refused_by_name_and_at_its_default_accepted(row):
    plain = config()
    assert config(**{row.name: row.default}).to_dict() == plain.to_dict()
    value = ANOTHER.get(row.name, {bool: True, float: 0.25, str: "other"}.get(type(row.default), 0.5))
    with pytest.raises(ValueError, match=f"{row.name} is .*; want {re.escape(repr(row.default))}: \\w"):
        config(**{row.name: value})


@pytest.mark.parametrize("row", [row for row in (*NAMES, *OTHERS) if row.state != REFUSED], ids=lambda row: row.name)
def test_what_is_accepted_is_accepted_at_its_default(row):
    config(**{row.name: row.default})


def test_values_that_mean_the_same_as_ours():
    config(completion_only_loss=True, router_aux_loss_coef=0.0, dataset_kwargs={"skip_prepare_dataset": False})


@pytest.mark.parametrize(
    "names, becomes",
    [
        ({"max_length": None}, {"max_length": UNCUT}),
        ({"max_seq_length": 77}, {"max_length": 77}),
        ({"pad_to_multiple_of": "auto"}, {"pad_to_multiple_of": 1}),
        ({"pad_to_multiple_of": None}, {"pad_to_multiple_of": 1}),
        ({"pad_to_multiple_of": 8}, {"pad_to_multiple_of": 8}),
        ({"packing": True}, {"layout": "packed"}),
        ({"padding_free": True}, {"layout": "packed"}),
        ({"padding_free": False, "layout": "padded"}, {"layout": "padded"}),
        ({"precompute_ref_log_probs": True}, {"reference": "cached", "reference_cache_exact": True}),
        (
            {"precompute_ref_log_probs": True, "precompute_ref_batch_size": 16},
            {"reference": "cached", "reference_cache_exact": False},
        ),
        ({"beta": 0.3, "learning_rate": 1e-6}, {"from_trl": {"beta": 0.3}}),
        ({"eos_token": "</s>", "loss_weights": None}, {"from_trl": {"eos_token": "</s>"}}),
        ({"dataset_num_proc": 4, "shuffle_dataset": True, "assistant_only_loss": True, "eval_packing": True}, {}),
        ({"truncation_mode": "keep_end"}, {"max_length": 1024}),
    ],
)
def test_what_is_translated(names, becomes):
    made = config(**names)
    assert {name: getattr(made, name) for name in becomes} == becomes
    again = dataclasses.replace(made, seed=7)
    assert again.seed == 7 and again.from_trl == made.from_trl
    assert UnifiedConfig(**made.to_dict()).to_dict() == made.to_dict()


def test_two_names_that_contradict_each_other():
    with pytest.raises(ValueError, match="packing is True, so layout 'packed', and layout is 'padded'"):
        config(packing=True, layout="padded")
    with pytest.raises(ValueError, match="precompute_ref_log_probs is True, so reference 'cached', and reference is"):
        config(precompute_ref_log_probs=True, reference="frozen")


def test_a_name_of_nobody_is_refused():
    with pytest.raises(TypeError, match="betta"):
        config(betta=0.1)


def test_a_rate_that_is_not_given_is_told(caplog):
    config(beta=0.1)
    assert "learning_rate is not given, and 2e-05 here; TRL's DPOConfig and KTOConfig have 1e-06" in caplog.text
    caplog.clear()
    config(beta=0.1, learning_rate=1e-6)
    config(loss_type="nll")
    config()
    assert not caplog.text


# ---- recipes say it in their own place ----


def test_recipes_point_to_the_place():
    base = {"model": "tiny", "objective": "dpo", "train_dataset": {"a": "pairs.jsonl"}}
    assert parse(base).args.from_trl is None
    for key, message in (
        ("beta", "unknown key 'beta'; what the loss depends on stands with the objective: want objective.beta"),
        ("packing", "unknown key 'packing'; packing is TRL's, and `layout='packed'`"),
        ("max_stepz", "unknown key 'max_stepz'; did you mean 'max_steps'?"),
    ):
        with pytest.raises(RecipeError, match=re.escape(message)):
            parse(base | {key: 1})
    assert parse_config({"model_init_kwargs": {"revision": "v2"}}).model_init_kwargs == {"revision": "v2"}


# ---- objectives ----


@pytest.mark.parametrize(
    "kinds, names, same",
    [
        (["pair"], {"beta": 0.2}, {"preset": "dpo", "beta": 0.2}),
        (["pair"], {"loss_type": "robust"}, {"preset": "robust_dpo", "label_smoothing": 0.0}),
        (["pair"], {"loss_type": ["robust"], "label_smoothing": 0.2}, {"preset": "robust_dpo", "label_smoothing": 0.2}),
        (["pair"], {"loss_type": "discopop", "discopop_tau": 0.1}, {"preset": "discopop", "tau": 0.1}),
        (["pair"], {"loss_type": ["sft"]}, {"sft": {"loss": "nll", "on": "chosen"}}),
        (["label"], {"desirable_weight": 2.0, "beta": 0.3}, {"preset": "kto", "beta": 0.3, "desirable_weight": 2.0}),
        (["label"], {"loss_type": "apo_zero_unpaired"}, {"preference": {"loss": "apo_zero_unpaired"}}),
        (["score"], {"beta": 0.2}, {"preset": "una", "beta": 0.2}),
        (["demonstration"], {"loss_type": "dft"}, {"preset": "sft", "loss": "dft"}),
        (["document"], {"loss_type": "chunked_nll"}, "sft"),
        (["demonstration", "pair"], {"beta": 0.2}, {"preset": "uft_nll", "beta": 0.2}),
        (["demonstration", "pair"], {"loss_type": "sigmoid", "beta": 0.2}, {"preset": "dpo_nll", "beta": 0.2}),
        (["demonstration", "label"], {"loss_type": "kto"}, {"sft": {"loss": "nll"}, "preference": {"loss": "kto"}}),
        (["demonstration"], {"beta": 0.1}, "sft"),  # TRL's default says nothing
    ],
)
def test_objectives_of_trls_names(kinds, names, same):
    objective, why = objective_of(kinds, names | {"eos_token": "</s>"})
    assert objective.describe() == make_objective(same).describe()
    assert next(iter(names)) in why and all(kind in why for kind in kinds)


def test_several_losses_and_the_older_way_to_say_it():
    several, _ = objective_of(["pair"], {"loss_type": ["sigmoid", "bco_pair", "sft"], "loss_weights": [0.8, 0.2, 1.0]})
    mpo = make_objective("mpo")
    assert {(t.function, t.on, t.weight) for t in several.terms} == {(t.function, t.on, t.weight) for t in mpo.terms}
    older, _ = objective_of(["pair"], {"rpo_alpha": 0.5})
    newer, _ = objective_of(["pair"], {"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0, 0.5]})
    assert older == newer and older.name == "dpo_chosen_nll"


@pytest.mark.parametrize(
    "kinds, names, message",
    [
        (["pair"], {"loss_type": "aot"}, "loss_type is 'aot'; want sigmoid, .*; it sorts the pairs of a micro-batch"),
        (["pair"], {"loss_type": "sigmod"}, "loss_type is 'sigmod'; want sigmoid, "),
        (["pair"], {"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0]}, "loss_weights has 1 numbers for 2 losses"),
        (["pair"], {"label_smoothing": 0.1}, "label_smoothing is 0.1, which loss_type sigmoid does not use"),
        (["pair"], {"discopop_tau": 0.1}, "discopop_tau is 0.1, which loss_type sigmoid does not use"),
        (["pair"], {"desirable_weight": 2.0}, "desirable_weight is 2.0, which loss_type sigmoid does not use"),
        (["demonstration"], {"beta": 0.3}, "beta is 0.3, which objective sft does not use"),
        (["score"], {"label_smoothing": 0.1}, "label_smoothing is 0.1, which objective una does not use"),
        (["pair"], {"beta": 0.0}, "beta of term 'preference' is 0.0"),
    ],
)
def test_what_would_have_no_effect_is_refused(kinds, names, message):
    with pytest.raises(ValueError, match=message):
        objective_of(kinds, names)


def test_every_name_has_a_sentence_where_it_is_refused():
    assert all(row.text for row in KNOWN.values() if row.state == REFUSED)
