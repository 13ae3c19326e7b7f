"""The notebooks run, cell by cell, at sizes that take seconds; what is committed has outputs and nothing of a machine.

Cells are executed in this process rather than in a kernel each, which would take longer to start than they take to run.
"""

import json
import logging
import math
import os
import re
import sys
from pathlib import Path

import matplotlib
import matplotlib.pyplot as plt
import pytest
import transformers
import uft_kernels.products as products

from uft import losses
from uft.comparison.statistics import paired_difference

ROOT = Path(__file__).resolve().parents[2]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
NAMES = ["1_the_idea", "2_your_own_loss", "3_reading_results", "4_the_kernels"]
FIGURES = {"1_the_idea": 3, "2_your_own_loss": 2, "3_reading_results": 7, "4_the_kernels": 4}
LARGEST = 400 * 1024  # bytes of a file


def read(name):
    return json.loads((ROOT / "notebooks" / f"{name}.ipynb").read_text())


def text_of(cells, kind):
    return ["".join(cell["source"]) for cell in cells if cell["cell_type"] == kind]


@pytest.fixture
def undone(monkeypatch, tmp_path):
    """What a notebook does to the process is undone behind it."""
    tables = [losses.LIKELIHOOD, losses.PAIRWISE, losses.POINTWISE]
    before = [dict(table) for table in tables]
    for name in ("BUDGET", "SLAB", "KEEP"):
        monkeypatch.setattr(products, name, getattr(products, name))
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setenv("UFT_NOTEBOOK_QUICK", "1")
    monkeypatch.chdir(tmp_path)  # a notebook finds its files wherever it is run
    verbosity, modules = transformers.logging.get_verbosity(), set(sys.modules)
    matplotlib.use("Agg")
    with matplotlib.rc_context():
        yield
    plt.close("all")
    logging.disable(logging.NOTSET)
    transformers.logging.set_verbosity(verbosity)
    transformers.logging.enable_progress_bar()
    sys.modules.pop("measure", None) if "measure" not in modules else None
    for table, entries in zip(tables, before):
        table.clear()
        table.update(entries)


def run(name, monkeypatch):
    """Executes the code cells; returns their namespace and the figures that were shown."""
    shown = []

    def show():
        shown.extend(plt.figure(number) for number in plt.get_fignums())
        for figure in shown:
            figure.canvas.draw()
        plt.close("all")

    monkeypatch.setattr(plt, "show", show)
    namespace = {"__name__": "notebook"}
    for position, source in enumerate(text_of(read(name)["cells"], "code")):
        exec(compile(source, f"{name}, code cell {position}", "exec"), namespace)
    return namespace, shown


def test_the_four_are_there():
    assert [path.stem for path in NOTEBOOKS] == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_every_cell_runs(name, undone, monkeypatch, capsys):
    namespace, shown = run(name, monkeypatch)
    assert len(shown) == FIGURES[name]
    assert all(axes.has_data() for figure in shown for axes in figure.axes)
    told = capsys.readouterr()
    assert told.out and "rror" not in told.err
    check = {"1_the_idea": equal_compute, "2_your_own_loss": own_loss_trained, "4_the_kernels": products_counted}
    if name in check:
        check[name](namespace)
    assert os.listdir() == []  # nothing is left behind


def equal_compute(found):
    spent = [ends[-1] for runs in (found["runs"], found["replaying"]) for _, ends in runs.values()]
    assert max(spent) / min(spent) < 1.35  # a toy's steps are coarse
    for points, ends in found["runs"].values():
        assert points[0]["facts"] == 1.0 and points[0]["pairs"] == pytest.approx(math.log(2), abs=1e-5)
        assert points[-1]["flops"] == ends[-1]
        assert len(points) > len(ends)


def own_loss_trained(found):
    for (name, record), loss in zip(found["runs"].items(), ("dpo", "gce")):
        [stage] = record["stages"]
        assert stage["objective"]["terms"][1]["loss"] == loss, name
        assert stage["steps"] > 0 and 0 <= stage["measures"]["skill"] <= 1


def products_counted(found):
    counts = {key: tuple(map(round, value)) for key, value in found["counts"].items()}
    assert counts["frozen head", "eager"] == (1, 1) and counts["frozen head", "recomputed"] == (1, 2)
    assert counts["frozen head", "ours"] == (2, 0)
    assert counts["trained head", "ours"] == (1, 3) and counts["trained head", "ours, few logits"] == (1, 2)


# ---- what is committed ----


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_committed_outputs(path):
    notebook = json.loads(path.read_text())
    outputs = [output for cell in notebook["cells"] for output in cell.get("outputs", [])]
    assert not [output for output in outputs if output["output_type"] == "error" or output.get("name") == "stderr"]
    assert sum("image/png" in output.get("data", {}) for output in outputs) == FIGURES[path.stem]
    assert path.stat().st_size < LARGEST


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_nothing_of_the_machine_is_committed(path):
    notebook = json.loads(path.read_text())
    assert notebook["metadata"] == {
        "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
        "language_info": {"name": "python"},
    }
    assert all(cell["metadata"] == {} and not cell.get("execution_count") for cell in notebook["cells"])
    assert [cell["id"] for cell in notebook["cells"]] == [str(k) for k in range(len(notebook["cells"]))]
    for cell in notebook["cells"]:
        for output in cell.get("outputs", []):
            output.get("data", {}).pop("image/png", None)
    found = re.findall(
        r"(?:/home|/root|/tmp|/work|/Users|/opt|/mnt|/var|[A-Z]:\\\\)[/\\][^\s\"]*|site-packages", json.dumps(notebook)
    )
    assert found == []


@pytest.mark.parametrize("name", NAMES)
def test_links_and_files_that_are_named_exist(name):
    prose = "\n".join(text_of(read(name)["cells"], "markdown"))
    named = re.findall(r"`((?:docs|experiments|kernels|uft|notebooks)/[\w./]+)`", prose)
    assert [path for path in named if not (ROOT / path).exists()] == []


def test_the_conclusion_is_what_the_committed_results_say():
    summary = json.loads((ROOT / "experiments/results/sequential_vs_unified/summary.json").read_text())
    [table] = [arms for title, arms in summary["tables"].items() if "FLOPs" in title]

    def score(arm):
        return table["hedged_pairs"][arm]["per_seed"]["score"]

    prose = "\n".join(text_of(read("1_the_idea")["cells"], "markdown")).replace("−", "-")
    for other in ("sft_dpo_all_both", "sft_chosen"):
        found = paired_difference(score("dpo_nll_documents"), score(other))
        assert found.n == 10
        assert f"{found.mean:+.3f} [{found.low:+.3f}, {found.high:+.3f}]" in prose


@pytest.mark.slow
def test_a_kernel_runs_and_tidies(tmp_path, monkeypatch):
    """The command that stores outputs, on the notebook that is quickest, at the size of the tests."""
    sys.path.insert(0, str(ROOT / "notebooks"))
    from execute import execute

    monkeypatch.setattr(sys, "path", sys.path[1:])
    monkeypatch.setenv("UFT_NOTEBOOK_QUICK", "1")
    path = tmp_path / "4_the_kernels.ipynb"
    path.write_text((ROOT / "notebooks/4_the_kernels.ipynb").read_text())
    execute(path)
    test_committed_outputs(path)
    test_nothing_of_the_machine_is_committed(path)
