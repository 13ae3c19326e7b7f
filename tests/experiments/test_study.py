"""Studies: their points are plans that can be run, and what is written says what was found."""

import json

import numpy as np
import pytest
from matplotlib import image

from experiments import feedback_noise, lr_beta, mixing_ratio, reference
from experiments.lab.data import variant_of
from experiments.lab.training import LabStage, MovingReference, Plan, _copy, merged_adapters
from experiments.report import COLUMNS
from experiments.runs import fit
from experiments.sequential_vs_unified import NORMAL, TOY
from experiments.study import KL, Point, Study, chosen_settings, write_study

STUDIES = {module.STUDY.name: module.STUDY for module in (feedback_noise, lr_beta, mixing_ratio, reference)}


@pytest.mark.parametrize("name", STUDIES)
def test_points_are_plans_without_two_of_one_name(name):
    points = STUDIES[name].points(chosen_settings(), NORMAL)
    plans = [point.plan(3) for point in points]
    assert len({plan.key for plan in plans}) == len({point.name for point in points}) == len(points)
    assert all(plan.seed == 3 and plan.scale == NORMAL and plan.stages for plan in plans)
    assert all(stage.learning_rate > 0 for plan in plans for stage in plan.stages)
    if (base := STUDIES[name].baseline) is not None:
        assert base in {(point.line, point.x) for point in points}


def test_the_ratio_is_that_of_the_draws():
    for point in mixing_ratio.points(chosen_settings(), NORMAL):
        *_, last = point.plan(0).stages
        if len(point.plan(0).stages) == 1:
            assert last.demonstrations * NORMAL.sft_draws / NORMAL.preference_draws == pytest.approx(point.x)


def test_noise_is_the_share_that_is_turned_round():
    assert variant_of("hedged_pairs~0.3").flip == 0.3 and variant_of("hedged_pairs~0.3").hedging
    assert variant_of("noisy_pairs").flip == 0.25 and variant_of("noisy_pairs~0").flip == 0.0
    with pytest.raises(ValueError, match=r"variant is 'pears~0\.1'"):
        variant_of("pears~0.1")
    points = feedback_noise.points(chosen_settings(), TOY)
    flips = {point.x: variant_of(point.plan(0).variant).flip for point in points}
    assert all(flip == pytest.approx(x / 100) for x, flip in flips.items()) and len(flips) == 5


def record(seed: int, value: float) -> dict:
    measures = dict.fromkeys([*COLUMNS, *KL, "skill"], value + 0.01 * seed) | {"refusal.": value, "fact_recall": value}
    measures.pop("retention"), measures.pop("score", None)
    stage = {"steps": 10, "compute": {}, "objective": {"name": "dpo"}, "learning_rate": 1e-4}
    return {"seed": seed, "measures": measures, "compute": {"flops": 1e12}, "stages": [stage]}


@pytest.mark.parametrize(
    "kind, xs", [("lines", (1.0, 2.0, 4.0)), ("dots", ("a", "b")), ("heat", ("1|1", "1|2", "2|1", "2|2"))]
)
def test_what_is_written_says_what_was_found(kind, xs, tmp_path):
    points = [Point(line, x, lambda seed: None) for line in ("one", "other") for x in xs]
    records = [[record(seed, 0.1 * i) for seed in (0, 1, 2)] for i in range(len(points))]
    study = Study("name", "Which?", lambda chosen, scale: points, "axis" if kind != "heat" else "rows|columns", kind,
                  baseline=("one", xs[0]))  # fmt: skip
    table = write_study(tmp_path, study, points, records, TOY)
    text, summary = (tmp_path / "report.md").read_text(), json.loads((tmp_path / "summary.json").read_text())
    assert "# Which?" in text and "3 seeds (0, 1, 2)" in text and "other" in table
    # alignment of the second point is 0.1 above that of the first on every seed
    assert "+0.100 [+0.100, +0.100]" in text
    assert len(summary["points"]) == len(points)
    assert summary["points"][1]["measures"]["alignment"]["mean"] == pytest.approx(0.11)
    assert summary["points"][1]["interquartile_mean"]["alignment"] == pytest.approx(0.11)
    assert np.ptp(image.imread(tmp_path / "name.png")[..., :3]) > 0.5


# ---- what stages of the lab can do ----


@pytest.fixture(scope="module")
def base():
    from experiments.lab.base import load_base

    return load_base(0)


def test_documents_are_replayed():
    from experiments.lab.training import lab_data

    plan = Plan((), 0, "pairs", TOY)
    data = lab_data(plan, LabStage("sft", "sft", 1e-4, 1.0, documents=0.5))
    assert data.sources == ["demonstrations", "documents"] and data.kinds()["documents"] == {"document"}
    draws = dict(zip(data.sources, np.multiply(data.sizes, data.weights)))
    assert draws == {"demonstrations": TOY.sft_draws, "documents": TOY.sft_draws / 2}


def test_a_moving_reference_moves(base):
    from types import SimpleNamespace

    reference, policy = _copy(base), _copy(base, train=True)
    for p in policy.parameters():
        p.data += 1.0
    callback = MovingReference(reference, rate=0.6, every=4)
    for step in range(1, 5):
        callback.on_step_end(None, SimpleNamespace(global_step=step), None, model=policy)
        gap = next(policy.parameters()) - next(reference.parameters())
        assert gap.mean().item() == pytest.approx(1.0 if step < 4 else 0.4, abs=1e-4)


@pytest.mark.parametrize("how", ["linear", "ties"])
def test_adapters_trained_apart_are_added_up(base, how):
    import torch

    from experiments.lab.tokenizer import lab_tokenizer
    from experiments.lab.training import lab_data
    from uft.stages import Budget

    plan = Plan((), 0, "pairs", TOY)
    adapted = []
    for stage in (LabStage("sft", "sft", 1e-3, 1.0), LabStage("dpo", "dpo", 1e-3, 0.0, 1.0)):
        run = fit(_copy(base, train=True), stage.objective, lab_data(plan, stage), lab_tokenizer(), Budget(steps=2),
                  learning_rate=1e-3, batch_size=8, seed=0, lora=4)  # fmt: skip
        adapted.append(run.model)
    merged = merged_adapters(base, adapted, how)
    name = "model.layers.0.mlp.up_proj.weight"
    changes = []
    for model in adapted:
        layer = model.base_model.model.model.layers[0].mlp.up_proj
        changes.append(layer.get_delta_weight("default"))
    change = merged.state_dict()[name] - base.state_dict()[name]
    assert change.norm() > 0
    if how == "linear":
        assert torch.allclose(change, sum(changes), atol=1e-6)
    else:
        # where both would change a number the same way, neither is turned round
        agreed = (changes[0] * changes[1] > 0) & (change.abs() > 0.1 * change.abs().max())
        assert ((change * changes[0])[agreed] > 0).float().mean() > 0.9
