"""`uft completion SHELL`: a script that completes commands, options and keys of recipes."""

from __future__ import annotations

import argparse
import inspect
import sys
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
    sys.stdout.write(shtab.complete(whole_parser(), shell=shell))
    return 0


def whole_parser() -> argparse.ArgumentParser:
    """All commands as one parser; it is read, and never parses anything."""
    whole = argparse.ArgumentParser("uft", description="Single-stage unified fine-tuning.")
    whole.add_argument("--version", action="store_true", help="print the version")
    _add(whole, COMMANDS)
    return whole


def _add(parser: argparse.ArgumentParser, commands: Mapping[str, Command | Mapping[str, Command]]) -> None:
    below = parser.add_subparsers(metavar="COMMAND")
    for name, command in commands.items():
        if not isinstance(command, Command):
            _add(below.add_parser(name, help=f"{', '.join(command)}"), command)
            continue
        more = {"fields": True} if "fields" in inspect.signature(command.parser).parameters else {}
        page = command.parser(**more)
        for action in page._actions:
            if action.dest in ("config", "data", "paths", "path", "answers", "prompts", "eval"):
                action.complete = _FILE  # type: ignore[attr-defined]
        # a parser of the same name takes over what the page's own has
        below.add_parser(name, parents=[page], add_help=False, help=command.line)


_FILE = {"bash": "_shtab_compgen_files", "zsh": "_files", "tcsh": "f"}
