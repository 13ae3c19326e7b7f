"""Names of metrics as TensorBoard shows them: grouped by what they are, training beside evaluation.

logged                          tag
loss, eval_loss                 loss/train, loss/eval
loss/sft, eval_loss/sft         loss/sft, loss/sft (eval)
eval_<split>_loss/sft           loss/sft (eval <split>)
<source>/nll                    sources/<source>/nll
learning_rate, num_tokens, ...  optimisation/learning_rate, progress/num_tokens, ...
whatever has a group already    as it is: rewards/margins, weight/sft, conflict/sft-preference/cosine
"""

from __future__ import annotations

from collections.abc import Collection

GROUPS = {
    "optimisation": ("learning_rate", "grad_norm", "skipped_steps"),
    "progress": ("epoch", "num_tokens", "total_flos"),
    "speed": ("runtime", "samples_per_second", "steps_per_second", "tokens_per_second"),
    "memory": ("peak_memory_gib",),
    "divergence": ("kl", "reverse_kl", "entropy", "kl_sequence", "kl_coefficient"),
    "answers": ("length", "ended", "distinct_2", "length_reward_correlation"),
    "reward": ("reward",),
}
_GROUP = {name: group for group, names in GROUPS.items() for name in names}
OF_A_SOURCE = ("nll", "accuracy")


def tag(name: str, sources: Collection[str] = (), splits: Collection[str] = ()) -> str:
    """The tag of a logged metric.

    sources   names of data sets, whose metrics are `<source>/nll` and `<source>/accuracy`
    splits    names of evaluation data sets where there are several, logged as `eval_<split>_...`
    """
    quantity, of = _taken_apart(name, splits)
    if quantity == "loss":
        return f"loss/{of or 'train'}"
    group, slash, rest = quantity.rpartition("/")
    if slash and rest in OF_A_SOURCE and group in sources:
        quantity = f"sources/{quantity}"
    elif not slash:
        quantity = f"{_GROUP.get(quantity, 'other')}/{quantity}"
    elif quantity in ("loss/train", "loss/eval"):  # terms of these names
        quantity += " (term)"
    return f"{quantity} ({of})" if of else quantity


def _taken_apart(name: str, splits: Collection[str]) -> tuple[str, str]:
    """The quantity, and of which evaluation it is; "" in training."""
    if name == "train_loss":  # transformers' mean over the whole run
        return "loss/mean of the run", ""
    if name.startswith("train_") and _GROUP.get(own := name.removeprefix("train_")) == "speed":
        return own, "train"
    for kind in ("eval", "test"):
        if name.startswith(f"{kind}_"):
            rest = name.removeprefix(f"{kind}_")
            split = max((s for s in splits if rest.startswith(f"{s}_")), key=len, default=None)
            return (rest, kind) if split is None else (rest.removeprefix(f"{split}_"), f"{kind} {split}")
    return name, ""
