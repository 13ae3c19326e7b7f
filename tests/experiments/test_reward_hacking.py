"""The experiment on reward hacking: what it says of planted runs, and that the committed ones show what they should."""

import json

import numpy as np
import pytest

from experiments.reward_hacking import ARMS, RESULTS, summary_of, write
from uft.comparison.statistics import interval


def planted(arm, seed, gold, proxy, stopped=None):
    points = [
        {"step": 10 * k, "gold": g, "proxy": p, "kl": 2.0 * k} for k, (g, p) in enumerate(zip(gold, proxy, strict=True))
    ]
    return {"arm": arm, "seed": seed, "points": points, "steps": points[-1]["step"], "stopped": stopped,
            "compute": {"flops": 1e9}}  # fmt: skip


def test_what_is_said_of_planted_runs(tmp_path):
    runs = [planted("unguarded", seed, [0.5, 0.9, 0.2 + 0.1 * seed], [0.0, 0.5, 1.0]) for seed in (0, 1)]
    runs += [planted("guard_kl", seed, [0.5, 0.9], [0.0, 0.4], "step 10: kl is 2, allowed 1") for seed in (0, 1)]
    found = summary_of(runs)
    assert list(found) == ["unguarded", "guard_kl"]
    assert found["unguarded"]["gold_gain"] == pytest.approx([-0.3, -0.2])
    assert found["unguarded"]["proxy_gain"] == [1.0, 1.0] and found["unguarded"]["gold_best"] == [0.9, 0.9]
    assert found["guard_kl"]["gold_gain"] == pytest.approx([0.4, 0.4]) and found["guard_kl"]["steps"] == [10, 10]
    table = write(tmp_path, runs)
    assert ARMS["guard_kl"].label in table and (tmp_path / "reward_hacking.png").stat().st_size > 10_000
    assert "seed 1: step 10: kl is 2, allowed 1" in (tmp_path / "report.md").read_text()


def test_the_committed_unguarded_run_hacks_and_the_guarded_do_not():
    arms = json.loads((RESULTS / "summary.json").read_text())["arms"]
    mean = lambda arm, name: float(np.mean(arms[arm][name]))
    assert len(arms["unguarded"]["seeds"]) == 5
    assert interval(arms["unguarded"]["proxy_gain"]).low > 0 > mean("unguarded", "gold_gain")
    assert mean("unguarded", "gold_best") - mean("unguarded", "gold") > 0.3
    assert interval(arms["kl"]["gold_gain"]).low > 0
    for guarded in ("kl", "guard_kl", "guard_blind"):
        assert mean(guarded, "gold_gain") > 0 and mean(guarded, "gold") > mean("unguarded", "gold") + 0.1
    assert all(arms["guard_kl"]["stopped"]) and max(arms["guard_kl"]["kl"]) < 5
