"""Scripts written for TRL run here after a change of two names, and do what they did; nothing that they say is lost.

The scripts are tests/trl_scripts/*.py, and TRL's own of the installed version.
"""

import json
import logging
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from test_trainer_parity import TIGHT, labels, pairs
from tiny import tiny_model, tiny_tokenizer

from uft import Source, UnifiedConfig, UnifiedTrainer
from uft.from_trl import PAIRWISE, config_of
from uft.trl_tables import METRICS

pytestmark = [pytest.mark.filterwarnings("ignore")]
HERE = Path(__file__).parent
QUIET = {"use_cpu": True, "report_to": "none", "disable_tqdm": True, "save_strategy": "no", "logging_steps": 1}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Two tiny models with a tokenizer, and files with TRL's columns; pairs are conversations, the others strings."""
    folder = tmp_path_factory.mktemp("scripts")
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = TIGHT
    for seed, name in enumerate(("tiny", "tiny-sft")):
        tiny_model(tokenizer, seed=0).save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
        if seed:
            model = tiny_model(tokenizer, seed=0)
            torch.manual_seed(1)
            for weight in model.parameters():
                weight.data += 0.02 * torch.randn(weight.shape)
            model.save_pretrained(folder / name)
    demonstrations = [{"prompt": row["prompt"], "completion": row["chosen"]} for row in pairs()]
    for name, rows in {"pairs": pairs(True), "labels": labels(), "demonstrations": demonstrations}.items():
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (folder / f"{name}.jsonl").write_text(text)
        (folder / f"{name}-on-disk").mkdir()
        for part in ("train", "test"):
            (folder / f"{name}-on-disk" / f"{part}.jsonl").write_text(text)
    return folder


@pytest.fixture
def there(folder, monkeypatch, tmp_path):
    import datasets

    monkeypatch.chdir(folder)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path)
    return folder


def run(source):
    """The names of a script after it has run."""
    names = {"__name__": "__main__"}
    exec(compile(source, "script", "exec"), names)
    return names


def moved(source):
    """The change that docs/from_trl.md asks for: the import, the trainer's class and the config's."""
    source = re.sub(r"from trl import \w+Config, \w+Trainer", "from uft import UnifiedConfig, UnifiedTrainer", source)
    return re.sub(r"\b(SFT|DPO|KTO)(Trainer|Config)\b", r"Unified\2", source)


def logged(trainer, name="loss"):
    return [entry[name] for entry in trainer.state.log_history if name in entry]


# ---- scripts ----

SHARED = ("loss", "grad_norm", "learning_rate")
SCRIPTS = {
    "sft": (*SHARED, "eval_short_loss", "eval_rest_loss"),
    "dpo": (*SHARED, "rewards/chosen", "rewards/rejected", "rewards/margins", "logps/chosen", "logps/rejected"),
    "dpo_lora": ("loss", "rewards/margins"),
    "kto": (*SHARED, "rewards/chosen", "rewards/rejected"),
}


@pytest.mark.peers
@pytest.mark.parametrize("name", SCRIPTS)
def test_a_script_of_a_trl_user_does_the_same_here(name, there):
    """Logged numbers of every step.  A step holds all rows, whose order the trainers choose by different generators;
    the weights that a LoRA adapter begins with are drawn from the same."""
    source = (HERE / "trl_scripts" / f"{name}.py").read_text()
    theirs, ours = run(source)["trainer"], run(moved(source))["trainer"]
    assert type(ours) is UnifiedTrainer and type(theirs) is not UnifiedTrainer
    for metric in SCRIPTS[name]:
        np.testing.assert_allclose(logged(ours, metric), logged(theirs, metric), rtol=2e-4, atol=2e-6, err_msg=metric)
    assert len(set(logged(ours))) == len(logged(ours)) >= 3
    known = {name for metric in METRICS for name in metric.theirs.split(", ")}
    assert {key for key in theirs.state.log_history[0] if key != "step"} <= known


@pytest.mark.peers
@pytest.mark.parametrize("name", ["sft", "dpo", "kto"])
def test_trls_own_scripts_run_with_the_trainer_changed(name, there, monkeypatch, tmp_path):
    """Their parser reads TRL's config beside a ModelConfig; all that is changed is the trainer's class."""
    import importlib

    import trl

    script = importlib.import_module(f"trl.scripts.{name}")
    made = []
    monkeypatch.setattr(trl, f"{name.upper()}Trainer", lambda **given: made.append(UnifiedTrainer(**given)) or made[0])
    data = {"sft": "demonstrations", "dpo": "pairs", "kto": "labels"}[name]
    words = f"--model_name_or_path tiny --dataset_name {data}-on-disk --output_dir {tmp_path / name} --use_cpu "
    words += "--bf16 false --max_steps 2 --learning_rate 1e-4 --eval_strategy steps --eval_steps 2 --report_to none "
    words += "--disable_tqdm true --use_peft --lora_r 4 --lora_target_modules q_proj v_proj --logging_steps 1 --seed 3"
    given = script.make_parser().parse_args_and_config(words.split(), fail_with_unknown_args=False)
    script.main(*given)
    (trainer,) = made
    assert trainer.objective.name == {"sft": "sft", "dpo": "dpo", "kto": "kto"}[name]
    assert (trainer.args.learning_rate, trainer.args.seed, trainer.args.gradient_checkpointing) == (1e-4, 3, True)
    assert len(logged(trainer)) == 2 and logged(trainer, "eval_loss")
    assert (tmp_path / name / "adapter_model.safetensors").exists()


@pytest.mark.peers
def test_every_pairwise_loss_is_trls_of_that_name(there):
    """All at once, each with another weight, against a reference that is not the policy."""
    weights = [round(0.1 + 0.17 * i, 2) for i in range(len(PAIRWISE) + 1)]
    losses = dict(loss_type=[*PAIRWISE, "sft"], loss_weights=weights, label_smoothing=0.2, discopop_tau=0.1, beta=0.4)
    source = (HERE / "trl_scripts" / "dpo.py").read_text()
    source = re.sub(r"(?s)    beta=.*?loss_weights=[^\n]*\n", f"    **{losses!r},\n", source)
    theirs, ours = run(source)["trainer"], run(moved(source))["trainer"]
    for metric in SHARED:
        np.testing.assert_allclose(logged(ours, metric), logged(theirs, metric), rtol=2e-4, err_msg=metric)
    assert len(ours.objective.terms) == 13


# ---- what the trainer is told ----


def trainer(train, model="tiny", **options):
    """One that trains nothing; options of the config and of the trainer alike."""
    given = {name: options.pop(name) for name in [*options] if name in OF_TRAINER}
    return UnifiedTrainer(
        model=model, args=UnifiedConfig(output_dir="none", **QUIET | options), train_dataset=train, **given
    )


OF_TRAINER = ("objective", "eval_dataset", "formatting_func", "ref_model", "reference", "quantization_config",
              "processing_class", "data_collator")  # fmt: skip
DEMONSTRATIONS = [{"prompt": row["prompt"], "completion": row["chosen"]} for row in pairs()]
SCORES = [{**row, "score": 0.5} for row in DEMONSTRATIONS]


@pytest.mark.parametrize(
    "data, name",
    [
        (DEMONSTRATIONS, "sft"),
        ([{"text": "a b c"}], "sft"),
        ({"a": DEMONSTRATIONS, "b": [{"text": "a b c"}]}, "sft"),
        (pairs(), "dpo"),
        (labels(), "kto"),
        (SCORES, "una"),
        ({"instructions": DEMONSTRATIONS, "preferences": pairs()}, "uft_nll"),
        ({"pairs": pairs(), "labels": labels()}, "uft_nll"),
    ],
)
def test_the_objective_follows_from_the_data(data, name, there, caplog):
    logging.getLogger("transformers").propagate = True
    made = trainer(data)
    assert made.objective.name == name == made.record()["objective"]["name"]
    assert made.record()["objective"]["from"] == made.objective_from
    assert f"objective is '{name}', from data of kind" in caplog.text


def test_the_api_as_it_reads(there, tmp_path):
    args = UnifiedConfig(output_dir=str(tmp_path), max_steps=2, **QUIET)
    data = {"instructions": DEMONSTRATIONS, "preferences": pairs()}
    made = UnifiedTrainer(model="tiny", objective="uft_nll", train_dataset=data, args=args)
    made.train()
    record = json.loads((tmp_path / "run.json").read_text())
    assert record["objective"]["name"] == "uft_nll" and record["objective"]["from"] is None
    assert {"loss/sft", "loss/preference", "instructions/nll"} <= set(record["metrics"][0])


def test_one_data_set_more_and_the_losses_are_of_both(there):
    made = trainer({"instructions": DEMONSTRATIONS, "preferences": pairs()}, beta=0.3, loss_type=["sigmoid", "sft"])
    found = [(t.name, t.on, t.function.__name__, getattr(t, "beta", None)) for t in made.objective.terms]
    assert found == [
        ("sft", "demonstrations+documents", "token_nll", None),
        ("preference", "pairs", "dpo", 0.3),
        ("sft_chosen", "chosen", "token_nll", None),
    ]
    assert "beta of args" not in made.objective_from and "beta, loss_type of args" in made.objective_from
    assert "'beta': 0.3" in made.record()["config"]["from_trl"]


def test_what_is_set_behind_the_constructor_counts(there):
    args = UnifiedConfig(output_dir="none", learning_rate=1e-6, **QUIET)
    args.beta, args.packing, args.max_length = 0.7, True, 64
    made = UnifiedTrainer("tiny", args=args, train_dataset=pairs())
    assert made.objective.terms[0].beta == 0.7 and made.args.layout == "packed"
    args.sync_ref_model = True
    with pytest.raises(ValueError, match="sync_ref_model is True; want False: checkpoints hold no moving reference"):
        UnifiedTrainer("tiny", args=args, train_dataset=pairs())


def test_what_is_said_twice_or_cannot_be_is_refused(there):
    reference = tiny_model(tiny_tokenizer(), seed=1)
    for options, message in (
        ({"objective": "dpo", "beta": 0.2}, "objective is given, and beta in args; want one of them"),
        ({"objective": UnifiedConfig(output_dir="none", use_cpu=True)}, "objective is a UnifiedConfig; want args="),
        ({"ref_model": reference, "reference": reference}, "reference and ref_model are given"),
        ({"quantization_config": {"load_in_4bit": True}}, "quantization_config is given: base weights are not"),
        ({"data_collator": print}, "data_collator has no meaning here"),
        ({"model_init_kwargs": {"device_map": "auto"}}, "model_init_kwargs.device_map is 'auto'; want it left out"),
        ({"model_init_kwargs": {"revision": "main"}, "model": reference}, "model: revision is for loading"),
        ({"dataset_text_field": "content"}, "dataset_text_field is 'content', and no data set has such a column"),
        ({"eos_token": "<end>"}, "eos_token is '<end>', which the tokenizer lacks"),
    ):
        with pytest.raises(ValueError, match=re.escape(message)):
            trainer(pairs(), **{"processing_class": tiny_tokenizer()} | options)


def test_the_reference_stands_behind_the_model_as_in_trl(there):
    reference = tiny_model(tiny_tokenizer(), seed=1)
    args = UnifiedConfig(output_dir="none", **QUIET)
    made = UnifiedTrainer("tiny", reference, args=args, train_dataset=pairs())
    assert made.reference.model is reference and made.objective.name == "dpo"


# ---- data, tokenizer and model ----


def texts(made):
    """What is trained on, decoded."""
    decode = made.processing_class.decode
    return [decode([*e.prompt, *e.responses[0].tokens]) for e in made.train_dataset]


def test_text_that_a_function_makes_or_another_column_holds(there):
    from datasets import Dataset

    rows = Dataset.from_list(DEMONSTRATIONS[:2])
    made = trainer(rows, formatting_func=lambda row: f"<|im_start|>{row['prompt']}|{row['completion']}",
                   eval_dataset={"one": rows, "two": rows})  # fmt: skip
    wanted = [f"<|im_start|>{row['prompt']}|{row['completion']}<|im_end|>" for row in rows]
    assert texts(made) == wanted and made.objective.name == "sft"
    assert {"eval_one_loss", "eval_two_loss"} <= set(made.evaluate())

    named = Dataset.from_list([{"content": "a b c"}, {"content": "d e"}])
    assert texts(trainer(named, dataset_text_field="content")) == ["a b c<|im_end|>", "d e<|im_end|>"]
    both = trainer({"a": named, "b": DEMONSTRATIONS[:1]}, dataset_text_field="content")
    assert both.train_dataset.kinds() == {"a": {"document"}, "b": {"demonstration"}}
    with pytest.raises(ValueError, match="formatting_func is given, and several data sets"):
        trainer({"a": named}, formatting_func=str)


def test_several_sets_to_evaluate_on(there):
    from datasets import Dataset, DatasetDict

    rows = Dataset.from_list(pairs())
    splits = DatasetDict({"near": rows, "far": rows.select(range(3))})
    assert set(trainer(rows, eval_dataset=splits).eval_dataset) == {"near", "far"}
    # data sets of one split, where the training data are several
    by_name = trainer({"near": rows}, eval_dataset={"near": rows.select(range(2))}).eval_dataset
    assert by_name.sources == ["near"]
    assert len(trainer(rows, eval_dataset={"path": str(there / "pairs.jsonl")}).eval_dataset) == len(rows)
    with pytest.raises(ValueError, match="found a DatasetDict of near, far; want one of its splits"):
        trainer(splits)


@pytest.mark.parametrize("column, value", [("tools", [{"name": "f"}]), ("images", ["x"])])
def test_columns_that_would_change_the_prompt_are_refused(column, value, there):
    from datasets import Dataset

    rows = [{**row, column: value} for row in pairs(True)]
    with pytest.raises(ValueError, match=f"column '{column}' is in the data, and is not read here"):
        trainer(Dataset.from_list(rows))
    assert trainer(Dataset.from_list([{**row, column: None} for row in rows])).objective.name == "dpo"


def test_end_and_template_of_the_tokenizer(there, tmp_path):
    known = tiny_tokenizer()
    (tmp_path / "plain.jinja").write_text("{% for m in messages %}{{ m['role'] + ':' + m['content'] }}{% endfor %}"
                                          "{% if add_generation_prompt %}assistant:{% endif %}")  # fmt: skip
    given = {"eos_token": "<eos>", "chat_template_path": str(tmp_path / "plain.jinja"), "processing_class": known}
    made = trainer(pairs(True)[:1], objective="sft_chosen", **given)
    assert texts(made) == ["user:say:assistant:hello world<eos>"]
    made.args.max_steps = 1
    made.train()
    assert made.model.config.eos_token_id == made.processing_class.eos_token_id != known.eos_token_id
    taken = trainer(pairs(True)[:1], objective="sft_chosen", chat_template_path="tiny", processing_class=known)
    assert taken.processing_class.chat_template == TIGHT != known.chat_template
    other = tiny_tokenizer()
    other.add_tokens(["<new>"])
    other.save_pretrained(tmp_path / "other")
    with pytest.raises(ValueError, match="with token '<new>', which the tokenizer lacks"):
        trainer(pairs(True), chat_template_path=str(tmp_path / "other"), processing_class=known)


def test_how_the_model_is_loaded(there):
    made = trainer(pairs(), model_init_kwargs={"dtype": torch.float64, "attn_implementation": "eager"})
    assert made.model.dtype == made.reference.model.dtype == torch.float64
    assert made.model.config._attn_implementation == "eager"
    with pytest.raises(TypeError, match="unheard_of"):
        trainer(pairs(), model_init_kwargs={"unheard_of": 1})


@pytest.mark.peers
def test_trls_configs_keep_their_values_and_defaults(there):
    from trl import DPOConfig, GRPOConfig, KTOConfig, RewardConfig, SFTConfig

    cpu = {"output_dir": "none", "use_cpu": True, "bf16": False}
    found = config_of(DPOConfig(**cpu, loss_type="hinge", beta=0.2, warmup_steps=7, pad_to_multiple_of=8))
    assert (found.learning_rate, found.gradient_checkpointing, found.disable_dropout) == (1e-6, True, True)
    assert (found.warmup_steps, found.pad_to_multiple_of) == (7, 8)
    assert found.from_trl == {"loss_type": ["hinge"], "beta": 0.2}
    supervised = config_of(SFTConfig(**cpu, packing=True))
    assert (supervised.disable_dropout, supervised.layout, supervised.from_trl) == (False, "packed", None)
    assert config_of(KTOConfig(**cpu)).train_sampling_strategy == "random"
    assert config_of(type("Mine", (KTOConfig,), {})(**cpu)).learning_rate == 1e-6
    for refused, message in (
        (lambda: DPOConfig(**cpu, ld_alpha=0.5), "ld_alpha is 0.5; want None"),
        (lambda: DPOConfig(**cpu, use_liger_kernel=True), "use_liger_kernel is True"),
        (lambda: GRPOConfig(**cpu), "args is a GRPOConfig; want an SFTConfig, DPOConfig or KTOConfig"),
        (lambda: RewardConfig(**cpu), "args is a RewardConfig; want"),
        (lambda: {"beta": 0.1}, "args is dict; want a UnifiedConfig"),
    ):
        with pytest.raises(ValueError, match=re.escape(message)):
            config_of(refused())


def test_a_source_of_a_user_stays_as_it_is(there):
    source = Source("mine", data=[{"content": "a", "prompt": "b", "completion": "c"}], columns={"text": "content"},
                    kind="document")  # fmt: skip
    assert trainer(source).train_dataset.kinds() == {"mine": {"document"}}
