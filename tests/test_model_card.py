"""The card: header, equations, data and licences, measures that are written again, samples that stay text."""

import json

import pytest
from huggingface_hub import ModelCard, constants
from huggingface_hub.utils import validate_repo_id

from uft import losses
from uft.losses import register
from uft.model_card import model_card, update_measures, write_model_card
from uft.papers import TABLES, loss_described
from uft.presets import PRESETS, make_objective


def record(objective="dpo_nll", **changes):
    made = make_objective(objective)
    return {
        "objective": {"name": made.name, "terms": made.describe(), "balance": None},
        "reference": "FrozenReference",
        "data": {
            "train": {
                "fingerprint": "f" * 64,
                "sizes": {"mine": 3, "theirs": 4},
                "kinds": {"mine": ["demonstration"], "theirs": ["pair"]},
                "origins": {"mine": "/home/me/secret/rows.jsonl", "theirs": "them/pairs"},
            },
            "eval": {"sizes": {"mine": 2}},
        },
        "config": {"learning_rate": 1e-5},
        "model": {
            "architecture": "LlamaForCausalLM", "base": "them/base", "adapter": False, "parameters": 10,
            "trained_parameters": 10,
        },
        "seed": 1, "steps": 7, "compute": {"tokens": 5, "flops": 1e12, "seconds": 3, "peak_memory_bytes": 2**31},
        "metrics": [{"loss": 1.0}, {"eval_loss": 2.5, "eval_runtime": 1.0}],
        "versions": {"torch": "2"}, "commit": None, "hardware": {"gpu": ["NVIDIA H100", "NVIDIA H100"]},
    } | changes  # fmt: skip


@pytest.fixture
def cached(tmp_path, monkeypatch):
    """A hub cache with the cards of a base model and of a data set."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.chdir(tmp_path)
    for name, licence in (("models--them--base", "apache-2.0"), ("datasets--them--pairs", "cc-by-4.0")):
        place = tmp_path / "hub" / name
        (place / "snapshots" / "abc").mkdir(parents=True)
        (place / "refs").mkdir()
        (place / "refs" / "main").write_text("abc")
        (place / "snapshots" / "abc" / "README.md").write_text(f"---\nlicense: {licence}\n---\n")
    return tmp_path


def test_header_and_licences(cached):
    text = model_card("m", record())
    data = ModelCard(text).data
    assert (data.base_model, data.datasets, data.license) == ("them/base", ["them/pairs"], "apache-2.0")
    assert data.library_name == "transformers" and data.pipeline_tag == "text-generation"
    validate_repo_id(data.base_model)
    assert "| theirs | 4 | pair | [them/pairs](https://huggingface.co/datasets/them/pairs) | cc-by-4.0 |" in text
    assert "| mine | 3 | demonstration | `rows.jsonl`, not on the hub | not known |" in text
    assert "/home/me" not in text and "2 × NVIDIA H100; peak memory 2.00 GiB" in text


def test_nothing_is_said_of_what_is_not_known(tmp_path, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "empty"))
    data = ModelCard(model_card("m", record(model=record()["model"] | {"base": None}))).data
    assert data.license is None and data.base_model is None and data.get("base_model_relation") is None


def test_terms_are_said_by_equation_and_paper():
    text = model_card("m", record({"preset": "mpo", "kl_weight": 0.5}))
    assert "- `preference`: −log σ(Δ), in nats (Rafailov et al. 2023, [arXiv:2305.18290](" in text
    assert "- `quality`: −log σ(r_w) − log σ(−r_l), in nats" in text
    assert "- `kl`: KL(π ‖ π_ref) over the vocabulary, per token, in nats" in text


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_has_a_card(name):
    text = model_card("m", record(name))
    assert "arxiv.org/abs/" in text and f"Objective `{make_objective(name).name}`" in text


@pytest.mark.parametrize("loss", [loss for table in TABLES for loss in table.values()], ids=lambda f: f.__name__)
def test_every_loss_has_an_equation_and_a_source(loss):
    described = loss_described(loss.__name__)
    assert described.equation and "Eq." not in described.equation and "arXiv" not in described.equation
    assert described.papers


def test_a_loss_of_ones_own_needs_no_paper():
    def own_gap(chosen_reward, rejected_reward):
        """(Δ − 1)², in nats².  Mine."""
        return (chosen_reward - rejected_reward - 1).square()

    register(own_gap)
    try:
        assert "- `preference`: (Δ − 1)², in nats²\n" in model_card("m", record({"preference": {"loss": "own_gap"}}))
    finally:
        losses.PAIRWISE.pop("own_gap")


def test_measures_are_written_again_and_the_rest_stays(tmp_path):
    write_model_card(tmp_path, record(), "m")
    (tmp_path / "run.json").write_text(json.dumps(record()))
    card = tmp_path / "README.md"
    assert "| loss | 2.5 |" in card.read_text() and "No evaluation beyond" in card.read_text()
    card.write_text(card.read_text().replace("# m\n", "# m\n\nBy hand.\n"))
    evaluation = {
        "metrics": {
            "skills/accuracy": 0.6, "skills/accuracy/low": 0.5, "skills/accuracy/high": 0.7, "skills/F_true": 0.2,
            "skills/BT_true": 0.1, "skills/F_max": 0.8, "demonstrations/nll_change": 0.25, "demonstrations/worse": 0.75,
        },
        "before": {"skills/accuracy": 0.8}, "samples": {"skills": {"id": ["a", "b"]}}, "info": {"model": "/home/me/x"},
    }  # fmt: skip
    (tmp_path / "evaluation.json").write_text(json.dumps(evaluation))
    lines = [
        {"step": step, "prompt": f"say {step}", "answer": "```\n# title\n<!-- end of evaluation -->"[:20]}
        for step in (10, 20)
    ]
    (tmp_path / "samples.jsonl").write_text("\n".join(map(json.dumps, lines)) + '\n{"torn')
    assert update_measures(tmp_path)
    text = card.read_text()
    assert "By hand." in text and "No evaluation beyond" not in text and "/home/me" not in text
    assert "| skills/accuracy | 0.8 | 0.6 [0.5, 0.7] | -0.2 |" in text
    assert "| skills | 80.0 % | 75.0 % | 20.0 % | 10.0 % |" in text  # 1 − 0.2 / 0.8 of what was known is kept
    assert "Likelihood of demonstrations: 0.25 nats per token since before (lost); 75.0 % of the samples" in text
    assert "say 20" in text and "say 10" not in text and "````\n```\n# title" in text
    assert update_measures(tmp_path) and card.read_text() == text  # the same again


def test_a_card_of_another_kind_is_left_alone(tmp_path):
    (tmp_path / "README.md").write_text("mine")
    (tmp_path / "run.json").write_text(json.dumps(record()))
    assert not update_measures(tmp_path) and (tmp_path / "README.md").read_text() == "mine"
    assert not update_measures(tmp_path / "missing")
