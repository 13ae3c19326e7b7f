"""What reaches the hub and what does not, byte by byte; models and adapters that load without this library."""

import json
import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from datasets import Dataset
from fake_hub import FakeHub
from huggingface_hub import HfApi, ModelCard, constants
from peft import PeftConfig
from safetensors import safe_open
from tiny import tiny_model, tiny_tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer

from uft.cli import main
from uft.config import UnifiedConfig
from uft.data.mixture import load_feedback
from uft.licences import hub_id, origin
from uft.models import merged
from uft.redaction import without_paths
from uft.responding import respond
from uft.sharing import Shared, lay_out_shared, shared_files
from uft.stages import Stage, run_stages, save_after_stages
from uft.trainer import UnifiedTrainer

ROOT = Path(__file__).resolve().parents[1]
PROMPTS = ["say:", "say a b c:", "hello:", "the cat on the mat:"]
GOOD = [" hello world", " the cat sat on the mat", " c", " good bye"]
BAD = [" mat the on", " b", " a b c d e f g 1 2 3", " hello"]
SECRET, HOST = "hf_secret", "a-machine-of-mine"
MODEL = {"config.json", "generation_config.json", "model.safetensors"}
ADAPTER = {"adapter_config.json", "adapter_model.safetensors"}
BESIDE = {"tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "README.md", "run.json"}
LORA = {"use_peft": True, "lora_r": 4}


def lines(**named):
    return "\n".join(json.dumps(dict(zip(named, row))) for row in zip(*named.values()))


@pytest.fixture(scope="module")
def hub():
    server = FakeHub()
    yield server
    server.close()


@pytest.fixture
def place(hub, tmp_path, monkeypatch):
    """A folder with a tiny model, data and a recipe, and a hub without any commit."""
    hub.created.clear(), hub.commits.clear()
    monkeypatch.setattr("transformers.utils.hub._hf_api", HfApi(endpoint=hub.url))
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(socket, "gethostname", lambda: HOST)
    monkeypatch.chdir(tmp_path)
    write_base(tmp_path / "tiny")
    (tmp_path / "demonstrations.jsonl").write_text(lines(prompt=PROMPTS, completion=GOOD))
    (tmp_path / "pairs.jsonl").write_text(lines(prompt=PROMPTS, chosen=GOOD, rejected=BAD))
    return tmp_path


def write_base(folder, **changes):
    tokenizer = tiny_tokenizer()
    tokenizer.save_pretrained(folder)
    model = tiny_model(tokenizer, seed=0)
    if changes.get("tie_word_embeddings"):
        model.config.tie_word_embeddings = True
        model = type(model)(model.config)
    model.to(changes.get("dtype", torch.float32)).save_pretrained(folder)


def train(place, **changes):
    """`uft train` with absolute paths, as many write them."""
    recipe = {
        "model": str(place / "tiny"),
        "objective": "dpo_nll",
        "train_dataset": {
            "instructions": str(place / "demonstrations.jsonl"), "preferences": str(place / "pairs.jsonl"),
        },
        "output_dir": str(place / "out"), "max_steps": 2, "per_device_train_batch_size": 4, "learning_rate": 1e-2,
        "use_cpu": True, "disable_tqdm": True, "report_to": "none", "save_strategy": "no", "push_to_hub": True,
        "hub_model_id": "me/x", "hub_token": SECRET,
    } | changes  # fmt: skip
    (place / "recipe.yaml").write_text(yaml.safe_dump({k: v for k, v in recipe.items() if v is not None}))
    assert main(["train", "--config", "recipe.yaml"]) == 0


def assert_nothing_leaks(files, place):
    names = {str(place), str(ROOT), SECRET, HOST, str(Path.home()) + "/"}
    for name, content in files.items():
        for leak in names:
            assert leak.encode() not in content, f"{leak} in {name}"
        if name.endswith((".json", ".md")):
            assert not re.search(r'["\s`](/(tmp|home|root|work|usr)/[^"\s]*)', content.decode()), name


# ---- what is uploaded ----


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
def test_the_model_is_pushed_and_nothing_else_of_its_folder(lora, hub, place):
    (place / "out").mkdir()
    for name in ("progress.jsonl", "notes.txt", "train.py", "rows.parquet", "reference_logps.npz"):
        (place / "out" / name).write_text(f"{place} my data")
    train(place, **(LORA if lora else {}), save_strategy="steps", save_steps=1, hub_always_push=True)
    assert {each["repo"] for each in hub.commits} == {"me/x"}
    assert [each["message"] for each in hub.commits][-1] == "Model save"
    assert len(hub.commits) >= 2  # while training, too
    for commit in hub.commits:
        assert set(commit["files"]) == (ADAPTER if lora else MODEL) | BESIDE
        assert_nothing_leaks(commit["files"], place)
    assert hub.tokens == {f"Bearer {SECRET}"}
    assert not [*(place / "out").glob("sharing-*")]  # where it was laid out

    files = hub.commits[-1]["files"]
    run = json.loads(files["run.json"])
    assert run["steps"] == 2 and run["objective"]["name"] == "dpo_nll"
    assert run["data"]["train"]["origins"] == {"instructions": "demonstrations.jsonl", "preferences": "pairs.jsonl"}
    card = ModelCard(files["README.md"].decode())
    assert card.data.library_name == ("peft" if lora else "transformers") and card.data.base_model is None
    assert "# x\n" in card.content
    if lora:  # its base is a folder here; "tiny" would be somebody else's model there
        assert json.loads(files["adapter_config.json"])["base_model_name_or_path"] is None
        assert PeftConfig.from_pretrained(place / "out").base_model_name_or_path == str(place / "tiny")
    weights = "adapter_model.safetensors" if lora else "model.safetensors"
    assert files[weights] == (place / "out" / weights).read_bytes()


def test_what_was_pushed_is_the_model(hub, place):
    train(place)
    copy = place / "downloaded"
    copy.mkdir()
    for name, content in hub.commits[-1]["files"].items():
        (copy / name).write_bytes(content)
    ids = torch.arange(3, 40)[None]
    with torch.no_grad():
        theirs, ours = (AutoModelForCausalLM.from_pretrained(folder)(ids).logits for folder in (copy, place / "out"))
    assert torch.equal(theirs, ours)
    assert AutoTokenizer.from_pretrained(copy).chat_template == tiny_tokenizer().chat_template


def test_of_stages_the_last_model_is_pushed_once(hub, place):
    stages = [
        {"name": "sft", "objective": "sft", "on": "instructions"},
        {"name": "dpo", "objective": "dpo", "on": "preferences"},
    ]
    train(place, objective=None, stages=stages, save_strategy="steps", save_steps=1)
    (commit,) = hub.commits
    assert commit["repo"] == "me/x" and set(commit["files"]) == MODEL | BESIDE
    assert_nothing_leaks(commit["files"], place)
    assert [each["stage"] for each in json.loads(commit["files"]["run.json"])["stages"]] == ["sft", "dpo"]
    assert commit["files"]["model.safetensors"] == (place / "out" / "model.safetensors").read_bytes()
    card = commit["files"]["README.md"].decode()
    assert "# x\n" in card and "## Stage 1: sft" in card and "## Stage 2: dpo" in card


def test_whole_checkpoints_go_along_only_where_they_are_asked_for(hub, place):
    train(place, save_strategy="steps", save_steps=2, hub_strategy="checkpoint")
    (checkpoint,) = [each for each in hub.commits if each["message"].endswith(", checkpoint")]
    assert {"last-checkpoint/optimizer.pt", "last-checkpoint/trainer_state.json"} <= set(checkpoint["files"])
    others = [each for each in hub.commits if each is not checkpoint]
    assert others and all(set(each["files"]) == MODEL | BESIDE for each in others)
    assert not any(SECRET.encode() in content for content in checkpoint["files"].values())


def test_pushing_by_hand(hub, place):
    train(place, push_to_hub=False)
    assert hub.created == hub.commits == []
    Shared.at(place / "out").push("by hand")
    assert hub.commits[0]["repo"] == "somebody/out" and hub.commits[0]["message"] == "by hand"
    assert set(hub.commits[0]["files"]) == MODEL | BESIDE
    (place / "empty").mkdir()
    with pytest.raises(ValueError, match=r"empty: found no \*.safetensors; want the folder of a trained model"):
        Shared.at(place / "empty", "me/empty").push()
    assert len(hub.commits) == 1


def test_the_trainers_own_method(hub, place):
    tokenizer = tiny_tokenizer()
    trainer = UnifiedTrainer(
        "tiny", "sft", UnifiedConfig(output_dir="here", max_steps=1, use_cpu=True, report_to="none"),
        {"instructions": "demonstrations.jsonl"}, processing_class=tokenizer,
    )  # fmt: skip
    trainer.train()
    trainer.push_to_hub("mine", tags="more", private=True, token=SECRET)
    assert hub.created[0]["visibility"] == "private"
    (commit,) = hub.commits
    assert commit["repo"] == "somebody/here" and commit["message"] == "mine" and set(commit["files"]) == MODEL | BESIDE
    assert ModelCard(commit["files"]["README.md"].decode()).data.tags == ["uft", "unified-fine-tuning", "more"]


def test_who_may_not_push_learns_it_before_the_training(place, monkeypatch, capsys):
    monkeypatch.setattr("transformers.utils.hub._hf_api", HfApi(endpoint="http://127.0.0.1:9"))
    stages = [{"objective": "sft", "on": "instructions"}]
    for changes in ({}, {"objective": None, "stages": stages}):
        with pytest.raises(AssertionError):  # the command said it failed
            train(place, **changes)
        assert "uft: me/x: the repository cannot be made on the hub (" in capsys.readouterr().err
        assert not [*place.glob("out/**/*.safetensors")]


@pytest.mark.parametrize(
    "value, wanted",
    [
        ("/data/me/pairs.parquet", "pairs.parquet"),
        ("/home/jane doe/acme corp/x.jsonl", "x.jsonl"),
        ("/data/a, b (old)/x.jsonl", "x.jsonl"),
        ("C:\\Users\\Jane Doe\\x", "x"),
        ("\\\\server\\share\\x", "x"),
        ("~/clients/acme/x.jsonl", "x.jsonl"),
        ("../acme/secret/x.jsonl", "x.jsonl"),
        ("acme/my corp/x.jsonl", "x.jsonl"),
        ("file:///home/jane/acme/x.jsonl", "x.jsonl"),
        ("compared with /data/a b/evaluation.json.", "compared with evaluation.json."),
        ("read /home/jane doe/acme/x.jsonl and them/pairs", "read x.jsonl and them/pairs"),
        ("read '/home/jane doe/my x', ~/a/b, or c/secret/d.csv", "read 'my x', b, or d.csv"),
        ("/a/first\nsee C:\\Users\\Jane Doe\\x.json, \\\\server\\share\\x", "first\nsee x.json, x"),
        ("https://jane:s3@cret@host/me/x", "https://host/me/x"),
        ("from https://host/x?token=s3cret&page=2", "from https://host/x?token=&page=2"),
        ({"output_dir": "runs/acme/x/", "data_cache": "acme/cache"}, {"output_dir": "x", "data_cache": "cache"}),
        ({"model": "acme/models/base", "hub_model_id": "me/x"}, {"model": "base", "hub_model_id": "me/x"}),
        ({"model": "me/x"}, {"model": "me/x"}),
        (
            {"origins": {"a": "acme/secret/x.jsonl", "b": "them/pairs", "c": "./data/pairs", "d": "/data/pairs"}},
            {"origins": {"a": "x.jsonl", "b": "them/pairs", "c": "./pairs", "d": "./pairs"}},
        ),
        (
            {"output_dir": "/home/me/runs/x/", "n": [1, "C:\\Users\\me\\x.json"]},
            {"output_dir": "x", "n": [1, "x.json"]},
        ),
        ("runs/first", "runs/first"),
        ("me/pairs", "me/pairs"),
        ("https://hub.org/me/pairs", "https://hub.org/me/pairs"),
        ("eval_demonstrations/nll", "eval_demonstrations/nll"),
        ("1/2", "1/2"),
        ("nll / token", "nll / token"),
        ("KL(π ‖ π_ref)/T and/or -inf/2", "KL(π ‖ π_ref)/T and/or -inf/2"),
        ("/", "/"),
        ("hf://datasets/me/pairs/rows.parquet", "hf://datasets/me/pairs/rows.parquet"),
    ],
)
def test_of_paths_the_last_part_is_left(value, wanted):
    assert without_paths(value) == wanted


def test_a_folder_that_could_be_an_id_is_known_by_its_record(hub, place, monkeypatch):
    """`models/base` is a folder from where training ran, and written as an id is from where it is pushed."""
    (place / "models").mkdir()
    (place / "tiny").rename(place / "models" / "base")
    (place / "data").mkdir()
    rows = [{"prompt": p, "chosen": c, "rejected": r} for p, c, r in zip(PROMPTS, GOOD, BAD)]
    Dataset.from_list(rows).save_to_disk(place / "data" / "pairs")
    sources = {"preferences": "data/pairs"}
    train(place, model="models/base", train_dataset=sources, output_dir="out", push_to_hub=False, **LORA)
    assert json.loads((place / "out" / "adapter_config.json").read_text())["base_model_name_or_path"] == "models/base"
    monkeypatch.chdir("/")
    (place / "models").rename(place / "gone")
    Shared.at(place / "out", "me/x").push()
    (place / "gone").rename(place / "models")
    (place / "out" / "run.json").unlink()  # without it the folder is looked for around the model
    Shared.at(place / "out", "me/x").push()
    first, second = (each["files"] for each in hub.commits)
    for files in (first, second):
        assert json.loads(files["adapter_config.json"])["base_model_name_or_path"] is None
        assert not any(b"models/base" in content or b"data/pairs" in content for content in files.values())
    run = json.loads(first["run.json"])
    assert run["model"]["base"] is None and run["data"]["train"]["origins"] == {"preferences": "./pairs"}
    card = ModelCard(first["README.md"].decode())
    assert card.data.base_model is None and card.data.datasets is None and "`pairs`, not on the hub" in card.content


@pytest.mark.parametrize("stages", [False, True])
def test_a_base_model_on_the_hub_is_named_where_a_folder_has_its_name(stages, tmp_path, monkeypatch):
    model, aside = tmp_path / "out", tmp_path / "aside"
    for folder in (model, aside, tmp_path / "them" / "base"):
        folder.mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    (model / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "them/base", "r": 4}))
    record = {"model": {"base": "them/base"}}
    (model / "run.json").write_text(json.dumps({"stages": [{"model": {"base": None}}, record]} if stages else record))
    lay_out_shared(model, aside, model / "README.md")
    assert json.loads((aside / "adapter_config.json").read_text())["base_model_name_or_path"] == "them/base"
    assert hub_id("them/base") == "them/base"
    assert (origin("them/base"), origin("them/other"), origin("a.jsonl")) == ("./them/base", "them/other", "a.jsonl")


def test_shards_and_further_templates_are_shared(tmp_path):
    model = tiny_model(tiny_tokenizer(), seed=0)
    model.save_pretrained(tmp_path, max_shard_size="60KB")
    (tmp_path / "additional_chat_templates").mkdir()
    (tmp_path / "additional_chat_templates" / "tools.jinja").write_text("{{ messages }}")
    (tmp_path / "checkpoint-1").mkdir()
    (tmp_path / "checkpoint-1" / "model.safetensors").write_bytes(b"")
    names = {path.relative_to(tmp_path).as_posix() for path in shared_files(tmp_path)}
    assert "model.safetensors.index.json" in names and "model-00001-of-00003.safetensors" in names, names
    assert "additional_chat_templates/tools.jinja" in names and not any("checkpoint" in name for name in names)


# ---- without this library ----

OUTSIDE = """
import contextlib, io, json, sys
import transformers
transformers.logging.set_verbosity_error()
written = {}
for name, code in json.load(open("snippets.json")).items():
    with contextlib.redirect_stdout(io.StringIO()) as out:
        exec(code, {})
    written[name] = out.getvalue()
assert not any(name.split(".")[0] in ("uft", "uft_kernels") for name in sys.modules)
json.dump(written, open("written.json", "w"))
"""


def snippet(folder, base):
    """The card's own code, about one prompt."""
    code = re.search(r"```python\n(.*?)```", (folder / "README.md").read_text(), re.DOTALL)[1]
    code = re.sub(r'MODEL = ".*?"', f'MODEL = "{folder}"', code).replace("FOLDER_OF_THE_BASE_MODEL", str(base))
    assert code.count('"..."') == 1
    return code.replace('"..."', '"hello a b"').replace("max_new_tokens=128", "max_new_tokens=24")


def said(model, tokenizer):
    messages = [{"role": "user", "content": "hello a b"}]
    prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)["input_ids"]
    ((ids, _),) = respond(model.eval(), tokenizer, [prompt], max_new_tokens=24)
    return tokenizer.decode(ids, skip_special_tokens=True) + "\n"


def test_models_and_adapters_say_the_same_without_this_library(place, monkeypatch):
    """Full, tied, bfloat16, adapter, merged adapter and stages, each by the code of its own card in a process that has
    only transformers and peft."""
    monkeypatch.setattr("uft.model_card.hub_id", lambda name: None)
    write_base(place / "tied", tie_word_embeddings=True)
    write_base(place / "half", dtype=torch.bfloat16)
    tokenizer = tiny_tokenizer()
    sources = {"instructions": str(place / "demonstrations.jsonl"), "preferences": str(place / "pairs.jsonl")}
    data, _ = load_feedback(sources, tokenizer, 64)
    wanted, bases = {}, {}
    cases = {
        "full": ("tiny", {}), "tied": ("tied", {}), "half": ("half", {"dtype": "auto"}),
        "adapter": ("tiny", LORA), "merged": ("tiny", LORA),
    }  # fmt: skip
    for name, (base, options) in cases.items():
        args = UnifiedConfig(
            output_dir=str(place / name), max_steps=4, learning_rate=0.03, use_cpu=True, report_to="none", **options
        )
        trainer = UnifiedTrainer(str(place / base), "dpo_nll", args, data, processing_class=tokenizer)
        untrained = said(trainer.model, tokenizer)
        trainer.train()
        wanted[name], bases[name] = said(trainer.model, tokenizer), place / base
        assert wanted[name] != untrained
        if name == "merged":
            merged(trainer.model).save_pretrained(place / name)
            tokenizer.save_pretrained(place / name)
        else:
            trainer.save_model()
        trainer.create_model_card()
    stages = [Stage("sft", "sft", on=("instructions",)), Stage("dpo", "dpo", on=("preferences",), reference="base")]
    args = UnifiedConfig(output_dir=str(place / "stages"), max_steps=3, learning_rate=0.03, use_cpu=True, **LORA)
    policy, records = run_stages(str(place / "tiny"), stages, data, args, tokenizer)
    wanted["stages"], bases["stages"] = said(policy, tokenizer), place / "tiny"
    save_after_stages(policy, stages, place / "stages")
    tokenizer.save_pretrained(place / "stages")
    from uft.model_card import write_model_card

    write_model_card(place / "stages", records)

    (place / "snippets.json").write_text(json.dumps({name: snippet(place / name, bases[name]) for name in wanted}))
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PYTHON")} | {"HF_HUB_OFFLINE": "1"}
    ran = subprocess.run([sys.executable, "-c", OUTSIDE], cwd=place, env=environment, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    assert json.loads((place / "written.json").read_text()) == wanted

    kinds = {name: "adapter" if name == "adapter" else "model" for name in wanted}
    for name, kind in kinds.items():
        assert_ready_to_serve(place / name, kind)
    assert "lm_head.weight" not in weights_of(place / "tied") and "lm_head.weight" in weights_of(place / "full")
    assert weights_of(place / "half")["model.norm.weight"] == "BF16"
    assert json.loads((place / "half" / "config.json").read_text())["dtype"] == "bfloat16"


def weights_of(folder):
    with safe_open(folder / "model.safetensors", "pt") as file:
        return {name: file.get_slice(name).get_dtype() for name in file.keys()}  # noqa: SIM118


def assert_ready_to_serve(folder, kind):
    """What vLLM reads of a folder."""
    names = {path.name for path in folder.iterdir() if path.is_file()}
    assert {"tokenizer.json", "tokenizer_config.json", "chat_template.jinja"} <= names
    assert not [name for name in names if name.endswith((".pt", ".pth")) or name.startswith("pytorch_model")]
    tokenizer = json.loads((folder / "tokenizer_config.json").read_text())
    assert tokenizer["eos_token"] == "<|im_end|>" and tokenizer["pad_token"] == "<pad>"
    if kind == "adapter":
        found = json.loads((folder / "adapter_config.json").read_text())
        assert found["r"] == 4 and len(found["target_modules"]) > 0 and found["peft_type"] == "LORA"
        assert found["bias"] == "none" and not found["use_dora"] and not found["use_rslora"]
        assert found["modules_to_save"] is None and found["trainable_token_indices"] is None
        assert "adapter_model.safetensors" in names and "model.safetensors" not in names
        with safe_open(folder / "adapter_model.safetensors", "pt") as file:
            assert all(name.endswith((".lora_A.weight", ".lora_B.weight")) for name in file.keys())  # noqa: SIM118
        return
    config = json.loads((folder / "config.json").read_text())
    assert config["architectures"] == ["LlamaForCausalLM"] and config["vocab_size"] >= 298
    assert {"BF16": "bfloat16", "F32": "float32"}[next(iter(weights_of(folder).values()))] == config["dtype"]
    assert not any("lora" in name or "base_layer" in name for name in weights_of(folder))
    generation = json.loads((folder / "generation_config.json").read_text())
    ends, pad = tiny_tokenizer().eos_token_id, tiny_tokenizer().pad_token_id
    assert generation["eos_token_id"] == config["eos_token_id"] == ends
    assert generation["pad_token_id"] == config["pad_token_id"] == pad
