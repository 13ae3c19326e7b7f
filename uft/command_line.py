"""What commands that run a recipe share: how they are called, and their page of help."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import hashlib
import importlib.util
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from uft.signals import Terminated

DRY_RUN = ("--dry-run", "--dry_run")
GOES_ON = "the same command goes on"


class Given(NamedTuple):
    """What stood on the command line: files with the keys put over them, and whether nothing is to be run."""

    recipe: dict[str, Any]
    dry_run: bool


def recipe_of(words: Sequence[str], *, dry_run: bool = True, keep_import: bool = False) -> Given:
    """Reads `--config FILE` (several: later ones win), `--key value` and, where a command has it, `--dry-run`.

    What the key `import` names (modules, or files ending in .py; one or a list) is imported: losses that register
    themselves there are then known by name.  The key stays in the recipe where `keep_import` asks for it.  Raises
    RecipeError.
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
    recipe = override(recipe, rest)
    if not recipe:
        raise RecipeError("found no recipe; want --config FILE (`uft recipe` lists some to begin with), or --KEY VALUE")
    import_all(recipe.get("import"))
    if not keep_import:
        recipe.pop("import", None)
    return Given(recipe, asked)


def check_output(name: str) -> None:
    """Raises ValueError for a folder that cannot be made or written to."""
    folder = Path(name)
    there = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not there.is_dir():
        raise ValueError(f"output_dir is {name!r}, and {there} is a file; want a folder")
    if not os.access(there, os.W_OK) or there.resolve() in (Path("/proc"), Path("/sys")):
        raise ValueError(f"output_dir is {name!r}, and nothing can be written to {there}; want another folder")


def names_of(imports: Any) -> list[Any]:
    """The value of the key `import`, None, one name or several, as a list."""
    return [] if imports is None else list(imports) if isinstance(imports, (list, tuple)) else [imports]


def import_all(imports: Any) -> None:
    """Imports what the key `import` of a recipe names.  Raises RecipeError."""
    for name in names_of(imports):
        _import(name)


def digest_of_imports(imports: Any) -> str | None:
    """Changes with the names of what a recipe imports and with the content of files; None where there is nothing."""
    names = names_of(imports)
    if not names:
        return None
    digest = hashlib.sha256()
    for name in map(str, names):
        content = Path(name).read_bytes() if name.endswith(".py") else b""
        digest.update(f"{Path(name).name} {len(content)} ".encode() + content)
    return digest.hexdigest()


def _import(name: Any) -> None:
    from uft.recipe import RecipeError

    if not isinstance(name, str):
        raise RecipeError(f"import is {name!r}; want a module or a file ending in .py")
    try:
        if not name.endswith(".py"):
            importlib.import_module(name)
            return
        path = Path(name).resolve()
        known = f"uft_imported_{hashlib.sha256(str(path).encode()).hexdigest()[:8]}"
        if known in sys.modules:
            return
        spec = importlib.util.spec_from_file_location(known, path)
        module = sys.modules[known] = importlib.util.module_from_spec(spec)
        try:
            spec.loader.exec_module(module)
        except BaseException:
            del sys.modules[known]
            raise
    except Exception as error:
        raise RecipeError(f"import {name}: {type(error).__name__}: {error}") from error


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


@contextlib.contextmanager
def goes_on() -> Iterator[None]:
    """Around what a command runs: one that is stopped says that the same command, without another option, goes on."""
    try:
        yield
    except KeyboardInterrupt as stopped:
        raise KeyboardInterrupt(f"{str(stopped) or 'interrupted'}: {GOES_ON}") from stopped
    except Terminated as stopped:
        raise Terminated(f"{stopped}: {GOES_ON}") from stopped
