"""What is in the files that real feedback comes in, and what is left of them after filtering?

Data      pairs, scores, labels and demonstrations; pairs_eval, verifiable_eval and demonstrations_heldout_tasks as
          evaluation files
Measured  everything that `uft data check` measures, split by the column `source`
Filtered  by experiments/recipes/data_filter.yaml
Run       python -m experiments.data_quality --data DIR         a few minutes on one core
Writes    experiments/results/data_quality/: report.md, report.json, figures, filter.md and filter.json (the card);
          the filtered rows themselves stay in runs/data_quality/
"""

from __future__ import annotations

import argparse
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from uft.data.filter import run, summary
from uft.data.quality.measure import Options, measure
from uft.data.quality.report import write_report
from uft.data.sources import Source
from uft.recipe import read_yaml

RESULTS = Path(__file__).parent / "results" / "data_quality"
RECIPE = Path(__file__).parent / "recipes" / "data_filter.yaml"


def in_folder(datasets: dict[str, Any], folder: Path) -> dict[str, Any]:
    """The sources of a recipe, with their files in this folder."""
    return {name: options | {"path": str(folder / options["path"])} for name, options in datasets.items()}


def main(words: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="folder of the files")
    parser.add_argument("--made", type=Path, default=Path("runs/data_quality"), help="where the filtered rows go")
    parser.add_argument("--results", type=Path, default=RESULTS, help="where reports go")
    parser.add_argument("--limit", type=int, help="look at the first so many rows of each file only")
    asked = parser.parse_args(words)
    recipe = read_yaml(str(RECIPE))
    limit = {} if asked.limit is None else {"limit": asked.limit}
    for part in ("train_dataset", "eval_dataset"):
        recipe[part] = {name: each | limit for name, each in in_folder(recipe[part], asked.data).items()}

    train, evaluation = (
        [Source(name=n, **o) for n, o in recipe[part].items()] for part in ("train_dataset", "eval_dataset")
    )
    print(write_report(measure(train, evaluation, Options(by="source")), asked.results))
    outcomes, folder = run(recipe | {"output_dir": str(asked.made / "curated"), "overwrite": True})
    print(summary(outcomes))
    shutil.copyfile(folder / "README.md", asked.results / "filter.md")
    shutil.copyfile(folder / "filter.json", asked.results / "filter.json")
    return 0


if __name__ == "__main__":
    sys.exit(main())
