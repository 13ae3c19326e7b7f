"""Several ranks answer together, and one of them writes."""

import json
from pathlib import Path

import pytest
import ranks
import torch
from watched_runs import tensorboard, trainer

from uft.watching.lines import read

OPTIONS = {
    "samples": 5, "report_to": "tensorboard", "loss_plane": True, "learning_rate": 1e-9, "max_steps": 2, "eval_steps": 1
}  # fmt: skip


def _train(folder: Path) -> None:
    torch.set_num_threads(1)
    trainer(folder / "out", **OPTIONS).train()


@pytest.mark.slow
def test_two_ranks_answer_as_one_does(tmp_path):
    trainer(tmp_path / "one", **OPTIONS).train()
    (tmp_path / "two").mkdir()
    ranks.run(_train, tmp_path / "two", 2)
    one, two = (
        [json.loads(line) for line in (folder / "samples.jsonl").read_text().splitlines()]
        for folder in (tmp_path / "one", tmp_path / "two" / "out")
    )
    assert two == one and len(two) == 8  # at two steps, to each of the four prompts
    journal = read(tmp_path / "two" / "out" / "progress.jsonl")
    assert [e["step"] for e in journal if "loss" in e] == [1, 2] and journal[-1]["reason"] == "finished"
    tokens = [e["num_tokens"] for e in journal if "loss" in e]
    assert all(e["tokens_per_second"] > 0 for e in journal if "loss" in e) and tokens[0] < tokens[1]
    assert [e.step for e in tensorboard(tmp_path / "two").Scalars("loss/train")] == [1, 2]
