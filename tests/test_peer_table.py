"""docs/peers.md: what it says of the installed TRL is so, and what it names of ours is there."""

import importlib.util
import logging
import re
from pathlib import Path

import pytest
from tiny import tiny_model, tiny_tokenizer

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "peers.md").read_text()
ROWS = [{"prompt": "say:", "chosen": " hello", "rejected": " mat"}, {"prompt": "a b", "chosen": " c", "rejected": " d"}]
DEMONSTRATION = {"prompt": "say a:", "chosen": " a", "rejected": None}
CPU = {"use_cpu": True, "bf16": False, "report_to": "none"}


# ---- ours ----


def test_every_test_and_file_of_ours_that_is_named_is_there():
    named = re.findall(r"`((?:tests|uft|docs|experiments)/[\w/.]+)(?:::(\w+))?`", PAGE)
    assert len(named) > 15
    for file, test in named:
        assert (ROOT / file).exists(), file
        assert not test or f"def {test}(" in (ROOT / file).read_text(), f"{file}::{test}"


def test_every_cell_of_our_column_has_a_line_that_shows_it():
    short = PAGE.split("<!-- short -->")[1].split("<!-- end -->")[0]
    rows = [line.split("|")[1:-1] for line in short.strip().splitlines()[2:]]
    assert len(rows) <= 12 and {len(row) for row in rows} == {9}
    assert [row[1].strip() for row in rows].count("✓") == 11
    sections = [part for part in PAGE.split("\n## ")[2:] if "| this |" in part or "Here:" in part]
    assert len(sections) == PAGE.count("\n## ") - 1
    assert all("`tests/" in part for part in sections)


# the section that shows each row of the short table
SHOWN_IN = (
    "Demonstrations of", "Pairs, labels", "Pairs, labels", "Likelihood of", "Denominators", "Weights over",
    "Weights over", "Pairs without", "Pairs without", "Reward model", "A comparison", "Quantised",
)  # fmt: skip


def test_every_cell_of_a_project_has_a_line_that_shows_it():
    short = PAGE.split("<!-- short -->")[1].split("<!-- end -->")[0].strip().splitlines()
    head, _, *rows = ([cell.strip() for cell in line.split("|")[1:-1]] for line in short)
    sections = PAGE.split("\n## ")
    for row, title in zip(rows, SHOWN_IN, strict=True):
        (section,) = [part for part in sections if part.startswith(title)]
        for project, cell in zip(head[2:], row[2:]):
            named = project.split(" ")[0] in section or title == "A comparison"  # which nobody has
            assert named or not cell, f"{row[0]}: {project}"


# ---- TRL, as it is installed ----


def dpo_trainer(rows, tmp_path, **options):
    import trl
    from datasets import Dataset

    data = Dataset.from_list(rows) if isinstance(rows, list) else rows
    config = trl.DPOConfig(output_dir=str(tmp_path), **CPU, **options)
    models = tiny_model(tiny_tokenizer(), seed=0), tiny_model(tiny_tokenizer(), seed=0)
    return trl.DPOTrainer(*models, args=config, train_dataset=data, processing_class=tiny_tokenizer())


@pytest.mark.peers
def test_the_version_is_the_one_of_the_page():
    import trl

    assert trl.__version__ == "1.16.0" and "| TRL | 1.16.0" in PAGE


@pytest.mark.peers
def test_trl_takes_no_second_data_set_and_no_row_without_a_pair(tmp_path):
    with pytest.raises(TypeError, match="`train_dataset` must be a `Dataset`"):
        dpo_trainer({"preferences": ROWS, "instructions": [DEMONSTRATION]}, tmp_path)
    with pytest.raises((AttributeError, TypeError), match="NoneType"):
        dpo_trainer([*ROWS, DEMONSTRATION], tmp_path)


@pytest.mark.peers
def test_trls_kto_wants_labels_not_scores(tmp_path):
    import trl
    from datasets import Dataset

    rows = [{"prompt": row["prompt"], "completion": row["chosen"], "score": 0.7} for row in ROWS]
    config = trl.KTOConfig(output_dir=str(tmp_path), per_device_train_batch_size=2, **CPU)
    with pytest.raises((KeyError, ValueError), match="label"):
        trl.KTOTrainer(
            tiny_model(tiny_tokenizer(), seed=0), tiny_model(tiny_tokenizer(), seed=0), args=config,
            train_dataset=Dataset.from_list(rows), processing_class=tiny_tokenizer(),
        ).train()  # fmt: skip


@pytest.mark.peers
def test_trl_has_no_ppo():
    import trl

    assert importlib.util.find_spec("trl.experimental.ppo") is None
    assert not hasattr(trl, "PPOTrainer") and hasattr(trl, "RewardTrainer") and hasattr(trl, "RLOOTrainer")


@pytest.mark.peers
def test_trl_pads_pairs_and_logs_the_total_alone(tmp_path, caplog):
    logging.getLogger("trl").propagate = True
    losses = {"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0, 0.5]}
    run = dpo_trainer(ROWS, tmp_path, padding_free=True, max_steps=1, logging_steps=1, save_strategy="no",
                      disable_tqdm=True, **losses)  # fmt: skip
    assert "padding_free" in caplog.text
    run.train()
    logged = run.state.log_history[0]
    assert "loss" in logged and not any("sft" in name or name.startswith(("loss/", "weight/")) for name in logged)
    with pytest.raises((TypeError, ValueError)):
        dpo_trainer(
            ROWS, tmp_path, loss_type=["sigmoid"], loss_weights=[lambda progress: progress], max_steps=1
        ).train()
