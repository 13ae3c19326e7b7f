"""Where the rounds of a run come from: settings that must stay the same, models and files by their sha256."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from uft.config import UnifiedConfig
from uft.data.mixture import FeedbackDataset
from uft.evaluation.prompts import digest
from uft.record import plain, write_json
from uft.rlhf.labelling import Prompt
from uft.run_identity import ARGUMENTS, differences

LINEAGE = "lineage.json"
SETTINGS = "settings.json"  # of an unfinished round
# what, beside the arithmetic of a step, decides what a round becomes
LENGTH = ("max_steps", "num_train_epochs", "max_length", "use_peft", "lora_r", "lora_alpha", "dtype")


def settings_of(
    prompts: Sequence[Prompt], labeller: str, old: FeedbackDataset | None, args: UnifiedConfig, objective: Any,
    options: Any, model: Any,
) -> dict[str, Any]:  # fmt: skip
    """What finished rounds must agree with, as JSON."""
    found = {
        "options": dataclasses.asdict(options),
        "prompts": digest(list(prompts)),
        "labeller": labeller,
        "data": None if old is None else [old.fingerprint[:16], old.weights],
        "objective": objective.describe(),
        "arguments": {name: getattr(args, name, None) for name in (*ARGUMENTS, *LENGTH)},
        "model": weights_digest(model) if isinstance(model, nn.Module) else str(model),
    }
    # a function given as a weight shows the address it has in this process
    return json.loads(re.sub(r" at 0x[0-9a-f]+", "", json.dumps(plain(found))))


def begin(aside: Path, settings: Mapping[str, Any]) -> None:
    """The folder of an unfinished round; what was begun otherwise is begun anew."""
    path = aside / SETTINGS
    if aside.exists() and not (path.exists() and json.loads(path.read_text()) == settings):
        shutil.rmtree(aside)
    aside.mkdir(parents=True, exist_ok=True)
    write_json(path, settings)


def finished(folder: Path, settings: Mapping[str, Any]) -> dict[str, Any]:
    """The lineage of a finished round.  Raises ValueError where it was made with other settings."""
    lineage = json.loads((folder / LINEAGE).read_text())
    if other := differences(lineage["settings"], settings):
        raise ValueError(f"{folder}: was made otherwise: {'; '.join(other.values())}; want the same, or another folder")
    return lineage


def parent_of(model: Any, settings: Mapping[str, Any]) -> dict[str, Any]:
    """The model that a round begins with: its files, or its weights."""
    if isinstance(model, nn.Module):
        return {"model": type(model).__name__, "weights_sha256": settings["model"]}
    folder = Path(model)
    name = folder.parent.name if folder.name == "model" and folder.parent.name.startswith("round-") else str(model)
    return {"model": name, "files": files_of(folder) if folder.is_dir() else {}}


def weights_digest(model: nn.Module) -> str:
    """sha256 over names, types, shapes and numbers of all weights."""
    sha256 = hashlib.sha256()
    for name, parameter in sorted(model.state_dict().items()):
        sha256.update(f"{name} {parameter.dtype} {tuple(parameter.shape)}".encode())
        sha256.update(parameter.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return sha256.hexdigest()


def files_of(folder: Path) -> dict[str, str]:
    """sha256 of every file."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): sha256_of(path) for path in files}


def sha256_of(path: Path) -> str:
    """Of a file."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def data_files(old: FeedbackDataset | None, responses: Path, feedback: Mapping[str, Path]) -> dict[str, Any]:
    """What a round is trained on: the old data by their fingerprint, the files of rounds, by name, by their sha256."""
    return {
        "old": None if old is None else {"fingerprint": old.fingerprint, "sizes": dict(zip(old.sources, old.sizes))},
        "responses_sha256": sha256_of(responses),
        "feedback": {
            name: {"path": f"{name}/{path.name}", "sha256": sha256_of(path)} for name, path in feedback.items()
        },
    }
