"""The one rule by which kernels are compared: how much worse than eager PyTorch, measured against float64."""

import torch
from torch import Tensor


def worst_row_error(x: Tensor, gold: Tensor) -> float:
    """Largest relative L2 error of any row.  A row that should be exactly zero must be."""
    x, gold = x.detach().double().reshape(len(x), -1), gold.detach().double().reshape(len(gold), -1)
    error, scale = (x - gold).norm(dim=-1), gold.norm(dim=-1)
    return (error / scale.clamp(min=1e-30)).nan_to_num(float("inf")).max().item()


def assert_no_worse(found: Tensor, eager: Tensor, gold: Tensor, slack: float = 3.0) -> None:
    """`found` may be `slack` times as far from float64 as eager PyTorch is at the same dtype.

    All three come from the same low-precision inputs; two ulps of the output are always allowed.
    """
    allowed = slack * worst_row_error(eager, gold) + 2 * torch.finfo(found.dtype).eps
    error = worst_row_error(found, gold)
    assert error <= allowed, f"relative error {error:.2e}, allowed {allowed:.2e}"
