"""What a model card says of measures and samples, from evaluation.json and samples.jsonl in the model's folder, or in
that of its last stage."""

from __future__ import annotations

import contextlib
import json
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

EVALUATION = "evaluation.json"
SAMPLES = "samples.jsonl"
BEGIN, END = "<!-- evaluation -->", "<!-- end of evaluation -->"
SHOWN = 40  # lines of the table of metrics
TEXT = 400  # characters of a prompt or an answer
ANSWERS = 3
# bounds of intervals and sample sizes belong to a metric and get no line of their own
_BESIDE = ("/low", "/high", "/n")
_FORGETTING = ("F", "BT", "F_chance", "BT_chance", "F_true", "BT_true", "F_max", "nll_change", "worse")


def measured(folder: Path, records: Sequence[Mapping[str, Any]]) -> list[str]:
    """The lines of the section between two marks, by which `uft.model_card.update_measures` finds it again."""
    last = folder / str(records[-1].get("stage", ""))  # where `uft compare` keeps what it measured
    report = _json(folder / EVALUATION) or _json(last / EVALUATION)
    losses = _in_training(records)
    lines = [BEGIN, "## Evaluation", "", *losses, *([""] if losses else [])]
    if report is None or not isinstance(report.get("metrics"), dict):
        lines += ["No evaluation beyond the losses of training was made with this library."]
    else:
        lines += [*_table(report), *_forgotten(report)]
    return [*lines, "", *(_samples(folder) or _samples(last)), END]


def _json(path: Path) -> dict[str, Any] | None:
    with contextlib.suppress(OSError, ValueError):
        found = json.loads(path.read_text(encoding="utf-8"))
        return found if isinstance(found, dict) else None
    return None


def _in_training(records: Sequence[Mapping[str, Any]]) -> list[str]:
    """The last losses of each evaluation data set."""
    last: dict[str, float] = {}
    for line in records[-1].get("metrics", []):
        last |= {k: v for k, v in line.items() if k.startswith("eval_") and isinstance(v, (int, float))}
    speed = ("runtime", "samples_per_second", "steps_per_second")
    last = {name: value for name, value in last.items() if not name.endswith(speed)}
    if not last:
        return []
    rows = [f"| {name.removeprefix('eval_')} | {_number(value)} |" for name, value in list(last.items())[:SHOWN]]
    sizes = records[-1].get("data", {}).get("eval", {}).get("sizes", {})
    on = ", ".join(f"{name} ({size:,} examples)" for name, size in sizes.items())
    said = (
        f"On held-out data{f', {on}' if on else ''}, after the last step; exact means, in nats where they are losses:"
    )
    return [said, "", "| measure | value |", "|---|--:|", *rows]


def _table(report: Mapping[str, Any]) -> list[str]:
    metrics, before = report["metrics"], report.get("before") or {}
    names = [name for name in metrics if not name.endswith(_BESIDE) and name.split("/")[-1] not in _FORGETTING]
    counts = {name: len(columns.get("id", [])) for name, columns in (report.get("samples") or {}).items()}
    on = ", ".join(f"{name} ({n:,} samples)" for name, n in counts.items() if n)
    said = f"Measured by `uft eval`{f' on {on}' if on else ''}"
    head = ["metric", "before", "now", "change"] if before else ["metric", "value"]
    rows = []
    for name in names[:SHOWN]:
        now, then = metrics[name], before.get(name)
        interval = [metrics.get(name + end) for end in ("/low", "/high")]
        shown = _number(now) + (f" [{_number(interval[0])}, {_number(interval[1])}]" if None not in interval else "")
        change = "" if then is None or now is None else f"{now - then:+.4g}"
        rows.append([name, _number(then) if then is not None else "", shown, change] if before else [name, shown])
    more = [f"{len(names) - SHOWN} more are in evaluation.json.", ""] if len(names) > SHOWN else []
    aligned = [":--", *["--:"] * (len(head) - 1)]
    table = [f"| {' | '.join(cells)} |" for cells in (head, aligned, *rows)]
    return [f"{said}, {'before and after training' if before else 'after training'}:", "", *table, "", *more]


def _forgotten(report: Mapping[str, Any]) -> list[str]:
    """What was kept and what was lost since the earlier evaluation, section by section."""
    metrics = report["metrics"]
    rows = []
    for name in dict.fromkeys(key.rpartition("/")[0] for key in metrics if key.endswith("/F_true")):
        lost, gained, known = (metrics.get(f"{name}/{each}") for each in ("F_true", "BT_true", "F_max"))
        kept = None if not known or lost is None else 1 - lost / known
        cells = (name, _share(known), _share(kept), _share(lost), _share(gained))
        rows.append(f"| {' | '.join(cells)} |")
    changes = {key.rpartition("/")[0]: value for key, value in metrics.items() if key.endswith("/nll_change")}
    lines = []
    if rows:
        lines += [
            "What was kept and lost, sample by sample, with what guessing alone would show taken off "
            "([arXiv:2510.17776](https://arxiv.org/abs/2510.17776)):",
            "",
            "| section | known before | of it kept | lost | gained |",
            "|---|--:|--:|--:|--:|",
            *rows,
            "",
        ]
    lines += [
        f"Likelihood of {name}: {_number(change)} nats per token since before ({'lost' if change > 0 else 'gained'}); "
        f"{_share(metrics.get(f'{name}/worse'))} of the samples became less likely."
        for name, change in changes.items()
        if change is not None
    ]
    return lines


def _samples(folder: Path) -> list[str]:
    """A few answers to prompts, the newest ones of the file."""
    entries = []
    with contextlib.suppress(OSError):
        for line in (folder / SAMPLES).read_text(encoding="utf-8").splitlines():
            with contextlib.suppress(ValueError):
                entry = json.loads(line)
                if isinstance(entry, dict) and _text(entry, "prompt") and _text(entry, "answer"):
                    entries.append(entry)
    if not entries:
        return []
    step = max(entry.get("step", 0) for entry in entries)
    newest = [entry for entry in entries if entry.get("step", 0) == step][:ANSWERS]
    lines = ["## Samples", "", "Not chosen by hand: the first prompts that were watched, after the last step.", ""]
    for entry in newest:
        prompt, answer = _text(entry, "prompt"), _text(entry, "answer")
        lines += [*_quoted("prompt", prompt), *_quoted("answer", answer), ""]
    return lines


def _text(entry: Mapping[str, Any], name: str) -> str:
    value = entry.get(name)
    return value if isinstance(value, str) else ""


def _quoted(title: str, text: str) -> list[str]:
    """A block of code, with a fence that the text does not hold, so that nothing in it is taken for Markdown."""
    text = text if len(text) <= TEXT else text[: TEXT - 1] + "…"
    fence = "`" * max(3, 1 + max(map(len, re.findall("`+", text)), default=0))
    return [f"{title}:", "", fence, text, fence, ""]


def _number(value: Any) -> str:
    return "–" if not isinstance(value, (int, float)) or math.isnan(value) else f"{value:.4g}"


def _share(value: Any) -> str:
    return "–" if not isinstance(value, (int, float)) or math.isnan(value) else f"{100 * value:.1f} %"
