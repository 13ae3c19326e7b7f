"""One round after another in the lab: choose pairs, ask for their labels, train a reward model, see how well it judges.

even     prompts of the pool are drawn as the test's are: every operator, marked and unmarked, equally often
skewed   one operator makes up 7 of 10 prompts and one of 20 is marked, while the test stays even; some of what
         the test asks is rare among what may be labelled
"""

from __future__ import annotations

import random
from typing import Any

import numpy as np

from uft.data.embedding import pair_embedding, pair_features
from uft.data.judges import reward_trained_on
from uft.data.noise import margins
from uft.data.selection import Pool, diversity, select

from .base import load_base
from .data import Row, examples, preferences, variant_of
from .data import _pair as judged_pair
from .tokenizer import lab_tokenizer
from .world import COVERED, TEST, Task, draw_string, make_world

VARIANT = "hedged_pairs"
COMMON, MARKED = 0.7, 0.05  # shares of the skewed pool
TRAINING = {"learning_rate": 1e-3, "max_length": 64, "use_cpu": True, "warmup_steps": 0.1}
BATCH = 16  # pairs per step


def pool_rows(pool: str, count: int, seed: int) -> list[Row]:
    """The pairs that may be labelled, with the labels that would be given."""
    if pool == "even":
        return preferences(make_world(seed), VARIANT, count, seed)
    rows = []
    for row in range(count):
        rng = random.Random(f"skewed pool {seed} {row}")
        common = COVERED[seed % len(COVERED)]
        operator = common if rng.random() < COMMON else rng.choice([name for name in COVERED if name != common])
        task = Task(operator, draw_string(rng), "!" if rng.random() < MARKED else "")
        rows.append({"prompt": task.prompt} | judged_pair(task, variant_of(VARIANT), rng, False))
    return rows


def learning_curves(
    pool: str, seed: int, rules: list[str], budgets: list[int], size: int, members: int, steps: int, tested: int = 512
) -> dict[str, Any]:
    """Per rule the accuracy on held-out pairs after each budget of labels; all rules begin with the same random ones.

    Rewards are trained afresh in each round, for `steps` steps whatever the budget; `members` of them where a rule asks
    for several, of which the first is measured.
    """
    world, base, tokenizer = make_world(seed), load_base(seed), lab_tokenizer()
    pairs = examples(pool_rows(pool, size, seed))
    test = examples(preferences(world, VARIANT, tested, seed, TEST))
    embedding = pair_embedding(base.base_model, pairs, tokenizer.pad_token_id)
    first = np.random.default_rng([seed, 1]).permutation(size)[: budgets[0]]

    def train(labelled: np.ndarray, member: int):
        batch = min(BATCH, len(labelled))
        known = [pairs[i] for i in labelled]
        return reward_trained_on(
            known, base, tokenizer, 1000 * member + seed, max_steps=steps, per_device_train_batch_size=batch, **TRAINING
        )

    beginning = [train(first, member) for member in range(members if "disagreement" in rules else 1)]
    curves, spread = {}, {}
    for rule in rules:
        labelled, rewards, accuracy = first, beginning, []
        for budget, following in zip(budgets, [*budgets[1:], None]):
            wanted = members if rule == "disagreement" else 1
            if len(labelled) > len(first):
                # the last round only measures
                rewards = [train(labelled, member) for member in range(wanted if following else 1)]
            found = margins(rewards[0], test)
            accuracy.append(float(np.mean(found > 0) + 0.5 * np.mean(found == 0)))
            if following is None:
                break
            left = np.setdiff1d(np.arange(size), labelled)
            candidates = [pairs[i] for i in left]
            judged = rule in ("margin", "disagreement", "change")
            known = Pool(
                margins=np.stack([margins(each, candidates) for each in rewards[:wanted]]) if judged else None,
                features=pair_features(rewards[0], candidates) if rule == "change" else None,
                embedding=embedding[left],
                labelled=embedding[labelled],
            )
            chosen = select(rule, known, following - budget, seed=seed)
            labelled = np.concatenate([labelled, left[chosen.order]])
        curves[rule] = accuracy
        spread[rule] = diversity(embedding[labelled], embedding)._asdict()
    return {"pool": pool, "seed": seed, "budgets": budgets, "accuracy": curves, "diversity": spread}
