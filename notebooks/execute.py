"""Executes the notebooks at full size and stores what they show, with nothing in the files that another machine or
another run would change.

Run     python notebooks/execute.py [NOTEBOOK ...]      all of them by default; minutes
Writes  the notebooks themselves
"""

from __future__ import annotations

import argparse
import base64
import io
import os
import time
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from PIL import Image

HERE = Path(__file__).resolve().parent
METADATA = {
    "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
    "language_info": {"name": "python"},
}


def execute(path: Path) -> None:
    """Runs all cells in a fresh kernel.  Raises nbclient's CellExecutionError where one fails; the file then stays."""
    notebook = nbformat.read(path, as_version=4)
    # tqdm asks for ipywidgets, in a warning that names a file of this machine; no bar is drawn here
    os.environ.setdefault("PYTHONWARNINGS", "ignore:IProgress not found")
    NotebookClient(
        notebook, timeout=None, kernel_name="python3", coalesce_streams=True, extra_arguments=["--log-level=ERROR"]
    ).execute()
    tidy(notebook)
    nbformat.write(notebook, path)


def tidy(notebook: nbformat.NotebookNode) -> None:
    """Keeps sources and outputs; of metadata the name of the kernel, of figures 128 colours.

    Cells are numbered and not counted, so that the hook that looks after notebooks finds nothing to change.
    """
    notebook.metadata = nbformat.from_dict(METADATA)
    for number, cell in enumerate(notebook.cells):
        cell.id, cell.metadata = str(number), nbformat.from_dict({})
        if cell.cell_type == "code":
            cell.execution_count = None
        for output in cell.get("outputs", []):
            if "metadata" in output:
                output.metadata = nbformat.from_dict({})
            if png := output.get("data", {}).get("image/png"):
                output.data["image/png"] = with_palette(png)


def with_palette(png: str) -> str:
    """The same picture, base64, at about a third of the bytes: figures of lines and letters have few colours."""
    image = Image.open(io.BytesIO(base64.b64decode(png))).convert("RGB").quantize(128)
    small = io.BytesIO()
    image.save(small, "PNG", optimize=True)
    return base64.b64encode(small.getvalue()).decode()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("notebooks", nargs="*", type=Path, default=sorted(HERE.glob("*.ipynb")))
    for path in parser.parse_args().notebooks:
        start = time.perf_counter()
        execute(path)
        print(f"{path.name}: {time.perf_counter() - start:.0f} s, {path.stat().st_size / 1024:.0f} KB", flush=True)


if __name__ == "__main__":
    main()
