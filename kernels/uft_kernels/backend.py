"""Which form an operation takes: Triton kernels on a GPU, plain PyTorch elsewhere.

Everything here works without triton.  `form("torch")` and `form("triton")` choose by hand, for tests and benchmarks;
kernels run on the CPU only through Triton's interpreter (TRITON_INTERPRET=1, set before triton is imported).
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

try:
    import triton
    import triton.language as tl
except ImportError:  # macOS, Windows
    triton = tl = None

CACHED = 2**18  # entries

_chosen: str | None = None  # not a ContextVar, which torch.compile cannot look into


def jit(function: Callable) -> Callable:
    """triton.jit, or the function itself where there is no triton; it is then never called."""
    return function if triton is None else triton.jit(function)


@contextlib.contextmanager
def form(name: str) -> Iterator[None]:
    """Runs what is inside as "torch" or as "triton", whatever the device."""
    if name not in ("torch", "triton"):
        raise ValueError(f"form is {name!r}; want torch or triton")
    if name == "triton" and triton is None:
        raise ValueError("form is 'triton', which is not installed")
    global _chosen
    before, _chosen = _chosen, name
    try:
        yield
    finally:
        _chosen = before


def uses_triton(tensor: Tensor) -> bool:
    """float64 is for references and goes to PyTorch."""
    if triton is None or tensor.dtype == torch.float64:
        return False
    return _chosen == "triton" if _chosen else tensor.is_cuda


def row_blocks(rows_NV: Tensor) -> Iterator[slice]:
    """Slices of rows that the PyTorch form passes over several times: on a CPU few enough to stay in its cache."""
    N, V = rows_NV.shape
    step = max(1, CACHED // max(V, 1)) if rows_NV.device.type == "cpu" else max(N, 1)
    for start in range(0, N, step):
        yield slice(start, min(start + step, N))


def accumulation(dtype: torch.dtype) -> torch.dtype:
    """float32, or float64 for float64."""
    return torch.promote_types(dtype, torch.float32)
