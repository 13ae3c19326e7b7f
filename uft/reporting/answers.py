"""What models answered to the same prompts: of one run on its way, of several at their end."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from uft.reporting.groups import Group
from uft.reporting.text import lines, plain, table

PROMPTS, STEPS = 12, 4  # shown at most
Key = tuple[str, str]  # source and prompt


def answers(groups: Sequence[Group]) -> list[str]:
    """Markdown lines; none where no run has samples.  Of a group of seeds its first run that has some speaks."""
    speaking = {g.name: run.samples for g in groups for run in g.runs[::-1] if run.samples}
    if not speaking:
        return []
    asked = _asked(speaking)
    shown = asked[:PROMPTS]
    said = [
        "## Answers", "",
        "Answers to the same prompts, " + ("on the way and " if len(speaking) == 1 else "")
        + "as they were written last" + (", of the first seed." if any(len(g.runs) > 1 for g in groups) else "."), "",
    ]  # fmt: skip
    for source, prompt in shown:
        rows = _rows(speaking, (source, prompt))
        where = f" · {plain(source)}" if source else ""
        said += [table([f"prompt{where}", lines(prompt)], rows, prose=True), ""]
    if len(asked) > PROMPTS:
        said += [f"{len(asked) - PROMPTS} more prompts are in samples.jsonl of the runs.", ""]
    return said


def _asked(speaking: Mapping[str, Sequence[Mapping[str, Any]]]) -> list[Key]:
    """Prompts that most runs answered come first, in the order in which they were written."""
    counts: dict[Key, int] = {}
    for samples in speaking.values():
        for key in dict.fromkeys(_key(sample) for sample in samples):
            counts[key] = counts.get(key, 0) + 1
    return sorted(counts, key=lambda key: -counts[key])


def _key(sample: Mapping[str, Any]) -> Key:
    return str(sample.get("source") or ""), sample["prompt"]


def _rows(speaking: Mapping[str, Sequence[Mapping[str, Any]]], key: Key) -> list[list[str]]:
    mine = {name: [s for s in samples if _key(s) == key] for name, samples in speaking.items()}
    reference = next(
        (s["reference"] for each in mine.values() for s in each if isinstance(s.get("reference"), str)), None
    )
    rows = [] if reference is None else [["*reference*", lines(reference)]]
    for name, samples in mine.items():
        by_step = {sample["step"]: sample["answer"] for sample in samples}
        steps = sorted(by_step)
        if len(speaking) == 1:
            rows += [[f"step {step:,}", lines(by_step[step])] for step in _spread(steps)]
        else:
            rows += [[f"{plain(name)}, step {steps[-1]:,}", lines(by_step[steps[-1]])] if steps else [plain(name), "–"]]
    return rows


def _spread(steps: Sequence[int]) -> list[int]:
    """The first, the last and some between them."""
    if len(steps) <= STEPS:
        return list(steps)
    return [steps[round(i * (len(steps) - 1) / (STEPS - 1))] for i in range(STEPS)]
