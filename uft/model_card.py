"""The model card of a trained model, from the records of its stages and what lies in its folder.

    model_card(name, records, folder)     the text
    write_model_card(folder, records)     README.md of the folder
    update_measures(folder)               the section of measures alone, as `uft eval` does it

Folders of this machine are not named: of a file its name is said, of a base model from a folder that it was one.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from uft.card_measures import BEGIN, END, measured
from uft.licences import hub_id, licence_of
from uft.papers import DIVERGENCES, linked, loss_described, preset_papers

TAGS = ("uft", "unified-fine-tuning")
CARD = "README.md"
LEGEND = (
    "Above, π is the model, π_ref the reference, y a response to x, y_w the chosen and y_l the rejected one; "
    "r = β log π(y | x) / π_ref(y | x) is the implicit reward, Δ = r_w − r_l, s a score in [0, 1], A an advantage, σ "
    "the logistic function. Every term is averaged over its own tokens, pairs or responses of the whole optimiser step."
)
VLLM_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
REFERENCES = {
    "FrozenReference": "a frozen model of its own",
    "AdapterReference": "the same weights with the trained adapter off, or with an earlier one",
    "cached": "the model as it was before this stage, by log-probabilities computed beforehand",
}


def model_card(
    name: str,
    records: Mapping[str, Any] | Sequence[Mapping[str, Any]],
    tags: Sequence[str] = TAGS,
    folder: str | Path | None = None,
) -> str:
    """Markdown with a YAML header, as model hubs read it; `records` are one, or one per stage."""
    records = [records] if isinstance(records, Mapping) else list(records)
    folder = None if folder is None else Path(folder)
    last = records[-1]
    model = last["model"]
    base = hub_id(model.get("base"))
    stages = "one stage" if len(records) == 1 else f"{len(records)} stages, one after the other,"
    adapter = _is_adapter(records, folder)
    lines = [
        "---",
        _header(records, base, adapter, tags),
        "---",
        "",
        f"# {name}",
        "",
        f"Trained in {stages} by unified-finetuning ({model['architecture']}, {model['parameters']:,} parameters, of "
        f"which {model['trained_parameters']:,} were trained). "
        + (f"Base model: [{base}](https://huggingface.co/{base})." if base else "It began with no model of the hub.")
        + _adapter_said(last["config"], model),
        "",
        "## How to use",
        "",
        *_use(name, base, adapter, folder),
    ]
    for number, record in enumerate(records, start=1):
        title = f"## Stage {number}: {record.get('stage', '')}" if len(records) > 1 else "## Training"
        lines += ["", title, "", *_stage(record)]
    lines += ["", LEGEND]
    if folder is not None:
        lines += ["", *measured(folder, records)]
    versions = ", ".join(f"{package} {version}" for package, version in last["versions"].items())
    commit = f", commit {last['commit']}" if last["commit"] else ""
    lines += ["", "## Limits", "", *_limits(records), "", f"Versions: {versions}{commit}.", ""]
    return "\n".join(lines)


def write_model_card(folder: str | Path, records: Any, name: str | None = None, tags: Sequence[str] = TAGS) -> None:
    """README.md of the folder."""
    text = model_card(name or Path(folder).resolve().name, records, tags, folder)
    (Path(folder) / CARD).write_text(text, encoding="utf-8")


def update_measures(folder: str | Path) -> bool:
    """Writes the section of measures of a card again, from what lies in the folder; the rest stays as it is, whatever
    was written there by hand.  False where there is no card with such a section, or no run.json."""
    card, found = Path(folder) / CARD, None
    with contextlib.suppress(OSError, ValueError):
        text = card.read_text(encoding="utf-8")
        found = json.loads((card.parent / "run.json").read_text(encoding="utf-8"))
    if (
        not isinstance(found, dict)
        or text.count(BEGIN) != 1
        or text.count(END) != 1
        or text.index(END) < text.index(BEGIN)
    ):
        return False
    before, rest = text.split(BEGIN)
    section = "\n".join(measured(card.parent, found.get("stages") or [found]))
    card.write_text(before + section + rest.split(END)[1], encoding="utf-8")
    return True


def _is_adapter(records: Sequence[Mapping[str, Any]], folder: Path | None) -> bool:
    """What the folder holds; before anything is saved there, what one stage will save."""
    if folder is not None and (folder / "adapter_config.json").exists():
        return True
    if folder is not None and any((folder / f"model.safetensors{end}").exists() for end in ("", ".index.json")):
        return False
    return bool(records[-1]["model"].get("adapter")) and len(records) == 1


def _header(records: Sequence[Mapping[str, Any]], base: str | None, adapter: bool, tags: Sequence[str]) -> str:
    from huggingface_hub import ModelCardData

    licence = licence_of(base)
    origins = [origin for record in records for origin in _origins(record).values()]
    data = ModelCardData(
        base_model=base,
        datasets=list(dict.fromkeys(filter(None, map(hub_id, origins)))) or None,
        library_name="peft" if adapter else "transformers",
        pipeline_tag="text-generation",
        tags=list(tags),
        **({} if licence is None else licence._asdict()),
    )
    if base:
        data["base_model_relation"] = "adapter" if adapter else "finetune"
    return data.to_yaml()


def _origins(record: Mapping[str, Any]) -> dict[str, str]:
    return dict(record["data"].get("train", {}).get("origins") or {})


# ---- how it was trained ----


def _stage(record: Mapping[str, Any]) -> list[str]:
    config, compute, objective = record["config"], record["compute"], record["objective"]
    terms = [
        f"| {t['name']} | {t.get('loss', t['type'])} | {t['on']} | {t['weight']} | {t.get('beta', '')} |"
        for t in objective["terms"]
    ]
    said, papers = [], list(preset_papers(objective["name"]))
    for term in objective["terms"]:
        described = loss_described(term.get("loss", ""))
        equation = described.equation or DIVERGENCES.get(term.get("direction", ""), "")
        options = {k: v for k, v in term.items() if k not in ("name", "type", "on", "weight", "loss", "beta")}
        if equation:
            more = "".join(f", {key} = {value}" for key, value in options.items() if key != "direction")
            source = f" ({'; '.join(map(linked, described.papers))})" if described.papers else ""
            said.append(f"- `{term['name']}`: {equation}{more}{source}")
        papers = [paper for paper in papers if not any(paper in cited for cited in described.papers)]
    balance = objective.get("balance")
    reference = record.get("reference")
    cited = f" ({linked(', '.join(papers))})" if papers else ""
    return [
        f"Objective `{objective['name']}`{cited}:",
        "",
        "| term | loss | on | weight | beta |",
        "|---|---|---|--:|--:|",
        *terms,
        "",
        *([*said, ""] if said else []),
        *([f"Reference: {REFERENCES[reference]}.", ""] if reference in REFERENCES else []),
        *([f"Weights are decided in training by `{balance}`.", ""] if balance else []),
        *_data(record),
        "",
        f"{record['steps']:,} steps, learning rate {config.get('learning_rate')}, seed {record['seed']}; "
        f"{compute.get('tokens', 0):,} tokens, {compute.get('flops', 0):.3g} FLOPs (reference passes included), "
        f"{compute.get('seconds', 0):.0f} s.",
        *_cost(record),
    ]


def _data(record: Mapping[str, Any]) -> list[str]:
    train = record["data"].get("train", {})
    origins, kinds = _origins(record), train.get("kinds", {})
    rows = []
    for source, size in train.get("sizes", {}).items():
        origin = origins.get(source)
        on_hub = hub_id(origin)
        licence = licence_of(origin, "dataset")
        place = f"[{on_hub}](https://huggingface.co/datasets/{on_hub})" if on_hub else "not on the hub"
        if origin and not on_hub:
            place = f"`{Path(origin).name}`, {place}"
        of_kind = ", ".join(kinds.get(source, [])) or "–"
        rows.append(f"| {source} | {size:,} | {of_kind} | {place} | {licence.license if licence else 'not known'} |")
    fingerprint = train.get("fingerprint")
    return [
        "| data set | examples | kind | from | licence |",
        "|---|--:|---|---|---|",
        *rows,
        *(["", f"Fingerprint of the tokenised data: `{fingerprint[:16]}`."] if fingerprint else []),
    ]


def _cost(record: Mapping[str, Any]) -> list[str]:
    compute, hardware = record["compute"], record.get("hardware", {})
    gpus = hardware.get("gpu") or []
    on = f"{len(gpus)} × {gpus[0]}" if gpus else hardware.get("cpu")
    cores = f", {hardware['cores']} cores" if not gpus and hardware.get("cores") else ""
    parts = [f"on {on}{cores}"] if on else []
    if peak := compute.get("peak_memory_bytes"):
        parts.append(f"peak memory {peak / 2**30:.2f} GiB")
    passes = {"policy_forwards": "forward", "backwards": "backward", "reference_forwards": "reference"}
    if ran := [f"{compute[name]:,.0f} {said}" for name, said in passes.items() if compute.get(name)]:
        parts.append(f"sequences passed: {', '.join(ran)}")
    if skipped := compute.get("skipped_steps"):
        parts.append(f"{skipped:,.0f} steps skipped, whose loss or gradient was not finite")
    text = "; ".join(parts)
    return ["", f"{text[0].upper()}{text[1:]}."] if text else []


# ---- how it is used ----


def _use(name: str, base: str | None, adapter: bool, folder: Path | None) -> list[str]:
    chat = folder is None or (folder / "chat_template.jinja").exists()
    where = base or "FOLDER_OF_THE_BASE_MODEL"
    if adapter:
        imports = ["from peft import PeftModel", "from transformers import AutoModelForCausalLM, AutoTokenizer"]
        load = [
            f'base = AutoModelForCausalLM.from_pretrained("{where}", dtype="auto")',
            "model = PeftModel.from_pretrained(base, MODEL)",
        ]
        rank = _adapter_rank(folder)
        serve = f'vllm serve "{where}" --enable-lora --lora-modules tuned=MODEL --max-lora-rank {rank}'
    else:
        imports = ["from transformers import AutoModelForCausalLM, AutoTokenizer"]
        load = ['model = AutoModelForCausalLM.from_pretrained(MODEL, dtype="auto")']
        serve = "vllm serve MODEL"
    ask = ['inputs = tokenizer("...", return_tensors="pt")']
    if chat:
        ask = [
            'messages = [{"role": "user", "content": "..."}]',
            "inputs = tokenizer.apply_chat_template(",
            '    messages, add_generation_prompt=True, return_dict=True, return_tensors="pt"',
            ")",
        ]
    code = [
        *imports,
        "",
        f'MODEL = "{name}"  # this repository, or the folder that it was downloaded to',
        "tokenizer = AutoTokenizer.from_pretrained(MODEL)",
        *load,
        *ask,
        "written = model.generate(**inputs, max_new_tokens=128)[0, inputs.input_ids.shape[1] :]",
        "print(tokenizer.decode(written, skip_special_tokens=True))",
    ]
    return ["```python", *code, "```", "", f"Or served: `{serve}`."]


def _adapter_said(config: Mapping[str, Any], model: Mapping[str, Any]) -> str:
    if not model.get("adapter") or not config.get("use_peft"):
        return ""
    return f" Trained as a LoRA adapter of rank {config.get('lora_r')}, alpha {config.get('lora_alpha')}."


def _adapter_rank(folder: Path | None) -> int:
    """The smallest rank that vLLM can be told and that holds the adapter's."""
    rank = 0
    if folder is not None and (folder / "adapter_config.json").exists():
        rank = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8")).get("r", 0)
    return next((allowed for allowed in VLLM_RANKS if allowed >= (rank or 16)), VLLM_RANKS[-1])


def _limits(records: Sequence[Mapping[str, Any]]) -> list[str]:
    idle = sorted({name for record in records for name in record.get("idle_terms") or []})
    return [
        "The model has what its base model and the data above have taught it, their errors and preferences included; "
        "what it was not measured on under Evaluation is not known. Losses of training say nothing about safety or "
        "facts. Licences of base model and data apply.",
        *([f"Terms that found no row in the data: {', '.join(idle)}."] if idle else []),
    ]
