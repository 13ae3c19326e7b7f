"""Kernels run on the GPU where there is one, else through the interpreter; the PyTorch form runs everywhere."""

import importlib.util

import interpreter
import pytest
import torch
import uft_kernels

if importlib.util.find_spec("triton") and not torch.cuda.is_available():
    interpreter.mend()


@pytest.fixture
def device():
    return "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture(params=["torch", "triton"])
def form(request):
    """Everything in the test runs in this form."""
    if request.param == "triton" and not importlib.util.find_spec("triton"):
        pytest.skip("triton is not installed")
    with uft_kernels.form(request.param):
        yield request.param
