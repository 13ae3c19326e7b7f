"""A report on disk: report.md, report.json (numbers alone, no text of the data) and a PNG per section."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from uft.data.quality.markdown import markdown


def write_report(findings: Mapping[str, Any], folder: str | Path) -> Path:
    from uft.data.quality.figures import draw
    from uft.record import write_json

    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "report.json", dict(findings))
    # before the figures too: what was measured is not lost with a picture of it
    (folder / "report.md").write_text(markdown(findings), encoding="utf-8")
    (folder / "report.md").write_text(markdown(findings, draw(findings, folder)), encoding="utf-8")
    return folder / "report.md"
