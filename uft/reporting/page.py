"""Markdown to one HTML file that needs nothing else: figures inside, contents at the top, for screens and for print."""

from __future__ import annotations

import base64
import html
import shutil
from collections.abc import Collection
from pathlib import Path
from urllib.parse import unquote
from xml.etree import ElementTree

import markdown
from markdown.extensions import Extension
from markdown.inlinepatterns import SubstituteTagInlineProcessor
from markdown.treeprocessors import Treeprocessor

WORDS, PROSE = 28, 60  # characters, from which on a cell wraps, and from which on its table is text and no numbers
TYPES = {".png": "image/png", ".svg": "image/svg+xml", ".jpg": "image/jpeg", ".jpeg": "image/jpeg"}

STYLE = """
:root { color-scheme: light dark; --text: #1a1a1a; --back: #ffffff; --line: #d8d8d8; --soft: #f4f5f7; --link: #0b5cad }
@media (prefers-color-scheme: dark) {
  :root { --text: #e4e4e4; --back: #16181b; --line: #3a3d42; --soft: #212429; --link: #7db8f5 }
}
* { box-sizing: border-box }
body { font: 16px/1.55 system-ui, sans-serif; color: var(--text); background: var(--back);
       max-width: 80rem; margin: 0 auto; padding: 1rem clamp(0.8rem, 3vw, 2.5rem) 4rem }
p, li { max-width: 48rem }
h1 { font-size: 1.7rem; line-height: 1.2 } h2 { margin-top: 2.6rem; border-bottom: 1px solid var(--line) }
h3 { margin-top: 2rem }
a { color: var(--link) }
code { font-size: 0.9em; background: var(--soft); padding: 0.1em 0.3em; border-radius: 3px }
pre { overflow-x: auto; background: var(--soft); padding: 0.8rem } pre code { padding: 0 }
nav { background: var(--soft); padding: 0.6rem 1.2rem; border-radius: 6px; font-size: 0.93rem }
nav summary { cursor: pointer; font-weight: 600 } nav ul { padding-left: 1.1rem; margin: 0.3rem 0 }
.table { overflow-x: auto; margin: 1rem 0 }
table { border-collapse: collapse; font-size: 0.84rem; font-variant-numeric: tabular-nums }
th, td { padding: 0.28rem 0.5rem; border-bottom: 1px solid var(--line); white-space: nowrap }
th { background: var(--soft); vertical-align: bottom; white-space: normal }
th:first-child, td:first-child { position: sticky; left: 0; background: var(--back); white-space: normal;
                                 min-width: 10rem; max-width: 22rem }
th:first-child { background: var(--soft); text-align: left }
td.words { white-space: normal; min-width: 11rem }
table.prose td { white-space: normal; overflow-wrap: anywhere; vertical-align: top; text-align: left;
                 max-width: 48rem; min-width: 7rem }
details.part { margin: 1.2rem 0; border-bottom: 1px solid var(--line) } details.part > summary { cursor: pointer }
details.part > summary > :is(h2, h3) { display: inline; border: 0; margin: 0 }
figure { margin: 1.4rem 0; overflow-x: auto }
figure img { display: block; max-width: 100%; height: auto; background: #ffffff; border-radius: 4px }
figcaption { font-size: 0.88rem; opacity: 0.85; max-width: 48rem }
@media (max-width: 45rem) {
  figure img { max-width: none; width: 44rem } figcaption { position: sticky; left: 0; max-width: 92vw }
  td, th { padding: 0.25rem 0.4rem } th:first-child, td:first-child { min-width: 7rem; max-width: 9.5rem }
}
@media print {
  :root { --text: #000; --back: #fff; --line: #bbb; --soft: #fff; --link: #000 }
  body { font-size: 10pt; max-width: none; padding: 0 } nav { display: none }
  .table, figure { overflow: visible } table { font-size: 6.5pt }
  td, th { padding: 0.15rem 0.25rem; white-space: normal }
  th:first-child, td:first-child { position: static; min-width: 5rem }
  details.part::details-content { content-visibility: visible; height: auto; display: block }
  figure, tr { break-inside: avoid } h2, h3, h4 { break-after: avoid } figure img { max-height: 23cm; width: auto }
}
"""


class _Pictures(Treeprocessor):
    """Puts images into the page, gives each a caption from its text, and lets wide tables scroll by themselves."""

    def __init__(self, md: markdown.Markdown, folder: Path) -> None:
        super().__init__(md)
        self.folder = folder

    def run(self, root: ElementTree.Element) -> None:
        for image in root.iter("img"):
            image.set("src", embedded(self.folder / unquote(image.get("src"))))
        for position, child in enumerate(list(root)):
            if child.tag == "table":
                root[position] = wrapper = ElementTree.Element("div", {"class": "table", "tabindex": "0"})
                wrapper.append(child)
                for cell in child.iterfind("tbody/tr/td"):
                    length = len("".join(cell.itertext()))
                    if length > WORDS:
                        cell.set("class", "words")
                    if length > PROSE and cell.get("style") == "text-align: left;":
                        child.set("class", "prose")
            elif child.tag == "p" and len(child) == 1 and child[0].tag == "img" and not (child.text or "").strip():
                root[position] = figure = ElementTree.Element("figure")
                figure.append(child[0])
                child[0].tail = None
                ElementTree.SubElement(figure, "figcaption").text = child[0].get("alt")


class _Folds(Treeprocessor):
    """Puts the sections of some headings into folds, which are open on paper."""

    def __init__(self, md: markdown.Markdown, titles: Collection[str]) -> None:
        super().__init__(md)
        self.titles = titles

    def run(self, root: ElementTree.Element) -> None:
        inside: ElementTree.Element | None = None
        level = ""
        for child in list(root):
            heading = child.tag in ("h1", "h2", "h3")
            if heading and inside is not None and child.tag <= level:
                inside = None
            if heading and inside is None and "".join(child.itertext()) in self.titles:
                inside, level = ElementTree.Element("details", {"class": "part"}), child.tag
                root[list(root).index(child)] = inside
                ElementTree.SubElement(inside, "summary").append(child)
            elif inside is not None:
                root.remove(child)
                inside.append(child)


class _Embed(Extension):
    def __init__(self, folder: Path, folded: Collection[str]) -> None:
        super().__init__()
        self.folder, self.folded = folder, folded

    def extendMarkdown(self, md: markdown.Markdown) -> None:
        md.preprocessors.deregister("html_block")  # a tag in the text is text: <eos>, say
        md.inlinePatterns.deregister("html")
        # but for the one that Markdown has no other way to say inside a table
        md.inlinePatterns.register(SubstituteTagInlineProcessor("<br>", "br"), "break", 95)
        md.treeprocessors.register(_Pictures(md, self.folder), "pictures", 0)
        md.treeprocessors.register(_Folds(md, self.folded), "folds", -1)


def embedded(path: Path) -> str:
    """A file as a data URI."""
    if path.suffix not in TYPES:
        raise ValueError(f"{path}: an image is one of {', '.join(TYPES)}")
    if not path.is_file():
        raise FileNotFoundError(f"{path}: the page shows this figure, and there is no such file")
    return f"data:{TYPES[path.suffix]};base64,{base64.b64encode(path.read_bytes()).decode()}"


def html_page(text: str, folder: Path, folded: Collection[str] = ()) -> str:
    """The page of a Markdown text whose images are paths relative to `folder`.

    folded   titles of sections that are closed on a screen until somebody opens them
    """
    converter = markdown.Markdown(
        extensions=["tables", "fenced_code", "sane_lists", "toc", _Embed(folder, folded)],
        extension_configs={"toc": {"toc_depth": "2-3"}},
    )
    body = converter.convert(text)
    title = next((line[2:] for line in text.splitlines() if line.startswith("# ")), "Report")
    entries = converter.toc_tokens
    contents = f"<nav><details open><summary>Contents</summary>{converter.toc}</details></nav>" if entries else ""
    heading, closing, rest = body.partition("</h1>")
    body = f"{heading}{closing}\n{contents}\n{rest}" if closing else f"{contents}\n{body}"
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{html.escape(html.unescape(title))}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n{body}\n</body>\n</html>\n"
    )


def keep(output: Path, results: Path) -> None:
    """Copies what an experiment has written about itself to where it is committed."""
    results.mkdir(parents=True, exist_ok=True)
    for path in (p for p in output.iterdir() if p.suffix in (".md", ".json", ".png")):
        shutil.copy(path, results / path.name)


def write_page(folder: Path, text: str, name: str = "report", folded: Collection[str] = ()) -> None:
    """Writes a Markdown text and its self-contained page side by side; its figures lie in the same folder."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{name}.md").write_text(text.rstrip("\n") + "\n", encoding="utf-8")
    (folder / f"{name}.html").write_text(html_page(text, folder, folded), encoding="utf-8")
