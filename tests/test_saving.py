"""What a run leaves behind: weights as safetensors, adapters that plain peft loads, a model card."""

import json

import pytest
import torch
from huggingface_hub import ModelCard
from mixed import Tokenizer, dataset, model, trainer
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM

from uft.models import load_policy
from uft.stages import Stage, run_stages, save_after_stages

LORA = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")


def logits(policy):
    with torch.no_grad():
        return policy.eval()(torch.arange(3, 40)[None]).logits


def card_of(folder):
    text = (folder / "README.md").read_text()
    return ModelCard(text), text


def test_model_card(tmp_path):
    run = trainer(
        "uft_nll", dataset(("demonstrations", "scores")), output_dir=tmp_path, eval_dataset=dataset(("scores",), n=3)
    )
    run.train()
    run.save_model()
    run.create_model_card(model_name="my model", tags="mine")
    card, text = card_of(tmp_path)
    assert card.data.tags == ["uft", "unified-fine-tuning", "mine"]
    assert card.data.library_name == "transformers"
    assert card.data.base_model is None  # fresh weights
    assert "# my model" in text and "one stage" in text and "LlamaForCausalLM" in text
    assert "| sft | token_nll | demonstrations+documents | 1.0 |" in text
    assert "| preference | una_mse | responses | 1.0 | 0.1 |" in text
    assert "| demonstrations | 8 |" in text and "| scores | 8 |" in text
    counters = run.counters()
    assert f"2 steps, learning rate 0.01, seed 42; {counters['tokens']:,} tokens" in text
    assert "torch" in text and str(tmp_path) not in text


@pytest.mark.parametrize("name, wanted", [("Qwen/Qwen3-0.6B-Base", "Qwen/Qwen3-0.6B-Base"), ("/tmp/some/folder", None)])
@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
def test_base_model_in_the_card_is_a_hub_id_or_absent(name, wanted, lora, tmp_path):
    """The hub refuses cards whose base_model is a folder."""
    policy = model()
    policy.config._name_or_path = name
    run = trainer("dpo", dataset(("pairs",)), policy, output_dir=tmp_path, peft_config=LORA if lora else None)
    run.create_model_card()
    card, text = card_of(tmp_path)
    assert card.data.base_model == wanted
    assert card.data.library_name == ("peft" if lora else "transformers")
    assert "LlamaForCausalLM" in text


def test_weights_are_safetensors(tmp_path):
    run = trainer("dpo", dataset(("pairs",)), output_dir=tmp_path, save_strategy="steps", save_steps=1)
    run.train()
    run.save_model()
    for folder in (tmp_path, tmp_path / "checkpoint-2"):
        assert (folder / "model.safetensors").is_file()
        assert not [*folder.glob("pytorch_model*"), *folder.glob("adapter_model.bin")]
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path)), logits(run.model))


def test_pickled_weights_are_not_read(tmp_path):
    policy = model()
    policy.save_pretrained(tmp_path)
    torch.save(policy.state_dict(), tmp_path / "pytorch_model.bin")
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(OSError, match="safetensors"):
        load_policy(str(tmp_path))


def test_an_adapter_loads_in_plain_peft(tmp_path):
    base = model()
    base.save_pretrained(tmp_path / "base")
    policy = load_policy(str(tmp_path / "base"))
    out = tmp_path / "out"
    run = trainer("dpo", dataset(("pairs",)), policy, output_dir=out, peft_config=LORA, learning_rate=0.1)
    run.train()
    run.save_model()
    run.create_model_card()
    assert {path.name for path in out.iterdir() if path.suffix in (".safetensors", ".bin")} == {
        "adapter_model.safetensors", "training_args.bin",
    }  # fmt: skip
    loaded = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), out)
    assert torch.equal(logits(loaded), logits(run.model))
    assert (logits(loaded) - logits(base)).abs().max() > 1e-2


@pytest.mark.parametrize("boundary, files", [("merge", "model.safetensors"), ("keep", "adapter_model.safetensors")])
def test_after_stages_with_adapters(boundary, files, tmp_path):
    """Merged where the weights under the adapter are an earlier stage's; otherwise the adapter without the frozen copy
    that was the reference."""
    stages = [
        Stage("sft", "sft", on=("demonstrations",)),
        Stage("dpo", "dpo", on=("pairs",), boundary=boundary),
    ]
    args = trainer("dpo", dataset(("pairs",)), output_dir=tmp_path, max_steps=3, learning_rate=0.05).args
    data = dataset(("demonstrations", "pairs"))
    policy, _ = run_stages(model(), stages, data, args, Tokenizer(), peft_config=LORA)
    ended = logits(policy)
    save_after_stages(policy, stages, tmp_path / "saved")
    saved = {path.name for path in (tmp_path / "saved").iterdir() if path.name.endswith("safetensors") or path.is_dir()}
    assert saved == {files}
    if boundary == "merge":
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    else:
        loaded = PeftModel.from_pretrained(model(), tmp_path / "saved")
    torch.testing.assert_close(logits(loaded), ended, rtol=1e-4, atol=1e-4)
    assert (logits(model()) - ended).abs().max() > 0.1


def test_run_json_is_json(tmp_path):
    run = trainer("kto", dataset(("labels",)), output_dir=tmp_path)
    run.train()
    found = json.loads((tmp_path / "run.json").read_text(), parse_constant=lambda name: pytest.fail(name))
    assert found["objective"]["name"] == "kto" and found["steps"] == 2


def test_a_folder_with_an_adapter_is_trained_on(tmp_path):
    base = model()
    base.save_pretrained(tmp_path / "base")
    policy = get_peft_model(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), LORA)
    with torch.no_grad():
        for name, parameter in policy.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1)
    policy.save_pretrained(tmp_path / "adapter")
    run = trainer("sft", dataset(("demonstrations",)), str(tmp_path / "adapter"), output_dir=tmp_path / "run")
    assert torch.equal(logits(run.model), logits(policy))
    trained = {name for name, parameter in run.model.named_parameters() if parameter.requires_grad}
    assert trained and all("lora_" in name for name in trained)
    with pytest.raises(ValueError, match=r"found an adapter in .*, and another one is asked for"):
        trainer("sft", dataset(("demonstrations",)), str(tmp_path / "adapter"), peft_config=LORA)


def test_a_model_that_nothing_of_is_trained_is_refused():
    with pytest.raises(ValueError, match="found no weight that wants a gradient"):
        trainer("sft", dataset(("demonstrations",)), model().requires_grad_(False))
