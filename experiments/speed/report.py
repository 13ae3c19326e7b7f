"""Table and figure of the benchmark of training."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np

from .measure import STAGES
from .parts import PARTS
from .rivals import OURS, OURS_PACKED, OURS_PADDED, TOLD, TRL, TRL_COMPACT
from .workloads import CHOSEN

COLOURS = {OURS: "#0072B2", OURS_PACKED: "#56B4E9", OURS_PADDED: "#A6CEE3", TRL: "#D55E00", TRL_COMPACT: "#E69F00"}
OF_PARTS = ["#999999", "#CC79A7", "#0072B2", "#56B4E9", "#009E73", "#F0E442", "#444444"]
DARK = ("#0072B2", "#009E73", "#444444", "#CC79A7")
TUNING = {"full": "all weights", "lora": "LoRA"}
REFERENCE = {"live": "reference in every step", "cached": "reference computed before"}


def goals_of(cases: list[dict]) -> list[dict[str, Any]]:
    """What was aimed at, case by case, and what was measured: ours to TRL."""
    found = []
    for case in timed(cases):
        ratio, setting = case["to_trl"].get(OURS), case["setting"]
        if setting["device"] == "cpu":
            want = {"rate": 1.6 if case["case"].startswith("long") else 1.3}
        elif setting["shape"] == "1.5b" and case["case"].startswith("long"):
            want = {"rate": 1.6, "memory": 0.7}
        else:
            continue
        if ratio is not None:
            rate, held = ratio["rate"]["median"], ratio["memory"]
            met = rate >= want["rate"] and ("memory" not in want or (held is not None and held <= want["memory"]))
            short = case["to_short_head"].get(OURS, {}).get("rate", {}).get("median")
            found.append({"shape": setting["shape"], "case": case["case"], "want": want, "rate": rate, "memory": held,
                          "met": met, "rate_to_short_head": short})  # fmt: skip
    return found


def timed(cases: list[dict]) -> list[dict]:
    return [case for case in cases if case["case"] != STAGES]


def title(case: dict) -> str:
    name, tuning, reference = case["case"].split()
    return f"{name} prompts, {TUNING[tuning]}, {REFERENCE[reference]}"


def machine(record: dict) -> str:
    hardware, versions = record["hardware"], record["versions"]
    at = ", ".join(hardware.get("gpu", [])) or f"{hardware['cpu']}, {hardware['threads']} of {hardware['cores']} cores"
    told = ", ".join(f"{name} {versions.get(name)}" for name in ("torch", "transformers", "trl", "peft"))
    return f"{at}; {told}; {record['date'][:10]}, commit {record['commit']}"


def table(record: dict) -> str:
    lines = [
        "# A training step beside TRL's: DPO + likelihood of the chosen answer", "", machine(record) + ".", "",
        "Medians and extremes of rounds in which the rivals ran in turn, each in a process of its own. Rate: response",
        "tokens per second, data included. Memory: the highest during training, on a CPU resident and beyond libraries",
        "and loaded model; tensors: what those of one step take at most beyond weights and optimiser. Ratios are to",
        "TRL as it is.", "",
        *(f"- {name}: {told}." for name, told in TOLD.items()), "",
    ]  # fmt: skip
    if record["goals"]:
        lines += [
            "## Goals",
            "",
            "Ours to TRL.",
            "",
            "| shape | case | wanted | measured | met | beside its short head |",
            "|---" * 6 + "|",
        ]
        for goal in record["goals"]:
            want = " and ".join(f"{'≥' if k == 'rate' else '≤'} {v} x {k}" for k, v in goal["want"].items())
            short = f"{goal['rate_to_short_head']:.2f} x rate" if goal["rate_to_short_head"] else "-"
            found = f"{goal['rate']:.2f} x rate, {_shown(goal['memory'])} x memory"
            met = "yes" if goal["met"] else "no"
            lines.append(f"| {goal['shape']} | {goal['case']} | {want} | {found} | {met} | {short} |")
        lines.append("")
    for case in timed(record["cases"]):
        lines += of_case(case)
    for case in record["cases"]:
        if case["case"] == STAGES:
            lines += of_stages(case)
    return "\n".join(lines).rstrip() + "\n"


def _shown(ratio: float | None) -> str:
    return "-" if ratio is None else f"{ratio:.2f}"


def of_case(case: dict) -> list[str]:
    setting, data = case["setting"], case["workload"]
    worst = {name: max(found.values()) for name, found in case["agreement"].items() if name != OURS}
    lines = [
        f"## {setting['shape']}: {title(case)}", "",
        f"{data['pairs']} pairs ({case['rows']}; {CHOSEN[case['case'].split()[0]]}; at most {setting['max_length']} "
        f"tokens), {setting['batch_size']} per step: prompts {data['P']:.0f} tokens, responses {data['R']:.0f}, the "
        f"longer of two {data['longer_to_shorter_response']:.1f} times the shorter, "
        f"{100 * data['padding']:.0f} % padding in padded batches. "
        f"Limit of running a prompt once, 2(P+R)/(P+2R): {data['limit_of_sharing']:.2f}.", "",
        "Largest relative difference from ours of loss, gradient norm or log-probability in any checked step: "
        + (", ".join(f"{name} {error:.0e}" for name, error in worst.items()) or "nothing to compare with") + ".", "",
        "| | rate | to TRL | CPU time to TRL | memory MiB | to TRL | tensors MiB | reference before, s |",
        "|---|--:|--:|--:|--:|--:|--:|--:|",
    ]  # fmt: skip
    for name, r in case["rivals"].items():
        if "missing" in r:
            lines.append(f"| {name} | {r['missing']} | | | | | | |")
            continue
        ratio = case["to_trl"].get(name)
        to_trl = ["-"] * 3
        if ratio:
            rate = ratio["rate"]
            to_trl = [f"**{rate['median']:.2f}** [{rate['low']:.2f}, {rate['high']:.2f}]",
                      f"{ratio['cpu_seconds']:.2f}", _shown(ratio["memory"])]  # fmt: skip
        tensors = "-" if r["tensors"] is None else f"{r['tensors'] / 2**20:.0f}"
        prepared = f"{r['prepared']['median']:.2f}" if r["prepared"]["median"] else "-"
        cells = [f"{r['rate']['median']:.0f} [{r['rate']['low']:.0f}, {r['rate']['high']:.0f}]", to_trl[0], to_trl[1],
                 f"{r['memory']['median'] / 2**20:.0f}", to_trl[2], tensors, prepared]  # fmt: skip
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    lines += ["", "Milliseconds per step and part, of a run with timers:", "",
              "| | " + " | ".join(PARTS) + " |", "|---" + "|--:" * len(PARTS) + "|"]  # fmt: skip
    steps = setting["steps"] - setting["warmup"]
    for name, r in case["rivals"].items():
        if "missing" not in r:
            lines.append(f"| {name} | " + " | ".join(f"{1000 * r['parts'][p] / steps:.1f}" for p in PARTS) + " |")
    return [*lines, ""]


def of_stages(case: dict) -> list[str]:
    ratio = case["unified_to_sequential"]
    lines = [
        f"## {case['setting']['shape']}: one joint stage against two", "",
        f"{case['workload']['pairs']} demonstrations and as many pairs ({case['rows']}), once each, "
        f"{case['setting']['batch_size']} examples per step; sequential is SFT, then DPO.", "",
        "| | seconds | with copies between | TFLOPs | tokens | reference passes | steps |", "|---" + "|--:" * 6 + "|",
    ]  # fmt: skip
    for design, found in case["designs"].items():
        seconds, whole = (float(np.median([run[k] for run in found])) for k in ("seconds", "whole_seconds"))
        one = found[0]
        lines.append(f"| {design} | {seconds:.2f} | {whole:.2f} | {one['flops'] / 1e12:.3f} | {one['tokens']} | "
                     f"{one['reference_forwards']} | {one['steps']} |")  # fmt: skip
    s = ratio["seconds"]
    lines.append(f"| unified / sequential | **{s['median']:.2f}** [{s['low']:.2f}, {s['high']:.2f}] | "
                 f"{ratio['whole_seconds']:.2f} | {ratio['flops']:.3f} | {ratio['tokens']:.3f} | "
                 f"{ratio['reference_forwards']:.3f} | {ratio['steps']:.3f} |")  # fmt: skip
    return [*lines, ""]


def draw(record: dict, path: Path) -> None:
    """Left the rate, right where a step's time goes; a bar per rival and case."""
    bars = [
        (case, name, found)
        for case in timed(record["cases"])
        for name, found in case["rivals"].items()
        if "missing" not in found
    ]
    if not bars:
        return
    several = len({case["setting"]["shape"] for case, *_ in bars}) > 1
    places, heads, at = [], {}, 0.0
    for k, (case, *_) in enumerate(bars):
        first = k == 0 or bars[k - 1][0] is not case
        at += 1.9 if first and k else 1.0
        places.append(at)
        if first:
            heads[at] = (f"{case['setting']['shape']}: " if several else "") + title(case)
    figure, (left, right) = plt.subplots(
        1, 2, figsize=(12.5, 1.4 + 0.27 * at), sharey=True, width_ratios=[1, 1.15], constrained_layout=True
    )
    for (case, name, found), y in zip(bars, places):
        rate = found["rate"]
        error = [[rate["median"] - rate["low"]], [rate["high"] - rate["median"]]]
        left.barh(y, rate["median"], xerr=error, height=0.82, color=COLOURS[name], error_kw={"lw": 0.9, "capsize": 2})
        ratio = case["to_trl"].get(name)
        if ratio and name != TRL:
            left.text(rate["high"], y, f"  {ratio['rate']['median']:.2f} x", va="center", fontsize=7.5)
        whole, begin = sum(found["parts"].values()), 0.0
        for part, colour in zip(PARTS, OF_PARTS):
            share = max(0.0, found["parts"][part] / whole)
            right.barh(y, share, left=begin, height=0.82, color=colour, label=part if y == places[0] else None)
            if share > 0.05:
                right.text(begin + share / 2, y, f"{100 * share:.0f}", ha="center", va="center", fontsize=7,
                           color="white" if colour in DARK else "black")  # fmt: skip
            begin += share
    for y, told in heads.items():
        left.text(0.0, y - 0.95, told, fontsize=8.5, fontweight="bold", va="center")
    left.set_yticks(places, [name for _, name, _ in bars], fontsize=8)
    left.set_ylim(max(places) + 0.7, min(places) - 1.6)
    left.margins(x=0.12)
    left.set_xlabel("response tokens per second; median and extremes of rounds; ratio to TRL")
    right.set_xlabel("share of a step's time, of a run with timers (%)")
    right.set_xlim(0, 1)
    right.set_xticks(np.linspace(0, 1, 6), [f"{20 * k}" for k in range(6)])
    handles, names = right.get_legend_handles_labels()
    right.legend(handles, names, ncols=len(PARTS), loc="lower center", bbox_to_anchor=(0.5, 1.0), frameon=False,
                 fontsize=8)  # fmt: skip
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
    figure.suptitle(machine(record), fontsize=8.5, x=0.01, ha="left")
    figure.savefig(path, dpi=140)
    plt.close(figure)
