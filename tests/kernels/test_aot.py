"""Kernels are built for GPUs that are not here: what the interpreter accepts a compiler may refuse."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "kernels" / "bench" / "aot.py"
pytestmark = pytest.mark.skipif(not importlib.util.find_spec("triton"), reason="triton is not installed")


def check(*words: str) -> None:
    import triton

    if not (SCRIPT.parent / "results" / f"aot-triton{triton.__version__}.json").exists():
        pytest.skip(f"no table for triton {triton.__version__}; make it with kernels/bench/aot.py --write")
    clean = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    told = subprocess.run([sys.executable, SCRIPT, "--check", *words], capture_output=True, text=True, env=clean)
    assert told.returncode == 0, told.stdout[-3000:] + told.stderr[-3000:]


@pytest.mark.parametrize("kernels", ["token_logprob", "token_divergence backward"])
def test_kernels_build_for_hopper_as_the_table_says(kernels):
    check("--targets", "sm_90", "--kernels", kernels)


@pytest.mark.slow
def test_every_configuration_builds_for_every_target_as_the_table_says():
    check()


def test_the_table_has_no_spills():
    import json

    for path in (SCRIPT.parent / "results").glob("aot-*.json"):
        rows = json.loads(path.read_text())
        assert {row["target"] for row in rows} == {"sm_80", "sm_90", "sm_100", "gfx942"}
        assert max(row["spilled_bytes"] for row in rows) <= 64
        products = [row for row in rows if row["kernel"].startswith("linear_") and row["target"] == "sm_90"]
        assert products and all(row["wgmma"] for row in products if row["dtype"] == "bf16")
