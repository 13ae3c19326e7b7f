"""`uft compare` without a recipe is the lab's comparison, wherever the package lies."""

import importlib
import types

import pytest
from comparison_workplace import uft

from uft.comparison import command


@pytest.fixture
def lab(monkeypatch, tmp_path):
    """A lab that notes how it is called, in a folder that is no checkout."""
    (tmp_path / "site/uft_experiments/results/sequential_vs_unified").mkdir(parents=True)
    package = tmp_path / "site/uft_experiments"
    found = types.SimpleNamespace(
        __file__=str(package / "sequential_vs_unified.py"), RESULTS=package / "results/sequential_vs_unified", calls=[]
    )
    found.main = lambda words: found.calls.append(words) or 0
    monkeypatch.setattr(importlib, "import_module", lambda name: found if name == command.LAB else None)
    return found


def test_all_words_go_to_the_lab(lab):
    assert command.main(["--quick", "--seeds", "3", "4"]) == 0
    assert lab.calls == [["--quick", "--seeds", "3", "4"]]


@pytest.mark.parametrize("word", command.KEEPS_RESULTS)
def test_what_writes_results_wants_a_checkout(lab, tmp_path, word):
    with pytest.raises(ValueError, match=rf"{word} writes into experiments/results of a checkout.*want `git clone`"):
        command.main([word])
    assert lab.calls == []
    (tmp_path / "site/.git").mkdir()
    assert command.main([word]) == 0 and lab.calls == [[word]]


def test_a_missing_lab_and_a_dry_run_without_a_recipe(monkeypatch, capsys):
    monkeypatch.setattr(command, "LAB", "uft_experimentz.sequential_vs_unified")
    assert uft("compare", "--quick") == 1
    assert "is not installed; want the whole package: pip install unified-finetuning" in capsys.readouterr().err
    assert uft("compare", "--dry-run") == 1
    assert "--dry-run is for recipes; want --config FILE beside it" in capsys.readouterr().err


def test_help_shows_both_forms(capsys):
    assert uft("compare", "--help") == 0
    said = capsys.readouterr().out
    assert "uft compare --quick" in said and "uft compare --config compare.yaml" in said and "--workers" in said
