"""Objectives: what a term is on, how presets are put together, and what is refused."""

import math

import pytest
import torch
from mixed import dataset, model

from uft import losses
from uft.collation import Collator
from uft.models import FrozenReference, score
from uft.objective import Objective
from uft.presets import PRESETS, make_objective
from uft.terms import Divergence, Likelihood, Pairwise

SOURCES = ("demonstrations", "pairs", "labels", "scores", "documents")


@pytest.fixture(scope="module")
def batch():
    return Collator(0, sources=SOURCES)(dataset()[:])


@pytest.fixture(scope="module")
def scored(batch):
    with torch.no_grad():
        return score(model(), batch, FrozenReference(model(seed=1)), divergence=True)


@pytest.mark.parametrize(
    "on, responses",
    [
        ("demonstrations", 8), ("pairs", 16), ("chosen", 8), ("rejected", 8), ("labels", 8), ("scores", 8),
        ("documents", 8), ("responses", 32), ("demonstrations+chosen", 16), ("pairs + labels", 24),
    ],
)  # fmt: skip
def test_rows(batch, on, responses):
    assert batch.rows(on).sum() == responses


def test_rows_refuses_a_name_it_does_not_know(batch):
    with pytest.raises(ValueError, match="'chosn' is unknown"):
        batch.rows("chosn")


def test_dpo_nll_by_hand(scored):
    batch = scored.batch
    objective = make_objective({"preset": "dpo_nll", "beta": 0.3, "sft_weight": 0.5, "preference_weight": 2.0})
    loss, metrics = objective(scored, objective.counts(batch))

    nll, tokens = 0.0, 0
    for r in range(len(batch.kind)):
        if batch.kind[r] in (0, 1):  # documents and demonstrations
            for t in range(batch.shifted.shape[1]):
                if batch.shifted[r, t]:
                    nll, tokens = nll - float(scored.token_logp[r, t]), tokens + 1
    preference = 0.0
    for chosen, rejected in batch.preferences.tolist():
        ratio = scored.logp - scored.reference_logp
        preference += math.log1p(math.exp(-0.3 * float(ratio[chosen] - ratio[rejected])))
    assert float(loss) == pytest.approx(0.5 * nll / tokens + 2.0 * preference / 8, rel=1e-5)
    assert metrics["weight/preference"][0] == 2.0


def test_uft_is_one_mean_over_demonstrations_and_responses(scored):
    batch = scored.batch
    objective = make_objective("uft")
    assert objective.counts(batch).tolist() == [8 + 16 + 8 + 8]
    loss, _ = objective(scored, objective.counts(batch))
    rows = ~batch.target.isnan()
    s = torch.sigmoid(0.01 * (scored.logp - scored.reference_logp))[rows]
    assert float(loss) == pytest.approx(float((s - batch.target[rows]).square().mean()), rel=1e-5)
    assert (batch.target[batch.rows("demonstrations")] == 1).all()


def test_both_directions_of_kl(scored):
    batch = scored.batch
    logits = [m(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits.double().log_softmax(-1)
              for m in (model(), model(seed=1))]  # fmt: skip
    p, q = (x[:, :-1] for x in logits)
    mask = batch.shifted & batch.rows("demonstrations")[:, None]
    for direction, expected in (
        ("policy_reference", (p.exp() * (p - q)).sum(-1)),
        ("reference_policy", (q.exp() * (q - p)).sum(-1)),
    ):
        term = Divergence("kl", "demonstrations", direction=direction)
        assert term.count(batch) == mask.sum()
        assert float(term.loss(scored, {})) == pytest.approx(float(expected[mask].sum()), rel=1e-5)


def test_likelihood_on_demonstrations_and_on_chosen_are_two_terms(scored):
    demonstrated, chosen = Likelihood("a", "demonstrations"), Likelihood("b", "chosen")
    both = Likelihood("c", "demonstrations+chosen")
    total = demonstrated.loss(scored, {}) + chosen.loss(scored, {})
    torch.testing.assert_close(both.loss(scored, {}), total)
    assert both.count(scored.batch) == demonstrated.count(scored.batch) + chosen.count(scored.batch)


def test_a_response_weight_scales_its_loss(batch):
    term = Pairwise("preference", function=losses.dpo)
    with torch.no_grad():
        plain = score(model(), batch, FrozenReference(model(seed=1)))
        heavier = type(batch)(batch, weight=torch.where(batch.rows("chosen"), 2.0, 1.0))
        doubled = score(model(), heavier, FrozenReference(model(seed=1)))
    torch.testing.assert_close(term.loss(doubled, {}), 2 * term.loss(plain, {}))


@pytest.mark.parametrize("name", [*PRESETS, *losses.PAIRWISE])
def test_every_preset_is_finite_and_has_a_gradient(batch, name):
    objective = make_objective(name)
    policy = model()
    scored = score(policy, batch, FrozenReference(model(seed=1)), divergence=objective.needs_divergence)
    statistics = {}
    for term in objective.statistic_terms:
        n = torch.tensor(1.0)
        key = "kl" if term.statistics_on == "mismatched" else "delta"
        statistics[term.name] = term.statistics({key: (n, n)}, {}, update=False)
    loss, _ = objective(scored, objective.counts(batch), statistics)
    loss.backward()
    assert torch.isfinite(loss)
    gradients = [p.grad for p in policy.parameters() if p.grad is not None]
    assert all(torch.isfinite(g).all() for g in gradients) and any(g.any() for g in gradients)


def test_a_micro_batch_without_a_terms_rows_counts_zero(batch):
    objective = make_objective("dpo_nll")
    part = batch.select(batch.rows("demonstrations"))
    assert objective.counts(part).tolist()[1] == 0
    with torch.no_grad():
        loss, metrics = objective(score(model(), part), torch.tensor([10.0, 5.0]))
    assert torch.isfinite(loss) and "loss/preference" not in metrics


def test_weights_follow_progress(scored):
    objective = make_objective("dpo_nll").with_weights(preference=lambda progress: progress, sft=0.0)
    counts = objective.counts(scored.batch)
    losses_at = [float(objective(scored, counts, progress=p)[0]) for p in (0.0, 0.5, 1.0)]
    assert losses_at[0] == 0 and losses_at[1] == pytest.approx(losses_at[2] / 2)


def test_mapping_of_terms():
    spec = {
        "sft": {"loss": "nll", "on": "demonstrations"},
        "preference": {"loss": "simpo", "beta": 2.0, "gamma": 1.0, "weight": 0.5},
        "kl": {"weight": 0.1},
    }
    objective = make_objective(spec)
    assert [t["name"] for t in objective.describe()] == ["sft", "preference", "kl"]
    assert objective.describe()[1] == {
        "name": "preference", "type": "Pairwise", "on": "pairs", "weight": 0.5, "loss": "simpo", "beta": 2.0,
        "gamma": 1.0,
    }  # fmt: skip


@pytest.mark.parametrize(
    "spec, message",
    [
        ("dpoo", "objective 'dpoo' is unknown; want one of sft"),
        ({"preset": "dpo", "betta": 1}, "has no option 'betta'"),
        ({"preset": "kto", "betta": 1}, "has no option 'betta'"),
        ({"preset": "una", "betta": 1}, "betta"),
        ({"preset": "dpo", "beta": 0}, "beta of term 'preference' is 0; want a number > 0"),
        ({"a": {"loss": "nlll"}}, "term 'a': loss is 'nlll'; want one of nll"),
        ({"a": {"loss": "nll", "on": "demos"}}, "is on 'demos'"),
        ({"a": {"loss": "nll", "weight": -1}}, "weight of term 'a' is -1"),
        ({"kl": {"direction": "both"}}, "direction is 'both'"),
        ({}, "an objective needs terms"),
        (3, "objective is 3"),
    ],
)
def test_what_is_refused(spec, message):
    with pytest.raises(ValueError, match=message):
        make_objective(spec)


def test_two_terms_of_one_name_are_refused():
    with pytest.raises(ValueError, match="different names"):
        Objective((Likelihood("a", "chosen"), Likelihood("a", "rejected")))
