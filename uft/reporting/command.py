"""`uft report`: what runs have written about themselves as one page that opens offline, side by side."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path


def parser() -> argparse.ArgumentParser:
    words = argparse.ArgumentParser(
        "uft report",
        description="Makes report.html (opens offline, figures inside), report.md and the figures of what runs have\n"
        "written: of uft train, uft rl, uft reward and uft eval, finished or still going. Folders are searched\n"
        "for runs; those that differ only in seed are shown as mean with interval.",
        epilog="examples:\n"
        "  uft report runs/first                        # one run\n"
        "  uft report runs/sequential runs/unified      # side by side\n"
        "  uft report runs/compare --title 'Sequential against unified' --open",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    words.add_argument("runs", metavar="RUN", nargs="+", type=Path, help="folder of a run, or one that holds several")
    words.add_argument(
        "--output", metavar="FOLDER", type=Path, default=Path("runs/report"), help="where it goes; default: runs/report"
    )
    words.add_argument("--title", metavar="TEXT", help="of the page; default: the names of the runs")
    words.add_argument("--open", action="store_true", help="show the page in the browser")
    return words


def main(words: Sequence[str]) -> int:
    given = parser().parse_args(words)
    from uft.reporting.finding import find_runs
    from uft.reporting.sections import write_report

    found = find_runs(given.runs, given.output)
    page = write_report(found, given.output, given.title)
    for sentence in found.skipped:
        print(f"skipped {sentence}", file=sys.stderr)
    count = "1 run" if len(found.runs) == 1 else f"{len(found.runs)} runs"
    print(f"{count} in {page}, and report.md beside it")
    if given.open:
        import webbrowser

        webbrowser.open(page.resolve().as_uri())
    return 0
