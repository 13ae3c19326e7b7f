"""`uft recipe`: the recipes that come along."""

from __future__ import annotations

import argparse
import importlib.util
import itertools
import re
import sys
from collections.abc import Sequence
from pathlib import Path

# by name, for experiments may be left out of an installation
HOME = "uft_experiments"


def parser() -> argparse.ArgumentParser:
    found = argparse.ArgumentParser(
        "uft recipe",
        description="Lists the recipes that come along, or prints one, with its comments, to begin with.",
        epilog="example: uft recipe first > first.yaml",
    )
    found.add_argument("name", nargs="?", help="of a recipe; without one they are listed")
    return found


def main(words: Sequence[str]) -> int:
    name = parser().parse_args(list(words)).name
    recipes = recipes_here()
    if name is None:
        width = max(map(len, recipes), default=0)
        for each, path in recipes.items():
            print(f"{each.removesuffix('.yaml'):<{width}}  {_about(path)}")
        return 0
    path = recipes.get(name) or recipes.get(f"{name}.yaml")
    if path is None:
        raise ValueError(f"recipe is {name!r}; want one of {', '.join(r.removesuffix('.yaml') for r in recipes)}")
    sys.stdout.write(path.read_text())
    return 0


def recipes_here() -> dict[str, Path]:
    """Name, with its ending, -> file.  Raises OSError where no recipes came along."""
    return {path.relative_to(folder).as_posix(): path for folder in _folders() for path in _files(folder)}


def _folders() -> list[Path]:
    found = importlib.util.find_spec(HOME)
    folders = [Path(place) / "recipes" for place in (found.submodule_search_locations or [])] if found else []
    if not any(folder.is_dir() for folder in folders):
        raise OSError(f"found no recipes; want the package {HOME} beside uft, as pip installs both")
    return folders


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.suffix in (".yaml", ".json"))


def _about(path: Path) -> str:
    """The first sentence of the comment at the top."""
    lines = itertools.takewhile(lambda line: line.startswith("#"), path.read_text().splitlines())
    text = " ".join(line.lstrip("# ") for line in lines)
    return re.split(r"(?<!\bal)\.\s|: python", text)[0].rstrip(".")
