"""The how-to pages are followed to the letter: files written, the line added, commands run.

In a copy of the checkout this takes minutes; beside it a quick form runs files that need no copy in this process.
"""

import json
import re
import runpy
import shutil
import sys

import pytest
from pages import ROOT, blocks, follow, write
from tiny import tiny_model, tiny_tokenizer

from uft import losses
from uft.data import READERS

HOW_TO = ROOT / "docs" / "how_to"
PAGES = sorted(HOW_TO.glob("*.md"))


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    tokenizer = tiny_tokenizer()
    tiny_model(tokenizer, seed=0).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def checkout(tmp_path):
    """A copy of the checkout that pages may change."""
    nothing_large = shutil.ignore_patterns("__pycache__", "*.png", "runs")
    for name in ("uft", "kernels", "experiments", "tests"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=nothing_large)
    for name in ("setup.cfg", "pyproject.toml"):
        shutil.copy(ROOT / name, tmp_path / name)
    return tmp_path


def run_in_process(page, name, place, model, monkeypatch):
    """Writes the page's files into a folder and runs one of them as a script."""
    for block in blocks(page):
        if block.title is not None and "/" not in block.title:
            write(block, place)
    monkeypatch.chdir(place)
    monkeypatch.setattr(sys, "argv", [name, str(model)])
    return runpy.run_path(name, run_name="__main__")


def test_every_page_is_followed():
    assert [page.stem for page in PAGES] == ["add_a_data_source", "add_a_loss", "add_an_experiment"]
    assert all(any(block.language == "bash" for block in blocks(page)) for page in PAGES)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_python_of_pages_compiles_and_fits_the_style(page):
    for block in blocks(page):
        if block.language == "python":
            compile(block.text, block.title, "exec")
            assert max(map(len, block.text.splitlines())) <= 120


def test_a_loss_in_a_file_of_ones_own(tmp_path, model, monkeypatch):
    try:
        ran = run_in_process(HOW_TO / "add_a_loss.md", "squared_gap.py", tmp_path, model, monkeypatch)
    finally:
        losses.PAIRWISE.pop("squared_gap", None)
    logs = [log for log in ran["trainer"].state.log_history if "rewards/margins" in log]
    assert logs[0]["rewards/margins"] == 0
    assert logs[0]["loss"] == pytest.approx(0.25)
    assert logs[-1]["loss"] < 0.25


def test_rows_with_ranked_answers(tmp_path, model, monkeypatch, capsys):
    try:
        ran = run_in_process(HOW_TO / "add_a_data_source.md", "rankings.py", tmp_path, model, monkeypatch)
    finally:
        READERS.pop("ranking", None)
    first, second = ran["trainer"].train_dataset
    assert [len(first.responses), len(second.responses)] == [3, 4]
    assert len(second.preferences) == 6
    assert [response.target for response in first.responses] == [1.0, 0.5, 0.0]
    assert "not a ranking" in capsys.readouterr().out


@pytest.mark.slow
def test_a_loss(checkout, model):
    """One file and one line, and the loss is trained with by its name in a recipe."""
    before = (checkout / "uft/losses/__init__.py").read_text().splitlines()
    printed = dict(follow(HOW_TO / "add_a_loss.md", checkout, model))
    after = (checkout / "uft/losses/__init__.py").read_text().splitlines()
    assert [line for line in after if line not in before] == [
        "from uft.losses.gaps import squared_gap as squared_gap"
    ] and len(after) == len(before) + 1
    assert any("2 passed" in text for text in printed.values())
    record = json.loads((checkout / "gaps/run.json").read_text())
    assert "squared_gap" in json.dumps(record["objective"])


@pytest.mark.slow
def test_a_data_source(checkout, model):
    printed = dict(follow(HOW_TO / "add_a_data_source.md", checkout, model))
    assert re.search(r"database\s+label\s+4\s+4\s+0", "\n".join(printed.values()))
    assert json.loads((checkout / "ratings/run.json").read_text())
    assert "not a ranking" in printed["python rankings.py $MODEL\n"]


@pytest.mark.slow
def test_an_experiment(checkout, model):
    printed = dict(follow(HOW_TO / "add_an_experiment.md", checkout, model))
    assert "joint DPO + NLL" in next(iter(printed.values()))
    summary = json.loads((checkout / "runs/replayed_documents/summary.json").read_text())
    assert [point["x"] for point in summary["points"]] == [0.0, 0.25, 1.0]
    assert (checkout / "runs/replayed_documents/report.html").exists()
