"""Studies: their points are plans that can be run, and what is written says what was found."""

import json

import numpy as np
import pytest
from matplotlib import image
from transformers import LlamaForCausalLM

from experiments import (
    feedback_noise,
    forgetting_budget,
    loss_zoo,
    lr_beta,
    mixing_ratio,
    reference,
    scale,
    weight_schedule,
)
from experiments.arms import ARMS, REPLAY, TRAINED
from experiments.lab.base import lab_config
from experiments.lab.data import variant_of
from experiments.lab.training import (
    LabStage,
    MovingReference,
    Plan,
    ReferenceAnew,
    _copy,
    design_flops,
    lab_data,
    merged_adapters,
    run_plan,
)
from experiments.report import COLUMNS
from experiments.runs import DEMONSTRATIONS, PREFERENCES, SFT_STAGE, fit
from experiments.search import designed
from experiments.sequential_vs_unified import NORMAL, TOY, VARIANTS
from experiments.study import KL, Point, Study, write_study
from uft.compute import Meter
from uft.presets import make_objective

MODULES = (feedback_noise, forgetting_budget, loss_zoo, lr_beta, mixing_ratio, reference, weight_schedule)
STUDIES = {study.name: study for study in (*(module.STUDY for module in MODULES), *scale.STUDIES)}


def chosen_settings() -> dict:
    """As the search leaves them, for every arm and loss."""
    losses = [loss for names in loss_zoo.LOSSES.values() for loss in names]
    return (
        {name: designed(ARMS[name].space)[0] for name in TRAINED}
        | {SFT_STAGE: {"learning_rate": 4e-4}}
        | {f"loss/{loss}": {"learning_rate": 1e-4, "beta": 1.5} for loss in losses}
    )


@pytest.mark.parametrize("name", STUDIES)
def test_points_are_plans_without_two_of_one_name(name):
    points = STUDIES[name].points(chosen_settings(), NORMAL)
    plans = [point.plan(3) for point in points]
    assert len({plan.key for plan in plans}) == len({point.name for point in points}) == len(points)
    assert all(plan.seed == 3 and plan.stages for plan in plans)
    assert name in ("scale", "data_size") or all(plan.scale == NORMAL for plan in plans)
    assert all(stage.learning_rate > 0 for plan in plans for stage in plan.stages)
    if (base := STUDIES[name].baseline) is not None:
        assert base in {(point.line, point.x) for point in points}


def test_the_ratio_is_that_of_the_draws():
    for point in mixing_ratio.points(chosen_settings(), NORMAL):
        *_, last = point.plan(0).stages
        if len(point.plan(0).stages) == 1:
            assert last.demonstrations * NORMAL.sft_draws / NORMAL.preference_draws == pytest.approx(point.x)


def test_the_ratio_of_the_sequence_counts_what_is_replayed():
    """With what the second stage can draw for the FLOPs that the first one leaves."""
    whole = Plan((), 0, VARIANTS[0], NORMAL)
    flops = _flops_per_draw(whole)
    assert flops[PREFERENCES] / flops[DEMONSTRATIONS] == pytest.approx(mixing_ratio.COST, rel=0.03)
    for point in mixing_ratio.points(chosen_settings(), NORMAL):
        if len(point.plan(0).stages) == 2:
            first, last = point.plan(0).stages
            draws = {DEMONSTRATIONS: first.demonstrations * NORMAL.sft_draws, PREFERENCES: 0.0}
            mixture = {DEMONSTRATIONS: last.demonstrations * NORMAL.sft_draws, PREFERENCES: NORMAL.preference_draws}
            left = design_flops(whole) - draws[DEMONSTRATIONS] * flops[DEMONSTRATIONS]
            times = left / sum(flops[name] * n for name, n in mixture.items())
            draws = {name: n + times * mixture[name] for name, n in draws.items()}
            assert draws[DEMONSTRATIONS] / draws[PREFERENCES] == pytest.approx(point.x, rel=0.03)
            assert draws[DEMONSTRATIONS] - first.demonstrations * NORMAL.sft_draws == pytest.approx(
                REPLAY * draws[DEMONSTRATIONS], rel=0.03
            )


def _flops_per_draw(plan: Plan) -> dict[str, float]:
    data = lab_data(plan, LabStage("design", "sft", 0.0, 1.0, 1.0))
    model, found = LlamaForCausalLM(lab_config()), {}
    for name, objective in ((DEMONSTRATIONS, "sft"), (PREFERENCES, "dpo_nll")):
        meter = Meter(model, make_objective(objective), reference_runs=True)
        found[name] = meter.of_examples(data.examples[name]).flops / data.sizes[data.sources.index(name)]
    return found


def test_studies_of_one_command_do_not_overwrite_each_other(tmp_path, monkeypatch):
    written = []
    monkeypatch.setattr("experiments.study.write_study", lambda folder, *_: written.append(folder) or "")
    monkeypatch.setattr("experiments.study.run_sharing", lambda plans, *_: [{} for _ in plans])
    monkeypatch.setattr("experiments.study.chosen_settings", chosen_settings)
    assert scale.run(["--output", str(tmp_path)]) == 0
    assert written == [tmp_path / "scale", tmp_path / "data_size"]


def test_noise_is_the_share_that_is_turned_round():
    assert variant_of("hedged_pairs~0.3").flip == 0.3 and variant_of("hedged_pairs~0.3").hedging
    assert variant_of("noisy_pairs").flip == 0.25 and variant_of("noisy_pairs~0").flip == 0.0
    with pytest.raises(ValueError, match=r"variant is 'pears~0\.1'"):
        variant_of("pears~0.1")
    points = feedback_noise.points(chosen_settings(), TOY)
    flips = {point.x: variant_of(point.plan(0).variant).flip for point in points}
    assert all(flip == pytest.approx(x / 100) for x, flip in flips.items()) and len(flips) == 5
    kinds = {variant_of(point.plan(0).variant).kind for point in points if point.line.endswith("scores")}
    assert kinds == {"score"}


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


def test_a_reference_taken_anew_is_the_policy_of_that_moment(base):
    from types import SimpleNamespace

    reference, policy = _copy(base), _copy(base, train=True)
    callback = ReferenceAnew(reference, 0.5)
    for step in range(1, 9):
        for p in policy.parameters():
            p.data += 1.0
        callback.on_step_end(None, SimpleNamespace(global_step=step, max_steps=8), None, model=policy)
        gap = (next(reference.parameters()) - next(base.parameters())).mean().item()
        assert gap == pytest.approx(0.0 if step < 4 else 4.0, abs=1e-4)


def test_the_zoo_tries_every_loss_there_is():
    from uft.losses import PAIRWISE, POINTWISE

    points = loss_zoo.points(chosen_settings(), NORMAL)
    assert {point.x for point in points if point.line == "pairwise"} == set(PAIRWISE)
    assert {point.x for point in points if point.line == "pointwise"} == set(POINTWISE)
    [orpo] = [point.plan(0).stages[-1].objective["preference"] for point in points if point.x == "orpo"]
    assert orpo == {"loss": "orpo", "weight": 1.5}


def test_larger_models_get_smaller_rates_and_larger_data_as_many_draws():
    chosen = chosen_settings()
    rates = {
        p.x: p.plan(0).stages[-1].learning_rate
        for p in scale.by_model(chosen, NORMAL)
        if "joint" in p.line or "unified" in p.line
    }
    assert rates[1.3] == pytest.approx(rates[0.34] / 2) and rates[0.09] == pytest.approx(2 * rates[0.34])
    for point in scale.by_data(chosen, NORMAL):
        assert point.plan(0).scale.demonstrations == point.x and point.plan(0).scale.sft_draws == NORMAL.sft_draws


def test_the_weights_of_a_joint_stage_always_add_up_to_one():
    for point in weight_schedule.points(chosen_settings(), NORMAL):
        if point.line == "joint stage":
            objective = make_objective(point.plan(0).stages[0].objective)
            for progress in (0.0, 0.3, 0.49, 0.5, 0.99):
                assert sum(objective.weights(progress).values()) == pytest.approx(1.0), point.x


# ---- a budget of FLOPs where weights decide what a step costs ----


@pytest.mark.parametrize(
    "objective, share",
    [
        ({"preset": "dpo_nll", "beta": 0.1}, 1.0),
        ({"preset": "dpo_nll", "beta": 0.1, "balance": "alright"}, 0.5),
        ({"preset": "dpo_nll", "beta": 0.1, "sft_weight": {"schedule": "step", "at": 0.5, "before": 1, "after": 0},
          "preference_weight": {"schedule": "step", "at": 0.5, "before": 0, "after": 1}}, 0.5),
    ],
    ids=["both", "alright", "step"],
)  # fmt: skip
def test_as_many_steps_as_the_flops_buy(base, objective, share):
    """Where one term of two rests, a step costs half of one that trains both."""
    from experiments.expected_cost import expected_steps
    from experiments.lab.training import design_flops, lab_data

    plan = Plan((), 0, "hedged_pairs", TOY)
    data = lab_data(plan, LabStage("joint", objective, 1e-4, 1.0, 1.0))
    steps = expected_steps(base, make_objective(objective), data, TOY.batch_size, design_flops(plan))
    draws = (TOY.sft_draws + TOY.preference_draws) / TOY.batch_size
    assert steps == pytest.approx(draws / share, rel=0.03)


def test_what_maxright_measures_is_paid_for(base):
    from experiments.expected_cost import expected_steps
    from experiments.lab.training import design_flops, lab_data

    plan = Plan((), 0, "hedged_pairs", TOY)
    data = lab_data(plan, LabStage("joint", "dpo_nll", 1e-4, 1.0, 1.0))
    steps = {}
    for refresh in (2, 10, 1000):
        rule = {"method": "maxright", "optimum": {"sft": 0.0, "preference": 0.0}, "refresh": refresh}
        objective = make_objective({"preset": "dpo_nll", "balance": rule})
        steps[refresh] = expected_steps(base, objective, data, TOY.batch_size, design_flops(plan))
    assert steps[2] < 0.8 * steps[10] < steps[10] < steps[1000]


# ---- a budget of forgetting ----


def test_what_a_budget_is_judged_by(monkeypatch):
    """The budget rises by 0.05 and 0.054 (kept), constant 0 by 0.5 (not), 0.1 and 1 keep it, 0.1 aligns best."""
    monkeypatch.setattr(forgetting_budget, "RISE", {DEMONSTRATIONS: 0.05})

    def runs(alignment, *rises):
        measures = {"alignment": alignment, "accuracy_logp": 0.5, "accuracy_reward": 0.5}
        stages = [[{"watched": {DEMONSTRATIONS: 0.1}}, {"watched": {DEMONSTRATIONS: 0.1 + rise}}] for rise in rises]
        return [{"seed": i, "stages": each, "measures": measures} for i, each in enumerate(stages)]

    line = "demonstrations kept"
    found = {
        "budget": runs(0.9, 0.05, 0.054),
        "constant 0": runs(0.99, 0.5, 0.01),
        "constant 0.1": runs(0.8, 0.01, 0.02),
        "constant 1": runs(0.7, 0.0, 0.0),
    }
    points = [Point(line, name, lambda seed: None) for name in found]
    lines, [kept] = forgetting_budget.judged(points, list(found.values()))
    assert kept["keeps"] == {"budget": True, "constant 0": False, "constant 0.1": True, "constant 1": True}
    assert kept["best_constant"] == "constant 0.1"
    assert "constant 0.1 (best constant that keeps it)" in "\n".join(lines)


def test_a_stage_with_a_budget_runs_in_the_lab(tmp_path):
    chosen = chosen_settings()
    [point] = [p for p in forgetting_budget.points(chosen, TOY) if p.line == "facts kept" and p.x == "budget"]
    record = run_plan(point.plan(0), str(tmp_path), curves=False)
    assert record["stages"][-1]["steps"] == round(
        (REPLAY * TOY.sft_draws + TOY.preference_draws) / TOY.batch_size
    )  # one kind is not drawn in vain, though its weight begins at 0
    assert set(record["stages"][-1]["watched"]) == {DEMONSTRATIONS, "prior"}
    assert record["stages"][-1]["compute"]["policy_forwards"] > record["stages"][-1]["compute"]["backwards"]
