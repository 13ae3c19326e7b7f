"""What commands that run a recipe share: how they are called, and their page of help."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple

DRY_RUN = ("--dry-run", "--dry_run")


class Given(NamedTuple):
    """What stood on the command line: files with the keys put over them, and whether nothing is to be run."""

    recipe: dict[str, Any]
    dry_run: bool


def recipe_of(words: Sequence[str], *, dry_run: bool = True) -> Given:
    """Reads `--config FILE` (several: later ones win), `--key value` and, where a command has it, `--dry-run`.

    Raises RecipeError.
    """
    from uft.recipe import RecipeError, override, read_yaml

    recipe: dict[str, Any] = {}
    asked, rest, left = False, [], list(words)
    while left:
        word = left.pop(0)
        if word == "--config" and not left:
            raise RecipeError("--config needs a file")
        if word == "--config" or word.startswith("--config="):
            recipe |= read_yaml(left.pop(0) if word == "--config" else word.partition("=")[2])
        elif dry_run and word in DRY_RUN:
            asked = True
        else:
            rest.append(word)
    return Given(override(recipe, rest), asked)


def recipe_parser(
    prog: str, description: str, examples: str, *, fields: type | None = None, dry_run: bool = True
) -> argparse.ArgumentParser:
    """The page of help of a command that runs a recipe, which `uft completion` reads too.

    fields    a dataclass whose fields the recipe may hold; with it every one has a line
    """
    more = "" if fields else f"\n\nEvery key with its meaning: {prog} --help all. Recipes to begin with: uft recipe."
    parser = argparse.ArgumentParser(
        prog,
        usage=f"{prog} --config FILE [--KEY VALUE ...]{' [--dry-run]' if dry_run else ''}",
        description=description,
        epilog=f"examples:{examples}{more}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--config", metavar="FILE", help="recipe as YAML; several are put over each other")
    if dry_run:
        parser.add_argument("--dry-run", action="store_true", help="check everything, say what would happen, and stop")
    for field in dataclasses.fields(fields) if fields is not None else ():
        if field.init and field.name not in ("config",):
            text = str(field.metadata.get("help", "")).replace("%", "%%")
            parser.add_argument(f"--{field.name}", metavar="VALUE", help=text)
    return parser
