"""The command `uft`: finds the command, runs it, and says in one sentence what went wrong."""

from __future__ import annotations

import difflib
import inspect
import os
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from uft.cli.commands import COMMANDS, Command, group_usage, usage
from uft.command_line import GOES_ON


def main(words: Sequence[str] | None = None) -> int:
    """Runs `uft WORDS`; returns the exit code: 0, 1 for an error, 2 for a wrong call, 130 for Ctrl-C."""
    words = sys.argv[1:] if words is None else list(words)
    traceback = "--traceback" in words or bool(os.environ.get("UFT_TRACEBACK"))
    words = [word for word in words if word != "--traceback"]
    if not words or words[0] in ("-h", "--help"):
        print(usage())
        return 0 if words else 2
    if words[0] == "--version":
        from uft import __version__

        print(f"uft {__version__}")
        return 0
    try:
        path, command, rest = _found(words)
    except LookupError as error:
        print(error.args[0], file=sys.stderr)
        return 2
    asks = "-h" in rest or "--help" in rest
    if not isinstance(command, Command):
        print(group_usage(path, command), file=sys.stdout if asks else sys.stderr)
        return 0 if asks else 2
    try:
        if asks:
            print(_help(command, rest), end="")
            return 0
        return command.main(rest)
    except KeyboardInterrupt as error:
        print(f"uft: {_how_to_go_on(error) or 'interrupted'}", file=sys.stderr)
        return 130
    except SystemExit as error:
        if str(error).startswith("stopped by"):
            print(f"uft: {_how_to_go_on(error)}", file=sys.stderr)
            return error.code
        if isinstance(error.code, int):  # of argparse, which has said why
            return error.code
        raise
    except (ValueError, OSError, ImportError, FloatingPointError) as error:
        if traceback:
            raise
        print(f"uft: {' '.join(str(error).split())}", file=sys.stderr)
        return 1


def _found(words: Sequence[str]) -> tuple[str, Command | Mapping[str, Command], list[str]]:
    """How it is called, the command or group of commands, and the words behind it.  Raises LookupError."""
    found: Command | Mapping[str, Any] = COMMANDS
    for depth, word in enumerate(words):
        path = " ".join(["uft", *words[:depth]])
        if isinstance(found, Command) or word in ("-h", "--help"):
            return path, found, list(words[depth:])
        if word not in found:
            near = difflib.get_close_matches(word, found, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"want one of {', '.join(found)}"
            raise LookupError(f"{path}: unknown command {word!r}; {hint}")
        found = found[word]
    return " ".join(["uft", *words]), found, []


def _help(command: Command, words: Sequence[str]) -> str:
    """The command's page; `--help all`, where a recipe may hold many keys, has a line for each."""
    if "all" in words and "fields" in inspect.signature(command.parser).parameters:
        return command.parser(fields=True).format_help()
    return command.parser().format_help()


def _how_to_go_on(stopped: BaseException) -> str:
    """What a stopped command said, and how it goes on unless it said that too; empty where it said nothing."""
    said = str(stopped)
    return said if not said or GOES_ON in said else f"{said}: the same command with --resume true"
