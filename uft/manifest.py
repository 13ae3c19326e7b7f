"""A checkpoint's list of its files, by which a torn one is known.

Written last, before the checkpoint appears under its name.  Sizes of all files are kept, and a checksum of each: of
files up to 64 MiB over all bytes, of longer ones over their size and 64 pieces of 1 MiB, evenly spaced, the first
(where safetensors has its header) and the last among them.  What is so found: files that are missing, cut short,
filled with zeros or exchanged, and any change in a small file.  What is not: a few changed bytes inside a large one.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

MANIFEST = "manifest.json"
MIB = 1 << 20
PIECES = 64
# a card may be edited, and nobody resumes from it
LEFT_OUT = {MANIFEST, "README.md"}


def checksum(path: Path) -> str:
    """sha256 of a file, or of its size and 64 MiB of it where it is longer than that."""
    size, digest = path.stat().st_size, hashlib.sha256()
    with open(path, "rb") as file:
        if size <= PIECES * MIB:
            digest.update(file.read())
        else:
            digest.update(str(size).encode())
            for piece in range(PIECES):
                file.seek((size - MIB) * piece // (PIECES - 1))
                digest.update(file.read(MIB))
    return digest.hexdigest()


def write_manifest(folder: Path) -> None:
    files = sorted(p for p in folder.rglob("*") if p.is_file() and p.name not in LEFT_OUT)
    listed = {p.relative_to(folder).as_posix(): {"bytes": p.stat().st_size, "sha256": checksum(p)} for p in files}
    (folder / MANIFEST).write_text(json.dumps({"files": listed}, indent=1) + "\n")


def damage(folder: Path) -> str | None:
    """What is wrong with a checkpoint, in one clause that names the file; None where it is whole."""
    try:
        files = json.loads((folder / MANIFEST).read_text())["files"]
        listed = {name: (int(wanted["bytes"]), str(wanted["sha256"])) for name, wanted in files.items()}
    except FileNotFoundError:
        return f"{folder}: found no {MANIFEST}; want a checkpoint that this trainer wrote to its end"
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return f"{folder / MANIFEST}: found no readable list of files ({type(error).__name__})"
    for name, (wanted, sha256) in listed.items():
        path = folder / name
        if not path.is_file():
            return f"{path}: found no such file; want {wanted:,} bytes"
        if (size := path.stat().st_size) != wanted:
            return f"{path}: found {size:,} bytes; want {wanted:,}"
        try:
            same = checksum(path) == sha256
        except OSError as error:
            return f"{path}: cannot be read ({error.strerror})"
        if not same:
            return f"{path}: found other bytes than were written (sha256 differs)"
    return None
