"""The figure of a benchmark: time as a ratio to the floor, and memory, per case and rival."""

from __future__ import annotations

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np

COLOURS = {"ours": "#c1272d", "ours, fused": "#8b1a1d", "ours, filtered": "#e88a8d",
           "eager": "#8c8c8c", "torch.compile": "#bdbdbd", "F.linear_cross_entropy": "#5b8db8",
           "TRL": "#e0a030", "Liger": "#4d9e6a", "CCE": "#7e5aa2"}  # fmt: skip


def draw(rows: list[dict], told: str, path: Path) -> None:
    """Left the time, right the extra memory; random inputs of the shape with the most logits."""
    largest = max((row for row in rows), key=lambda row: row["shape"]["N"] * row["shape"]["V"])["shape"]
    rows = [row for row in rows if row["shape"] == largest and not row["peaked"]]
    names = [n for n in COLOURS if any("ms" in row["rivals"].get(n, {}) for row in rows)]
    figure, axes = plt.subplots(1, 2, figsize=(12, 0.9 + 0.9 * len(rows)), sharey=True, constrained_layout=True)
    for k, name in enumerate(names):
        at = np.arange(len(rows)) + (k - (len(names) - 1) / 2) * 0.8 / len(names)
        found = [row["rivals"].get(name, {}) for row in rows]
        ratio = np.array([f.get("to_floor", np.nan) for f in found])
        spread = [
            [r * (1 - f["ms"]["low"] / f["ms"]["median"]), r * (f["ms"]["high"] / f["ms"]["median"] - 1)]
            if "ms" in f else [0.0, 0.0]
            for r, f in zip(ratio, found)
        ]  # fmt: skip
        style = {"height": 0.75 / len(names), "color": COLOURS[name], "label": name}
        axes[0].barh(at, ratio, xerr=np.array(spread).T, error_kw={"lw": 0.8}, **style)
        axes[1].barh(at, [f.get("extra_bytes", np.nan) / 2**20 for f in found], **style)
    axes[0].axvline(1.0, color="black", lw=1, ls=":")
    axes[0].set_xlabel("time / floor (the bare matrix products); median and quartiles")
    axes[1].set_xlabel("memory beyond inputs and gradients, MiB")
    axes[1].set_xscale("log")
    axes[0].set_yticks(range(len(rows)), [row["case"].replace(", ", ",\n") for row in rows])
    axes[0].invert_yaxis()
    figure.legend(*axes[1].get_legend_handles_labels(), loc="outside lower center", ncols=7, fontsize=8, frameon=False)
    shape = " x ".join(str(largest[k]) for k in "NDV")
    figure.suptitle(f"N x D x V = {shape}, {rows[0]['dtype']}\n{told}", fontsize=10)
    figure.savefig(path, dpi=130)
    plt.close(figure)
