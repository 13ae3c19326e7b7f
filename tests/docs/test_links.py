"""Every link leads somewhere, every page is found, every public name is documented.  Needs no MkDocs."""

import ast
import importlib
import os
import re
from pathlib import Path

import pytest
import yaml
from pages import ROOT, anchors, links

import uft
import uft.losses
from uft.presets import PRESETS

DOCS = ROOT / "docs"
API = sorted((DOCS / "api").glob("*.md"))
NAMED = ("README.md", "LOG.md", "CHANGELOG.md", "CONTRIBUTING.md", "kernels/README.md")
PAGES = sorted([*DOCS.rglob("*.md"), *(ROOT / name for name in NAMED)])


class _Loader(yaml.SafeLoader):
    """Reads mkdocs.yml without the Python objects that it names."""


_Loader.add_multi_constructor("tag:yaml.org,2002:python/", lambda loader, suffix, node: None)


def in_nav() -> list[str]:
    def pages(entry):
        if isinstance(entry, str):
            return [entry]
        return [page for each in (entry.values() if isinstance(entry, dict) else entry) for page in pages(each)]

    return pages(yaml.load((ROOT / "mkdocs.yml").read_text(), _Loader)["nav"])


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_links_lead_to_files_and_headings_that_are_there(page):
    assert [link for link in links(page) if not leads_somewhere(link, page)] == []


def leads_somewhere(link: str, page: Path) -> bool:
    path, _, anchor = link.partition("#")
    target = page if not path else page.parent / path
    if not anchor or target.suffix != ".md" or DOCS / "api" in target.parents:  # whose anchors are names of objects
        return target.exists()
    return target.exists() and anchor in anchors(target)


def test_every_page_is_in_the_navigation_once_and_is_there():
    nav = in_nav()
    pages = {page.relative_to(DOCS).as_posix() for page in DOCS.rglob("*.md")}
    assert sorted(set(nav)) == sorted(nav)
    assert set(nav) == pages


def test_what_pages_include_is_there():
    markers = [(page, path) for page in DOCS.rglob("*.md") for path in _included(page.read_text())]
    assert len(markers) >= 10
    assert [(page.name, path) for page, path in markers if not (ROOT / path).exists()] == []


def _included(text: str) -> list[str]:
    return re.findall(r"<!-- include: (\S+) -->", text) + re.findall(r"--8<-- \"([^\"]+)\"", text)


def test_every_recipe_is_on_the_page_of_recipes():
    text = (DOCS / "recipes.md").read_text()
    recipes = [path for path in (ROOT / "experiments/recipes").rglob("*") if path.suffix in (".yaml", ".json")]
    assert [path.name for path in recipes if path.name not in text] == []


@pytest.mark.parametrize("command, module", [("compare", "recipe"), ("sweep", "sweep_recipe")])
def test_recipes_that_stand_for_a_table_name_every_key_of_their_own(command, module):
    text = (ROOT / f"experiments/recipes/{command}.yaml").read_text()
    own = importlib.import_module(f"uft.comparison.{module}").OWN
    assert [key for key in own if not re.search(rf"^(# )?{key}:", text, re.M)] == []


def test_every_preset_is_on_the_page_of_objectives():
    text = (DOCS / "objectives.md").read_text().split("## Losses")[0]
    assert [name for name in PRESETS if f"`{name}`" not in text] == []


def documented() -> dict[str, set[str] | None]:
    """Module -> the names of it that API pages show, None for all."""
    found: dict[str, set[str] | None] = {}
    for page in API:
        for each in re.finditer(r"^::: (\S+)\n((?: +.*\n)*)", page.read_text() + "\n", re.M):
            members = re.search(r"members: \[([^\]]*)\]", each[2])
            found[each[1]] = None if members is None else set(members[1].split(", "))
    return found


def shows(module: str, name: str) -> bool:
    return module in documented() and (documented()[module] is None or name in documented()[module])


def test_every_public_name_has_an_api_page():
    assert [name for name in uft.__all__ if not shows(uft._WHERE[name], name)] == []
    index = (DOCS / "api/index.md").read_text()
    assert [name for name in uft.__all__ if f"`{name}`" not in index] == []


def test_every_loss_and_every_kernel_has_an_api_page():
    for name in uft.losses.__all__:
        value = getattr(uft.losses, name)
        if callable(value):
            assert shows(value.__module__, value.__name__), name
    tree = ast.parse((ROOT / "kernels/uft_kernels/__init__.py").read_text())
    where = {alias.name: node.module for node in tree.body if isinstance(node, ast.ImportFrom) for alias in node.names}
    assert [name for name, module in where.items() if not shows(module, name)] == []


def test_what_api_pages_name_is_there():
    for module, names in documented().items():
        file = (ROOT / "kernels" if module.startswith("uft_kernels") else ROOT) / module.replace(".", os.sep)
        file = file.with_suffix(".py") if file.with_suffix(".py").exists() else file / "__init__.py"
        text = file.read_text()
        assert [name for name in names or () if not re.search(rf"\b(def|class) {name}\b|\b{name} =", text)] == []
