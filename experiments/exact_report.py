"""What is written of exact paths: how far from the true fronts, in a table, figures and words."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from uft.comparison.statistics import Interval, interval, paired_difference
from uft.record import environment, write_json

from . import exact_figures
from .lab.enumerable.optimum import Front, kl_front, loss_front, reward_front
from .lab.enumerable.paths import Scale, base_policy
from .lab.enumerable.world import World
from .report import markdown_table, terminal_table

# fmt: off
COLUMNS = {
    "sft": "f_SFT", "dpo": "f_DPO", "ideal": "ideal distance", "closest": "closest on the way", "front": "to front",
    "forgotten": "forgotten", "avoidable": "avoidable", "reward": "reward", "reward_front": "to reward front",
    "kl_front": "to KL front", "kl_base": "KL(π‖base)", "kl_from_base": "KL(base‖π)", "kl_optimal": "KL(π‖π*)",
    "sft_uncovered": "f_SFT uncovered", "kl_base_uncovered": "KL(π‖base) unc.", "reward_uncovered": "reward uncovered",
}
# betas of the front of KL and reward
BETAS = (16, 8, 4, 2, 1.4, 1, 0.8, 0.6, 0.5, 0.4, 0.3, 0.25, 0.2, 0.15, 0.1, 0.07, 0.05)
# fmt: on
SHOWN = ("sft", "dpo", "ideal", "closest", "front", "forgotten", "avoidable", "reward", "reward_front")
CONTRASTED = ("ideal", "closest", "front", "forgotten", "avoidable", "reward")
FIGURES = {
    "losses": "paths in the plane of both losses", "reward": "paths by expected reward",
    "kl": "expected reward against KL to the base",
}  # fmt: skip

Records = Mapping[str, Sequence[Mapping[str, Any]]]  # arm -> one record per seed
BySeed = Mapping[str, Mapping[int, Mapping[str, float]]]  # arm -> seed -> measures


@dataclass(frozen=True)
class About:
    """What was trained in and how.

    arms       name -> something with a `label`, a `family`, `judged` and `like`
    contrasts  pairs of arms whose differences are shown
    found      arm -> its learning rate and the trials that led to it, on seed `search_seed`
    """

    world: World
    scale: Scale
    base: Mapping[str, Any]
    arms: Mapping[str, Any]
    contrasts: Sequence[tuple[str, str]]
    found: Mapping[str, Mapping[str, Any]]
    search_seed: int


class Truth(NamedTuple):
    """What is known without training anything but the base."""

    losses: Front
    rewards: Front
    kl: Front

    @classmethod
    def of(cls, world: World, scale: Scale, cache: Path) -> Truth:
        base = base_policy(world, scale, cache)
        return cls(loss_front(world, base, scale.beta), reward_front(world), kl_front(world, base, BETAS))


def judged(truth: Truth, measures: Mapping[str, float]) -> dict[str, float]:
    """Where a policy stands to the fronts.

    ideal         distance to both optima at once, in shares of the front's range
    front         distance to the front of losses, the same
    forgotten     f_SFT above its optimum, nats per token
    avoidable     that part of it which a policy on the front with the same f_DPO does not have
    reward_front, kl_front   distances to the other two fronts
    """
    sft, dpo, reward = measures["sft"], measures["dpo"], measures["reward"]
    return {
        "ideal": truth.losses.ideal_distance(sft, dpo),
        "front": truth.losses.distance(sft, dpo),
        "forgotten": sft - truth.losses.ideal[0],
        "avoidable": sft - truth.losses.needed(dpo),
        "reward_front": truth.rewards.distance(sft, -reward),
        "kl_front": truth.kl.distance(measures["kl_base"], -reward),
    }


def path_of(record: Mapping[str, Any]) -> list[dict[str, float]]:
    """All points of a run; those that end a stage which another follows are marked."""
    points: list[dict[str, float]] = []
    for number, stage in enumerate(record["stages"]):
        points += stage["path"] if number == 0 else stage["path"][1:]
        points[-1] = points[-1] | {"boundary": number + 1 < len(record["stages"])}
    return points


def values_of(truth: Truth, record: Mapping[str, Any]) -> dict[str, float]:
    """All measures of a run: at its end, and the least ideal distance on its way."""
    closest = min(judged(truth, point)["ideal"] for point in path_of(record))
    return record["measures"] | judged(truth, record["measures"]) | {"closest": closest}


def write_report(folder: Path, about: About, truth: Truth, records: Records) -> str:
    """Writes everything into `folder` and returns the table for the terminal."""
    folder.mkdir(parents=True, exist_ok=True)
    by_seed = {name: {r["seed"]: values_of(truth, r) for r in runs} for name, runs in records.items()}
    paths = {name: [path_of(record) for record in runs] for name, runs in records.items()}
    labels = {name: about.arms[name].label for name in records}
    families = {name: about.arms[name].family for name in records}

    def mean(name: str, column: str) -> Interval:
        return interval([values[column] for values in by_seed[name].values()])

    header = ["arm", *COLUMNS.values(), "learning rates", "steps", "GFLOPs"]
    rows = [[labels[name], *(str(mean(name, c)) for c in COLUMNS), *_cost(runs)] for name, runs in records.items()]
    text = ["# How far from the true Pareto front, and by which way?", "", _description(about, truth.losses), ""]
    text += [markdown_table(header, rows), "", _explained(len(next(iter(by_seed.values())))), ""]
    text += [*_contrasts(by_seed, labels, about.contrasts), _in_words(by_seed, labels, families, truth.losses), ""]
    exact_figures.loss_paths(folder / "losses.png", paths, labels, families, truth.losses)
    exact_figures.reward_paths(folder / "reward.png", paths, labels, families, truth.rewards)
    exact_figures.kl_ends(folder / "kl.png", paths, labels, families, truth.kl)
    text += [line for name, title in FIGURES.items() for line in (f"![{title}]({name}.png)", "")]
    text += [
        "Thick lines are means over seeds, hollow marks the end of a first stage; ways that leave a panel are cut.",
        "",
    ]
    text += ["## Learning rates", "", *_searched(records, about)]
    (folder / "report.md").write_text("\n".join(text) + "\n")
    summary = {
        "world": asdict(about.world), "scale": asdict(about.scale), "base": about.base,
        "searched": {name: about.found[name] for name in records},
        "fronts": {
            name: {"x": front.x.tolist(), "y": front.y.tolist(), "weight": front.weight.tolist()}
            for name, front in truth._asdict().items()
        },
        "ideal": truth.losses.ideal, "range": truth.losses.range, "front_nearest_to_ideal": _nearest(truth.losses),
        "arms": {
            name: {
                "label": labels[name], "family": families[name],
                "measures": {c: mean(name, c)._asdict() for c in next(iter(by_seed[name].values())) if c != "step"},
                "per_seed": by_seed[name], "paths": paths[name], "compute": [run["compute"] for run in runs],
                "objectives": [stage["objective"] for stage in runs[0]["stages"]],
            }
            for name, runs in records.items()
        },
        **environment(),
    }  # fmt: skip
    write_json(folder / "summary.json", summary)
    short = [[labels[name], *(str(mean(name, column)) for column in SHOWN)] for name in records]
    return terminal_table(["arm", *(COLUMNS[column] for column in SHOWN)], short)


def _cost(runs: Sequence[Mapping[str, Any]]) -> tuple[str, str, str]:
    rates = " → ".join(f"{stage['learning_rate']:g}" for stage in runs[0]["stages"])
    steps = sum(stage["steps"] for stage in runs[0]["stages"])
    flops = [run["compute"]["flops"] for run in runs if run["compute"]]
    return rates, f"{steps:,}", f"{np.mean(flops) / 1e9:.1f}" if flops else "–"


def _description(about: About, front: Front) -> str:
    world, scale, base = about.world, about.scale, about.base
    half = int(np.argmin(np.abs(front.weight - 0.5)))
    return (
        f"{len(world.prompts)} prompts, {int(world.covered.sum())} of which preferences are about, and "
        f"{len(world.responses)} responses to each; every number is a sum over all of them. f_SFT is in nats per token "
        f"of demonstrations, f_DPO in nats per pair with beta {scale.beta:g} and the base as reference, whatever an "
        f"arm was trained with. The base is a transformer of width {scale.width}, trained for {scale.base_steps} steps "
        f"on documents (KL(documents‖base) is {base['kl_from_documents']:.4f} nats per response): f_SFT "
        f"{base['sft']:.3f}, f_DPO {base['dpo']:.3f}, expected reward {base['reward']:.3f}. Every arm starts there and "
        f"takes {scale.steps} steps of {scale.batch_size} examples, none of which it sees twice. Seeds differ in "
        "examples and their order, not in the base, so that there is one front.\n\n"
        f"The front: where f_SFT is least, {front.x[0]:.3f}, f_DPO is {front.y[0]:.3f}; where f_DPO is least, "
        f"{front.y[-1]:.3f}, f_SFT is {front.x[-1]:.3f}; at equal weights they are {front.x[half]:.3f} and "
        f"{front.y[half]:.3f}. It is that of all tables π(y | x); a transformer can come near it."
    )


def _explained(seeds: int) -> str:
    return (
        f"{seeds} seed{'s' * (seeds > 1)}; mean ± half the 95 % t-interval. Distances are in shares of the front's "
        "ranges: *ideal distance* to both optima at once, *to front* to the nearest policy that exists. *Closest "
        "on the way* is the least ideal distance of all points that were measured: where an oracle would have "
        "stopped. *Forgotten* is f_SFT above its optimum, and *avoidable* the part of it that the policy on the "
        "front with the same f_DPO has not. *To reward front* is the same in the plane of f_SFT and expected "
        "reward, and *to KL front* in that of KL(π‖base) and expected reward; neither depends on a method's own "
        "reference. Rewards and KL, in nats per response, are on covered prompts unless it says otherwise."
    )


def _contrasts(by_seed: BySeed, labels: Mapping[str, str], contrasts: Sequence[tuple[str, str]]) -> list[str]:
    rows = []
    for a, b in contrasts:
        if a in by_seed and b in by_seed:
            row = [f"{labels[a]} − {labels[b]}"]
            for column in CONTRASTED:
                one, other = ({s: v[column] for s, v in by_seed[name].items()} for name in (a, b))
                found = paired_difference(one, other)
                low_high = f" [{found.low:+.3f}, {found.high:+.3f}]" if found.n > 1 else ""
                row.append(f"{found.mean:+.3f}{low_high}")
            rows.append(row)
    if not rows:
        return []
    header = ["difference, paired by seed [95 % t-interval]", *(COLUMNS[column] for column in CONTRASTED)]
    return [markdown_table(header, rows), ""]


def _in_words(by_seed: BySeed, labels: Mapping[str, str], families: Mapping[str, str], front: Front) -> str:
    """What the front says of orders and of joint training, in numbers of this run."""

    def of(name: str, column: str) -> float:
        return float(np.mean([values[column] for values in by_seed[name].values()]))

    text = [f"The front itself comes as near to the ideal point as {_nearest(front):.3f}."]
    for family in ("sequential", "joint"):
        names = [name for name in by_seed if families[name] == family]
        if names:
            best, near = (min(names, key=lambda name: of(name, column)) for column in ("ideal", "closest"))
            text.append(
                f"Of the {family} arms {labels[best]} ends nearest to it ({of(best, 'ideal'):.3f}), "
                f"{of(best, 'front'):.3f} from the front, having forgotten {of(best, 'forgotten'):.3f} nats per token, "
                f"{of(best, 'avoidable'):.3f} of them avoidably; stopped by an oracle, {labels[near]} comes nearest "
                f"({of(near, 'closest'):.3f})."
            )
    for name in by_seed:
        if families[name] == "limit":
            text.append(
                f"The transformer itself, descended by the exact gradient ({labels[name]}), ends "
                f"{of(name, 'front'):.3f} from the front and {of(name, 'ideal'):.3f} from the ideal point: what arms "
                "that see samples are farther away at this weight is due to these and to the number of steps."
            )
    return " ".join(text)


def _nearest(front: Front) -> float:
    return min(front.ideal_distance(x, y) for x, y in zip(front.x, front.y))


def _searched(records: Records, about: About) -> list[str]:
    rows = []
    for name in records:
        arm, found = about.arms[name], about.found[name]
        if "grid" in found and arm.like is None:
            tried = ", ".join(f"{trial['learning_rate']:g}: {-trial['score']:.3f}" for trial in found["grid"])
            rows.append(
                [arm.label, f"{found['learning_rate']:g}", "yes" if found["inside"] else "no", arm.judged, tried]
            )
    if not rows:
        return ["Not searched: every arm has the default."]
    note = (
        f"Of the last stage, on seed {about.search_seed}, by what the arm is judged by; smaller is better. The first "
        "stage of a sequence has the rate that is best for that stage at full length, not tuned at half. Sequences "
        "were first tried at 0.001, 0.003 and 0.009 and then moved to smaller rates, so that they have had two trials "
        "more."
    )
    return [note, "", markdown_table(["arm", "chosen", "inside the grid", "judged by", "trials"], rows)]
