"""Looking at a model without leaving a trace: modes and random numbers are afterwards what they were."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import nn


@contextmanager
def undisturbed(*models: nn.Module) -> Iterator[None]:
    """While this lasts the models are in evaluation mode, and nothing has a gradient.  Afterwards every module is in
    the mode it was in, and Python, NumPy and torch (CPU and CUDA) draw the numbers that they would have drawn."""
    modes = [(module, module.training) for model in models for module in model.modules()]
    python, numpy = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(), torch.no_grad():
        try:
            for model in models:
                model.eval()
            yield
        finally:
            for module, training in modes:  # one by one: parts may have been frozen in evaluation mode
                module.training = training
            random.setstate(python)
            np.random.set_state(numpy)
