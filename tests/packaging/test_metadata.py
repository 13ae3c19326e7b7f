"""What setup.cfg, CITATION.cff and the package say of themselves; all packages are listed."""

import ast
import configparser
import datetime
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

import uft

ROOT = Path(__file__).resolve().parents[2]
# of https://github.com/citation-file-format/citation-file-format, schema 1.2.0
CFF = {
    "abstract", "authors", "cff-version", "commit", "contact", "date-released", "doi", "identifiers", "keywords",
    "license", "license-url", "message", "preferred-citation", "references", "repository", "repository-artifact",
    "repository-code", "title", "type", "url", "version",
}  # fmt: skip


@pytest.fixture(scope="module")
def setup():
    parser = configparser.ConfigParser()
    parser.read(ROOT / "setup.cfg")
    return parser


@pytest.fixture(scope="module")
def citation():
    return yaml.load((ROOT / "CITATION.cff").read_text(), yaml.BaseLoader)


def words(setup, section, key):
    return setup[section][key].split()


def test_one_version_everywhere(setup, citation):
    version = setup["metadata"]["version"]
    assert uft.__version__ == version == citation["version"]
    newest = re.search(r"^## \[?v?(\d+\.\d+\.\d+)", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert newest is None or newest[1] == version


def test_the_citation_is_valid(citation):
    """The rules of the format's schema that such a file can break."""
    assert set(citation) <= CFF and {"authors", "cff-version", "message", "title"} <= set(citation)
    assert citation["cff-version"] == "1.2.0" and citation["type"] in ("software", "dataset")
    assert citation["license"] == "Apache-2.0"
    assert re.fullmatch(r"\d{4}-\d\d-\d\d", citation["date-released"])
    datetime.date.fromisoformat(citation["date-released"])
    assert citation["authors"] and all({"name"} <= set(a) or {"family-names"} <= set(a) for a in citation["authors"])
    for reference in citation["references"]:
        assert {"type", "title", "authors"} <= set(reference)


def test_every_package_is_listed(setup):
    """A package that is left out of the list works from a checkout and is missing in a wheel."""
    places = {
        "uft": ROOT / "uft",
        "uft_kernels": ROOT / "kernels" / "uft_kernels",
        "uft_experiments": ROOT / "experiments",
    }
    found = {
        ".".join([name, *path.parent.relative_to(folder).parts])
        for name, folder in places.items()
        for path in folder.rglob("__init__.py")
    }
    assert set(words(setup, "options", "packages")) == found


def imported(folder):
    """The outermost names of what the modules below a folder import, within functions too."""
    for path in folder.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                yield from (alias.name.partition(".")[0] for alias in node.names)
            elif isinstance(node, ast.ImportFrom) and not node.level:
                yield node.module.partition(".")[0]


def test_what_is_imported_is_required(setup):
    """Not only because something else requires it today."""
    from packaging.requirements import Requirement
    from packaging.utils import canonicalize_name

    asked = setup["options"]["install_requires"].splitlines()
    for extra in ("peers", "eval", "sweep", "deepspeed"):
        asked += setup["options.extras_require"][extra].splitlines()
    required = {canonicalize_name(Requirement(line).name) for line in asked if line.strip()}
    other = {"yaml": "pyyaml", "liger_kernel": "liger-kernel", "lm_eval": "lm-eval"}
    found = set().union(*(imported(ROOT / folder) for folder in ("uft", "kernels/uft_kernels", "experiments")))
    found -= {*sys.stdlib_module_names, "uft", "uft_kernels", "experiments", "uft_experiments"}
    assert {canonicalize_name(other.get(name, name)) for name in found} - required == set()


def test_a_source_distribution_holds_all_that_is_committed():
    """So that the tests can be run from it."""
    if not (ROOT / ".git").exists():
        pytest.skip("needs the checkout")
    from setuptools._distutils.filelist import FileList

    kept = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split("\n")
    kept = [name for name in kept if name and (ROOT / name).exists()]
    chosen = FileList()
    chosen.set_allfiles(kept)
    for line in (ROOT / "MANIFEST.in").read_text().splitlines():
        if line and not line.startswith("#"):
            chosen.process_template_line(line)
    by_itself = {"setup.cfg", "pyproject.toml", "MANIFEST.in"}
    left = {name for name in kept if not name.startswith("uft/")} - {*chosen.files} - by_itself
    assert not left
    assert sum((ROOT / name).stat().st_size for name in kept) < 30e6


def test_cleaning_leaves_runs_alone():
    """Models that took days may lie there."""
    said = subprocess.run(["make", "-n", "clean"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert "rm -rf" in said and "runs" not in said.split()


def test_every_folder_with_modules_is_a_package():
    for folder in (ROOT / "uft", ROOT / "kernels" / "uft_kernels"):
        for path in folder.rglob("*.py"):
            assert (path.parent / "__init__.py").exists(), path


def test_constraints_hold_what_is_required(setup):
    """Every requirement, those of extras too, has a tested version; and that version satisfies it."""
    pytest.importorskip("packaging")
    from packaging.requirements import Requirement
    from packaging.utils import canonicalize_name

    lines = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if line and not line.startswith("#")]
    tested = {canonicalize_name(r.name): r for r in map(Requirement, lines)}
    own = {"triton", "deepspeed"}  # torch's own, and what is built where it is used
    asked = setup["options"]["install_requires"].splitlines()
    for extra in setup["options.extras_require"].values():
        asked += extra.splitlines()
    for requirement in (Requirement(line) for line in asked if line.strip()):
        name = canonicalize_name(requirement.name)
        if name in own:
            continue
        assert name in tested, f"constraints.txt says nothing of {name}"
        (pin,) = tested[name].specifier
        assert requirement.specifier.contains(pin.version), f"{name}: {pin} does not satisfy {requirement}"


def test_every_target_of_make_is_listed_as_one():
    text = (ROOT / "Makefile").read_text()
    targets = set(re.findall(r"^([a-z][\w-]*):", text, re.MULTILINE))
    phony = {word for line in re.findall(r"^\.PHONY:(.*)$", text, re.MULTILINE) for word in line.split()}
    assert targets == phony


def test_the_hooks_are_there():
    """What pre-commit would run is installed by the extra `dev`, so that no hook needs a network."""
    hooks = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())
    assert all(repo["repo"] == "local" for repo in hooks["repos"])
    for hook in (hook for repo in hooks["repos"] for hook in repo["hooks"]):
        assert hook["language"] in ("system", "pygrep"), hook["id"]
    if (ROOT / ".git").exists():
        kept = subprocess.run(["git", "ls-files", "-s"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
        assert kept
