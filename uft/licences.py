"""What is known offline of a model or a data set: whether its name is an id on the hub, and its licence."""

from __future__ import annotations

import contextlib
import re
from pathlib import Path
from typing import Any, NamedTuple

_ID = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?")
_FILE = re.compile(r"\.(jsonl?|parquet|csv|txt)$")


class Licence(NamedTuple):
    """As the header of a card says it; name and link where the licence is `other`."""

    license: str
    license_name: str | None = None
    license_link: str | None = None


def hub_id(name: str | None) -> str | None:
    """The name, if it is written as an id on the hub is; None for other files and folders.

    Nothing is looked for, so that it says the same in every working directory; `origin` looks, when data is read.
    """
    return str(name) if name and _ID.fullmatch(str(name)) and not _FILE.search(str(name)) else None


def origin(path: str | Path) -> str:
    """The path or id as records keep it: a folder here that could be an id begins with "./", which no id does."""
    is_here = Path(path).expanduser().exists()
    return f"./{Path(path).as_posix()}" if is_here and hub_id(str(path)) else str(path)


def licence_of(name: str | None, kind: str = "model") -> Licence | None:
    """What the card of a model (or "dataset") says: of a folder its README.md, of an id the one in the hub's cache.

    Nothing is downloaded: None where the card is not at hand, or names no licence.
    """
    if not name:
        return None
    card: Any = None
    if hub_id(name):
        from huggingface_hub import try_to_load_from_cache

        card = try_to_load_from_cache(name, "README.md", repo_type=kind)
    elif (folder := Path(name).expanduser()).exists():
        card = (folder if folder.is_dir() else folder.parent) / "README.md"
    if not isinstance(card, (str, Path)) or not Path(card).is_file():
        return None
    from huggingface_hub import metadata_load

    with contextlib.suppress(ValueError, OSError, AttributeError):
        known = metadata_load(card) or {}
        if isinstance(known.get("license"), str):
            return Licence(known["license"], known.get("license_name"), known.get("license_link"))
    return None
