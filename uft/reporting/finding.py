"""The runs below some folders, each evaluation with the run whose model it measured, and what could not be used."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from uft.reporting.runs import (
    EVALUATION,
    GUARD,
    PROGRESS,
    RECORD,
    REWARD,
    REWARDS,
    SAMPLES,
    ReportError,
    Run,
    read_json,
    read_run,
)

OWN = {RECORD, PROGRESS, SAMPLES, GUARD, REWARD, REWARDS, EVALUATION}
# folders in which a run keeps what is no run: checkpoints, its evaluations on the way, copies of weights
INSIDE = re.compile(r"checkpoint-\d+|partial|evaluation|reference|critic|runs?-cache|\..*|__pycache__")
# what saved models, tokenizers and trainers of transformers consist of
OF_MODELS = re.compile(
    r"(config|generation_config|adapter_config|tokenizer|tokenizer_config|special_tokens_map|added_tokens|vocab|"
    r"preprocessor_config|processor_config|chat_template|trainer_state|all_results|train_results|eval_results|"
    r"manifest|run_identity|identity|recipe|.*\.index)\.json"
)


class Found(NamedTuple):
    """Runs in the order in which they were named, and a sentence for each file that is not shown."""

    runs: list[Run]
    skipped: list[str]


def find_runs(given: Sequence[Path], output: Path | None = None) -> Found:
    """Below the given folders but for `output`, where reports are written.

    Raises ReportError for a path that is not there, and where there is no run at all.
    """
    runs: dict[Path, Run] = {}
    skipped: list[str] = []
    for path in given:
        if not path.exists():
            raise ReportError(f"{path}: no such folder; want what a run has written")
        if path.is_file():
            if path.name not in OWN:
                raise ReportError(f"{path}: found a file; want a folder, or one of {', '.join(sorted(OWN))}")
            path = path.parent
        _walk(path, runs, skipped, output.resolve() if output else None)
    found = _joined(runs, skipped)
    skipped += [note for run in found for note in run.notes]
    skipped = list(dict.fromkeys(skipped))
    if not found:
        said = f"; {'; '.join(skipped)}" if skipped else ""
        raise ReportError(
            f"{', '.join(map(str, given))}: found no run; want a folder with {RECORD}, {PROGRESS}, {EVALUATION} or "
            f"{REWARDS}{said}"
        )
    return Found(_named(found), skipped)


def _walk(folder: Path, runs: dict[Path, Run], skipped: list[str], output: Path | None) -> None:
    stages: set[str] = set()
    try:
        run = read_run(folder)
    except ReportError as problem:
        skipped.append(str(problem))
    else:
        if run is not None:
            runs.setdefault(folder.resolve(), replace(run, folder=folder))
            stages = {stage.name for stage in run.stages}
    for entry in sorted(os.scandir(folder), key=lambda e: _natural(e.name)):
        path = Path(entry.path)
        if entry.is_dir() and not entry.is_symlink():
            if not INSIDE.fullmatch(entry.name) and entry.name not in stages and path.resolve() != output:
                _walk(path, runs, skipped, output)
        elif path.suffix == ".json" and path.name not in OWN and not OF_MODELS.fullmatch(path.name):
            skipped.append(f"{path}: no file that this report knows")


def _natural(name: str) -> list[tuple[int, int | str]]:
    """step-9 before step-10."""
    return [(0, int(part)) if part.isdigit() else (1, part) for part in re.split(r"(\d+)", name) if part]


def _joined(runs: dict[Path, Run], skipped: list[str]) -> list[Run]:
    """Evaluations in folders of their own go to the run whose model they measured, the newest first."""
    found = {place: _with_last_evaluation(run, skipped) for place, run in runs.items() if run.kind != "evaluation"}
    for place, run in runs.items():
        if run.kind != "evaluation":
            continue
        target = _measured(run, place, list(found))
        if target is None:
            found[place] = run
        elif runs[target].evaluation is None or _date(run) > _date(found[target]):
            found[target] = replace(found[target], evaluation=run.evaluation)
            runs[target] = found[target]
        else:
            skipped.append(f"{run.folder / EVALUATION}: there is a newer evaluation of {found[target].folder}")
    return list(found.values())


def _measured(run: Run, place: Path, trained: Sequence[Path]) -> Path | None:
    """The folder of the run that an evaluation is of: the one its `model` names, or the one it lies in."""
    model = (run.evaluation or {}).get("info", {}).get("model")
    if isinstance(model, str):
        for base in (Path.cwd(), *place.parents):
            if (named := (base / model).resolve()) in trained:
                return named
    return next((parent for parent in place.parents if parent in trained), None)


def _date(run: Run) -> str:
    return str((run.evaluation or {}).get("info", {}).get("date", ""))


def _with_last_evaluation(run: Run, skipped: list[str]) -> Run:
    """Where nobody measured the finished model, what was measured last on the way."""
    if run.evaluation is not None:
        return run
    folders = [run.folder, *(run.folder / stage.name for stage in run.stages if stage.name)]
    paths = []
    for folder in folders:
        paths += sorted(folder.glob(f"evaluation/step-*/{EVALUATION}"), key=lambda path: _natural(path.parent.name))
        paths += [folder / EVALUATION] if (folder / EVALUATION).is_file() else []
    if not paths:
        return run
    try:
        return replace(run, evaluation=read_json(paths[-1], "metrics"))
    except ReportError as problem:
        skipped.append(str(problem))
        return run


def _named(runs: Sequence[Run]) -> list[Run]:
    """Each run with the shortest name that tells it from the others: its path below what all have in common."""
    places = [run.folder.resolve() for run in runs]
    common = Path(os.path.commonpath(places)) if len(places) > 1 else places[0].parent
    return [
        replace(run, name=str(place.relative_to(common)) if place != common else place.name)
        for run, place in zip(runs, places)
    ]
