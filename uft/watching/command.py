"""`uft watch`: runs in the terminal, while they train."""

from __future__ import annotations

import argparse
import contextlib
import sys
import time
from collections.abc import Sequence
from pathlib import Path


def parser() -> argparse.ArgumentParser:
    found = argparse.ArgumentParser(
        "uft watch",
        description="Follows runs in the terminal while they train: state, time left, losses per term, rewards, the "
        "path through the plane of losses, the newest answers. Of several runs there is a table, and the one that "
        "logged last closely. Ctrl-C ends it; the runs go on. Without a terminal it prints once.",
        epilog="""examples:
  uft watch                                  # whatever is below runs/
  uft watch runs/first
  uft watch runs/compare --once              # for scripts
  uft watch runs/first --metrics 'loss/*,rewards/margins'""",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    found.add_argument("folder", nargs="*", help="output_dir of a run, or a folder of several; default: runs")
    found.add_argument("--once", action="store_true", help="print and exit")
    found.add_argument("--interval", type=float, default=2.0, help="seconds between two looks (default: 2)")
    found.add_argument("--metrics", default="", help="names or patterns such as 'loss/*,kl', with commas between")
    return found


def main(words: Sequence[str]) -> int:
    """Raises ValueError for a folder that is not there or, with --once, without runs or what --metrics asks for."""
    from rich.console import Console

    from uft.watching.runs import Watcher

    given = parser().parse_args(list(words))
    if not given.interval > 0:
        raise ValueError(f"--interval is {given.interval}; want seconds > 0")
    folders = [Path(folder) for folder in given.folder or ["runs"]]
    for folder in folders:
        if not folder.is_dir():
            raise ValueError(f"{folder} is no folder; want the output_dir of a run, or a folder of several")
    patterns = [name for name in given.metrics.split(",") if name]
    watcher, console = Watcher(folders), Console()
    if given.once or not sys.stdout.isatty():
        runs = watcher.runs()
        if not runs:
            raise ValueError(f"{', '.join(map(str, folders))}: found no run; want a progress.jsonl or run.json in it")
        from uft.watching.page import page, unmatched

        if problem := unmatched(runs, patterns):
            raise ValueError(problem)
        console.print(page(runs, time.time(), console.width, patterns))
        return 0
    with contextlib.suppress(KeyboardInterrupt):
        _follow(watcher, console, patterns, given.interval)
    return 0


def _follow(watcher, console, patterns: Sequence[str], interval: float) -> None:
    from rich.live import Live
    from rich.text import Text

    from uft.watching.page import page

    view = Text("no run yet")
    try:
        with Live(view, console=console, screen=True, auto_refresh=False, vertical_overflow="crop") as live:
            while True:
                if runs := watcher.runs():
                    view = page(runs, time.time(), console.width, patterns, rows=max(3, console.height // 3))
                live.update(view, refresh=True)
                time.sleep(interval)
    finally:
        console.print(view)  # what was seen last stays
