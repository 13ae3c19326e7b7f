"""Does the divergence from the base predict what is forgotten, and which divergence?

Said      that forgetting is a quadratic function of KL(base‖policy) on the new task (arXiv:2509.04259), and that KL on
          prior-task prompts is what counts (arXiv:2607.04364)
Runs      every trained run of every comparison and study in the result folders; nothing is trained
Predicts  KL(policy‖base) and KL(base‖policy), nats per token, on new-task prompts and on prior-task prompts
Forgotten the share of pretraining facts that is gone (1 - fact recall); and retention of the base less retention after,
          where the base of that seed was measured
Judged    the best predictor has the highest R2 of the monotone fit on left-out experiments (left-out methods where
          there is one experiment), decided before any number was seen
Run       python -m experiments.kl_law [FOLDER ...] [--results]        seconds
Writes    runs/kl_law/{report.md, report.html, summary.json, kl_law.png}, with --results into experiments/results
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from uft.comparison.tables import markdown_table, terminal_table
from uft.record import environment, write_json
from uft.reporting.page import write_page

from .figures import family_names, family_styles, plt, save
from .fits import FITS, Correlation, correlation, fitted_r2, left_out_r2, r2, resampled_spearman, within_r2
from .reporting.folders import ResultError, read_result
from .reporting.runs import KL, LAB, REAL, Run, runs_of

RESULTS = Path(__file__).parent / "results"
OUTCOMES = {"forgotten": "share of facts forgotten", "lost": "retention lost since the base"}
REAL_OUTCOMES = {"forgotten": "1 - knowledge (likelihood of held-out text)", "lost": OUTCOMES["lost"]}
OWN_CURVE = 8  # runs, from which on a method gets a curve of its own
LIMITS = """\
- One small world: the same facts and tasks in every experiment of the lab, and the same base model for a seed, except
  where model size is what varies. A left-out experiment is new in its settings, not in its models.
- KL is per token, along answers sampled at temperature 1 to fixed prompts (256 of the new task), until their end.
- "New task" are unmarked skill prompts, which demonstrations teach and preferences are not about. "Prior task" are
  prompts for facts, and facts are also what forgetting is measured on: that KL there predicts better is to be expected.
- Correlation over runs that differ in method, learning rate and data: no run was trained to have a certain KL.
- Runs of one setting differ by seed alone; intervals resample whole settings, or whole seeds. With few seeds the second
  are too narrow.
- A monotone curve fits the runs it has seen better than a quadratic by construction, and is level beyond them, where a
  quadratic goes on: compare the R² of runs left out."""
REAL_LIMIT = (
    "Here knowledge is itself the likelihood of held-out text, so KL on text measures nearly the same thing and has to "
    "predict it; the comparison of interest is between the two KLs on demonstrations."
)


def judged(runs: Sequence[Run], outcome: str, draws: int = 2000) -> dict[str, Any]:
    """How well each KL predicts one outcome, over these runs."""
    runs = [run for run in runs if np.isfinite(getattr(run, outcome))]
    y = np.array([getattr(run, outcome) for run in runs])
    xs = np.array([[run.kl[name] for run in runs] for name in KL])
    groups = {by: [getattr(run, by) for run in runs] for by in ("experiment", "method", "setting", "seed")}
    resampled = {by: resampled_spearman(xs, y, groups[by], draws) for by in ("setting", "seed")}
    table = {
        name: {
            **{f"r2_{fit}": fitted_r2(fit, x, y) for fit in FITS},
            **{f"r2_{fit}_left_out_{by}": left_out_r2(fit, x, y, groups[by])
               for fit in FITS for by in ("experiment", "method")},
            "r2_within_seeds": within_r2(x, y, groups["seed"]),
            **{f"rho_by_{by}": correlation(x, y, found[:, k], groups[by])._asdict() for by, found in resampled.items()},
        }
        for k, (name, x) in enumerate(zip(KL, xs))
    }  # fmt: skip
    criterion = f"r2_monotone_left_out_{'experiment' if len(set(groups['experiment'])) > 1 else 'method'}"
    best = max(KL, key=lambda name: np.nan_to_num(table[name][criterion], nan=-np.inf))
    finite = resampled["setting"][np.isfinite(resampled["setting"]).all(1)]
    highest = np.mean(finite.argmax(1) == list(KL).index(best)) if len(finite) else np.nan
    return {
        "runs": len(runs), "settings": len(set(groups["setting"])), "seeds": sorted(set(groups["seed"])),
        "experiments": dict(Counter(groups["experiment"])), "criterion": criterion, "best": best,
        "highest_rho_in_resamples": float(highest), "predictors": table,
        "methods": _methods(runs, y, xs, list(KL).index(best)),
    }  # fmt: skip


def _methods(runs: Sequence[Run], y: np.ndarray, xs: np.ndarray, best: int) -> dict[str, Any]:
    """Per method: R2 of a quadratic of its own on each KL, and of the best predictor's curve over all methods."""
    curve = FITS["monotone"](xs[best], y)
    found = {}
    for method in dict.fromkeys(run.method for run in runs):
        own = np.array([run.method == method for run in runs])
        enough = own.sum() >= OWN_CURVE
        found[method] = {
            "runs": int(own.sum()),
            "own": {n: fitted_r2("quadratic", x[own], y[own]) if enough else float("nan") for n, x in zip(KL, xs)},
            "common": r2(y[own], curve(xs[best][own])) if enough else float("nan"),
        }
    return found


def draw(path: Path, runs: Sequence[Run], found: Mapping[str, Any], outcome: str, label: str) -> None:
    """A panel per KL: a mark per run, the quadratic dashed, the monotone curve solid."""
    families = {run.method: run.family for run in runs}
    styles = family_styles(families)
    y = np.array([getattr(run, outcome) for run in runs])
    figure, panels = plt.subplots(2, 2, figsize=(8.6, 7.0), sharey=True)
    for panel, (name, title) in zip(panels.flat, KL.items()):
        x = np.array([run.kl[name] for run in runs])
        for family, style in styles.items():
            own = np.array([run.family == family for run in runs])
            panel.plot(x[own], y[own], style.marker, color=style.colour, alpha=0.45, markersize=4, mew=0)
        along = np.linspace(x.min(), x.max(), 300)
        for (fit, curve), dash in zip(FITS.items(), ("--", "-")):
            panel.plot(along, curve(x, y)(along), dash, color="black", lw=1.2, label=fit)
        of = found["predictors"][name]
        numbers = f"R² {of['r2_quadratic']:.2f} quadratic, {of['r2_monotone']:.2f} monotone"
        panel.set_title(f"{title}\n{numbers}", loc="left", fontsize=9)
        panel.set_xlabel("nats per token")
        margin = 0.06 * (np.ptp(y) or 1.0)
        panel.set_ylim(y.min() - margin, y.max() + margin)
    for panel in panels[:, 0]:
        panel.set_ylabel(label)
    figure.tight_layout(rect=(0, 0, 1, 0.93), h_pad=1.6)
    family_names(figure, panels[0, 0], "Does KL predict what is forgotten?  dashed quadratic, solid monotone", styles)
    save(figure, path)


def write(folder: Path, runs: Sequence[Run], lacking: Mapping[str, int], draws: int = 2000) -> str:
    """Writes everything into `folder` and returns the table for the terminal."""
    folder.mkdir(parents=True, exist_ok=True)
    worlds = {world: [run for run in runs if run.world == world] for world in (LAB, REAL)}
    worlds = {world: own for world, own in worlds.items() if own}
    found = {
        world: {o: judged(own, o, draws) for o in OUTCOMES if sum(np.isfinite(getattr(r, o)) for r in own) > 2}
        for world, own in worlds.items()
    }
    drawn = next(iter(worlds))
    labels = {LAB: OUTCOMES, REAL: REAL_OUTCOMES}
    draw(folder / "kl_law.png", worlds[drawn], found[drawn]["forgotten"], "forgotten", labels[drawn]["forgotten"])
    text = ["# Does KL from the base predict what is forgotten?", "", _answer(found, labels), ""]
    if lacking:
        left = ", ".join(f"{name} {n}" for name, n in lacking.items())
        text += [f"Runs left out because a KL was not measured: {left}.", ""]
    text += [f"![Forgetting against KL, a mark per run ({drawn})](kl_law.png)", ""]
    for world, outcomes in found.items():
        for outcome, of in outcomes.items():
            text += [f"## {world[0].upper()}{world[1:]}: {labels[world][outcome]}", "", *_tables(of)]
            text += [REAL_LIMIT, ""] if world == REAL and outcome == "forgotten" else []
    text += ["## What limits this", "", LIMITS]
    write_json(
        folder / "summary.json",
        {"question": "Does KL from the base predict what is forgotten?", "found": found, "left_out": dict(lacking),
         "runs": [run._asdict() for run in runs], **environment()},
    )  # fmt: skip
    write_page(folder, "\n".join(text))
    return terminal_table(*_predictors(found[drawn]["forgotten"], short=True))


def _answer(found: Mapping[str, Any], labels: Mapping[str, Mapping[str, str]]) -> str:
    sentences = []
    for world, outcomes in found.items():
        for outcome, of in outcomes.items():
            order = sorted(KL, key=lambda name: -np.nan_to_num(of["predictors"][name][of["criterion"]], nan=-np.inf))
            first, second = (of["predictors"][name][of["criterion"]] for name in order[:2])
            left_out, share = of["criterion"].rsplit("_", 1)[1], 100 * of["highest_rho_in_resamples"]
            sentences.append(
                f"In {world}, {labels[world][outcome]} is predicted best by **{KL[order[0]]}**: R² {first:.2f} "
                f"on left-out {left_out}s, against {second:.2f} for {KL[order[1]]}. Its rank correlation is the "
                f"highest of the four in {share:.0f} % of resamples."
            )
    return "\n\n".join(sentences)


def _predictors(of: Mapping[str, Any], short: bool = False) -> tuple[list[str], list[list[str]]]:
    names = {
        "r2_quadratic": "R² quadratic", "r2_monotone": "R² monotone",
        "r2_quadratic_left_out_experiment": "left-out experiments, quadratic",
        "r2_monotone_left_out_experiment": "left-out experiments, monotone",
        "r2_quadratic_left_out_method": "left-out methods, quadratic",
        "r2_monotone_left_out_method": "left-out methods, monotone",
        "r2_within_seeds": "R² within seeds",
    }  # fmt: skip
    names = {k: v for k, v in names.items() if not short or "method" not in k}
    rows = []
    for name, row in of["predictors"].items():
        rho = [str(Correlation(**row[f"rho_by_{by}"])) for by in ("setting", "seed")]
        rows.append([KL[name], *(_number(row[k]) for k in names), *rho[: 1 if short else 2]])
    header = ["predictor", *names.values(), "Spearman’s ρ [95 %, settings]", "ρ [95 %, seeds]"]
    return header[: len(rows[0])], rows


def _tables(of: Mapping[str, Any]) -> list[str]:
    experiments = ", ".join(f"{name} {n}" for name, n in of["experiments"].items())
    methods = [
        [method, str(row["runs"]), *(_number(value) for value in row["own"].values()), _number(row["common"])]
        for method, row in of["methods"].items()
    ]
    header = ["R² per method", "runs", *KL.values(), f"common curve of {KL[of['best']]}"]
    return [
        f"{of['runs']} runs of {of['settings']} settings and {len(of['seeds'])} seeds ({experiments}).", "",
        markdown_table(*_predictors(of)), "",
        "Left out: each experiment, or each method, is predicted by the curve of all others, against their mean; below "
        "0 is worse than that mean. Within seeds: what is left of each seed's mean, by a quadratic.", "",
        markdown_table(header, methods), "",
        f"A quadratic of each method's own, from {OWN_CURVE} runs on; and the monotone curve of all methods together, "
        "judged on the runs of one.", "",
    ]  # fmt: skip


def _number(value: float) -> str:
    return f"{value:.2f}" if np.isfinite(value) else "–"


def main(words: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", type=Path, nargs="*", help="default: every folder of experiments/results")
    parser.add_argument("--results", action="store_true", help="write into experiments/results/kl_law")
    parser.add_argument("--draws", type=int, default=2000, help="resamples of settings and of seeds")
    parser.add_argument("--output", type=Path, default=Path("runs/kl_law"))
    arguments = parser.parse_args(words)
    folders = arguments.folders or sorted(path for path in RESULTS.iterdir() if path.is_dir())
    output = RESULTS / "kl_law" if arguments.results else arguments.output
    try:
        results = [result for result in map(read_result, folders) if result is not None]
        runs, lacking = runs_of(results)
        if len(runs) < 3:
            left = ", ".join(f"{name} {n}" for name, n in lacking.items()) or "none"
            raise ResultError(f"{len(runs)} runs have all of {', '.join(KL)}; runs that lack one: {left}")
    except ResultError as problem:
        print(f"error: {problem}", file=sys.stderr)
        return 1
    print(write(output, runs, lacking, arguments.draws))
    print(f"{output}/report.html, report.md, summary.json and kl_law.png")
    return 0


if __name__ == "__main__":
    sys.exit(main())
