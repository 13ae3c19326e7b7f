"""Weights over time: schedules, balancers, and the conflict of the terms' gradients."""

import copy
import json
import math
import os
import random
import signal
import time

import pytest
import torch
from mixed import dataset, model, parameters, trainer
from peft import LoraConfig
from processes import assert_same_end, join, ranks_resume, start, start_ranks, write_end
from transformers import TrainerCallback

from uft.balance import Alright, ForgettingBudget, Maxright, Moment, make_balancer
from uft.checkpoint import last_checkpoint
from uft.collation import Collator, Cutter
from uft.model_card import model_card
from uft.models import FrozenReference, score
from uft.objective import Objective
from uft.presets import make_objective
from uft.recipe import RecipeError, parse, read_yaml
from uft.schedules import Constant, Cosine, Linear, Step, make_weight

BOTH = ("demonstrations", "pairs")
NLL = "eval_demonstrations/nll"
BUDGET = {"method": "forgetting_budget", "quantity": NLL, "rise": 0.01, "every": 2}
MAXRIGHT = {"method": "maxright", "optimum": {"sft": 1.0, "preference": 0.1}, "refresh": 3}


def dpo_nll(balance=None, **weights):
    return {"preset": "dpo_nll", "balance": balance, **weights}


# ---- schedules ----


def test_schedules_by_hand():
    assert [Linear(2, 1)(p) for p in (0, 0.25, 1)] == [2, 1.75, 1]
    assert [Cosine(1, 0)(p) for p in (0, 0.5, 1)] == pytest.approx([1, 0.5, 0], abs=1e-15)
    assert Cosine(0.2, 1)(1 / 3) == pytest.approx(1 - 0.8 * 0.75)
    assert [Step(0.5, 1, 0)(p) for p in (0, 0.49, 0.5, 0.99)] == [1, 1, 0, 0]
    assert Constant(3)(0.7) == 3


@pytest.mark.parametrize(
    "schedule, text",
    [(Cosine(1.0, 0), "Cosine(1, 0)"), (Step(0.5, 1, 0.25), "Step(0.5, 1, 0.25)"), (Constant(2), "Constant(2)"),
     (Linear(1e-3, 1), "Linear(0.001, 1)")],
)  # fmt: skip
def test_a_schedule_reads_as_it_is_written(schedule, text):
    assert repr(schedule) == text
    assert eval(text) == schedule


@pytest.mark.parametrize(
    "value, message",
    [
        (
            {"schedule": "cosin", "start": 1, "end": 0},
            "schedule is 'cosin'; want one of constant, linear, cosine, step",
        ),
        ({"schedule": "cosine", "start": 1}, "schedule 'cosine' has start; want start, end"),
        ({"schedule": "step", "at": 2, "before": 1, "after": 0}, "at of schedule Step is 2; want a share"),
        ({"schedule": "linear", "start": -1, "end": 0}, "start of schedule Linear is -1; want a number >= 0"),
        ({"schedule": "linear", "start": "1", "end": 0}, "start of schedule Linear is '1'"),
        ({"schedule": "constant", "value": math.nan}, "value of schedule Constant is nan"),
    ],
)
def test_a_schedule_that_is_none_is_refused(value, message):
    with pytest.raises(ValueError, match="sft_weight: " + message):
        make_weight(value, "sft_weight")


RECIPE = """
model: m
train_dataset: {pairs: {path: pairs.jsonl}}
objective:
  preset: dpo_nll
  sft_weight: {schedule: linear, start: 0.5, end: 1}
  preference_weight: {schedule: cosine, start: 1.0, end: 0.0}
  balance: {method: forgetting_budget, quantity: eval_demonstrations/nll, rise: 5e-2, every: 20, keep: [sft]}
"""
TERMS = """
model: m
train_dataset: {pairs: {path: pairs.jsonl}}
objective:
  sft: {loss: nll, weight: {schedule: step, at: 0.5, before: 1, after: 0}}
  preference: {loss: dpo, beta: 0.1}
  balance: alright
"""


def objective_of(text: str, tmp_path) -> Objective:
    (tmp_path / "recipe.yaml").write_text(text)
    return parse(read_yaml(str(tmp_path / "recipe.yaml"))).objective


def test_weights_in_yaml(tmp_path):
    found = objective_of(RECIPE, tmp_path)
    assert [term.weight for term in found.terms] == [Linear(0.5, 1), Cosine(1.0, 0.0)]
    assert found.balancer == ForgettingBudget(NLL, rise=0.05, every=20, keep=("sft",))
    assert make_balancer(found.balancer) is found.balancer
    found = objective_of(TERMS, tmp_path)
    assert [term.weight for term in found.terms] == [Step(0.5, 1, 0), 1.0]
    assert found.balancer == Alright()
    in_python = make_objective({"preset": "dpo_nll", "preference_weight": Cosine(1, 0)})
    assert in_python.weights(0.5) == {"sft": 1.0, "preference": pytest.approx(0.5)}
    with_kl = make_objective(
        {"preset": "dpo", "kl_weight": {"schedule": "constant", "value": 0.3}, "balance": "alright"}
    )
    assert with_kl.weights(0) == {"preference": 1.0, "kl": 0.3} and with_kl.balancer == Alright()
    assert found.describe()[0]["weight"] == "Step(0.5, 1, 0)"


def test_a_recipe_that_is_wrong_says_where(tmp_path):
    with pytest.raises(RecipeError, match="objective: weight of term 'sft': schedule is 'stp'"):
        objective_of(TERMS.replace("schedule: step", "schedule: stp"), tmp_path)
    with pytest.raises(RecipeError, match="objective: balance: method is 'alrigt'; want one of alright"):
        objective_of(TERMS.replace("balance: alright", "balance: alrigt"), tmp_path)


# ---- a term of weight 0 takes no part in a step ----

SEQUENTIAL = {
    "sft": {"loss": "nll", "weight": Step(0.5, 1, 0)},
    "preference": {"loss": "dpo", "weight": Step(0.5, 0, 1)},
}


class Gradients(TrainerCallback):
    """Weights before each optimiser step, and its gradients."""

    def __init__(self):
        self.steps = []

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        self.steps.append((parameters(model).clone(), {n: p.grad.clone() for n, p in model.named_parameters()}))


@pytest.mark.parametrize("layout", ["packed", "padded"])
def test_the_step_schedule_is_sequential_training_to_the_bit(layout):
    """Its gradients are those of each term's own objective, over the same examples and at the same weights."""
    seen, data = Gradients(), dataset(BOTH)
    run = trainer(SEQUENTIAL, data, max_steps=4, callbacks=[seen], layout=layout)
    sampler = run.batches_of(run.train_dataset, training=True)
    plan = []
    for epoch in range(2):
        sampler.set_epoch(epoch)
        plan += [shares[0] for shares in sampler.plan()]
    run.train()
    for step, (indices, (before, gradients)) in enumerate(zip(plan, seen.steps, strict=True)):
        alone = Objective((make_objective(SEQUENTIAL).terms[step // 2],)).with_weights(
            **{("sft", "preference")[step // 2]: 1.0}
        )
        assert alone.needs_reference == (step >= 2)
        cut = Cutter(run.data_collator.collate, alone.need, alone.needs)
        torch.nn.utils.vector_to_parameters(before, run.model.parameters())
        run.model.zero_grad()
        [batch] = cut([data[i] for i in indices]).batches
        scored = score(run.model, batch, run.reference if alone.needs_reference else None)
        alone(scored, alone.counts(batch))[0].backward()
        for name, parameter in run.model.named_parameters():
            assert torch.equal(parameter.grad, gradients[name]), (step, name)
    assert not torch.equal(seen.steps[0][0], seen.steps[3][0])


def test_a_row_that_only_resting_terms_are_on_costs_nothing():
    run = trainer(SEQUENTIAL, dataset(BOTH), max_steps=4, logging_steps=2)
    run.train()
    drawn = [run.counters()[f"examples/{kind}"] for kind in BOTH]
    assert drawn == [16, 16]
    # two epochs: demonstrations in the first, both responses of each pair in the second
    plan = run.batches_of(run.train_dataset, training=True)
    demonstrations, pairs = 0, 0
    for epoch in range(2):
        plan.set_epoch(epoch)
        kinds = [run.train_dataset[i].kind for shares in plan.plan() for i in shares[0]]
        demonstrations += (epoch == 0) * kinds.count("demonstration")
        pairs += (epoch == 1) * kinds.count("pair")
    counters = run.counters()
    assert counters["policy_forwards"] == counters["backwards"] == demonstrations + 2 * pairs
    assert counters["reference_forwards"] == 2 * pairs
    assert run.state.total_flos == counters["flops"]
    first, second = (entry for entry in run.state.log_history if "loss" in entry)
    assert (first["weight/sft"], first["weight/preference"]) == (1, 0)
    assert (second["weight/sft"], second["weight/preference"]) == (0, 1)
    assert "loss/preference" not in first and "loss/sft" not in second


@pytest.mark.parametrize("loss", ["dpo", "simpo"])
def test_the_model_never_reads_a_resting_row(loss):
    """Also where both terms' rows need the same of the model, so that they would share a pass."""
    objective = {**SEQUENTIAL, "preference": SEQUENTIAL["preference"] | {"loss": loss}}
    run = trainer(objective, dataset(BOTH), max_steps=2, per_device_train_batch_size=16, layout="padded")
    read = []
    run.model.register_forward_pre_hook(
        lambda module, args, inputs: read.append(len(inputs["input_ids"])) if torch.is_grad_enabled() else None,
        with_kwargs=True,
    )
    run.train()
    assert read == [8, 16]  # demonstrations, and the two sides of pairs


def test_a_number_0_rests_too_but_is_evaluated():
    run = trainer(dpo_nll(preference_weight=0.0), dataset(BOTH), eval_dataset=dataset(BOTH, n=4))
    run.train()
    assert "reference_forwards" not in run.counters() or run.counters()["reference_forwards"] == 0
    assert run.evaluate()["eval_loss/preference"] > 0


def test_terms_on_the_same_rows_share_their_pass():
    """Chosen answers are imitated in each step, and preferred in the second half."""
    objective = {"sft": {"loss": "nll", "on": "chosen"}, "preference": {"loss": "dpo", "weight": Step(0.5, 0, 1)}}
    run = trainer(objective, dataset(("pairs",)), max_steps=2)
    run.train()
    assert run.counters()["policy_forwards"] == 8 + 16  # rejected answers rest in the first step
    assert run.counters()["reference_forwards"] == 16


def test_kto_rests_with_its_statistics():
    objective = {"sft": {"loss": "nll"}, "kto": {"loss": "kto", "on": "labels", "weight": Step(0.5, 0, 1)}}
    run = trainer(objective, dataset(("demonstrations", "labels")), max_steps=2, logging_steps=1)
    run.train()
    first, second = (entry for entry in run.state.log_history if "loss" in entry)
    assert "kl/kto" not in first and "kl/kto" in second


def test_a_step_without_any_weight_is_refused():
    run = trainer({"sft": {"loss": "nll", "weight": Step(0.5, 1, 0)}}, dataset(("demonstrations",)), max_steps=2)
    with pytest.raises(ValueError, match="every weight of objective 'custom' is 0; want a term"):
        run.train()


# ---- balancers, by hand ----


def moment(step=0, weights=None, present=("sft", "preference"), losses=None, metrics=None) -> Moment:
    weights = weights or {"sft": 0.75, "preference": 0.25}
    return Moment(step, 0, weights, present, lambda: dict(losses), lambda name: dict(metrics))


def test_alright_is_the_weighted_sum_in_the_mean():
    found = [Alright().weights(moment(step), {}) for step in range(2000)]
    assert all(sorted(w.values()) == [0.0, 1.0] for w in found)
    assert sum(w["sft"] for w in found) / len(found) == pytest.approx(0.75, abs=3 * math.sqrt(0.75 * 0.25 / 2000))
    assert found == [Alright().weights(moment(step), {}) for step in range(2000)]  # nothing but seed and step
    heavy = {"sft": 2.0, "preference": 1.0, "kl": 1.0}
    draws = [Alright().weights(moment(step, heavy, tuple(heavy)), {}) for step in range(2000)]
    for name, weight in heavy.items():
        assert sum(w[name] for w in draws) / 2000 == pytest.approx(weight, abs=0.2)


def test_alright_draws_what_is_there():
    assert all(
        Alright().weights(moment(step, present=("sft",)), {}) == {"sft": 1.0, "preference": 0.0} for step in range(20)
    )


def test_maxright_by_hand():
    balancer, memory = Maxright({"sft": 1.0, "preference": 0.2}, refresh=3), {}
    # 0.75 (1.8 - 1) = 0.6 against 0.25 (0.7 - 0.2) = 0.125
    assert balancer.weights(moment(0, losses={"sft": 1.8, "preference": 0.7}), memory) == {
        "sft": 1.0,
        "preference": 0.0,
    }
    assert balancer.logged(moment(0), memory) == pytest.approx({"gap/sft": 0.6, "gap/preference": 0.125})
    balancer.saw({"sft": 1.1}, memory)  # 0.075 now; the other's value is old
    assert balancer.weights(moment(1), memory) == {"sft": 0.0, "preference": 1.0}
    balancer.saw({"preference": 0.4}, memory)  # 0.05
    assert balancer.weights(moment(2), memory) == {"sft": 1.0, "preference": 0.0}
    fresh = moment(3, losses={"sft": 1.0, "preference": 0.3})
    assert balancer.weights(fresh, memory) == {"sft": 0.0, "preference": 1.0}


def test_the_budgets_multiplier_by_hand():
    """Unit 0.1 above a start of 2.0: violations are -1, 0.5, 1.5, -0.5, -2."""
    balancer, memory = ForgettingBudget(NLL, rise=0.1, every=2, proportional=1.0, integral=0.5, most=2.0), {}
    found = []
    for k, nll in enumerate((2.0, 2.15, 2.25, 2.05, 1.9)):
        weights = balancer.weights(moment(2 * k, {"sft": 0.5, "preference": 2.0}, metrics={NLL: nll}), memory)
        between = balancer.weights(moment(2 * k + 1, {"sft": 0.5, "preference": 2.0}), memory)
        assert weights == between
        found.append((memory["violation"], memory["integral"], memory["multiplier"], weights))
    violations, integrals, multipliers, weights = zip(*found)
    assert violations == pytest.approx((-1, 0.5, 1.5, -0.5, -2))
    assert integrals == pytest.approx((0, 0.25, 1.0, 0.75, 0))
    assert multipliers == pytest.approx((0, 0.75, 2.0, 0.25, 0))  # the third is cut from 2.5
    assert weights[0] == weights[4] == {"sft": 0.5, "preference": 2.0}
    assert weights[2] == pytest.approx({"sft": (0.5 + 2) / 3, "preference": 2 / 3})


def test_a_limit_is_an_absolute_value():
    balancer, memory = ForgettingBudget("eval_prior_kl", limit=0.2, keep="kl", proportional=1.0, integral=0.0), {}
    own = {"sft": 1.0, "preference": 1.0, "kl": 0.0}
    assert balancer.weights(moment(0, own, metrics={"eval_prior_kl": 0.0}), memory) == own
    found = balancer.weights(moment(50, own, metrics={"eval_prior_kl": 0.3}), memory)
    assert found == pytest.approx({"sft": 2 / 3, "preference": 2 / 3, "kl": 1 / 3})
    with pytest.raises(ValueError, match="eval_prior_kl is none of eval_loss; want a finite metric"):
        balancer.weights(moment(100, own, metrics={"eval_loss": 0.3}), memory)


@pytest.mark.parametrize(
    "balance, message",
    [
        ("alrigt", "method is 'alrigt'; want one of alright, maxright, forgetting_budget"),
        (3, "method is None; want one of"),
        ({"method": "alright", "refresh": 3}, "alright has no option 'refresh'; want none"),
        ({"method": "maxright"}, "maxright: .*optimum"),
        ({"method": "maxright", "optimum": {"sft": 1}}, "optimum is of sft; want that of sft, preference"),
        ({"method": "maxright", "optimum": 1}, "optimum is 1; want the lowest loss of each term"),
        (MAXRIGHT | {"refresh": 0}, "refresh is 0; want a number of steps"),
        (BUDGET | {"rise": None}, "rise is None and limit None; want one of them"),
        (BUDGET | {"limit": 1.0}, "rise is 0.01 and limit 1.0; want one of them"),
        (BUDGET | {"rise": 0}, "rise is 0; want a number > 0"),
        (BUDGET | {"keep": "stf"}, "keep is stf; want some, but not all, of the terms sft, preference"),
        (BUDGET | {"keep": ["sft", "preference"]}, "want some, but not all"),
        (BUDGET | {"quantity": "nll"}, "quantity is 'nll'; want a metric such as"),
        (BUDGET | {"every": 0.5}, "every is 0.5; want a number of steps"),
    ],
)  # fmt: skip
def test_a_balancer_that_does_not_fit_is_refused(balance, message):
    with pytest.raises(ValueError, match=message):
        make_objective(dpo_nll(balance))


def test_a_quantity_that_no_evaluation_has_is_refused():
    with pytest.raises(ValueError, match="there is no evaluation data; want a metric of eval_dataset"):
        trainer(dpo_nll(BUDGET), dataset(BOTH))
    run = trainer(dpo_nll(BUDGET | {"quantity": "eval_demonstration/nll"}), dataset(BOTH), eval_dataset=dataset(BOTH))
    with pytest.raises(ValueError, match=r"eval_demonstration/nll is none of .*eval_demonstrations/nll"):
        run.train()


# ---- balancers in training ----


def logs(run) -> list[dict]:
    return [entry for entry in run.state.log_history if "loss" in entry]


def test_alright_trains_one_term_a_step():
    run = trainer(dpo_nll("alright", sft_weight=0.5, preference_weight=0.5), dataset(BOTH), max_steps=6)
    run.train()
    for entry in logs(run):
        trained = {name for name in ("sft", "preference") if f"loss/{name}" in entry}
        assert len(trained) == 1 and entry[f"weight/{min(trained)}"] == 1
        assert entry["weight/sft"] + entry["weight/preference"] == 1
    assert len({entry["weight/sft"] for entry in logs(run)}) == 2  # both were drawn


class MeanLosses(TrainerCallback):
    """The terms' mean losses over the data that the next step is on, before it."""

    def __init__(self, data):
        self.data, self.found = data, []

    def on_step_begin(self, args, state, control, model=None, **kwargs):
        objective = make_objective("dpo_nll")
        batch = Collator(0, sources=BOTH)(self.data[:])
        with torch.no_grad():
            scored = score(model, batch, FrozenReference(self.reference))
            losses = [t.loss(scored, {}) / t.count(batch) for t in objective.terms]
        self.found.append({t.name: float(x) for t, x in zip(objective.terms, losses)})


@pytest.mark.parametrize("accumulation", [1, 2])
def test_maxright_trains_the_term_with_the_largest_gap(accumulation):
    """Every step is on all data, so that the losses it sees are known."""
    data = dataset(BOTH)
    losses = MeanLosses(data)
    losses.reference = model()
    optimum = {"sft": 3.55, "preference": 0.1}
    run = trainer(
        dpo_nll(MAXRIGHT | {"optimum": optimum}), data, max_steps=9, callbacks=[losses], learning_rate=3e-3,
        per_device_train_batch_size=16 // accumulation, gradient_accumulation_steps=accumulation,
    )  # fmt: skip
    run.train()
    known, chosen = {}, []
    for step, (now, entry) in enumerate(zip(losses.found, logs(run), strict=True)):
        if step % 3 == 0:
            known = dict(now)
        gaps = {name: known[name] - optimum[name] for name in known}
        for name, gap in gaps.items():
            assert entry[f"balance/gap/{name}"] == pytest.approx(gap, abs=1e-5)
        best = max(gaps, key=gaps.get)
        assert entry[f"weight/{best}"] == 2.0  # the sum of all
        known[best] = now[best]
        chosen.append(best)
    assert len(set(chosen)) == 2


def test_measuring_for_maxright_is_counted():
    objective = dpo_nll(MAXRIGHT | {"refresh": 5})
    run = trainer(objective, dataset(BOTH), max_steps=1, per_device_train_batch_size=16)
    run.train()
    counters = run.counters()
    trained = counters["backwards"]
    assert counters["policy_forwards"] == 8 + 16 + trained
    assert counters["reference_forwards"] == 16 + (16 if trained == 16 else 0)


def test_the_budget_measures_what_an_evaluation_does():
    held_out = dataset(BOTH, n=4)
    run = trainer(dpo_nll(BUDGET | {"rise": 100.0}), dataset(BOTH), eval_dataset=held_out, max_steps=3)
    run.train()
    plain = trainer(
        "dpo_nll",
        dataset(BOTH),
        eval_dataset=held_out,
        max_steps=3,
        eval_strategy="steps",
        eval_steps=2,
        eval_on_start=True,
    )
    plain.train()
    evaluated = [entry[NLL] for entry in plain.state.log_history if NLL in entry]
    assert [entry["balance/measured"] for entry in logs(run)] == [evaluated[0], evaluated[0], evaluated[1]]
    # far within its budget it changes nothing
    assert logs(run)[2]["weight/preference"] == 1 and logs(run)[2]["balance/multiplier"] == 0
    assert torch.equal(parameters(run.model), parameters(plain.model))
    # and an evaluation is that of the objective's own weights
    assert run.evaluate()["eval_loss"] == plain.evaluate()["eval_loss"]


def test_the_budgets_measurements_are_counted():
    held_out = dataset(BOTH, n=4)
    run = trainer(dpo_nll(BUDGET), dataset(BOTH), eval_dataset=held_out, max_steps=3)
    run.train()
    plain = trainer("dpo_nll", dataset(BOTH), max_steps=3)
    plain.train()
    cost = plain.meter.of_examples(held_out, trained=False)
    for name in ("flops", "policy_forwards", "reference_forwards"):
        assert run.counters()[name] == plain.counters()[name] + 2 * getattr(cost, name)
    assert run.counters()["tokens"] == plain.counters()["tokens"]


def test_a_budget_keeps_what_would_be_forgotten():
    """Pairs alone spoil demonstrations that were learnt before; the budget holds their likelihood."""
    options = dict(per_device_train_batch_size=16, lr_scheduler_type="constant", learning_rate=3e-3)
    taught = trainer("sft", dataset(("demonstrations",)), max_steps=30, **options)
    taught.train()

    def train(balance):
        run = trainer(
            dpo_nll(balance, sft_weight=0.0, beta=0.5), dataset(BOTH), policy=copy.deepcopy(taught.model), max_steps=60,
            eval_dataset={"held_out": dataset(("demonstrations",)), "pairs": dataset(("pairs",))}, **options,
        )  # fmt: skip
        run.train()
        return run, run.evaluate()

    quantity = "eval_held_out_demonstrations/nll"
    _, free = train(None)
    run, bound = train({"method": "forgetting_budget", "quantity": quantity, "rise": 0.2, "every": 1})
    start = logs(run)[0]["balance/measured"]
    assert free[quantity] > start + 0.8
    assert bound[quantity] < start + 0.25
    assert max(entry["balance/multiplier"] for entry in logs(run)) > 0.1
    assert bound["eval_pairs_loss/preference"] < 0.1  # and preferences are learnt


def test_a_kl_on_prior_prompts_can_be_the_quantity():
    objective = {
        "sft": {"loss": "nll"},
        "preference": {"loss": "dpo"},
        "kl": {"on": "documents", "weight": 0.0},
        "balance": {
            "method": "forgetting_budget",
            "quantity": "eval_prior_kl",
            "limit": 1e-3,
            "every": 1,
            "keep": "kl",
        },
    }
    objective["sft"]["on"] = "demonstrations"
    run = trainer(
        objective, dataset((*BOTH, "documents")), max_steps=3,
        eval_dataset={"prior": dataset(("documents",), n=4)},
    )  # fmt: skip
    run.train()
    first, second, *_ = logs(run)
    assert first["balance/measured"] == pytest.approx(0, abs=1e-6) and first["weight/kl"] == 0
    assert second["balance/measured"] > 1e-3 and second["weight/kl"] > 0


def test_what_decides_the_weights_is_in_the_record_and_on_the_card(tmp_path):
    run = trainer(
        dpo_nll(BUDGET, sft_weight=Cosine(1, 0.5)), dataset(BOTH), eval_dataset=dataset(BOTH), output_dir=tmp_path
    )
    run.train()
    record = json.loads((tmp_path / "run.json").read_text())
    assert record["objective"]["balance"] == repr(make_balancer(BUDGET))
    assert "`ForgettingBudget(quantity='eval_demonstrations/nll', rise=0.01" in model_card("m", record)
    assert "| sft | token_nll | demonstrations+documents | Cosine(1, 0.5) |" in model_card("m", record)


# ---- resumption ----

BALANCERS = {"alright": "alright", "maxright": MAXRIGHT, "budget": BUDGET | {"every": 3}}


def train(folder: str, resume: bool, balance, seconds: float = 0.0) -> None:
    """14 steps; checkpoints off the rhythm of measuring, refreshing and logging."""
    torch.set_num_threads(1)

    class Slow(TrainerCallback):
        def on_step_end(self, *args, **kwargs):
            time.sleep(seconds)

    run = trainer(
        dpo_nll(balance, sft_weight=Linear(0.5, 1)), dataset(BOTH), output_dir=folder, max_steps=14,
        per_device_train_batch_size=4, gradient_accumulation_steps=2, save_strategy="steps", save_steps=4,
        logging_steps=3, eval_dataset=dataset(BOTH, n=3), callbacks=[Slow()], gradient_conflict=5,
    )  # fmt: skip
    run.train(resume_from_checkpoint=last_checkpoint(folder) if resume else None)
    write_end(run, folder)


@pytest.mark.parametrize("name", BALANCERS)
def test_killed_and_resumed_it_ends_the_same(name, tmp_path):
    whole, torn = tmp_path / "whole", tmp_path / "torn"
    whole.mkdir()
    assert join([start(train, str(whole), False, BALANCERS[name])]) == [0]
    child = start(train, str(torn), False, BALANCERS[name], seconds=0.05)
    while not (torn / f"checkpoint-{4 + 4 * random.Random(name).randrange(2)}").exists():
        assert child.is_alive()
        time.sleep(0.002)
    os.kill(child.pid, signal.SIGKILL)
    child.join()
    assert join([start(train, str(torn), True, BALANCERS[name])]) == [0]
    assert_same_end(torn, whole)
    state = json.loads((whole / "checkpoint-12" / "trainer_state.json").read_text())
    assert bool(state["stateful_callbacks"]["RunState"]["args"]["balance"]) == (name != "alright")


@pytest.mark.parametrize(
    "change, message",
    [
        ({"preference_weight": Step(0.31, 1, 0.5)}, r"objective.preference.schedule is \\?\"Step\(0.3, 1, 0.5\)"),
        ({"balance": BUDGET | {"rise": 0.02}}, "balance.method"),
        ({"eval": 5}, "balance.measured_on"),
    ],
)
def test_a_run_with_other_weights_is_another_run(change, message, tmp_path):
    def made(balance=BUDGET, eval=4, **weights):
        return trainer(
            dpo_nll(balance, **{"preference_weight": Step(0.3, 1, 0.5)} | weights), dataset(BOTH), output_dir=tmp_path,
            max_steps=2, save_strategy="steps", save_steps=1, eval_dataset=dataset(BOTH, n=eval),
        )  # fmt: skip

    made().train()
    with pytest.raises(ValueError, match="is of another run: " + message):
        made(**change).train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))


# ---- several ranks ----


@ranks_resume
@pytest.mark.parametrize("name", [pytest.param("maxright", marks=pytest.mark.slow), "budget"])
def test_two_ranks_decide_as_one_process_does(name, tmp_path):
    one, two = tmp_path / "one", tmp_path / "two"
    one.mkdir()
    two.mkdir()
    assert join([start(train_alone, str(one), BALANCERS[name])]) == [0]
    assert join(start_ranks(train_halved, str(two), BALANCERS[name])) == [0, 0]
    (alone, _), (halved, _) = (json.loads((folder / "final.json").read_text()) for folder in (one, two))
    for a, b in zip(alone, halved, strict=True):
        shared = {k: v for k, v in a.items() if k.startswith(("weight/", "balance/", "conflict/", "loss"))}
        assert len(shared) > 5 or "loss" not in a
        assert {k: b[k] for k in shared} == pytest.approx(shared, rel=1e-3, abs=1e-5)
    torch.testing.assert_close(torch.load(one / "final.pt"), torch.load(two / "final.pt"), rtol=1e-3, atol=1e-4)


def train_alone(folder: str, balance, size: int = 8, **options) -> None:
    torch.set_num_threads(1)
    run = trainer(
        dpo_nll(balance), dataset(BOTH), output_dir=folder, max_steps=6, per_device_train_batch_size=size,
        eval_dataset=dataset(BOTH, n=3), gradient_conflict=2, learning_rate=1e-3, **options,
    )  # fmt: skip
    run.train()
    write_end(run, folder)


def train_halved(folder: str, balance) -> None:
    train_alone(folder, balance, 4, ddp_backend="gloo")


# ---- gradient conflict ----


def test_conflict_by_hand():
    data, policy, reference = dataset(BOTH), model().double(), model(seed=1).double()
    objective = make_objective(dpo_nll(sft_weight=0.3, preference_weight=2.0))
    batch = Collator(0, sources=BOTH)(data[:])
    gradients = []
    for term in objective.terms:
        policy.zero_grad()
        (term.loss(score(policy, batch, FrozenReference(reference)), {}) / term.count(batch)).backward()
        gradients.append(torch.cat([p.grad.flatten() for p in policy.parameters()]))
    a, b = gradients
    policy.zero_grad()
    for options in (
        {"per_device_train_batch_size": 16},
        {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 4},
    ):
        run = trainer(
            objective, data, policy=model().double(), reference_model=reference, max_steps=2, gradient_conflict=2,
            dtype="auto", **options,
        )  # fmt: skip
        run.train()
        first, second = logs(run)
        assert first["conflict/sft-preference/cosine"] == pytest.approx(float(a @ b / (a.norm() * b.norm())), rel=1e-6)
        assert first["conflict/sft-preference/ratio"] == pytest.approx(float(a.norm() / b.norm()), rel=1e-6)
        assert "conflict/sft-preference/cosine" not in second


WAYS = {
    "dropout": {"disable_dropout": False},
    "an adapter": {"peft_config": LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")},
    "a cached reference": {"reference": "cached"},
    "padded": {"layout": "padded"},
}


@pytest.mark.parametrize("way", WAYS)
def test_measuring_conflict_changes_nothing(way):
    """Not a bit, with dropout and with statistics that outlive the step."""
    ends = []
    objective = {"sft": {"loss": "nll"}, "preference": {"loss": "dpo"}, "bco": {"loss": "bco", "on": "labels"}}
    for every in (0, 1):
        policy = model(attention_dropout=0.3) if way == "dropout" else model()
        run = trainer(
            objective, dataset((*BOTH, "labels")), policy=policy, max_steps=4, gradient_conflict=every,
            max_grad_norm=1.0, gradient_accumulation_steps=2, per_device_train_batch_size=6, **WAYS[way],
        )  # fmt: skip
        run.train()
        counters = {k: v for k, v in run.counters().items() if k not in ("seconds", "conflict_flops")}
        history = [{k: v for k, v in e.items() if not k.startswith("conflict/")} for e in logs(run)]
        ends.append((parameters(run.model), counters, history, run.run_state.statistics, logs(run)))
    assert torch.equal(ends[0][0], ends[1][0])
    assert ends[0][1:4] == ends[1][1:4]
    assert any("conflict/sft-bco/cosine" in entry for entry in ends[1][4])


def test_conflict_is_refused_where_it_cannot_be_measured():
    with pytest.raises(ValueError, match="gradient_conflict is -1; want a number of steps"):
        trainer("dpo_nll", dataset(BOTH), gradient_conflict=-1)
