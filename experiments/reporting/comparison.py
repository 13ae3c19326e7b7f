"""The main comparison: what its summary holds, and the text and figures that are made from a summary alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from uft.comparison.statistics import effect_size, holm, interquartile_mean, interval, paired_difference, sign_flip
from uft.comparison.tables import markdown_table

from .. import figures
from ..search import RETENTION
from .tables import (
    ABILITIES,
    COLUMNS,
    COMPUTE_HEADER,
    CONTRASTED,
    LIKE_WITH_LIKE,
    SHARED,
    Records,
    best_of,
    by_seed,
    compute_row,
    lost_by_seed,
    mean_of,
    named_contrasts,
    signed,
)

MAIN = ("score", "retention", "alignment", "skill_covered", "skill_uncovered", "refusal!_covered",
        "refusal!_uncovered", "refusal.", "fact_recall")  # fmt: skip
KL = {"kl_base": "KL(π‖base)", "kl_from_base": "KL(base‖π)", "kl_base_prior": "KL(π‖base), facts",
      "kl_from_base_prior": "KL(base‖π), facts"}  # fmt: skip
LABELS = COLUMNS | KL | {"score": "score", "skill": "skill"}
DRAWN = {"skill": "skill", "alignment": "alignment", "refusal.": "refuses “.”", "fact_recall": "facts"}
SETTINGS = {"learning_rate": "learning rate", "first_rate": "learning rate of a first stage of its own", "beta": "beta"}
CURVES_OF = 2  # arms of each family


def summary_of(records: Records, arms: Mapping[str, Any], chosen: Mapping[str, Any]) -> dict[str, Any]:
    """Arm -> everything that a report says about it."""
    names = [*COLUMNS, "score", "skill"]
    names += [n for n in KL if n not in names and all(n in r["measures"] for runs in records.values() for r in runs)]
    lost, followed = lost_by_seed(records, arms), _followed(records, arms, chosen)
    return {
        arm: {
            "label": arms[arm].label,
            "family": arms[arm].family,
            "measures": {c: mean_of(runs, c)._asdict() for c in names},
            "interquartile_mean": {c: interquartile_mean(list(by_seed(runs, c).values())) for c in MAIN},
            "per_seed": {c: by_seed(runs, c) for c in names},
            "compute": [run["compute"] for run in runs],
            "steps": [[s.get("steps", 0) for s in run["stages"]] for run in runs],
            **({"lost": lost[arm]} if arm in lost and runs[0]["compute"] else {}),
            **({"curve": _curve(runs)} if arm in followed else {}),
        }
        for arm, runs in records.items()
    }


def _followed(records: Records, arms: Mapping[str, Any], chosen: Mapping[str, Any]) -> set[str]:
    return most_followed({arm: {"family": arms[arm].family} for arm, r in records.items() if r[0]["compute"]}, chosen)


def most_followed(arms: Mapping[str, Mapping[str, Any]], chosen: Mapping[str, Any]) -> set[str]:
    """The arms whose curves are kept and drawn: of each family those that were best in the search."""
    found = set()
    for family in {arm["family"] for arm in arms.values()}:
        own = [name for name, arm in arms.items() if arm["family"] == family]
        found |= set(sorted(own, key=lambda name: -chosen.get(name, {}).get("score", 0.0))[:CURVES_OF])
    return found


def _curve(runs: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The points along a run's compute, stage boundaries marked; each quantity as mean, lowest and highest of seeds."""
    along = [list(zip(*(_points(run) for run in runs)))][0]
    return [
        {"flops": float(np.mean([p["flops"] for p in same])), "boundary": same[0]["boundary"]}
        | {n: [float(f([p[n] for p in same])) for f in (np.mean, np.min, np.max)] for n in DRAWN}
        for same in along
    ]


def _points(run: Mapping[str, Any]) -> list[dict[str, Any]]:
    points, before = [], 0.0
    for position, stage in enumerate(run["stages"]):
        cost = stage["compute"].get("flops", 0)
        for point in stage.get("curve", []):
            at = before + cost * point["step"] / point["of"]
            points.append({"flops": at, "boundary": False, **{name: point[name] for name in DRAWN}})
        before += cost
        last = position + 1 == len(run["stages"])
        points.append({"flops": before, "boundary": not last, **{name: stage["measures"][name] for name in DRAWN}})
    return points


# ---- from here on from a summary alone ----


def comparison_text(summary: Mapping[str, Any], folder: Path, *, prefix: str = "", detail: bool = True) -> list[str]:
    """Markdown lines of all tables of a comparison; figures go into `folder`, their names begin with `prefix`.

    detail   also measures beside the main ones, compute and search
    """
    tables, search = summary["tables"], summary["search"]
    text = [*_named(tables, search), *_like_with_like(tables)]
    for title, variants in tables.items():
        text += [f"## {title}", ""]
        for variant, arms in variants.items():
            slug = f"{prefix}{'{}'}-{'flops' if 'FLOPs' in title else 'examples'}-{variant}.png"
            text += [f"### Preferences: {variant}", ""]
            text += _one_table(arms, search.get(variant, {}), variant, folder, slug, "FLOPs" in title, detail)
    return [*text, "## Search", "", *_search(search, tables)] if detail else text


def _values(arm: Mapping[str, Any], name: str) -> dict[int, float]:
    return {int(seed): value for seed, value in arm["per_seed"][name].items()}


def _differences(one: Mapping[str, Any], other: Mapping[str, Any]) -> list[float]:
    """Of the scores, seed by seed that both have."""
    x, y = _values(one, "score"), _values(other, "score")
    return [x[seed] - y[seed] for seed in sorted(set(x) & set(y))]


def family_of(name: str, arm: Mapping[str, Any]) -> str:
    """As the summary says; older ones do not."""
    if "family" in arm:
        return arm["family"]
    return "unified" if name.startswith("unified") else "sequential" if name.startswith("sft_") and name not in (
        "sft_chosen",) else "control"  # fmt: skip


def _named(tables: Mapping[str, Any], search: Mapping[str, Any]) -> list[str]:
    """The contrasts that were named beforehand, and the only tests: on the score, over all tables, with Holm."""
    rows, tests = [], {}
    for title, variants in tables.items():
        for variant, arms in variants.items():
            families = {name: family_of(name, arm) for name, arm in arms.items()}
            for a, b in named_contrasts(families, search.get(variant, {}), arms):
                found = _differences(arms[a], arms[b])
                if len(found) < 2:
                    continue
                key = f"{title} {variant} {a} {b}"
                tests[key] = sign_flip(found)
                rows.append((key, title, variant, f"{arms[a]['label']} − {arms[b]['label']}", found))
    if not rows:
        return []
    adjusted = holm(tests)
    shown = [
        [name, title.split(" (")[0].lower(), variant, signed(interval(d)), f"{interquartile_mean(d):+.3f}",
         f"{effect_size(d):+.1f}", f"{sum(x > 0 for x in d)} of {len(d)}", f"{tests[key]:.3f}", f"{adjusted[key]:.3f}"]
        for key, title, variant, name, d in rows
    ]  # fmt: skip
    header = ["score, paired by seed", "table", "preferences", "difference [95 % interval]", "interquartile mean",
              "effect size d", "seeds above 0", "p (sign flips)", "p (Holm)"]  # fmt: skip
    return [
        "## The contrasts named beforehand", "",
        "The best unified arm, by the search, against the best sequential arm, by the search, and against likelihood "
        "on demonstrations and chosen answers. p by flipping signs of the seeds' differences, exact, then adjusted for "
        "all rows here (Holm). Nothing else in this report is a test.", "",
        markdown_table(header, shown), "",
    ]  # fmt: skip


def _like_with_like(tables: Mapping[str, Any]) -> list[str]:
    rows = []
    for title, variants in tables.items():
        for variant, arms in variants.items():
            for a, b in LIKE_WITH_LIKE:
                found = _differences(arms[a], arms[b]) if a in arms and b in arms else []
                if len(found) > 1:
                    rows.append(
                        [f"{arms[a]['label']} − {arms[b]['label']}", title.split(" (")[0].lower(), variant,
                         signed(interval(found)), f"{effect_size(found):+.1f}",
                         f"{sum(d > 0 for d in found)} of {len(found)}"]
                    )  # fmt: skip
    if not rows:
        return []
    header = ["score, paired by seed", "table", "preferences", "difference [95 % interval]", "effect size d",
              "seeds above 0"]  # fmt: skip
    return [
        "## Like with like", "",
        "Arms that replay the same, or nothing. Chosen after the first of these tables had been seen: described, not "
        "tested.", "",
        markdown_table(header, rows), "",
    ]  # fmt: skip


def _one_table(arms, chosen, variant: str, folder: Path, slug: str, equal_flops: bool, detail: bool) -> list[str]:
    counts = sorted({len(arm["per_seed"]["score"]) for arm in arms.values()})
    families = {name: family_of(name, arm) for name, arm in arms.items()}
    shown = _figures(arms, families, chosen, variant, folder, slug)
    seeds = " or ".join(map(str, counts))
    text = [*shown[:2], _measures(arms, MAIN), "", f"Means over {seeds} seeds ± half the 95 % t-interval.", ""]
    contrasted = [
        [f"{arms[a]['label']} − {arms[b]['label']}",
         *(signed(paired_difference(_values(arms[a], n), _values(arms[b], n))) for n in CONTRASTED)]
        for a, b in named_contrasts(families, chosen, arms)
    ]  # fmt: skip
    if contrasted:
        header = ["difference, paired by seed [95 % interval]", *(LABELS[n] for n in CONTRASTED)]
        text += [markdown_table(header, contrasted), ""]
    text += shown[2:]
    if detail:
        others = [n for n in LABELS if n not in (*MAIN, "skill") and all(n in a["per_seed"] for a in arms.values())]
        text += ["Other measures:", "", _measures(arms, others), ""]
        rows = [compute_row(a["label"], a["compute"], [sum(s) for s in a["steps"]]) for a in arms.values()]
        text += ["Compute:", "", markdown_table(COMPUTE_HEADER, rows), ""]
    flops = [c["flops"] for arm in arms.values() for c in arm["compute"] if c]
    if equal_flops and flops:
        spread = (max(flops) - min(flops)) / np.mean(flops)
        text += [f"Largest difference in FLOPs between any two runs: {100 * spread:.2f} %.", ""]
    return text


def _measures(arms: Mapping[str, Any], names: Sequence[str]) -> str:
    rows = [
        [arm["label"], *(str(interval(list(arm["per_seed"][name].values()))) for name in names)]
        for arm in arms.values()
    ]
    return markdown_table(["arm", *(LABELS[name] for name in names)], rows)


def _figures(arms, families, chosen, variant: str, folder: Path, slug: str) -> list[str]:
    folder.mkdir(parents=True, exist_ok=True)
    trained = {name: arm for name, arm in arms.items() if arm["compute"] and arm["compute"][0]}
    if not trained:  # the base alone
        return []
    labels = {name: arm["label"] for name, arm in arms.items()}
    order = [n for f in figures.family_styles(families) for n in trained if families[n] == f]
    text = []

    def shown(kind: str, caption: str) -> Path:
        text.extend([f"![{caption}]({slug.format(kind)})", ""])
        return folder / slug.format(kind)

    # the base would squeeze the others together
    points = {n: list(zip(*(list(_values(trained[n], m).values()) for m in ("alignment", "retention")))) for n in order}
    figures.retention_against_alignment(
        shown("tradeoff", "What is kept against what is gained: a mark at each arm's mean, lines its 95 % t-intervals, "
                          "cut where they would leave the panel."),
        points, labels, families, f"What is kept, against what is gained ({variant})",
    )  # fmt: skip
    baseline = best_of("sequential", families, chosen, order)
    if baseline and len(order) > 1:
        quantities = {"score": "score", "retention": "retention", "alignment": "alignment"}
        found = {
            n: {label: paired_difference(_values(trained[n], m), _values(trained[baseline], m))
                for m, label in quantities.items()}
            for n in order if n != baseline
        }  # fmt: skip
        figures.differences(
            shown("differences", f"Each arm less {labels[baseline]}, the best sequential arm by the search: paired by "
                                 "seed, lines are 95 % t-intervals, not adjusted for their number."),
            found, labels, families, f"Difference to {labels[baseline]} ({variant})",
        )  # fmt: skip
    if lost := [n for n in order if "lost" in trained[n]]:
        values = np.array([[np.mean(list(trained[n]["lost"][a].values())) for a in ABILITIES] for n in lost])
        figures.matrix(
            shown("forgetting", "What each arm has after training, less what its seed's supervised stage had."),
            values, [labels[n] for n in lost], list(ABILITIES.values()),
            f"Difference to the supervised stage ({variant})", families=[families[n] for n in lost],
        )  # fmt: skip
    if followed := {n: trained[n]["curve"] for n in order if "curve" in trained[n]}:
        figures.curves(
            shown("curves", f"Along the compute, for the {CURVES_OF} arms of each family that were best in the search: "
                            "means over seeds, and from the lowest to the highest."),
            followed, labels, families, DRAWN,
        )  # fmt: skip
    cost = {
        n: {
            "TFLOPs": np.mean([c["flops"] for c in trained[n]["compute"]]) / 1e12,
            "seconds": np.mean([c["seconds"] for c in trained[n]["compute"]]),
            "optimiser steps": np.mean([sum(steps) for steps in trained[n]["steps"]]),
        }
        for n in order
    }
    figures.costs(
        shown("cost", "What a run of each arm cost; reference passes count as FLOPs."), cost, labels, families,
        f"Cost of a run ({variant})",
    )  # fmt: skip
    return text


def _search(search: Mapping[str, Mapping[str, Any]], tables: Mapping[str, Any]) -> list[str]:
    text = [f"Score = (retention + alignment) / 2 on other prompts; retention = mean of {', '.join(RETENTION)}.", ""]
    labels = {
        name: arm["label"] for variants in tables.values() for arms in variants.values() for name, arm in arms.items()
    }
    for variant, found in search.items():
        found = {arm: settings for arm, settings in found.items() if "learning_rate" in settings}
        names = {n: t for n, t in SETTINGS.items() if any(s.get(n) is not None for s in found.values())}
        rows = [
            [labels.get(arm, SHARED if arm == "sft_stage" else arm),
             *("–" if s.get(n) is None else f"{s[n]:.3g}" for n in names),
             f"{s.get('score', 0):.3f}", str(s.get("trials", "–")),
             *("–" if s.get(k) is None else "yes" if s[k] else "no" for k in ("inside", "beta_inside"))]
            for arm, s in found.items()
        ]  # fmt: skip
        header = ["arm", *names.values(), "score", "trials", "rate inside its range", "beta inside its range"]
        text += [f"Preferences: {variant}", "", markdown_table(header, rows), ""]
    return text
