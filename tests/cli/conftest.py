"""A folder in which the command `uft` finds a tiny model, data files and a recipe."""

import json
import shutil

import pyarrow
import pyarrow.parquet
import pytest
from cli_workplace import BAD, GOOD, PROMPTS, write
from tiny import saved_tiny


@pytest.fixture(scope="session")
def base(tmp_path_factory):
    """The folder of a tiny model with its tokenizer."""
    return saved_tiny(tmp_path_factory.mktemp("base"))


@pytest.fixture
def workplace(base, tmp_path, monkeypatch):
    """A folder with the model, data files and `recipe.yaml`; it is where the commands run."""
    shutil.copytree(base, tmp_path / "tiny")
    lines = [json.dumps({"prompt": p, "completion": c}) for p, c in zip(PROMPTS, GOOD)]
    (tmp_path / "demonstrations.jsonl").write_text("\n".join(lines))
    pairs = {"prompt": PROMPTS, "chosen": GOOD, "rejected": BAD}
    pyarrow.parquet.write_table(pyarrow.table(pairs), tmp_path / "pairs.parquet")
    write(tmp_path, {})
    monkeypatch.chdir(tmp_path)
    return tmp_path
