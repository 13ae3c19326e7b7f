"""`uft reward train` and `uft reward evaluate`, from files to reports."""

import json
from pathlib import Path

import pytest
import yaml
from datasets import Dataset
from tiny import tiny_model, tiny_tokenizer

from uft.cli import main
from uft.rlhf.reward import RewardModel

PROMPTS = ["say:", "say a b c:", "hello:", "the cat on the mat:", "1 + 2 =", "good:"]
RECIPE = {
    "model": "lm", "train_dataset": {"pairs": "pairs.jsonl", "scores": {"path": "scores.jsonl"}},
    "eval_dataset": {"held_out": "pairs.jsonl"}, "output_dir": "out", "max_steps": 2, "learning_rate": 1e-3,
    "per_device_train_batch_size": 4, "use_cpu": True, "disable_tqdm": True, "report_to": "none",
    "save_strategy": "no", "max_length": 64,
}  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path, tokenizer = tmp_path_factory.mktemp("reward"), tiny_tokenizer()
    tiny_model(tokenizer, 0).save_pretrained(path / "lm")
    tokenizer.save_pretrained(path / "lm")
    pairs = [{"prompt": p, "chosen": " a b", "rejected": " the mat"} for p in PROMPTS]
    scores = [{"prompt": p, "completion": " c", "score": 0.5} for p in PROMPTS[:3]]
    for name, rows in (("pairs", pairs), ("scores", scores)):
        (path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (path / "held_out.jsonl").write_text((path / "pairs.jsonl").read_text())
    Dataset.from_list(pairs).to_parquet(path / "pairs.parquet")
    (path / "reward.yaml").write_text(yaml.safe_dump(RECIPE))
    return path


@pytest.fixture(autouse=True)
def there(folder, monkeypatch):
    monkeypatch.chdir(folder)


def test_train_and_evaluate(capsys):
    assert main(["reward", "train", "--config", "reward.yaml"]) == 0
    out = capsys.readouterr().out
    assert "pairs/accuracy" in out and "reward model in out/reward_model" in out
    model = RewardModel.load("out/reward_model")
    assert model.training_record["steps"] == 2 and model.training_record["examples"] == 8
    written = json.loads(Path("out/reward_model/rewards.json").read_text())["metrics"]
    assert written["reward/mean"] == pytest.approx(0, abs=1e-5) and written["reward/std"] == pytest.approx(1, abs=1e-5)

    assert main(["reward", "evaluate", "--model", "out/reward_model", "pairs.jsonl", "--output_dir", "again"]) == 0
    assert "rewards.json, rewards.md and rewards.png in again" in capsys.readouterr().out
    again = json.loads(Path("again/rewards.json").read_text())["metrics"]
    assert again == pytest.approx(written, nan_ok=True)


def test_members_of_an_ensemble_differ(capsys):
    words = ["--members", "2", "--output_dir", "several", "--calibrate", "false"]
    assert main(["reward", "train", "--config", "reward.yaml", *words]) == 0
    members = [RewardModel.load(f"several/member{i}") for i in range(2)]
    assert (members[0].center, members[0].scale) == (0.0, 1.0)
    assert [each.training_record["config"]["seed"] for each in members] == [42, 43]
    assert (members[0].model.score.weight != members[1].model.score.weight).all()
    models = [word for i in range(2) for word in ("--model", f"several/member{i}")]
    assert main(["reward", "evaluate", *models, "pairs.jsonl", "scores.jsonl"]) == 0
    out = capsys.readouterr().out
    assert "spread/wrong" in out and "targets" in out


@pytest.mark.parametrize(
    "words, message",
    [
        (["train", "--config", "reward.yaml", "--members", "0"], "members is 0; want at least 1"),
        (["train", "--config", "reward.yaml", "--memmbers", "2"], "did you mean 'members'"),
        (["train", "--config", "reward.yaml", "--calibrate", "2"], "calibrate is 2; want a value of type bool"),
        (["train", "--config", "reward.yaml", "--regression", "huber"], "want bce or mse"),
        (["train", "--train_dataset.a", "pairs.jsonl"], "key 'model' is missing"),
        (["evaluate", "--model", "lm", "pairs.jsonl"], "lm: found ['LlamaForCausalLM']; want a reward model"),
    ],
)
def test_what_is_wrong_is_said_in_one_line(words, message, capsys):
    assert main(["reward", *words]) == 1
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("uft: ") and message in error


def test_without_a_command_usage_is_shown(capsys):
    assert main(["reward"]) == 2
    assert "usage: uft reward COMMAND" in capsys.readouterr().err


def test_the_recipe_of_the_repository_trains(capsys):
    recipe = Path(__file__).parents[2] / "experiments" / "recipes" / "reward.yaml"
    words = [f"--{key}={RECIPE[key]}" for key in ("model", "max_steps", "use_cpu", "report_to", "max_length")]
    assert main(["reward", "train", "--config", str(recipe), *words, "--output_dir=recipe"]) == 0
    assert RewardModel.load("recipe/reward_model").training_record["config"]["warmup_steps"] == 0.03


def test_a_dry_run_trains_nothing(capsys):
    words = ["reward", "train", "--config", "reward.yaml", "--output_dir", "dry", "--members", "2", "--dry-run"]
    assert main(words) == 0
    assert "2 reward models from lm, 2 steps of 9 rows; in dry" in capsys.readouterr().out
    assert not Path("dry").exists()
    assert main([*words, "--members", "0"]) == 1
