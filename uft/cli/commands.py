"""Every command, where it stands, and its line in `uft --help`."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Command:
    """A module with `parser()`, whose help is the command's, and `main(words)`, which returns an exit code."""

    module: str
    line: str
    of: str = ""

    def _named(self, name: str) -> Callable[..., Any]:
        return getattr(importlib.import_module(self.module), f"{self.of}{name}")

    @property
    def main(self) -> Callable[[Sequence[str]], int]:
        return self._named("main")

    @property
    def parser(self) -> Callable[..., Any]:
        return self._named("parser")


COMMANDS: Mapping[str, Command | Mapping[str, Command]] = {
    "train": Command("uft.cli.train", "train by one joint objective, or by stages, as a recipe says"),
    "eval": Command("uft.cli.evaluate", "measure a model: likelihood, preferences, divergence, forgetting, answers"),
    "compare": Command("uft.comparison.command", "ways of training side by side: the lab's, or on your model and data"),
    "sweep": Command("uft.comparison.sweep_command", "search rates, weights and betas of a recipe"),
    "data": {
        "check": Command("uft.data.check_command", "validate data sets and report on their quality"),
        "filter": Command("uft.data.filter", "curated data sets, with a card and every dropped row by reason"),
        "noise": Command("uft.data.noise", "which judgements of pairs are probably wrong, and how many"),
        "select": Command("uft.data.selection", "which pairs to have labelled next"),
        "queue": Command("uft.data.queue", "judgements of people, as pairs for training"),
    },
    "reward": {
        "train": Command("uft.rlhf.command", "a reward model, or an ensemble, from pairs, labels and scores", "train_"),
        "evaluate": Command("uft.rlhf.command", "its accuracy, calibration and biases", "evaluate_"),
    },
    "rl": Command("uft.rlhf.rl_command", "PPO, RLOO or GRPO against a reward, with guards against hacking"),
    "generate": Command("uft.cli.generate", "answers of a model to prompts of a file, or of the command line"),
    "chat": Command("uft.cli.chat", "talk with a model in the terminal"),
    "watch": Command("uft.watching.command", "follow runs in the terminal while they train"),
    "report": Command("uft.reporting.command", "runs as one HTML page that opens offline, side by side"),
    "recipe": Command("uft.cli.recipe", "list the recipes that come along, or print one to begin with"),
    "kernels": Command("uft.cli.kernels", "check the kernels on this machine, and time them beside eager PyTorch"),
    "completion": Command("uft.cli.completion", "completion of commands and keys for bash, zsh or tcsh"),
}


EXAMPLES = """
examples:
  uft recipe first > first.yaml                  # a recipe to begin with
  uft train --config first.yaml --dry-run        # what would happen, and nothing else
  uft train --config first.yaml
  uft compare --quick                            # sequential beside unified training, in a toy world

uft COMMAND --help says more, with examples. Errors are one sentence; --traceback shows where one came from."""


def usage() -> str:
    """The page of `uft --help`."""
    found: dict[str, Command] = {}
    for name, command in COMMANDS.items():
        group = {"": command} if isinstance(command, Command) else command
        found |= {f"{name} {word}".strip(): each for word, each in group.items()}
    return "\n".join(["usage: uft COMMAND ... [--traceback] [--version]", "", *_lines(found), EXAMPLES])


def group_usage(path: str, group: Mapping[str, Command]) -> str:
    """The page of a group of commands, such as `uft data --help`."""
    first = next(iter(group))
    return "\n".join([f"usage: {path} COMMAND ...", "", *_lines(group), "", f"example: {path} {first} --help"])


def _lines(commands: Mapping[str, Command]) -> list[str]:
    width = max(map(len, commands))
    return [f"  {name:<{width}}  {command.line}" for name, command in commands.items()]
