"""`uft completion SHELL`: a script that completes commands, options and keys of recipes."""

from __future__ import annotations

import argparse
import dataclasses
import enum
import inspect
import sys
import typing
from collections.abc import Mapping, Sequence

from uft.cli.commands import COMMANDS, Command

SHELLS = ("bash", "zsh", "tcsh")


def parser() -> argparse.ArgumentParser:
    found = argparse.ArgumentParser(
        "uft completion",
        description="Prints a script with which a shell completes commands, options and the keys of recipes.",
        epilog="""examples:
  uft completion bash > ~/.local/share/bash-completion/completions/uft
  uft completion zsh > ~/.zfunc/_uft          # and in ~/.zshrc: fpath+=~/.zfunc; autoload -Uz compinit; compinit""",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    found.add_argument("shell", choices=SHELLS)
    return found


def main(words: Sequence[str]) -> int:
    import shtab

    shell = parser().parse_args(list(words)).shell
    script = shtab.complete(whole_parser(), shell=shell)
    # bash completes by names of files what has no values of its own
    sys.stdout.write(script.replace("complete -o bashdefault -F", "complete -o bashdefault -o default -F"))
    return 0


def whole_parser() -> argparse.ArgumentParser:
    """All commands as one parser; it is read, and never parses anything."""
    whole = argparse.ArgumentParser("uft", description="Single-stage unified fine-tuning.")
    whole.add_argument("--version", action="store_true", help="print the version")
    _add(whole, COMMANDS)
    return whole


def _add(
    parser: argparse.ArgumentParser, commands: Mapping[str, Command | Mapping[str, Command]], above: str = ""
) -> None:
    below = parser.add_subparsers(metavar="COMMAND")
    for name, command in commands.items():
        if not isinstance(command, Command):
            _add(below.add_parser(name, help=f"{', '.join(command)}"), command, f"{name} ")
            continue
        more = {"fields": True} if "fields" in inspect.signature(command.parser).parameters else {}
        page = command.parser(**more)
        values = values_of(f"{above}{name}")
        if "objective" in values:  # a key of the recipe, and no field of its arguments
            page.add_argument("--objective", metavar="NAME", help="a preset, or the name of a loss of pairs")
        for action in page._actions:
            if action.nargs in (None, "?") and action.choices is None and action.dest in values:
                action.choices = values[action.dest]
            if action.dest in ("config", "data", "paths", "path", "answers", "prompts", "eval"):
                action.complete = _FILE  # type: ignore[attr-defined]
        # a parser of the same name takes over what the page's own has
        below.add_parser(name, parents=[page], add_help=False, help=command.line)


def values_of(command: str) -> dict[str, tuple[str, ...]]:
    """Keys and arguments of a command that take one of a few values, and those."""
    from uft.config import LAYOUTS, UnifiedConfig
    from uft.data.sources import ON_BAD_ROW
    from uft.losses import PAIRWISE
    from uft.models import REFERENCE_MODES
    from uft.presets import PRESETS
    from uft.rlhf.config import ADVANTAGES, KL_IN, KL_LOSSES, RLConfig
    from uft.rlhf.reward_config import REGRESSION, RewardConfig

    rows = {"on_bad_row": ON_BAD_ROW}
    training = rows | {"on_non_finite": ("error", "skip")}
    placed = {"layout": LAYOUTS, "padding_side": ("right", "left"), "reference": REFERENCE_MODES}
    unified = closed(UnifiedConfig) | training | placed | {"objective": tuple({**PRESETS, **PAIRWISE})}
    policies = {"advantage": ADVANTAGES, "kl_in": KL_IN, "kl_loss": KL_LOSSES}
    own = {
        "recipe": {"name": _recipes()},
        **dict.fromkeys(("train", "compare", "sweep"), unified),
        "eval": rows | {"layout": LAYOUTS},
        "rl": closed(RLConfig) | training | policies,
        "reward train": closed(RewardConfig) | {"regression": tuple(REGRESSION)},
    }
    return own.get(command, {})


def _recipes() -> tuple[str, ...]:
    from uft.cli.recipe import recipes_here

    try:
        return tuple(name.removesuffix(".yaml") for name in recipes_here())
    except OSError:  # an installation without them completes the rest
        return ()


def closed(config: type) -> dict[str, tuple[str, ...]]:
    """The fields of a dataclass that are switches, enums, or have `choices` in their metadata, with their values."""
    types, found = typing.get_type_hints(config), {}
    for field in dataclasses.fields(config):
        kinds = typing.get_args(types[field.name]) or (types[field.name],)
        of = next((kind for kind in kinds if isinstance(kind, type) and issubclass(kind, enum.Enum)), None)
        if field.metadata.get("choices"):
            found[field.name] = tuple(field.metadata["choices"])
        elif of is not None:
            found[field.name] = tuple(str(each.value) for each in of)
        elif bool in kinds and set(kinds) <= {bool, type(None)}:
            found[field.name] = ("true", "false")
    return found


# of bash readline completes them, which knows how names with spaces are quoted
_FILE = {"zsh": "_files", "tcsh": "f"}
