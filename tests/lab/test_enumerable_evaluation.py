"""What evaluation estimates from samples is, in the world that can be listed, what is known exactly."""

import numpy as np
import pytest
import torch
from listed import model_of, within

from experiments.lab.enumerable import exact
from experiments.lab.enumerable.optimum import loss_front
from experiments.lab.enumerable.policy import policy_of
from experiments.lab.enumerable.world import EOS, World
from uft.collation import Collator
from uft.data.mixture import FeedbackDataset
from uft.evaluation import scoring
from uft.evaluation.divergence import divergence, divergence_along, sampled
from uft.evaluation.likelihood import demonstration_likelihood
from uft.evaluation.preference import pair_preference
from uft.evaluation.tradeoff import hypervolume, ideal_distance, pareto_front
from uft.models import FrozenReference

WORLD, BETA = World(), 0.3
COLLATE = Collator(EOS)


@pytest.fixture(scope="module")
def models():
    return model_of(WORLD, 1), model_of(WORLD, 2)


@pytest.fixture(scope="module")
def listed(models):
    return tuple(policy_of(model, WORLD) for model in models)


def scores_of(models, examples, **options):
    policy, reference = models
    data = FeedbackDataset({"train": examples})
    return scoring.score_data(policy, data, COLLATE, reference=FrozenReference(reference), **options)


def test_likelihood_of_demonstrations(models, listed):
    scores = scores_of(models, WORLD.draw_demonstrations(2000, seed=0))
    found = demonstration_likelihood(scores)
    assert found["nll"] == pytest.approx(exact.sft_loss(WORLD, listed[0]).item(), rel=0.03)
    per_response = -(WORLD.demonstrations * listed[0]).sum(-1).mean()
    within(-scores.logp, per_response)
    assert found["nll_sequence"] == pytest.approx(per_response.item(), rel=0.03)


def test_ranking_of_pairs(models, listed):
    found = pair_preference(scores_of(models, WORLD.draw_pairs(4000, seed=0)), BETA)
    policy, reference = listed
    ratio = policy - reference

    def mean(of_pair):
        """Over all pairs (i chosen, j rejected) about covered prompts."""
        covered = WORLD.covered.nonzero()[:, 0].tolist()
        return sum((exact.pair_mass(WORLD, x) * of_pair(x)).sum().item() for x in covered) / len(covered)

    def right(table):
        return lambda x: (table[x][:, None] > table[x]).double() + 0.5 * (table[x][:, None] == table[x]).double()

    error = 4.5 * 0.5 / np.sqrt(4000)  # of a share
    exactly = {
        "likelihood/accuracies": mean(right(policy)),
        "likelihood/token_accuracies": mean(right(policy / WORLD.length)),
        "rewards/accuracies": mean(right(ratio)),
        "agreement": mean(lambda x: 1 - (right(policy)(x) - right(ratio)(x)).abs()),
        "displaced": mean(lambda x: (ratio[x] < 0).double()[:, None]),
    }
    for name, value in exactly.items():
        assert found[name] == pytest.approx(value, abs=error), name
    assert exactly["rewards/accuracies"] == pytest.approx(exact.preferred_share(WORLD, policy, reference))
    means = {
        "rewards/margins": mean(lambda x: BETA * (ratio[x][:, None] - ratio[x])),
        "drift/chosen": mean(lambda x: ratio[x][:, None]),
        "drift/rejected": mean(lambda x: ratio[x][None, :]),
        "logps/chosen": mean(lambda x: policy[x][:, None]),
    }
    for name, value in means.items():
        assert found[name] == pytest.approx(value, abs=0.12), name


def test_divergence_along_what_either_model_writes(models, listed):
    """Sampled with at most `max_tokens` tokens, so that cut responses are among the listed ones."""
    policy, reference = listed
    prompts = [WORLD.ids(prompt) for prompt in WORLD.prompts for _ in range(200)]
    options = {"prompts": prompts, "eos": EOS, "max_new_tokens": WORLD.max_tokens, "batch_size": 600}
    along_policy, along_reference = (
        divergence_along(models[0], FrozenReference(models[1]), along, COLLATE, **options)
        for along in ("policy", "reference")
    )
    exactly = {
        "kl": exact.token_kl(WORLD, policy, reference),
        "kl_sequence": exact.sequence_kl(policy, reference),
        "reverse_kl": exact.token_kl(WORLD, reference, policy, along=policy),
        "entropy_sequence": exact.entropy(policy),
    }
    for name, value in exactly.items():
        assert along_policy[name] == pytest.approx(value.item(), rel=0.05), name
    exactly = {
        "reverse_kl": exact.token_kl(WORLD, reference, policy),
        "reverse_kl_sequence": exact.sequence_kl(reference, policy),
        "kl": exact.token_kl(WORLD, policy, reference, along=reference),
    }
    for name, value in exactly.items():
        assert along_reference[name] == pytest.approx(value.item(), rel=0.05), name


def test_divergence_along_given_responses_is_exact_where_all_are_given(models, listed):
    policy, reference = listed
    scores = scores_of(models, WORLD.every_response(4), divergence=True)
    found = divergence(scores)
    nodes = (WORLD.token_logp(policy).exp() * (WORLD.token_logp(policy) - WORLD.token_logp(reference))).sum(-1)[4]
    total = sum(nodes[WORLD.nodes.index(r[:t])] for r in WORLD.responses for t in range(len(r)))
    assert found["kl_sequence"] == pytest.approx(total.item() / len(WORLD.responses), abs=1e-5)
    assert found["kl"] == pytest.approx(total.item() / WORLD.length.sum().item(), abs=1e-5)
    # weighted by how likely each is, the same numbers are the exact KL of whole responses
    weighted = (policy[4].exp().numpy() * scores.kl).sum()
    assert weighted == pytest.approx((policy[4].exp() * (policy - reference)[4]).sum().item(), abs=1e-5)


def test_samples_have_the_listed_frequencies(models, listed):
    x, count = 3, 3000
    data = sampled(models[0], [WORLD.ids(WORLD.prompts[x])] * count, eos=EOS, max_new_tokens=4, batch_size=1000)
    places = torch.tensor([WORLD.place(WORLD.text(data[i].responses[0].tokens)) for i in range(count)])
    share, mass = torch.bincount(places, minlength=len(WORLD.responses)) / count, listed[0][x].exp()
    often = mass > 0.005
    assert often.sum() > 10
    assert ((share - mass)[often].abs() < 4.5 * (mass * (1 - mass) / count).sqrt()[often]).all()


def test_fronts_of_evaluation_keep_what_is_on_the_true_front(listed):
    small = World("ab")
    reference = small.documents.log()
    front = loss_front(small, reference, BETA, (0.0, 0.1, 0.3, 0.5, 0.7, 0.9, 1.0))
    losses = np.stack([front.x, front.y], axis=1)
    assert pareto_front(-losses).all()
    mixed = torch.logaddexp(front.policies, reference).log_softmax(-1)
    more = [(exact.sft_loss(small, p).item(), exact.pairwise_loss(small, p, reference, BETA).item()) for p in mixed]
    assert pareto_front(-np.concatenate([losses, np.array(more)]))[: len(losses)].all()
    corner = -losses.max(0)
    assert hypervolume(-losses, corner) == pytest.approx(hypervolume(-np.concatenate([losses, np.array(more)]), corner))
    assert ideal_distance(losses, front.ideal).min() > 0
