"""Which run a folder holds: a digest of all that decides its numbers, so that a finished run is not run again.

What changes no number (logging, saving, where things are kept) is not in it.  Where the best checkpoint is loaded at
the end, when one is saved decides which it is.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from uft import __version__
from uft.command_line import digest_of_imports
from uft.evaluation.data import EvaluationData
from uft.manifest import checksum
from uft.record import plain, write_json

FILE = "identity.json"
DECIDES_NOTHING = {
    "output_dir", "resume", "logging_dir", "logging_strategy", "logging_steps", "logging_first_step", "report_to",
    "run_name", "disable_tqdm", "log_level", "save_steps", "save_strategy", "save_total_limit", "data_cache",
    "dataloader_num_workers", "dataloader_pin_memory", "dataloader_persistent_workers", "push_to_hub", "hub_model_id",
}  # fmt: skip
OF_BEST = {"save_steps", "save_strategy"}  # decide where load_best_model_at_end is on


def digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(plain(value), sort_keys=True).encode()).hexdigest()[:16]


def decides(values: Mapping[str, Any], **more: Any) -> dict[str, Any]:
    """The keys of a recipe that decide what a run finds, the content of files it imports, and whatever else does."""
    nothing = DECIDES_NOTHING - OF_BEST if loads_best(values) else DECIDES_NOTHING
    kept = {key: value for key, value in values.items() if key not in nothing and key != "import"}
    imports = digest_of_imports(values.get("import"))
    imported = {} if imports is None else {"imports": imports}
    return {"version": __version__, "recipe": kept, "weights": of_model(str(values["model"])), **imported, **more}


def loads_best(values: Mapping[str, Any]) -> bool:
    """Whether a recipe, or a stage of it, ends with its best checkpoint and not with its last."""
    stages = [stage for stage in values.get("stages") or () if isinstance(stage, Mapping)]
    return any(str(each.get("load_best_model_at_end", False)).lower() in ("true", "1") for each in (values, *stages))


def of_model(name: str) -> str | None:
    """A digest of a model's folder; None for a hub id, which is its own."""
    folder = Path(name)
    if not folder.is_dir():
        return None
    files = [p for p in sorted(folder.iterdir()) if p.suffix in (".safetensors", ".json", ".jinja", ".model")]
    return digest([(path.name, checksum(path)) for path in files])


def of_evaluation(data: EvaluationData) -> str:
    """A digest of the data of an evaluation."""
    tokens = {name: [hashlib.sha256(each.tobytes()).hexdigest() for each in some] for name, some in data.tokens.items()}
    given = {name: each.fingerprint for name, each in data.responses.items()}
    return digest([data.ids(), tokens, given, data.groups])


def claim(folder: Path, facts: Mapping[str, Any]) -> str | None:
    """Makes the folder that of the run that these facts decide; a sentence where another one lay there.

    A run of other facts is put aside as FOLDER.DIGEST, and one that was put aside comes back.
    """
    own, said = digest(facts), None
    there = _digest_in(folder)
    if there is None and folder.exists() and any(folder.iterdir()):
        raise ValueError(f"{folder}: holds files of something else; want another output_dir")
    if there not in (None, own):
        aside = folder.with_name(f"{folder.name}.{there}")
        folder.rename(aside)
        said = f"{folder}: a run of other settings lay there; it is in {aside} now"
    back = folder.with_name(f"{folder.name}.{own}")
    if back.exists() and not folder.exists():
        back.rename(folder)
        said = f"{folder}: the run of these settings was put aside before, and is back"
    if _digest_in(folder) is None:
        write_json(folder / FILE, {"digest": own, "decided_by": facts})
    return said


def _digest_in(folder: Path) -> str | None:
    try:
        return json.loads((folder / FILE).read_text())["digest"]
    except (OSError, ValueError, KeyError):
        return None
