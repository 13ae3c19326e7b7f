"""Runs many independent jobs, a few at a time, and keeps each result under the content of its question.

A job is a function of the module it stands in and plain keyword arguments.  Its result, a JSON-able dict, is stored
in `cache/<hash of code, function and arguments>.json`; a second call, or one after an interruption, reads it back.
"""

from __future__ import annotations

import ast
import hashlib
import inspect
import json
import multiprocessing
import os
import sys
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from uft.record import commit, write_json

ROOT = Path(__file__).resolve().parents[1]
OWN = ("uft", "uft_kernels", "experiments")


@dataclass(frozen=True)
class Job:
    """`name` is for people; `function(**arguments)` runs in a process of its own."""

    name: str
    function: Callable[..., dict[str, Any]]
    arguments: dict[str, Any] = field(default_factory=dict)

    @property
    def code(self) -> str:
        return code_fingerprint(file_of(self.function))

    @property
    def key(self) -> str:
        content = json.dumps([self.function.__qualname__, self.arguments, self.code], sort_keys=True, default=str)
        return hashlib.sha256(content.encode()).hexdigest()[:20]


def file_of(function: Callable) -> Path:
    return Path(inspect.getfile(function))


@cache
def code_fingerprint(module: Path) -> str:
    """Changes with what a module and all modules of this repository that it leads to do, and with the weights
    beside it.

    Comments, docstrings and formatting do not change it, and neither does code that the module never reaches.
    """
    digest = hashlib.sha256()
    for path in sorted(reached(module.resolve())):
        tree = ast.parse(path.read_text())
        for node in ast.walk(tree):
            if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)) and ast.get_docstring(node, clean=False):
                node.body = node.body[1:]
        digest.update(f"{path.name} {ast.dump(tree)}".encode())
    for path in sorted(module.resolve().parent.rglob("*.safetensors")):
        digest.update(path.read_bytes())
    return digest.hexdigest()


def reached(module: Path) -> set[Path]:
    """The module and the files of this project that it imports, directly or not, anywhere in its code."""
    found, todo = set(), {module}
    while todo:
        path = todo.pop()
        found.add(path)
        todo |= _imported(path) - found
    return found


def _imported(path: Path) -> set[Path]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            for alias in node.names:
                found |= _files_of(alias.name.split("."))
        elif isinstance(node, ast.ImportFrom):
            parts = node.module.split(".") if node.module else []
            for alias in node.names:  # what is imported from a package may be a module of it
                whole = [*parts, alias.name]
                found |= _files_in(path.parents[node.level - 1], whole) if node.level else _files_of(whole)
    return found


def _files_of(parts: list[str]) -> set[Path]:
    """A module of this project by its dotted name, with the packages that it lies in."""
    if parts[0] not in OWN:  # where this project is installed, others lie beside it
        return set()
    return _files_in(ROOT, parts) | _files_in(ROOT / "kernels", parts)


def _files_in(folder: Path, parts: list[str]) -> set[Path]:
    found = {folder / "__init__.py"} if folder != ROOT else set()
    for k in range(1, len(parts) + 1):
        place = folder.joinpath(*parts[:k])
        found |= {place / "__init__.py", place.with_suffix(".py")}
    return {path for path in found if path.exists()}


def run_jobs(jobs: Sequence[Job], cache: Path, *, workers: int = 2, title: str = "") -> list[dict[str, Any]]:
    """The results in the order of the jobs.  The first failure stops what has not begun and is raised."""
    paths = [cache / f"{job.key}.json" for job in jobs]
    todo = {job.key: job for job, path in zip(jobs, paths) if not path.exists()}
    about = {"job_commit": commit()}
    progress = _Progress(title, len(todo), len(jobs))
    if todo:
        # spawned, so that each worker sets its number of threads before torch starts them
        context = multiprocessing.get_context("spawn")
        files = tuple({file_of(job.function) for job in todo.values()})
        with ProcessPoolExecutor(workers, mp_context=context, initializer=_one_thread, initargs=files) as pool:
            running = {pool.submit(_timed, job.function, job.arguments): job for job in todo.values()}
            try:
                while running:
                    done, _ = wait(running, return_when=FIRST_COMPLETED, timeout=1.0)
                    # what succeeded is kept before a failure is raised
                    for future in sorted(done, key=lambda future: future.exception() is not None):
                        job = running.pop(future)
                        result, seconds, code = future.result()
                        if code != job.code:
                            raise RuntimeError("the code has changed while jobs were running; start again")
                        write_json(
                            cache / f"{job.key}.json", {**result, **about, "job": job.name, "job_seconds": seconds}
                        )
                        progress.finished(job.name, seconds)
                    progress.show()
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                raise
    progress.end()
    return [json.loads(path.read_text()) for path in paths]


def _one_thread(*files: Path) -> None:
    threading.Thread(target=_end_with, args=(os.getppid(),), daemon=True).start()
    for file in files:  # what this process will import, before anybody edits it
        code_fingerprint(file)
    # two runs side by side with a thread each are faster than one after the other with two
    os.environ["OMP_NUM_THREADS"] = "1"
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    os.environ["HF_HUB_OFFLINE"] = "1"
    import torch

    torch.set_num_threads(1)
    import transformers

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()


def _end_with(parent: int) -> None:
    """A parent that was killed tells nobody; its workers would train on for a result that nobody takes."""
    while os.getppid() == parent:
        time.sleep(1)
    os._exit(1)


def _timed(function: Callable[..., dict[str, Any]], arguments: dict[str, Any]) -> tuple[dict[str, Any], float, str]:
    start = time.perf_counter()
    result = function(**arguments)
    return result, round(time.perf_counter() - start, 2), code_fingerprint(file_of(function))


class _Progress:
    """One line that is rewritten on a terminal, and a line per job elsewhere."""

    def __init__(self, title: str, todo: int, total: int):
        self.title, self.todo, self.total = title, todo, total
        self.done, self.start, self.live = 0, time.monotonic(), sys.stderr.isatty()
        if total > todo:
            self._say(f"{title}: {total - todo} of {total} runs found in the cache")

    def finished(self, name: str, seconds: float) -> None:
        self.done += 1
        self._say(f"  {self.title} {self.done}/{self.todo}  {name}  {seconds:.0f} s, {self._left()}")

    def show(self) -> None:
        if self.live and self.todo:
            filled = 24 * self.done // self.todo
            bar = "#" * filled + "-" * (24 - filled)
            print(f"\r  {self.title} [{bar}] {self.done}/{self.todo}  {self._left()}   ", end="", file=sys.stderr)

    def end(self) -> None:
        if self.live and self.todo:
            print("\r" + " " * 79 + "\r", end="", file=sys.stderr)

    def _left(self) -> str:
        if not self.done:
            return "time left unknown"
        left = (time.monotonic() - self.start) / self.done * (self.todo - self.done)
        return f"{left / 60:.1f} min left"

    def _say(self, line: str) -> None:
        self.end()
        print(line, file=sys.stderr, flush=True)
