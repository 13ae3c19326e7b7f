"""A folder with a tiny model, data and recipes of a comparison and of a sweep; as small as shows something."""

import copy
import json

import yaml

from uft.cli import main

PROMPTS = ["say:", "say a b c:", "hello:", "the cat on the mat:", "1 + 2 =", "good:"]
GOOD = [" hello world", " the cat sat on the mat", " c", " good bye", " 3", " bye bye bye"]
BAD = [" mat the on", " b", " a b c d e f g 1 2 3", " hello", " the cat sat", " g"]
DEMONSTRATIONS = [{"prompt": p, "completion": c} for p, c in zip(PROMPTS, GOOD)]
PAIRS = [{"prompt": p, "chosen": c, "rejected": r} for p, c, r in zip(PROMPTS, GOOD, BAD)]

TRAINING = {
    "model": "tiny",
    "train_dataset": {"instructions": {"path": "demonstrations.jsonl"}, "preferences": {"path": "pairs.jsonl"}},
    "max_steps": 3,
    "per_device_train_batch_size": 2,
    "learning_rate": 1e-3,
    "use_cpu": True,
    "disable_tqdm": True,
    "report_to": "none",
    "samples": 0,
    "output_dir": "out",
}
COMPARISON = TRAINING | {
    "arms": {
        "sequential": {
            "stages": [
                {"name": "sft", "objective": "sft", "on": "instructions", "max_steps": 2},
                {"name": "dpo", "objective": {"preset": "dpo", "beta": 0.2}, "on": "preferences"},
            ]
        },
        "joint": {"objective": "dpo_nll", "learning_rate": 2e-3},
    },
    "seeds": [0, 1],
    "measure": {
        "demonstrations": {"held_out": {"path": "demonstrations.jsonl"}},
        "pairs": {"held_out": {"path": "pairs.jsonl"}},
    },
    "save_models": False,
}
SWEEP = TRAINING | {
    "objective": "dpo_nll",
    "eval_dataset": {"instructions": {"path": "demonstrations.jsonl"}},
    "max_steps": 2,
    "sweep": {"learning_rate": {"low": 1e-4, "high": 1e-2, "log": True}, "objective.beta": [0.1, 0.5]},
    "metric": "eval_loss/sft",
    "trials": 3,
    "sampler": "random",
}


def changed(recipe, changes):
    """The recipe with `a.b.c: value` put over it; None takes a key away."""
    result = copy.deepcopy(recipe)
    for key, value in changes.items():
        *path, last = key.split(".")
        node = result
        for part in path:
            node = node[int(part)] if isinstance(node, list) else node[part]
        if value is None:
            node.pop(last)
        else:
            node[last] = value
    return result


def write(folder, name, recipe):
    (folder / name).write_text(yaml.safe_dump(recipe, sort_keys=False))


def fill(folder, base):
    """Links the model and writes data and recipes."""
    (folder / "tiny").symlink_to(base)
    for name, rows in (("demonstrations", DEMONSTRATIONS), ("pairs", PAIRS)):
        (folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    write(folder, "compare.yaml", COMPARISON)
    write(folder, "sweep.yaml", SWEEP)


def uft(*words):
    return main(list(map(str, words)))


def read(path):
    return json.loads(path.read_text())
