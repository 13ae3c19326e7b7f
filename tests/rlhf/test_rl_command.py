"""`uft rl`, from files to a model that loads."""

import json
from pathlib import Path

import pytest
import yaml
from tiny import tiny_model, tiny_tokenizer
from transformers import AutoModelForCausalLM

from uft.cli import main
from uft.recipe import read_yaml
from uft.rlhf.reward import RewardModel
from uft.rlhf.rl_command import _FIELDS, _OWN

RECIPE = {
    "model": "lm", "reward": "rm", "prompts": {"prompts": "prompts.jsonl"}, "output_dir": "out", "max_steps": 2,
    "advantage": "gae", "per_device_train_batch_size": 4, "max_new_tokens": 4, "learning_rate": 1e-3, "use_cpu": True,
    "disable_tqdm": True, "report_to": "none", "save_strategy": "no", "guard": {"kl": 5.0, "action": "warn"},
}  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path, tokenizer = tmp_path_factory.mktemp("rl"), tiny_tokenizer()
    model = tiny_model(tokenizer, 0)
    model.save_pretrained(path / "lm")
    tokenizer.save_pretrained(path / "lm")
    for seed, name in enumerate(("rm", "rm2")):
        RewardModel.of(model, tokenizer, seed=seed).save(path / name)
    rows = [{"prompt": p, "completion": " a"} for p in ("say:", "hello:", "1 + 2 =", "good:", "the cat:")]
    (path / "prompts.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (path / "mine.py").write_text("def short(examples):\n    return [[-float(len(r.tokens)) for r in e.responses]"
                                  " for e in examples]\n")  # fmt: skip
    return path


@pytest.fixture(autouse=True)
def there(folder, monkeypatch):
    monkeypatch.chdir(folder)


def rl(*words, **changes):
    recipe = {key: value for key, value in (RECIPE | changes).items() if value is not None}
    Path("rl.yaml").write_text(yaml.safe_dump(recipe))
    return main(["rl", "--config", "rl.yaml", *words])


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"advantage": "rloo", "samples": 2, "reward": ["rm", "rm2"], "conservative": 1.0},
        {"advantage": "grpo", "samples": 2, "reward": "mine:short", "kl_in": "loss"},
    ],
    ids=lambda changes: changes.get("advantage", "gae"),
)
def test_trains_what_the_recipe_says(changes, capsys):
    assert rl(**changes) == 0
    assert "model, run.json in out" in capsys.readouterr().out
    record = json.loads(Path("out/run.json").read_text())
    assert record["steps"] == 2 and record["compute"]["generated_tokens"] > 0
    assert ("reward/spread" in record["metrics"][0]) == isinstance(changes.get("reward"), list)
    AutoModelForCausalLM.from_pretrained("out")
    assert json.loads(Path("out/guard.json").read_text())["limits"]["kl"] == 5.0


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"reward": None}, "key 'reward' is missing"),
        ({"reward": "mine:shrot", "advantage": "rloo", "samples": 2}, "reward 'mine:shrot'"),
        ({"reward": "mine:short"}, "want a reward model, whose copy is the critic"),
        ({"guard": {"kll": 1.0}}, "guard: unknown key 'kll'; did you mean 'kl'?"),
        ({"conservative": 1.0}, "found one reward model"),
        ({"advantag": "gae"}, "unknown key 'advantag'; did you mean 'advantage'?"),
        ({"samples": 1, "advantage": "rloo"}, "want 2 or more"),
        ({"guard": {"kl": "abc"}}, "guard: limit kl is 'abc'; want a number > 0"),
        ({"guard": {"spread": 2.0}}, "guard: spread is of an ensemble"),
        ({"guard": {"kl": 2.0}, "kl_in": "none"}, "guard: kl wants a reference"),
        ({"conservative": "x"}, "conservative is 'x'; want a number"),
        ({"reward": "json:__name__", "advantage": "rloo", "samples": 2}, "found str; want a function"),
        ({"prompts": {"prompts": {"path": "prompts.jsonl", "weight": 2.0}}}, "prompts.prompts: weight is 2.0"),
    ],
)
def test_refuses_in_one_sentence(changes, message, capsys):
    assert rl(**changes) == 1
    assert message in capsys.readouterr().err


def test_the_recipe_that_is_shown_names_what_there_is():
    recipe = read_yaml(str(Path(__file__).parents[2] / "experiments" / "recipes" / "rl.yaml"))
    assert set(recipe) <= {*_OWN, *_FIELDS}


def test_a_dry_run_trains_nothing(capsys):
    assert rl("--dry-run", output_dir="dry", samples=3) == 0
    out = capsys.readouterr().out
    assert "gae: 2 steps over 5 prompts; a rollout asks 4 of them for 3 responses of at most 4 tokens" in out
    assert not Path("dry").exists()
    assert rl("--dry-run", reward="nowhere.py") == 1
