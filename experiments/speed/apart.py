"""One call in a process of its own, so that its peak of memory and its caches are its own."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import sys
import warnings
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from typing import Any

from transformers.utils import logging

# what every call imports; a fork server has it imported already and has run nothing, no threads, no GPU
MODULES = ["experiments.speed.report", "experiments.runs", "tqdm", "trl", "trl.trainer.dpo_trainer", "peft", "datasets"]
STARTS = ("here", "forkserver", "spawn")


def apart(start: str, function: Callable, *args: Any, **kwargs: Any) -> Any:
    """The result of a function of a module.  start: a way of multiprocessing to begin, or "here" in this process."""
    if start == "here":
        return _quietly(function, args, kwargs)
    context = multiprocessing.get_context(start)
    if start == "forkserver":
        context.set_forkserver_preload(MODULES)
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        return pool.submit(_quietly, function, args, kwargs).result()


def _quietly(function: Callable, args: tuple, kwargs: dict) -> Any:
    os.environ["TQDM_DISABLE"] = "1"
    logging.set_verbosity_error()
    if "datasets" in sys.modules:
        sys.modules["datasets"].disable_progress_bars()
    with warnings.catch_warnings(), open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
        warnings.simplefilter("ignore")
        return function(*args, **kwargs)
