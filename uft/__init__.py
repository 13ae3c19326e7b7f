"""Single-stage unified fine-tuning: demonstrations and preferences in one joint objective."""

import importlib
from typing import Any

__version__ = "0.1.0"

# resolved on first use, so that `uft.losses` and `uft.feedback` load without transformers
_WHERE = {
    "Batch": "uft.feedback",
    "Budget": "uft.stages",
    "EvaluationCallback": "uft.evaluation.callback",
    "EvaluationConfig": "uft.evaluation.config",
    "FeedbackDataset": "uft.data.mixture",
    "Objective": "uft.objective",
    "Source": "uft.data.sources",
    "Stage": "uft.stages",
    "UnifiedConfig": "uft.config",
    "UnifiedTrainer": "uft.trainer",
    "evaluate": "uft.evaluation.suite",
    "make_objective": "uft.presets",
    "run_stages": "uft.stages",
}
__all__ = sorted(_WHERE)


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f"module 'uft' has no attribute {name!r}")
    return getattr(importlib.import_module(_WHERE[name]), name)
