"""What stands in a page of Markdown: links, anchors of headings, blocks of code; and doing what a page says."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[2]
FENCE = re.compile(r"^( *)(```+)(\w*)(?: title=\"([^\"]*)\")?[^\n]*\n(.*?)^\1\2 *$", re.M | re.S)
CODE = re.compile(r"(`+)[^`]+\1")
LINK = re.compile(r"!?\[(?:[^\[\]]|\[[^\]]*\])*\]\(([^)\s]+)\)")
ONE_LINE_MORE = " (one line more)"


class Block(NamedTuple):
    """A fenced block: its language, its title (a file's path) and its text."""

    language: str
    title: str | None
    text: str


def blocks(page: Path) -> list[Block]:
    return [Block(found[3], found[4], found[5]) for found in FENCE.finditer(page.read_text())]


def links(page: Path) -> list[str]:
    """Targets of links and figures that are neither in code nor addresses elsewhere."""
    text = CODE.sub("", FENCE.sub("", page.read_text()))
    return [link for link in LINK.findall(text) if not re.match(r"[a-z]+:", link)]


def anchors(page: Path) -> set[str]:
    """Of headings, as code hosts and the site's `slugify` make them."""
    found: set[str] = set()
    for heading in re.findall(r"^#{1,6} +(.+?) *$", FENCE.sub("", page.read_text()), re.M):
        text = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading)
        slug = re.sub(r"[^\w\- ]", "", text.lower()).strip().replace(" ", "-")
        found.add(slug)
    return found


def follow(page: Path, place: Path, model: Path) -> Iterator[tuple[str, str]]:
    """Does what a page says in a folder: files are written where their titles say, commands are run in order.

    Yields each command with what it printed.  Raises AssertionError for a command that fails.
    """
    for block in blocks(page):
        if block.title is not None:
            write(block, place)
        elif block.language == "bash":
            yield block.text, run(block.text, place, {"MODEL": str(model)})


def write(block: Block, place: Path) -> None:
    path = place / block.title.removesuffix(ONE_LINE_MORE)
    text = block.text
    if block.title.endswith(ONE_LINE_MORE):
        before = path.read_text()
        first = re.search(r"^(from|import) ", before, re.M).start()
        text = before[:first] + text + before[first:]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def run(commands: str, place: Path, variables: Mapping[str, str]) -> str:
    """Runs commands as a shell does there, with the packages of that folder before installed ones."""
    environment = os.environ | {
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "PYTHONPATH": f"{place}:{place / 'kernels'}:{ROOT}:{ROOT / 'kernels'}",
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
        **variables,
    }
    done = subprocess.run(
        ["bash", "-euc", commands], cwd=place, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, f"{commands}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
    return done.stdout
