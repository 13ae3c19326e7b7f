"""MkDocs hook: files of the repository that pages include, or link to, become part of the site.

`<!-- include: PATH -->` in a page is replaced by a Markdown file of the repository, with its links put right.  A link
that leaves docs/ is followed: Markdown becomes a page, a figure or numbers a file, code and recipes a page that shows
them; their own links are followed too.  So the same text works on a code host, in an editor and in the site, and
nothing is copied by hand.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path
from posixpath import dirname, relpath

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files, InclusionLevel
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"
UNDER = "repository"  # the folder of the site for what is linked and not included
INCLUDE = re.compile(r"<!-- include: (\S+) -->")
LINK = re.compile(r"(!?\[(?:[^\[\]]|\[[^\]]*\])*\]\()([^)\s#]+)(#[^)\s]*)?(\))")
FENCE = re.compile(r"^(```+|~~~+).*?^\1[`~]*[ \t]*$", re.M | re.S)
AS_THEY_ARE = {".png", ".svg", ".jpg", ".gif", ".csv", ".json", ".html", ".pdf"}
LANGUAGES = {".py": "python", ".yaml": "yaml", ".yml": "yaml", ".toml": "toml", ".cfg": "ini", ".sh": "bash"}

_sources: dict[str, Path] = {}  # page of the site -> the file whose text it shows
_homes: dict[Path, str] = {}  # file of the repository -> its place in the site


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds everything that the pages of docs/ lead to."""
    _sources.clear()
    _homes.clear()
    pages = {page.src_uri: DOCS / page.src_uri for page in files.documentation_pages()}
    for uri, path in pages.items():
        _homes[path] = uri
        for found in INCLUDE.finditer(path.read_text()):
            _homes[ROOT / found[1]] = uri
    todo = list(dict.fromkeys(_homes))
    while todo:
        for target in _leading_out(todo.pop()):
            if target in _homes:
                continue
            _homes[target], file = _published(target, config)
            files.append(file)
            if target.suffix == ".md":
                todo.append(target)
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Puts in what is included, and points links at where their files are in the site."""
    uri = page.file.src_uri
    source = _sources.get(uri, DOCS / uri)
    if source.suffix != ".md":
        return markdown
    included = {path: ROOT / path for path in INCLUDE.findall(markdown)}
    markdown = rebased(markdown, source, uri)
    for path, file in included.items():
        markdown = markdown.replace(f"<!-- include: {path} -->", rebased(file.read_text(), file, uri))
    return markdown.replace("<details>", "<details markdown>")


def rebased(markdown: str, source: Path, uri: str) -> str:
    """The text of a file with its links as a page at `uri` must write them."""

    def changed(found: re.Match[str]) -> str:
        target = _target(found[2], source)
        if target not in _homes:
            return found[0]
        return f"{found[1]}{relpath(_homes[target], dirname(uri) or '.')}{found[3] or ''}{found[4]}"

    return _outside_fences(lambda text: LINK.sub(changed, text), markdown)


def _leading_out(path: Path) -> Iterator[Path]:
    """Files and folders outside docs/ that a Markdown file links to."""
    for found in LINK.finditer(FENCE.sub("", path.read_text())):
        target = _target(found[2], path)
        if target is not None and not target.is_relative_to(DOCS):
            yield target


def _target(link: str, source: Path) -> Path | None:
    """The file or folder of the repository that a relative link means, if there is one."""
    if re.match(r"[a-z]+:|/", link):
        return None
    target = Path(os.path.normpath(source.parent / link))
    return target if target.is_relative_to(ROOT) and target.exists() else None


def _published(path: Path, config: MkDocsConfig) -> tuple[str, File]:
    """Where a file stands in the site, and the file there."""
    uri = f"{UNDER}/{path.relative_to(ROOT).as_posix()}"
    if path.suffix in AS_THEY_ARE:
        return uri, File.generated(config, uri, abs_src_path=str(path))
    # a README would take the place of its folder's index
    uri = uri.replace("README.md", "readme_of_folder.md") if path.suffix == ".md" else f"{uri}.md"
    content = path.read_text() if path.suffix == ".md" else _shown(path)
    _sources[uri] = path
    return uri, File.generated(config, uri, content=content, inclusion=InclusionLevel.NOT_IN_NAV)


def _shown(path: Path) -> str:
    """A page that shows a text file, or what is in a folder."""
    head = f"---\nsearch:\n  exclude: true\n---\n\n# `{path.relative_to(ROOT).as_posix()}`\n\n"
    if path.is_dir():
        names = sorted(each.name for each in path.iterdir() if each.name[0] not in "._")
        return head + "\n".join(f"- `{name}`" for name in names) + "\n"
    text = path.read_text()
    fence = "`" * max(3, 1 + max((len(run) for run in re.findall(r"`{3,}", text)), default=0))
    return f"{head}{fence}{LANGUAGES.get(path.suffix, 'text')}\n{text.rstrip()}\n{fence}\n"


def _outside_fences(change, markdown: str) -> str:
    """Changes a text but for its fenced blocks of code."""
    parts, at = [], 0
    for fence in FENCE.finditer(markdown):
        parts += [change(markdown[at : fence.start()]), fence[0]]
        at = fence.end()
    return "".join([*parts, change(markdown[at:])])
