"""Runs to report on: real tiny ones by `uft train`, once for all tests, and planted ones with numbers known by hand."""

import json
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "cli"))  # its workplace


@pytest.fixture(scope="session")
def trained(tmp_path_factory):
    """A folder with runs/unified, runs/sequential (two stages) and runs/seeds/seed0, seed1 of the unified recipe."""
    import cli_workplace
    import pyarrow
    import pyarrow.parquet
    from cli_workplace import BAD, GOOD, PROMPTS, STAGES
    from tiny import tiny_model, tiny_tokenizer

    folder = tmp_path_factory.mktemp("trained")
    tokenizer = tiny_tokenizer()
    tiny_model(tokenizer, seed=0).save_pretrained(folder / "tiny")
    tokenizer.save_pretrained(folder / "tiny")
    rows = [json.dumps({"prompt": p, "completion": c}) for p, c in zip(PROMPTS, GOOD)]
    (folder / "demonstrations.jsonl").write_text("\n".join(rows))
    pyarrow.parquet.write_table(
        pyarrow.table({"prompt": PROMPTS, "chosen": GOOD, "rejected": BAD}), folder / "pairs.parquet"
    )
    shared = {
        "eval_dataset": {"instructions": {"path": "demonstrations.jsonl"}, "preferences": {"path": "pairs.parquet"}},
        "eval_strategy": "steps", "eval_steps": 2, "max_steps": 4, "save_strategy": "no",
    }  # fmt: skip
    runs = {
        "unified": {"samples": 2, "samples_max_new_tokens": 4},
        "sequential": {"objective": None, "stages": [each | {"budget": {"steps": 2}} for each in STAGES]},
        "seeds/seed0": {"seed": 0, "eval_strategy": "no", "eval_dataset": None},
        "seeds/seed1": {"seed": 1, "eval_strategy": "no", "eval_dataset": None},
    }
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for name, changes in runs.items():
            cli_workplace.write(folder, shared | {"output_dir": f"runs/{name}"} | changes)
            assert cli_workplace.train() == 0
    return folder / "runs"


@pytest.fixture
def plant(tmp_path):
    """plant(name, file, content): JSON, or text as it is; returns the folder it lies in."""

    def put(name, file, content):
        path = tmp_path / name / file
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content if isinstance(content, str) else json.dumps(content))
        return path.parent

    return put
