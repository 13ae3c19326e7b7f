"""What a wheel holds, and that it works where nothing but it is: without the checkout, without git, from a folder that
is not written to."""

import os
import shutil
import site
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
LEFT = (
    ".git", ".venv*", "runs", "site", "results", "build", "dist", "*.egg-info", "__pycache__", ".*_cache",
    ".hypothesis",
)  # fmt: skip
SETTINGS = "experiments/results/sequential_vs_unified/search.json"
CLEAN = os.environ.get("UFT_WHEEL_PYTHON")  # of an environment into which the wheel was installed; `make test-wheel`


def built(kind, source, out):
    run = subprocess.run(
        [sys.executable, "-m", "build", f"--{kind}", "--no-isolation", "--outdir", str(out), str(source)],
        capture_output=True, text=True,
    )  # fmt: skip
    assert run.returncode == 0, run.stdout[-2000:] + run.stderr[-2000:]
    return next(out.glob("*.whl" if kind == "wheel" else "*.tar.gz"))


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    """A copy of what is built, so that nothing of the checkout is touched."""
    tree = tmp_path_factory.mktemp("tree") / "source"
    shutil.copytree(ROOT, tree, ignore=shutil.ignore_patterns(*LEFT, "tests", "docs"))
    (tree / SETTINGS).parent.mkdir(parents=True)
    shutil.copy(ROOT / SETTINGS, tree / SETTINGS)
    return tree


@pytest.fixture(scope="module")
def wheel(tree, tmp_path_factory):
    return built("wheel", tree, tmp_path_factory.mktemp("dist"))


def test_a_wheel_holds_all_that_is_needed_and_nothing_else(wheel):
    names = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    places = {"uft": ROOT / "uft", "uft_kernels": ROOT / "kernels/uft_kernels", "uft_experiments": ROOT / "experiments"}
    modules = {
        f"{name}/{path.relative_to(folder).as_posix()}"
        for name, folder in places.items()
        for path in folder.rglob("*.py")
    }
    assert {name for name in names if name.endswith(".py")} == modules
    wanted = {
        "uft/data/quality": ("*.txt",),
        "experiments": ("recipes/**/*.*", "lab/base_models/seed*/*", "paper/dry_tasks/*"),
    }
    data = {
        path for folder, patterns in wanted.items() for pattern in patterns for path in (ROOT / folder).glob(pattern)
    }
    data = {
        path.relative_to(ROOT).as_posix() for path in data if path.is_file() and path.suffix not in (".py", ".pyc")
    } | {SETTINGS}
    others = {name for name in names if not name.endswith(".py")}
    shipped = {name.replace("uft_experiments/", "experiments/", 1) for name in others}
    assert data <= shipped, f"left out: {sorted(data - shipped)}"
    more = shipped - data
    # further data of the library may be added beside its modules, but no results, tests, caches or notebooks
    bad = [
        n for n in more if n.startswith("experiments/") or "test" in n or n.endswith((".pyc", ".ipynb", ".safetensors"))
    ]
    assert not bad
    assert wheel.stat().st_size < 15e6


def test_the_licence_and_the_command_come_along(wheel):
    archive = zipfile.ZipFile(wheel)
    info = {name.partition(".dist-info/")[2]: name for name in archive.namelist() if ".dist-info/" in name}
    assert archive.read(info["licenses/LICENSE"]) == (ROOT / "LICENSE").read_bytes()
    assert b"uft = uft.cli:main" in archive.read(info["entry_points.txt"])
    metadata = archive.read(info["METADATA"]).decode()
    assert "License-Expression: Apache-2.0" in metadata or "License: Apache-2.0" in metadata


@pytest.mark.slow
def test_a_source_distribution_builds_the_same_wheel(tree, wheel, tmp_path):
    import tarfile

    archive = built("sdist", tree, tmp_path / "sdist")
    with tarfile.open(archive) as file:
        file.extractall(tmp_path / "unpacked", filter="data")
    (unpacked,) = (tmp_path / "unpacked").iterdir()
    for name in (
        "LICENSE",
        "CHANGELOG.md",
        "CITATION.cff",
        "constraints.txt",
        "Makefile",
        "kernels/bench/heads.py",
        SETTINGS,
    ):
        assert (unpacked / name).exists(), name
    again = built("wheel", unpacked, tmp_path / "again")
    names = [sorted(n for n in zipfile.ZipFile(w).namelist() if not n.endswith("RECORD")) for w in (wheel, again)]
    assert names[0] == names[1]


# ---- it works ----


class Installed:
    """Runs things in an empty folder with the wheel's own files.

    By default with the interpreter under the environment that runs the tests, which sees that environment's packages
    but not its editable installation: no .pth file is read on PYTHONPATH.
    """

    def __init__(self, wheel, folder):
        self.folder, self.site = folder / "empty", folder / "site"
        self.folder.mkdir()
        self.environment = {"PATH": "/usr/bin-without-git", "HOME": str(folder), "PYTHONDONTWRITEBYTECODE": "1"}
        self.environment |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TRITON_INTERPRET": "1"}
        if CLEAN:
            self.python, self.command = CLEAN, [str(Path(CLEAN).parent / "uft")]
            return
        self.python = getattr(sys, "_base_executable", sys.executable)
        pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--no-compile"]
        subprocess.run([*pip, "--target", str(self.site), str(wheel)], check=True)
        self.environment["PYTHONPATH"] = os.pathsep.join([str(self.site), *site.getsitepackages()])
        self.command = [self.python, str(self.site / "bin" / "uft")]

    def run(self, words):
        return subprocess.run(words, cwd=self.folder, env=self.environment, capture_output=True, text=True, timeout=600)

    def uft(self, *words):
        return self.run([*self.command, *words])

    def files(self):
        return {path: path.stat().st_mtime_ns for path in self.site.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory):
    return Installed(wheel, tmp_path_factory.mktemp("installed"))


@pytest.mark.slow
def test_the_wheels_own_files_are_run_and_all_of_them_import(installed):
    code = """
import importlib, pkgutil, uft, uft_experiments, uft_kernels
print(uft.__file__)
for package in (uft, uft_kernels, uft_experiments):
    for module in pkgutil.walk_packages(package.__path__, package.__name__ + "."):
        if not module.name.endswith("__main__"):
            importlib.import_module(module.name)
"""
    ran = installed.run([installed.python, "-c", code])
    assert ran.returncode == 0, ran.stderr
    assert str(ROOT / "uft") not in ran.stdout
    assert CLEAN or str(installed.site) in ran.stdout


@pytest.mark.slow
def test_the_commands_work_from_an_empty_folder(installed):
    before = installed.files()
    helped = installed.uft("--help")
    assert helped.returncode == 0 and "usage: uft COMMAND" in helped.stdout, helped.stderr
    listed = installed.uft("recipe")
    assert listed.returncode == 0 and "first" in listed.stdout, listed.stderr
    first = installed.uft("recipe", "first")
    assert first.returncode == 0 and first.stdout == (ROOT / "experiments/recipes/first.yaml").read_text()
    wrong = installed.uft("train", "--config", "missing.yaml")
    assert wrong.returncode == 1 and wrong.stderr == "uft: missing.yaml: no such file\n"
    assert installed.files() == before


@pytest.mark.slow
def test_the_quick_comparison_works_from_an_empty_folder(installed):
    """Two minutes on two cores: base model, arms, figures and report, all below runs/ of the folder it is run in."""
    before = installed.files()
    ran = installed.uft("compare", "--quick", "--workers", "1")
    assert ran.returncode == 0, ran.stdout[-2000:] + ran.stderr[-2000:]
    assert [*installed.folder.glob("runs/compare*/**/report.md")]
    assert installed.files() == before
