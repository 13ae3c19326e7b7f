"""Compiles every kernel configuration that dispatch can choose, without a GPU, and tables what each costs.

    python kernels/bench/aot.py            prints the table
    python kernels/bench/aot.py --write    also writes kernels/bench/results/aot-triton<version>.json
    python kernels/bench/aot.py --check    compares with that file instead; --targets and --kernels take a part of it

Columns: registers per thread, bytes spilled per thread, shared memory per block, and on Hopper the matrix instructions
(wgmma) of kernels that multiply.  A kernel that spills more than SPILLS bytes fails.  Not with TRITON_INTERPRET=1,
under which there is nothing to compile.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

os.environ["TRITON_INTERPRET"] = "0"
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.compiler import compile as compile_kernel
from uft_kernels import linear_filter, linear_rows, token_divergence, token_logprob  # noqa: F401

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
SPILLS = 64
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
RESULTS = Path(__file__).parent / "results"
LOGPROB, DIVERGENCE, FILTER, ROWS = (
    sys.modules[f"uft_kernels.{name}"] for name in ("token_logprob", "token_divergence", "linear_filter", "linear_rows")
)
NUMBERS = {"temperature": "fp32", "softcap": "fp32", "js_weight": "fp32", "stride": "i32", "column": "i32"}
NUMBERS |= dict.fromkeys("NVD", "i32")
INDICES = {"target_ptr", "token_ptr", "tile_ptr", "first_ptr"}
# of the dtype of the model; every other pointer is float32
OPERANDS = {f"{name}_ptr" for name in ("logits", "policy", "reference", "gradient", "hidden", "weight", "bias", "dz")}


class Configuration(NamedTuple):
    name: str
    kernel: Any
    constants: dict[str, Any]
    dtype: str  # of the logits, or of hidden states and head
    targets: tuple[str, ...] = tuple(TARGETS)

    @property
    def options(self) -> dict[str, int]:
        stages = {"num_stages": ROWS.STAGES} if self.name.startswith("linear_rows") else {}
        return {"num_warps": self.warps, **stages}

    @property
    def warps(self) -> int:
        modules = {
            "linear_filter": FILTER,
            "linear_rows": ROWS,
            "token_logprob": LOGPROB,
            "token_divergence": DIVERGENCE,
        }
        return modules[self.name.split()[0]].WARPS


def configurations() -> Iterator[Configuration]:
    """What the Python side of each kernel can ask for; the block is the one that large vocabularies get."""
    for dtype, capped in product(("bf16", "fp32"), (False, True)):
        common = {"CAPPED": capped, "IGNORED": LOGPROB.IGNORE, "BLOCK_V": LOGPROB.BLOCK_V}
        for maxima, entropy in product((False, True), repeat=2):
            constants = {**common, "WITH_MAXIMA": maxima, "WITH_ENTROPY": entropy, "ENTRIES": LOGPROB.ENTRIES}
            yield Configuration("token_logprob forward", LOGPROB._forward_kernel, constants, dtype)
        for entropy in (False, True):
            constants = {**common, "WITH_ENTROPY": entropy}
            yield Configuration("token_logprob backward", LOGPROB._backward_kernel, constants, dtype)
        for biased, entropy in product((False, True), repeat=2):
            constants = {"CAPPED": capped, "BIASED": biased, "WITH_ENTROPY": entropy, **FILTER.tile_of(DTYPES[dtype])}
            yield Configuration("linear_filter logits", FILTER._logit_gradient_kernel, constants, dtype)
        for js, target in product((False, True), (False, True)):
            constants = {"CAPPED": capped, "REFERENCE_CAPPED": capped, "WITH_JS": js, "WITH_TARGET": target,
                         "BLOCK_V": DIVERGENCE.BLOCK_V}  # fmt: skip
            yield Configuration("token_divergence forward", DIVERGENCE._forward_kernel, constants, dtype)
            yield Configuration("token_divergence backward", DIVERGENCE._backward_kernel, constants, dtype)

    for dtype in ("bf16", "fp32"):
        step, tile = FILTER.step_of(DTYPES[dtype]), FILTER.tile_of(DTYPES[dtype])
        yield Configuration("linear_filter weight gradient", FILTER._weight_gradient_kernel, step, dtype)
        yield Configuration("linear_filter contribution", FILTER._contribution_kernel, tile, dtype)

    for capped, biased, entropy in product((False, True), repeat=3):
        for descriptors, targets in ((None, tuple(TARGETS)), (9, ("sm_90",)), (10, ("sm_100",))):
            constants = {"CAPPED": capped, "BIASED": biased, "WITH_ENTROPY": entropy,
                         **ROWS.tile_of(descriptors, entropy, capped)}  # fmt: skip
            yield Configuration("linear_rows", ROWS._tile_kernel, constants, "bf16", targets)
            constants = {**constants, **ROWS.gradient_tile_of(descriptors, entropy, capped)}
            yield Configuration("linear_rows gradient", ROWS._gradient_kernel, constants, "bf16", targets)


def signature(configuration: Configuration) -> dict[str, str]:
    found = {}
    for name in configuration.kernel.arg_names:
        if name in configuration.constants:
            found[name] = "constexpr"
        elif name.endswith("_ptr"):
            found[name] = "*i64" if name in INDICES else f"*{configuration.dtype}" if name in OPERANDS else "*fp32"
        else:
            found[name] = next(kind for part, kind in NUMBERS.items() if part in name)
    return found


def build(configuration: Configuration, target: str) -> dict[str, Any]:
    names = configuration.kernel.arg_names
    # what the launcher specialises on: pointers and strides that are multiples of 16
    aligned = [i for i, name in enumerate(names) if name.endswith(("_ptr", "stride"))]
    source = ASTSource(
        fn=configuration.kernel, signature=signature(configuration), constexprs=configuration.constants,
        attrs={(i,): [["tt.divisibility", 16]] for i in aligned},
    )  # fmt: skip
    compiled = compile_kernel(source, target=TARGETS[target], options=configuration.options)
    cost = _amd(compiled) if target.startswith("gfx") else _nvidia(compiled)
    if target == "sm_90" and configuration.name.startswith("linear_"):
        cost["wgmma"] = compiled.asm["ptx"].count("wgmma.mma_async")
    constants = {name: value for name, value in configuration.constants.items() if name != "IGNORED"}
    return {"kernel": configuration.name, "dtype": configuration.dtype, **constants, "target": target,
            **cost, "shared_bytes": compiled.metadata.shared}  # fmt: skip


def _nvidia(compiled: Any) -> dict[str, int]:
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        Path(file.name).write_bytes(compiled.asm["cubin"])
        told = subprocess.run([tool, "--dump-resource-usage", file.name], capture_output=True, text=True, check=True)
    registers, stack = (int(re.search(rf"{word}:(\d+)", told.stdout)[1]) for word in ("REG", "STACK"))
    return {"registers": registers, "spilled_bytes": stack}


def _amd(compiled: Any) -> dict[str, int]:
    def number(key: str) -> int:
        return int(re.search(rf"\.{key}:\s+(\d+)", compiled.asm["amdgcn"])[1])

    return {"registers": number("vgpr_count"), "spilled_bytes": number("private_segment_fixed_size")}


def table(targets: Sequence[str], kernels: str) -> list[dict[str, Any]]:
    wanted = [configuration for configuration in configurations() if kernels in configuration.name]
    return [
        build(configuration, target)
        for configuration in wanted
        for target in targets
        if target in configuration.targets
    ]


def differences(rows: Sequence[dict[str, Any]], kept: Sequence[dict[str, Any]]) -> list[str]:
    costs = ("registers", "spilled_bytes", "shared_bytes", "wgmma")

    def key(row: dict[str, Any]) -> str:
        return json.dumps({name: value for name, value in row.items() if name not in costs}, sort_keys=True)

    known = {key(row): row for row in kept}
    return [f"{key(row)}: {known.get(key(row))}, now {row}" for row in rows if known.get(key(row)) != row]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="also write the table as JSON")
    parser.add_argument("--check", action="store_true", help="compare with the committed table of this triton")
    parser.add_argument("--targets", nargs="+", choices=tuple(TARGETS), default=tuple(TARGETS))
    parser.add_argument("--kernels", default="", help="part of a kernel's name")
    arguments = parser.parse_args()
    path = RESULTS / f"aot-triton{triton.__version__}.json"
    rows = table(arguments.targets, arguments.kernels)
    if arguments.check:
        found = differences(rows, json.loads(path.read_text()))
        print("\n".join([*found, f"{len(rows)} built, {len(found)} differ from {path.name}"]))
        return int(bool(found))
    for row in rows:
        print("  ".join(f"{name} {value}" for name, value in row.items()))
    if arguments.write:
        if arguments.kernels:  # the others stay as they were
            rows = [row for row in json.loads(path.read_text()) if arguments.kernels not in row["kernel"]] + rows
        path.write_text("[\n" + ",\n".join(json.dumps(row) for row in rows) + "\n]\n")
        print(path.name)
    return int(any(row["spilled_bytes"] > SPILLS for row in rows))


if __name__ == "__main__":
    sys.exit(main())
