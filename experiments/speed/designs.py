"""What one joint stage costs against two: the same demonstrations and pairs, once each, in steps of one size."""

from __future__ import annotations

import shutil
import tempfile
import time
from typing import Any

import torch

from uft.config import UnifiedConfig
from uft.data.mixture import FeedbackDataset
from uft.stages import Stage, run_stages

from ..runs import added_up
from .rivals import LAYOUTS, OURS, Setting, arguments, lora
from .shapes import make_model, make_plain_tokenizer
from .workloads import as_example

DEMONSTRATIONS, PAIRS = "demonstrations", "preferences"


def stages_of(design: str, beta: float) -> list[Stage]:
    if design == "unified":
        return [Stage("unified", {"preset": "dpo_nll", "beta": beta}, on=(DEMONSTRATIONS, PAIRS))]
    return [
        Stage("sft", "sft", on=(DEMONSTRATIONS,)),
        Stage("dpo", {"preset": "dpo", "beta": beta}, on=(PAIRS,), reference="previous"),
    ]


DESIGNS = ("sequential", "unified")


def run_design(design: str, setting: Setting) -> dict[str, Any]:
    """Compute of all stages; `whole_seconds` also holds what is between them, such as copying the reference."""
    device = torch.device(setting.device)
    longest = max(row.longest for row in (*setting.workload.pairs, *setting.workload.demonstrations))
    model = make_model(setting.shape, device, getattr(torch, setting.dtype), longest + 1)
    data = FeedbackDataset({
        DEMONSTRATIONS: [as_example(row) for row in setting.workload.demonstrations],
        PAIRS: [as_example(row) for row in setting.workload.pairs],
    })  # fmt: skip
    folder = tempfile.mkdtemp(prefix="speed-")
    try:
        before = time.perf_counter()
        _, records = run_stages(
            model, stages_of(design, setting.beta), data,
            UnifiedConfig(**arguments(setting, folder, 10), dtype=setting.dtype, **LAYOUTS[OURS]),
            make_plain_tokenizer(), peft_config=lora(setting),
        )  # fmt: skip
        whole = time.perf_counter() - before
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    steps = sum(record["steps"] for record in records)
    return {"design": design, "steps": steps, **added_up(records), "whole_seconds": whole}
