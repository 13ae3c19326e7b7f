"""Does a policy hack its reward, and what keeps it from it?

Proxy     a reward model of few judgements (128 hedged pairs, of 4,096), after the lab's supervised stage
Gold      the hidden utility of what is written, exact, which no run sees
Arms      RLOO for 120 steps with nothing against hacking; with a KL penalty; against an ensemble's mean less its
          disagreement; and with nothing but a guard that stops it: by a KL budget, or without any KL, by disagreement,
          diversity and length.  All but the ensembles have the same proxy
Limits    chosen on seeds 5 and 6, which are not reported; what they are of is looked at in every step
Measured  on held-out prompts of the test, along training: proxy, gold, KL(π ‖ SFT) of sampled responses
Run       python -m experiments.reward_hacking [--results]       about ten minutes on two cores
Writes    runs/reward_hacking/{summary.json, report.md, report.html, reward_hacking.png}
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import LlamaForCausalLM, TrainerCallback

from uft.collation import Collator
from uft.comparison.statistics import interval
from uft.comparison.tables import markdown_table, terminal_table
from uft.record import environment, write_json
from uft.reporting.page import write_page
from uft.rlhf.guards import HackingGuard, Limits
from uft.rlhf.reward import RewardEnsemble
from uft.rlhf.sampling import sample

from .figures import LINES, MARKERS, plt, save
from .jobs import Job, run_jobs
from .lab.data import examples, preference_tasks, preferences
from .lab.measures import JUDGED, MAX_NEW_TOKENS, logp
from .lab.reinforcement import Reinforcement, Rewarding, reinforce, train_rewards
from .lab.tokenizer import decode, lab_tokenizer
from .lab.training import LabStage, Plan, Scale, run_plan
from .lab.world import TEST, VALIDATION, make_world

RESULTS = Path(__file__).parent / "results" / "reward_hacking"
NAME, QUESTION = "reward_hacking", "Does a policy hack its reward, and what keeps it from it?"
VARIANT, JUDGEMENTS, PASSES, RATE = "hedged_pairs", 128, 4, 3e-4
SFT_RATE = 6.11e-4  # what the search of the comparison found for this stage
SCALE = Scale(demonstrations=8192, preferences=4096, sft_draws=9600, preference_draws=3200, batch_size=32)
STEPS = LOGGED = 120
SEEDS = (0, 1, 2, 3, 4)
PROMPTS = 128  # held out, measured on
LOOKED = (0, 2, 4, 6, 8, 10, 14, 20, 28, 40, 60, 80, 100, 120)


@dataclass(frozen=True)
class Arm:
    label: str
    how: Reinforcement
    limits: Limits | None = None


NOTHING = Reinforcement("rloo", kl=0.0, reward_rate=1e-3)
ARMS = {
    "unguarded": Arm("unguarded", NOTHING),
    "kl": Arm("KL penalty 0.2", replace(NOTHING, kl=0.2)),
    "conservative": Arm("mean of 4 − 1 deviation", replace(NOTHING, members=4, conservative=1.0)),
    "guard_kl": Arm("guard: KL budget 1 nat", NOTHING, Limits(kl=1.0)),
    "guard_blind": Arm(
        "guard without KL: ensemble of 4, diversity, length",
        replace(NOTHING, members=4),
        Limits(spread=1.25, distinct=0.75, length=1.25, ended=0.9),
    ),
}


def run(arm: str, seed: int, cache: str, part: str) -> dict[str, Any]:
    """One run: what it was rewarded, what that was worth, and how far it went, along training."""
    spec, world = ARMS[arm], make_world(seed)
    plan = Plan((LabStage("sft", "sft", SFT_RATE, 1.0),), seed, VARIANT, SCALE)
    run_plan(plan, cache, part=part, curves=False, keep_last=True)
    folder = Path(cache) / "stages" / part / plan.key

    def sft() -> LlamaForCausalLM:
        return LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32)

    rows = examples(preferences(world, VARIANT, SCALE.preferences, seed), "preferences")
    rewarding = train_rewards(
        sft(), rows[:JUDGEMENTS], PASSES * JUDGEMENTS, spec.how.reward_rate, SCALE.batch_size, seed, spec.how.members
    )
    look = _Look(rewarding, world, sft().eval(), part)
    guard = [HackingGuard(spec.limits, patience=1)] if spec.limits else []
    policy = sft()
    look.at(0, policy.eval())
    trainer = reinforce(
        policy, rewarding, rows, spec.how, RATE, STEPS, seed, [look, *guard], reference=sft(), logged=LOGGED
    )
    if look.points[-1]["step"] != trainer.state.global_step:
        look.at(trainer.state.global_step, trainer.policy)
    return {
        "arm": arm, "seed": seed, "points": look.points, "steps": trainer.state.global_step,
        "stopped": guard[0].stopped if guard else None,
        "compute": {"flops": trainer.run_state.counters["flops"] + rewarding.flops},
    }  # fmt: skip


class _Look(TrainerCallback):
    """Measures on held-out prompts."""

    def __init__(self, rewarding: Rewarding, world: Any, reference: LlamaForCausalLM, part: str):
        self.rewarding, self.reference, self.points = rewarding, reference, []
        self.tasks = preference_tasks(world, PROMPTS, JUDGED, part)
        self.prompts = examples([{"prompt": t.prompt, "completion": t.best} for t in self.tasks], "preferences")

    def on_step_end(self, args, state, control, model=None, **kwargs) -> None:
        if state.global_step in LOOKED:
            self.at(state.global_step, model.policy)

    def at(self, step: int, policy: LlamaForCausalLM) -> None:
        written = sample(policy, lab_tokenizer(), self.prompts, max_new_tokens=MAX_NEW_TOKENS, seed=JUDGED)
        gold = [task.utility(decode(e.responses[0].tokens.tolist())) for task, e in zip(self.tasks, written)]
        batch = Collator(lab_tokenizer().pad_token_id, ("preferences",))(written)
        kl = (logp(policy, batch) - logp(self.reference, batch)).mean().item()
        proxy = np.mean([value for each in self.rewarding.rewards(written) for value in each])
        found = {"step": step, "gold": float(np.mean(gold)), "proxy": float(proxy), "kl": kl}
        if len(self.rewarding.members) > 1:
            spread = RewardEnsemble(self.rewarding.members).spread(written)
            found["spread"] = float(np.mean([value for each in spread for value in each]))
        self.points.append(found)


# ---- what is said of the runs ----


def summary_of(runs: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Arm -> numbers per seed, of the beginning, the end and the best point on the way."""
    found: dict[str, Any] = {}
    for name, arm in ARMS.items():
        own = [run for run in runs if run["arm"] == name]
        if not own:
            continue
        ends = {q: [run["points"][-1][q] for run in own] for q in ("gold", "proxy", "kl")}
        begins = {q: [run["points"][0][q] for run in own] for q in ("gold", "proxy")}
        found[name] = {
            "label": arm.label,
            "seeds": [run["seed"] for run in own],
            "gold": ends["gold"],
            "gold_gain": (np.array(ends["gold"]) - begins["gold"]).tolist(),
            "proxy_gain": (np.array(ends["proxy"]) - begins["proxy"]).tolist(),
            "gold_best": [max(point["gold"] for point in run["points"]) for run in own],
            "kl": ends["kl"],
            "steps": [run["steps"] for run in own],
            "stopped": [run["stopped"] for run in own],
            "flops": [run["compute"]["flops"] for run in own],
            "points": [run["points"] for run in own],
        }
    return found


def rows_of(arms: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    header = ["arm", "proxy gained", "gold gained", "gold at the end", "best gold on the way", "KL, nats", "steps"]
    rows = [
        [
            arm["label"],
            *(str(interval(arm[name])) for name in ("proxy_gain", "gold_gain", "gold", "gold_best", "kl")),
            f"{min(arm['steps'])} to {max(arm['steps'])}"
            if min(arm["steps"]) < max(arm["steps"])
            else f"{arm['steps'][0]}",
        ]
        for arm in arms.values()
    ]
    return header, rows


def draw(arms: Mapping[str, Any], path: Path) -> None:
    """Proxy and gold over the KL, of the runs that nothing stops and of those that something does."""
    figure, axes = plt.subplots(1, 2, figsize=(9.6, 3.9), sharey=True, layout="constrained")
    groups = ("unguarded", "kl"), ("unguarded", "conservative", "guard_kl", "guard_blind")
    for axis, names in zip(axes, groups):
        for k, name in enumerate(names):
            if name not in arms:
                continue
            colour, label = LINES[list(ARMS).index(name) % len(LINES)], arms[name]["label"]
            for s, points in enumerate(arms[name]["points"]):
                kl = [max(point["kl"], 0.0) for point in points]
                gold = [point["gold"] for point in points]
                axis.plot(kl, gold, color=colour, lw=1.1, alpha=0.75, label=label if s == 0 else None)
                axis.plot(kl[-1:], gold[-1:], color=colour, marker=MARKERS[k], ms=5, ls="")
        axis.set_xscale("function", functions=(lambda x: np.sqrt(np.maximum(x, 0)), np.square))
        axis.set_xlabel("KL(π ‖ SFT), nats per response (root scale)")
        axis.legend(frameon=False, fontsize=8)
    twin = axes[0].twinx()
    for s, points in enumerate(arms["unguarded"]["points"] if "unguarded" in arms else ()):
        kl = [max(point["kl"], 0.0) for point in points]
        twin.plot(kl, [p["proxy"] for p in points], color="#777777", lw=0.9, ls=":", label="proxy" if s == 0 else None)
    twin.set_ylabel("proxy reward of the unguarded runs (dotted)")
    twin.spines["right"].set_visible(True)
    axes[0].set_ylabel("gold: utility of what is written")
    axes[0].set_title("Unguarded and with a KL penalty; marks are the ends")
    axes[1].set_title("What stops or bounds it")
    save(figure, path)


def write(folder: Path, runs: Sequence[Mapping[str, Any]]) -> str:
    arms = summary_of(runs)
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "summary.json", {"question": QUESTION, "arms": arms, **environment()})
    draw(arms, folder / f"{NAME}.png")
    seeds = max(len(arm["seeds"]) for arm in arms.values())
    text = [
        f"# {QUESTION}", "",
        f"The lab, {seeds} seeds; mean ± half the 95 % t-interval. The proxy is a reward model of {JUDGEMENTS} "
        f"judgements, `{VARIANT}`; the policy, after supervised training, is trained against it by RLOO for {STEPS} "
        f"steps of {NOTHING.responses} responses at learning rate {RATE:g}. Gold is the hidden utility, 1 for the best "
        "policy. Limits were chosen on two seeds that are not reported, and are looked at in every step.", "",
        markdown_table(*rows_of(arms)), "",
        f"![proxy and gold over the distance from the policy before]({NAME}.png)", "",
        "What stopped the guarded runs:", "",
        *(
            f"- {arm['label']}, seed {seed}: {why}"
            for arm in arms.values() for seed, why in zip(arm["seeds"], arm["stopped"]) if why
        ),
    ]  # fmt: skip
    write_page(folder, "\n".join(text))
    return terminal_table(*rows_of(arms))


def main(words: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arms", nargs="+", choices=tuple(ARMS), default=list(ARMS))
    parser.add_argument("--seeds", type=int, nargs="+", default=list(SEEDS))
    parser.add_argument("--part", choices=(VALIDATION, TEST), default=TEST)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--results", action="store_true", help="write into experiments/results/reward_hacking")
    parser.add_argument("--output", type=Path, default=Path("runs") / NAME)
    arguments = parser.parse_args(words)
    cache = arguments.output / "cache"
    jobs = [
        Job(
            f"{ARMS[arm].label}, seed {seed}",
            run,
            {"arm": arm, "seed": seed, "cache": str(cache), "part": arguments.part},
        )
        for seed in arguments.seeds
        for arm in arguments.arms
    ]
    # the first of each seed trains the stage that the others begin with
    firsts = [job for job in jobs if job.arguments["arm"] == arguments.arms[0]]
    run_jobs(firsts, cache, workers=arguments.workers, title="unguarded")
    runs = run_jobs(jobs, cache, workers=arguments.workers, title=NAME)
    output = RESULTS if arguments.results else arguments.output
    print(write(output, runs))
    print(f"{output}/report.html, report.md, summary.json and {NAME}.png")
    return 0


if __name__ == "__main__":
    sys.exit(main())
