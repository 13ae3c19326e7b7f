"""The result of an evaluation: metrics, what they were made of sample by sample, and how both compare with an earlier
evaluation of the same samples."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from uft.evaluation.forgetting import sample_forgetting
from uft.record import write_json

NAME = "evaluation"
Samples = dict[str, dict[str, list]]


@dataclass(frozen=True)
class Report:
    """What `uft.evaluation.evaluate` found.

    metrics   flat, `section/...`
    samples   section -> column -> one value per sample; every section has `id`, and `correct` (and `options`) where a
              sample can be right or wrong
    info      model, configuration, versions, hardware
    before    the metrics of the evaluation it was compared with
    """

    metrics: dict[str, float]
    samples: Samples = field(default_factory=dict, repr=False)
    info: dict[str, Any] = field(default_factory=dict, repr=False)
    before: dict[str, float] | None = field(default=None, repr=False)

    @classmethod
    def of(cls, value: Report | Mapping[str, Any] | str | Path) -> Report:
        """A report, what its JSON holds, or the file, or the folder of it.  Raises ValueError for anything else."""
        if isinstance(value, Report):
            return value
        where = "the earlier evaluation"
        if isinstance(value, (str, Path)):
            path = Path(value)
            path = path / f"{NAME}.json" if path.is_dir() else path
            where = str(path)
            try:
                value = json.loads(path.read_text(encoding="utf-8"))
            except FileNotFoundError:
                raise ValueError(f"{where}: no such file; want the evaluation.json of an earlier run") from None
            except ValueError as error:
                raise ValueError(f"{where}: not valid JSON ({error})") from None
        if not isinstance(value, Mapping) or not {"metrics", "samples"} <= set(value):
            raise ValueError(f"{where}: found no metrics and samples; want what an evaluation has written")
        metrics = {name: math.nan if number is None else number for name, number in value["metrics"].items()}
        return cls(metrics, dict(value["samples"]), dict(value.get("info", {})), value.get("before"))

    def as_dict(self) -> dict[str, Any]:
        return {"metrics": self.metrics, "before": self.before, "info": self.info, "samples": self.samples}

    def write(self, folder: str | Path) -> Path:
        """evaluation.json and evaluation.md in the folder; returns the path of the first."""
        path = Path(folder) / f"{NAME}.json"
        write_json(path, self.as_dict())
        path.with_suffix(".md").write_text(self.markdown() + "\n", encoding="utf-8")
        return path

    # ---- as a table ----

    def rows(self) -> list[tuple[str, ...]]:
        """Header and lines: metric, value, and where there was an earlier evaluation its value and the change."""
        if self.before is None:
            return [("metric", "value"), *((name, _shown(value)) for name, value in self.metrics.items())]
        lines = [("metric", "before", "now", "change")]
        for name, value in self.metrics.items():
            old = self.before.get(name)
            change = "" if old is None else f"{value - old:+.4g}"
            lines.append((name, "" if old is None else _shown(old), _shown(value), change))
        return lines

    def markdown(self) -> str:
        head, *lines = self.rows()
        table = [head, (":--", *["--:"] * (len(head) - 1)), *lines]
        counts = ", ".join(f"{len(columns['id'])} {section}" for section, columns in self.samples.items())
        said = [f"# Evaluation of {self.info.get('model', 'a model')}", ""]
        said += [f"Reference: {self.info['reference']}.  "] if self.info.get("reference") else []
        said += [f"Samples: {counts}.  "] if counts else []
        said += [f"Compared with {self.info['compared_with']}."] if self.info.get("compared_with") else []
        return "\n".join([*said, "", *(f"| {' | '.join(line)} |" for line in table)])

    def __str__(self) -> str:
        lines = self.rows()
        width = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
        pad = [str.ljust, *[str.rjust] * (len(width) - 1)]
        return "\n".join("  ".join(p(cell, w) for p, cell, w in zip(pad, line, width)).rstrip() for line in lines)


def _shown(value: float) -> str:
    return "–" if value is None or math.isnan(value) else f"{value:.4g}"


# ---- against an earlier evaluation ----


def must_be_the_same(ids: Mapping[str, Sequence[str]], before: Report, *, whole: bool = True) -> None:
    """Raises ValueError where samples of the earlier evaluation are others than these, by section and id.

    whole   also where some of these are missing there
    """
    for section, ours in ids.items():
        theirs = before.samples.get(section, {}).get("id")
        if theirs is None:
            found = ", ".join(before.samples) or "nothing"
            raise ValueError(f"the earlier evaluation has samples of {found}; want {section}, to compare with")
        known = {each.partition("~")[0] for each in ours}
        stray = [each for each in theirs if each.partition("~")[0] not in known]
        missing = sorted(set(ours) - set(theirs)) if whole else []
        if stray or missing:
            what = f"{stray[0]!r}, which is not here" if stray else f"no {missing[0]!r}"
            raise ValueError(
                f"{section}: the earlier evaluation has {what} ({len(stray)} too many, {len(missing)} too few); want "
                "the same rows, tokenizer and max_length before and after"
            )


def changes(samples: Samples, before: Report) -> dict[str, float]:
    """`<section>/F`, `BT`, `F_true`, ... of every section in which samples are right or wrong, and
    `demonstrations/nll_change`, the mean over samples of what each lost, nats per token of all.

    Raises ValueError where the samples are not the same.
    """
    must_be_the_same({section: columns["id"] for section, columns in samples.items()}, before)
    found: dict[str, float] = {}
    for section, columns in samples.items():
        then = before.samples[section]
        place = {each: i for i, each in enumerate(then["id"])}
        at = [place[each] for each in columns["id"]]
        if "correct" in columns:
            pre, post = [then["correct"][i] for i in at], columns["correct"]
            known = [i for i, pair in enumerate(zip(pre, post)) if None not in pair]  # not left to a judge
            options = columns.get("options", [None] * len(post))
            if known:
                measured = sample_forgetting(*([column[i] for i in known] for column in (pre, post, options)))
                found |= {f"{section}/{name}": value for name, value in measured._asdict().items()}
        if "nll" in columns:
            rise = np.array(columns["nll"]) - np.array([then["nll"][i] for i in at])
            found[f"{section}/nll_change"] = float(rise.sum() / np.sum(columns["tokens"]))
            found[f"{section}/worse"] = float((rise > 0).mean())
    return found
