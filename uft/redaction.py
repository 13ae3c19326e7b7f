"""Texts without what says where they were written: of paths the last part is left, of URLs all but their credentials.

    /home/jane doe/acme/x.jsonl     x.jsonl          a text that begins as a path does is one, blanks included
    read ~/acme/x.jsonl twice       read x.jsonl twice
    output_dir: runs/first          output_dir: first    of relative paths where the key says that it is one
    owner/name                      owner/name       an id on the hub, unless such a folder is there
    https://jane:secret@host/x      https://host/x

What is no path to the eye (two/words, nll / token) stays.  In doubt too much is cut: words between two paths may go.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from uft.licences import hub_id

# values of these keys are folders or files; of the others, folders, files or ids on the hub
FOLDERS = {
    "output_dir", "data_cache", "reference_cache", "logging_dir", "resume_from_checkpoint", "run_name", "cache_dir",
}  # fmt: skip
NAMES = {"model", "reference", "path", "model_name_or_path", "tokenizer"}
ORIGINS = "origins"

_CREDENTIALS = re.compile(r"(?<=://)[^\s/?#]+@")
_SECRETS = re.compile(r"(?i)([?&][\w-]*(?:token|key|secret|signature|password|credential)[\w-]*=)[^&\s#'\"]+")
# how a path begins: file:///x, ~/x, ../x, C:\x, \\server\x, /x; not behind a letter, a dot or another slash, as in a/b
# and https://a, and not before a blank, as in nll / token
_BEGINS = (
    r"(?:file:/+|(?<![\w./\\:~)\]-])(?:~[\w.-]*[/\\]+|\.{1,2}[/\\]+|[A-Za-z]:[/\\]+|\\\\+(?=[\w.$-]+\\)|/))(?=[^\s/\\])"
)
_WORD = r"[^\s/\\'\"`,;()\[\]{}<>]+"
# in the middle of a path up to three words may be one folder's name, none of them but the last like a file's
_PART = rf"(?:(?!\S*\.[A-Za-z]\w+\s){_WORD}[ ]){{0,2}}{_WORD}"
_WHOLE = re.compile(rf"\s*{_BEGINS}.*")
_QUOTED = re.compile(rf"(?<=(['\"`])){_BEGINS}[^'\"`\n]*(?=\1)")
_INSIDE = re.compile(rf"{_BEGINS}(?:{_PART}[/\\]+)*(?:{_WORD})?")
_SUFFIX = r"\.(?:jsonl?|parquet|csv|txt|ya?ml|safetensors|pt|bin|log)"
_RELATIVE = re.compile(rf"[^\s/\\:]+(?:[/\\]+[^/\\:\n]+)+{_SUFFIX}")
_RELATIVE_INSIDE = re.compile(rf"(?<![\w./\\:~@-])[\w.-]+(?:[/\\]+[\w.-]+)+{_SUFFIX}\b")


def without_paths(value: Any, folder: Path | None = None) -> Any:
    """The same data with its texts as above.

    folder   what the data is about; names that are folders seen from there, or from a folder around it, are no ids
    """
    return _cut(value, None, folder)


def is_folder(name: Any, beside: Path | None = None) -> bool:
    """Whether a name is a file or a folder rather than an id on the hub, seen from here, `beside` or around that."""
    if not isinstance(name, str):
        return False
    around = [] if beside is None else [beside.absolute(), *beside.absolute().parents]
    return hub_id(name) is None or any((place / name).exists() for place in [Path(), *around])


def _cut(value: Any, key: str | None, folder: Path | None) -> Any:
    if isinstance(value, Mapping):
        within = ORIGINS if key == ORIGINS else None
        return {name: _cut(each, within or str(name), folder) for name, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [_cut(each, key, folder) for each in value]
    if not isinstance(value, str):
        return value
    text = "\n".join(_line(line) for line in value.split("\n"))
    if "://" in text:
        return text
    if key == ORIGINS and is_folder(value, folder):
        # "./pairs" is no id on the hub, as "pairs" would be
        return f"./{_last(text)}" if hub_id(_last(text)) else _last(text)
    return _last(text) if key in FOLDERS or (key in NAMES and is_folder(value, folder)) else text


def _line(text: str) -> str:
    text = _SECRETS.sub(r"\1", _CREDENTIALS.sub("", text))
    if _WHOLE.fullmatch(text) or _RELATIVE.fullmatch(text):
        return _last(text)
    for pattern in (_QUOTED, _INSIDE, _RELATIVE_INSIDE):
        text = pattern.sub(lambda match: _last(match[0]), text)
    return text


def _last(path: str) -> str:
    return re.split(r"[/\\]+", path.strip().rstrip("/\\"))[-1]
