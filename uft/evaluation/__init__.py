"""What a run forgot and what it gained: measured by likelihood, by ranking, by exact divergence and by generating.

forgetting, tradeoff                 arithmetic on results of any origin
likelihood, preference, divergence   what a model says of responses that are given or sampled
generation, verifiable, judge        what it writes, and whether that is right, refused or better
suite, callback                      all of it, after training (`uft eval`) and during it
"""

import importlib
from typing import Any

# resolved on first use: arithmetic needs no transformers
_WHERE = {
    "EvaluationCallback": "uft.evaluation.callback",
    "EvaluationConfig": "uft.evaluation.config",
    "Report": "uft.evaluation.report",
    "alignment_tax": "uft.evaluation.tradeoff",
    "backward_transfer": "uft.evaluation.forgetting",
    "evaluate": "uft.evaluation.suite",
    "forgetting_matrix": "uft.evaluation.forgetting",
    "hypervolume": "uft.evaluation.tradeoff",
    "ideal_distance": "uft.evaluation.tradeoff",
    "mean_forgetting": "uft.evaluation.forgetting",
    "optimality_gaps": "uft.evaluation.tradeoff",
    "pareto_front": "uft.evaluation.tradeoff",
    "sample_forgetting": "uft.evaluation.forgetting",
    "score_data": "uft.evaluation.scoring",
}
__all__ = sorted(_WHERE)


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f"module 'uft.evaluation' has no attribute {name!r}")
    return getattr(importlib.import_module(_WHERE[name]), name)
