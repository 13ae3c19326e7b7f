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
    """The name, if it is an id on the hub; None for files and folders."""
    is_id = bool(name) and _ID.fullmatch(str(name)) and not _FILE.search(str(name)) and not Path(str(name)).exists()
    return str(name) if is_id else None


def licence_of(name: str | None, kind: str = "model") -> Licence | None:
    """What the card of a model (or "dataset") says: of a folder its README.md, of an id the one in the hub's cache.

    Nothing is downloaded: None where the card is not at hand, or names no licence.
    """
    if not name:
        return None
    folder = Path(name)
    folder = folder if folder.is_dir() else folder.parent
    card: Any = folder / "README.md" if Path(name).exists() else None
    if card is None and hub_id(name):
        from huggingface_hub import try_to_load_from_cache

        card = try_to_load_from_cache(name, "README.md", repo_type=kind)
    if not isinstance(card, (str, Path)) or not Path(card).is_file():
        return None
    from huggingface_hub import metadata_load

    with contextlib.suppress(ValueError, OSError, AttributeError):
        known = metadata_load(card) or {}
        if isinstance(known.get("license"), str):
            return Licence(known["license"], known.get("license_name"), known.get("license_link"))
    return None
