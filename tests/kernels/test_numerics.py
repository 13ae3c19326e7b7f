"""The comparison itself: it must see what it is there to see."""

import numpy as np
import pytest
import torch
from interpreter import rounded, widened
from numerics import assert_no_worse


def test_rejects_a_zero_gradient_and_one_wrong_row_in_64():
    torch.manual_seed(0)
    gold = torch.softmax(torch.randn(64, 5000, dtype=torch.float64), -1)
    eager = gold.bfloat16()
    assert_no_worse(eager, eager, gold)
    with pytest.raises(AssertionError, match="relative error 1"):
        assert_no_worse(torch.zeros_like(eager), eager, gold)
    wrong = eager.clone()
    wrong[17] *= 1.1
    with pytest.raises(AssertionError):
        assert_no_worse(wrong, eager, gold)
    wrong[17] = float("nan")
    with pytest.raises(AssertionError, match="inf"):
        assert_no_worse(wrong, eager, gold)


def test_the_interpreters_bfloat16_is_torchs():
    values = torch.cat([torch.randn(5000) * 10.0**k for k in range(-30, 30, 6)] + [torch.tensor([0.0, float("inf")])])
    bits = values.bfloat16().view(torch.int16).numpy().view(np.uint16)
    assert (rounded(values.numpy()) == bits).all()
    assert (widened(bits) == values.bfloat16().float().numpy()).all()
