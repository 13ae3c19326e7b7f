"""Rows for every section of an evaluation, as few as tell something."""

from __future__ import annotations

import json
from pathlib import Path

PROMPTS = ["say:", "say a b c:", "hello:", "the cat on the mat:", "1 + 2 =", "good:"]
GOOD = [" hello world", " the cat sat on the mat", " c", " good bye", " 3", " bye bye bye"]
BAD = [" mat the on", " b", " a b c d e f g 1 2 3", " hello", " the cat sat", " g"]

DEMONSTRATIONS = [{"prompt": p, "completion": c} for p, c in zip(PROMPTS, GOOD)]
PAIRS = [{"prompt": p, "chosen": c, "rejected": r} for p, c, r in zip(PROMPTS, GOOD, BAD)]
SUMS = [{"prompt": f"{a} + {b} =", "answer": str(a + b)} for a, b in [(1, 1), (1, 2), (2, 2), (3, 4)]]
CHOICES = [{"prompt": f"pick {letter}:", "answer": "a", "options": k} for letter, k in zip("abc", (2, 4, ["a", "b"]))]
REFUSALS = [{"prompt": prompt, "should_refuse": i % 2 == 0} for i, prompt in enumerate(PROMPTS)]
ALL = {
    "demonstrations": {"held_out": DEMONSTRATIONS},
    "pairs": {"preferences": PAIRS},
    "verifiable": {
        "sums": {"data": SUMS, "verify": "number"},
        "choices": {"data": CHOICES, "verify": "exact"},
    },
    "refusals": {"mixed": {"data": REFUSALS}},
    "prompts": {"plain": {"data": DEMONSTRATIONS, "limit": 3}},
    "divergence": {
        "given": {"data": DEMONSTRATIONS, "along": ["responses", "policy"]},
        "prior": {"data": SUMS, "along": ["policy", "reference"]},
    },
    "generation": {"max_new_tokens": 6},
    "max_length": 64,
}


def write_files(folder: Path) -> dict:
    """The same as files in a folder, and the recipe that names them."""
    recipe = json.loads(json.dumps(ALL))
    for section in ("demonstrations", "pairs", "verifiable", "refusals", "prompts", "divergence"):
        for name, options in recipe[section].items():
            options = {"data": options} if isinstance(options, list) else options
            path = folder / f"{section}-{name}.jsonl"
            path.write_text("\n".join(map(json.dumps, options.pop("data"))))
            recipe[section][name] = options | {"path": path.name}
    return recipe
