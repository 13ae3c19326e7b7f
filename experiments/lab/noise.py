"""Labels of the lab turned round on purpose, and what a judge that was trained on other pairs says of them."""

from __future__ import annotations

from typing import Any

import numpy as np

from uft.data.judges import BY
from uft.data.noise import bayes_threshold, cross_validated, detection, flagged, noise_rate

from .base import load_base
from .data import examples, preferences
from .tokenizer import lab_tokenizer
from .world import make_world

VARIANT, FOLDS = "hedged_pairs", 3


def measured(seed: int, flip: float, by: str, pairs: int, options: dict[str, float]) -> dict[str, Any]:
    """One judge on the pairs of one seed with this share turned round."""
    world, base = make_world(seed), load_base(seed)
    clean, given = (preferences(world, f"{VARIANT}~{share}", pairs, seed) for share in (0.0, flip))
    wrong = np.array([a["chosen"] != b["chosen"] for a, b in zip(clean, given, strict=True)])
    shared = {"per_device_train_batch_size": 16, "max_length": 64, "use_cpu": True}
    margin, _ = cross_validated(
        examples(given),
        lambda others: BY[by](others, base, lab_tokenizer(), seed, **shared, **options),
        FOLDS,
        seed,
    )
    rate = noise_rate(margin)
    at = {"zero": 0.0, "bayes": bayes_threshold(rate)}
    return {
        "seed": seed, "flip": flip, "true": float(wrong.mean()), "estimated": rate._asdict(),
        # of what the judge says about the labels as they should be
        "gold_accuracy": float(np.mean((margin > 0) != wrong)),
        **{name: detection(margin, wrong, flagged(margin, t))._asdict() for name, t in at.items()},
    }  # fmt: skip
