"""The site builds strictly, asks nothing of the network, and shows docstrings and tables as they are."""

import re
import shutil
import subprocess
import sys

import pytest
from pages import ROOT

pytest.importorskip("mkdocs", reason="make docs installs it")
sys.path.insert(0, str(ROOT / "docs" / "hooks"))


def test_docstrings_keep_their_columns():
    griffe = pytest.importorskip("griffe")
    assert griffe
    from plain_docstrings import as_markdown

    text = (
        "One data set.  It is read once: a < b, y_t * 2.\n\n"
        "Rows:\npath      a file, or\n          a folder\nkind      `label`\n\n    L = a  + b\n\nMore."
    )
    assert as_markdown(text) == (
        "One data set.  It is read once: a &lt; b, y\\_t \\* 2.\n\n"
        "Rows:\n\n```text\npath      a file, or\n          a folder\nkind      `label`\n\nL = a  + b\n```\n\nMore."
    )


def test_lists_in_docstrings_stay_lists():
    pytest.importorskip("griffe")
    from plain_docstrings import as_markdown

    assert as_markdown("* one\n* two") == "* one\n* two"


def test_tables_of_keys_say_default_and_meaning():
    from dataclasses import dataclass, field

    from mkdocs.exceptions import PluginError
    from tables import keys

    @dataclass
    class Options:
        """Two of them.

        first, second   what they mean,
                        at length; `third` too
        """

        first: int = 1
        second: tuple[str, ...] = ("a", "b")
        third: bool = False
        fourth: str | None = field(default=None, metadata={"help": "its <help>"})

    assert keys(Options) == [
        ("`first`", "`1`", "what they mean, at length; `third` too"),
        ("`second`", "`[a, b]`", "what they mean, at length; `third` too"),
        ("`third`", "`false`", "see `first`"),
        ("`fourth`", "none", "its &lt;help>"),
    ]

    @dataclass
    class Unexplained:
        """Nothing is said of it."""

        key: int = 0

    with pytest.raises(PluginError, match=r"Unexplained\.key has no help"):
        keys(Unexplained)


def test_every_table_of_the_pages_can_be_made():
    from tables import MARKER, made

    markers = [found for page in (ROOT / "docs").rglob("*.md") for found in MARKER.finditer(page.read_text())]
    assert len(markers) >= 25
    for what, name, but in (found.groups() for found in markers):
        assert made(what, name, (but or "").split()).count("\n") >= 2, name


def test_links_of_included_files_are_put_right(monkeypatch):
    import repository

    readme, kernels = ROOT / "README.md", ROOT / "kernels/README.md"
    homes = {
        kernels: "kernels.md",
        ROOT / "docs/data.md": "data.md",
        ROOT / "uft/balance.py": "repository/balance.py.md",
    }
    monkeypatch.setattr(repository, "_homes", homes)
    text = "[a](kernels/README.md#speed) [b](uft/balance.py) [c](https://x.org) `[d](docs/data.md)` ![e](none.png)"
    assert repository.rebased(text, readme, "how_to/page.md") == (
        "[a](../kernels.md#speed) [b](../repository/balance.py.md) [c](https://x.org) `[d](../data.md)` ![e](none.png)"
    )
    fenced = "```\n[a](kernels/README.md)\n```\n[b](docs/data.md)"
    assert repository.rebased(fenced, readme, "page.md") == "```\n[a](kernels/README.md)\n```\n[b](data.md)"


def test_figures_are_those_of_their_script(tmp_path):
    shutil.copy(ROOT / "docs/figures/draw.py", tmp_path)
    subprocess.run([sys.executable, "draw.py"], cwd=tmp_path, check=True)
    for name in ("step.svg", "stages.svg"):
        assert (tmp_path / name).exists() and (ROOT / "docs/figures" / name).exists()


@pytest.mark.slow
def test_the_site_builds_strictly_and_needs_no_network(tmp_path):
    site = tmp_path / "site"
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(site)]
    built = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert built.returncode == 0, built.stderr[-4000:]
    fetched = re.compile(
        r"<(?:script|img|iframe|source)[^>]*\ssrc=[\"']?(?:https?:)?//|<link[^>]*rel=[\"']?(?:stylesheet|preconnect|icon)"
        r"[^>]*href=[\"']?(?:https?:)?//|url\([\"']?(?:https?:)?//|@import"
    )
    pages = [*site.rglob("*.html"), *site.rglob("*.css")]
    assert len(pages) > 60
    assert [page.name for page in pages if fetched.search(page.read_text())] == []
    losses = (site / "api/losses.html").read_text()
    assert "token_logp      log π(y_t | x, y_&lt;t), in nats, one per position" in losses
    assert "<details" in (site / "readme.html").read_text() or "<table" in (site / "readme.html").read_text()
