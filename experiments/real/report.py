"""The records of the comparison on real data as `summary.json`, `report.md` and figures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from uft.record import environment, write_json

from .. import figures
from ..report import (
    COMPUTE_HEADER,
    SHARED,
    Records,
    by_seed,
    compute_rows,
    contrast_rows,
    lost_since_sft,
    markdown_table,
    mean_of,
    terminal_table,
    write_page,
)
from . import measures

MAIN = {
    "retention": "retention",
    "alignment": "alignment",
    "score": "score",
    "knowledge": "knowledge",
    "demonstrations": "demonstrations",
    "skill": "skill",
    "likelier": "likelier",
    "likelier_token": "likelier per token",
    "polite": "polite",
}
KEPT = {
    "bits_per_byte": "bits per byte",
    "nll": "held-out NLL",
    "exact": "exact answers",
    "heldout_tasks/nll": "NLL, other tasks",
    "heldout_tasks/f1": "F1, other tasks",
    "kl/demonstrations": "KL(π‖base), demonstrations",
    "kl_base_policy/demonstrations": "KL(base‖π), demonstrations",
    "kl/text": "KL(π‖base), text",
    "kl_base_policy/text": "KL(base‖π), text",
}
GAINED = {
    "accuracy_reward": "pairs by reward",
    "margin_reward": "reward margin / β",
    "drift/chosen": "chosen logp, change",
    "drift/rejected": "rejected logp, change",
    "pairs_eval/likelier": "other instructions, likelier",
    "pairs_eval/likelier_token": "... per token",
    "length": "answer tokens",
    "ended": "ends with EOS",
    "repetition": "repeated 4-grams",
}
CONTRASTED = ("score", "retention", "alignment", *measures.RETENTION, *measures.ALIGNMENT)
ABILITIES = {
    "knowledge": "knowledge",
    "demonstrations": "demon-\nstrations",
    "skill": "skill",
    "exact": "exact\nanswers",
    "heldout_tasks/f1": "other\ntasks",
    "likelier": "pairs,\nlikelier",
    "likelier_token": "pairs,\nper token",
    "accuracy_reward": "pairs,\nby reward",
    "polite": "polite\nanswers",
}


def write_report(
    folder: Path, records: Records, arms: Mapping[str, Any], chosen: Mapping[str, Any], facts: Mapping[str, Any]
) -> str:
    """Writes everything into `folder` and returns the table for the terminal."""
    folder.mkdir(parents=True, exist_ok=True)
    labels = {name: arm.label for name, arm in arms.items()}
    trained = {arm: runs for arm, runs in records.items() if runs[0]["compute"]}
    seeds = max(map(len, records.values()))
    text = ["# Sequential against unified fine-tuning, on real data", "", *_setting(facts, seeds), ""]
    text += ["## Results", "", *_table(records, labels, MAIN), _note(seeds), ""]
    text += ["```", measures.__doc__.strip(), "```", ""]
    if compared := contrast_rows(records, arms, chosen, CONTRASTED):
        text += [markdown_table(["difference, paired by seed [95 % interval]", *CONTRASTED], compared), ""]
    text += _figures(folder, records, trained, arms, labels)
    text += ["## What is kept", "", *_table(records, labels, KEPT)]
    text += ["## What is gained", "", *_table(records, labels, GAINED)]
    text += ["By collection of pairs:", "", *_table(records, labels, _collections(records))]
    text += ["## Skills by task", "", *_tasks(records, labels, facts["majority"])]
    text += ["## Compute", "", markdown_table(COMPUTE_HEADER, compute_rows(records, labels)), "", *_spread(trained)]
    text += ["## Search", "", *_search(chosen, labels), "## Rows", "", *_rows(facts["report"])]
    write_page(folder, "\n".join(text))
    write_json(folder / "summary.json", _summary(records, labels, chosen, facts))
    short = {name: MAIN[name] for name in MAIN if name != "score"}
    return terminal_table(["arm", *short.values()], _cells(records, labels, short))


def _cells(records: Records, labels: Mapping[str, str], columns: Mapping[str, str]) -> list[list[str]]:
    return [[labels[arm], *(str(mean_of(runs, name)) for name in columns)] for arm, runs in records.items()]


def _table(records: Records, labels: Mapping[str, str], columns: Mapping[str, str]) -> list[str]:
    return [markdown_table(["arm", *columns.values()], _cells(records, labels, columns)), ""]


def _note(seeds: int) -> str:
    return f"Test part; mean over {seeds} seeds ± half the 95 % t-interval." if seeds > 1 else "Test part; one seed."


def _setting(facts: Mapping[str, Any], seeds: int) -> list[str]:
    scale = facts["settings"]["scale"]
    design = scale["design"]
    rates = max(len(grid) for grid in facts["settings"]["learning_rates"].values())
    bases = facts["bases"]
    return [
        f"Setting `{scale['name']}`: a Llama-style model of {bases[0]['parameters']:,} parameters with a byte-level "
        f"BPE of {scale['base']['vocabulary']:,} entries, pretrained on {scale['base']['tokens']:,} tokens of novels, "
        f"stories and encyclopaedia, one base per seed ({seeds} seeds; "
        f"{np.mean([b['compute']['seconds'] for b in bases]):.0f} s each). The sequential design draws "
        f"{design['demonstrations']:,} demonstrations and then {design['preferences']:,} pairs, of at most "
        f"{scale['max_length']} tokens; what that costs with DPO, reference passes counted, is the compute of every "
        f"arm. Batches of {design['batch_size']}. β is {design['beta']:g} everywhere and was not tuned; every arm had "
        f"{rates} learning rates, tried on seeds {_list(facts['settings']['search_seeds'])} and chosen by the "
        "validation score. The supervised stage is trained once per seed and shared.",
        "",
        f"The judge of politeness is right on {facts['judge']['test']:.2f} of held-out polite rewritings and plain "
        "answers (balanced).",
    ]


def _list(values: Sequence[Any]) -> str:
    return ", ".join(map(str, values))


def _collections(records: Records) -> dict[str, str]:
    first = next(iter(records.values()))[0]["measures"]
    names = [name.split("/")[1] for name in first if name.startswith("likelier/")]
    columns = {
        "likelier": "likelier",
        "likelier_token": "likelier per token",
        "accuracy_reward": "by reward",
        "margin": "margin per token",
    }
    return {f"{column}/{name}": f"{name}, {label}" for name in names for column, label in columns.items()}


def _tasks(records: Records, labels: Mapping[str, str], majority: Mapping[str, float]) -> list[str]:
    tasks = sorted(name.split("/")[1] for name in majority if name.startswith("f1/"))
    rows = [
        [
            task,
            *(f"{mean_of(runs, f'f1/{task}').mean:.2f} / {mean_of(runs, f'exact/{task}').mean:.2f}"
              for runs in records.values()),
            f"{majority[f'f1/{task}']:.2f} / {majority[f'exact/{task}']:.2f}",
        ]
        for task in tasks
    ]  # fmt: skip
    header = ["word F1 / exact", *(labels[arm] for arm in records), "commonest training answer"]
    return [markdown_table(header, rows), ""]


def _spread(trained: Records) -> list[str]:
    flops = [run["compute"]["flops"] for runs in trained.values() for run in runs]
    if not flops:
        return []
    spread = (max(flops) - min(flops)) / np.mean(flops)
    return [f"Largest difference in FLOPs between any two runs: {100 * spread:.2f} %.", ""]


def _search(chosen: Mapping[str, Any], labels: Mapping[str, str]) -> list[str]:
    rows = [
        [labels.get(arm, SHARED), f"{found['learning_rate']:g}", "yes" if found["inside"] else "no",
         ", ".join(f"{trial['learning_rate']:g}: {trial['score']:.3f}" for trial in found["grid"])]
        for arm, found in chosen.items()
    ]  # fmt: skip
    return [markdown_table(["arm", "learning rate", "inside its grid", "validation scores"], rows), ""]


def _rows(report: Mapping[str, Any]) -> list[str]:
    def counts(found: Mapping[str, int]) -> str:
        return ", ".join(f"{name} {n:,}" for name, n in found.items()) or "none"

    rows = [
        [name, f"{found['rows']:,}", counts(found["dropped"]), f"{sum(found['longer than max_length'].values()):,}",
         f"{sum(found['used'].values()):,}"]
        for name, found in report.items() if name != "split"
    ]  # fmt: skip
    split = [
        [name, *(f"{sum(parts[part].values()):,}" for part in ("train", "validation", "test"))]
        for name, parts in report["split"].items()
    ]
    return [
        markdown_table(["source", "rows of the tasks used", "dropped as bad", "longer than max_length", "used"], rows),
        "",
        markdown_table(["source", "train", "validation", "test"], split),
        "",
    ]


def _figures(folder: Path, records: Records, trained: Records, arms, labels: Mapping[str, str]) -> list[str]:
    points = {
        arm: list(zip(by_seed(runs, "alignment").values(), by_seed(runs, "retention").values()))
        for arm, runs in trained.items()  # the base would squeeze the others together
    }
    families = {name: arm.family for name, arm in arms.items()}
    figures.retention_against_alignment(
        folder / "tradeoff.png", points, labels, families, "What is kept, against what is gained (real data)",
        alignment="alignment (held-out pairs by log-likelihood, polite answers)",
        retention="retention (text, demonstrations, tasks)",
    )  # fmt: skip
    written = ["![retention against alignment](tradeoff.png)", ""]
    lost, rows = lost_since_sft(trained, arms, ABILITIES)
    if len(rows):
        figures.matrix(
            folder / "forgetting.png", lost, [labels[row] for row in rows], list(ABILITIES.values()),
            "Difference to the supervised stage", limit=0.5,
        )  # fmt: skip
        written += ["![forgetting](forgetting.png)", ""]
    return written


def _summary(records: Records, labels: Mapping[str, str], chosen: Mapping[str, Any], facts: Mapping[str, Any]):
    names = sorted({name for runs in records.values() for name in runs[0]["measures"]})
    return {
        **facts,
        "search": chosen,
        "arms": {
            arm: {
                "label": labels[arm],
                "measures": {name: mean_of(runs, name)._asdict() for name in names},
                "per_seed": {name: by_seed(runs, name) for name in names},
                "stages": [
                    [
                        {key: stage.get(key) for key in ("stage", "learning_rate", "steps", "compute", "measures")}
                        for stage in run["stages"]
                    ]
                    for run in runs
                ],
                "compute": [run["compute"] for run in runs],
            }
            for arm, runs in records.items()
        },
        **environment(),
    }
