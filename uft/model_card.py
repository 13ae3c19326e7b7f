"""The model card of a trained model, from the records of its stages."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

TAGS = ("uft", "unified-fine-tuning")


def model_card(name: str, records: Mapping[str, Any] | Sequence[Mapping[str, Any]], tags: Sequence[str] = TAGS) -> str:
    """Markdown with a YAML header, as model hubs read it; `records` are one, or one per stage."""
    records = [records] if isinstance(records, Mapping) else list(records)
    last = records[-1]
    model = last["model"]
    base = [f"base_model: {model['base']}"] if model.get("base") else []
    stages = "one stage" if len(records) == 1 else f"{len(records)} stages, one after the other,"
    lines = [
        "---",
        f"library_name: {'peft' if model.get('adapter') and len(records) == 1 else 'transformers'}",
        *base,
        "tags:",
        *(f"- {tag}" for tag in tags),
        "---",
        "",
        f"# {name}",
        "",
        f"Trained in {stages} by unified-finetuning ({model['architecture']}, {model['parameters']:,} parameters, of "
        f"which {model['trained_parameters']:,} were trained).",
    ]
    for number, record in enumerate(records, start=1):
        title = f"## Stage {number}: {record.get('stage', '')}" if len(records) > 1 else "## Training"
        lines += ["", title, "", *_stage(record)]
    versions = ", ".join(f"{package} {version}" for package, version in last["versions"].items())
    return "\n".join([*lines, "", f"Versions: {versions}, commit {last['commit']}.", ""])


def _stage(record: Mapping[str, Any]) -> list[str]:
    config, compute = record["config"], record["compute"]
    terms = [
        f"| {t['name']} | {t.get('loss', t['type'])} | {t['on']} | {t['weight']} | {t.get('beta', '')} |"
        for t in record["objective"]["terms"]
    ]
    balance = record["objective"].get("balance")
    sources = [f"| {source} | {size:,} |" for source, size in record["data"].get("train", {}).get("sizes", {}).items()]
    return [
        f"Objective `{record['objective']['name']}`:",
        "",
        "| term | loss | on | weight | beta |",
        "|---|---|---|--:|--:|",
        *terms,
        "",
        *([f"Weights are decided in training by `{balance}`.", ""] if balance else []),
        "| data set | examples |",
        "|---|--:|",
        *sources,
        "",
        f"{record['steps']:,} steps, learning rate {config.get('learning_rate')}, seed {record['seed']}; "
        f"{compute.get('tokens', 0):,} tokens, {compute.get('flops', 0):.3g} FLOPs (reference passes included), "
        f"{compute.get('seconds', 0):.0f} s.",
    ]


def write_model_card(folder: str | Path, records: Any, name: str | None = None, tags: Sequence[str] = TAGS) -> None:
    """README.md of the folder."""
    text = model_card(name or Path(folder).resolve().name, records, tags)
    (Path(folder) / "README.md").write_text(text, encoding="utf-8")
