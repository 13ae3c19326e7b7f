"""The model card of a trained model, from the record of its run."""

from __future__ import annotations

from typing import Any


def model_card(name: str, record: dict[str, Any], tags: list[str]) -> str:
    """Markdown with a YAML header, as model hubs read it."""
    config, compute = record["config"], record["compute"]
    header = ["---", "library_name: transformers", "tags:", *(f"- {tag}" for tag in tags), "---", ""]
    terms = [
        f"| {t['name']} | {t.get('loss', t['type'])} | {t['on']} | {t['weight']} | {t.get('beta', '')} |"
        for t in record["objective"]["terms"]
    ]
    sources = [f"| {source} | {size:,} |" for source, size in record["data"].get("train", {}).get("sizes", {}).items()]
    return "\n".join(
        [
            *header,
            f"# {name}",
            "",
            f"Trained in one stage with the objective `{record['objective']['name']}` of unified-finetuning "
            f"({record['model']['architecture']}, {record['model']['parameters']:,} parameters, of which "
            f"{record['model']['trained_parameters']:,} were trained).",
            "",
            "| term | loss | on | weight | beta |",
            "|---|---|---|--:|--:|",
            *terms,
            "",
            "| data set | examples |",
            "|---|--:|",
            *sources,
            "",
            f"{record['steps']:,} steps, learning rate {config.get('learning_rate')}, seed {record['seed']}; "
            f"{compute.get('tokens', 0):,} tokens, {compute.get('flops', 0):.3g} FLOPs (reference passes included), "
            f"{compute.get('seconds', 0):.0f} s.",
            "",
            "Versions: "
            + ", ".join(f"{k} {v}" for k, v in record["versions"].items())
            + f", commit {record['commit']}.",
            "",
        ]
    )
