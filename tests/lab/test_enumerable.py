"""The world that can be listed: its exact numbers are those of arithmetic, of optimality, and of large samples."""

import math

import numpy as np
import pytest
import torch
from listed import model_of, within

from experiments.lab.enumerable import exact
from experiments.lab.enumerable.optimum import (
    Front,
    joint_optimum,
    kl_front,
    loss_front,
    pointwise_optimum,
    reward_front,
)
from experiments.lab.enumerable.policy import enumerated, policy_of, tokenizer_of
from experiments.lab.enumerable.world import EOS, World
from experiments.lab.measures import divergence, logp
from uft import losses
from uft.collation import Collator
from uft.feedback import mismatched
from uft.models import FrozenReference, score
from uft.presets import make_objective

WORLD = World()
SMALL = World(letters="ab")
BETA = 0.3


@pytest.fixture(scope="module")
def policy():
    return model_of(WORLD, 1)


@pytest.fixture(scope="module")
def reference():
    return model_of(WORLD, 2)


def tables(world, seed=0, spread=1.0):
    """Log-probabilities of a random table near the documents."""
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(world.documents.shape, generator=generator, dtype=torch.float64)
    return (world.documents.log() + spread * noise).log_softmax(-1)


def close(a, b, **options):
    torch.testing.assert_close(torch.as_tensor(a), torch.as_tensor(b).to(torch.as_tensor(a)), **options)


# ---- what there is ----


@pytest.mark.parametrize("world", [WORLD, SMALL, World(letters="ab", max_tokens=5, uncovered=0)])
def test_every_sequence_is_one_response(world):
    written, most = len(world.vocabulary) - 1, world.max_tokens
    assert len(world.responses) == len(set(world.responses)) == sum(written**n for n in range(most)) + written**most
    assert all(len(response) <= most for response in world.responses)
    assert all(("." not in r and len(r) == most) or r.index(".") == len(r) - 1 for r in world.responses)
    assert [world.place(response) for response in world.responses] == list(range(len(world.responses)))
    rng = np.random.default_rng(0)
    for ids in rng.integers(0, len(world.vocabulary), (50, most + 2)):  # whatever a model writes is one of them
        assert world.text(ids) in world.responses
    for distribution in (world.documents, world.demonstrations, world.offered):
        close(distribution.sum(-1), torch.ones(len(world.prompts)))
        assert (distribution > 0).all()


def test_the_reward_is_what_it_says():
    # letters in the right place, 1.5 for "=" before the end, -1 if cut off
    cases = {
        "ba=.": 3.5,
        "ba.": 2.0,
        "ab.": 0.0,
        "b=.": 2.5,
        ".": 0.0,
        "=.": 1.5,
        "bab.": 2.0,
        "baba": 1.0,
        "aba=": -1.0,
    }
    for response, reward in cases.items():
        assert WORLD.reward_of("ab=", response) == reward
    assert WORLD.covered.tolist() == [prompt[0] != "c" for prompt in WORLD.prompts]
    x = WORLD.prompts.index("ab=")
    beats = WORLD.beats(x)[WORLD.place("ba."), WORLD.place("ab.")]
    assert beats.item() == pytest.approx(1 / (1 + math.exp(-2.0)))
    assert World(flip=0.25).beats(x)[WORLD.place("ba."), WORLD.place("ab.")].item() == pytest.approx(
        0.75 * beats.item() + 0.25 * (1 - beats.item())
    )


def test_a_policy_is_the_same_by_tokens_and_by_responses():
    table = tables(SMALL)
    by_token = SMALL.token_logp(table)
    close(by_token.exp().sum(-1), torch.ones(by_token.shape[:2]))
    close(SMALL.summed(by_token), table)
    # by hand: "a=." is a, then = behind a, then the end behind a=
    x, masses = 2, table[2].exp()
    behind = lambda start: sum(masses[SMALL.place(r)] for r in SMALL.responses if r.startswith(start))
    expected = (behind("a") / behind("")) * (behind("a=") / behind("a")) * (behind("a=.") / behind("a="))
    assert table[x, SMALL.place("a=.")].exp().item() == pytest.approx(expected.item())


def test_the_transformer_is_listed_whole(policy):
    listed = policy_of(policy, WORLD)
    close(listed.exp().sum(-1), torch.ones(len(WORLD.prompts)))
    for prompt, response in (("ab=", "."), ("ca=", "b."), ("bb=", "a=c."), ("cb=", "===="), ("aa=", "ccba")):
        ids = torch.from_numpy(WORLD.ids(prompt + response))[None].long()
        token_logp = policy(input_ids=ids).logits[0].double().log_softmax(-1)
        by_hand = sum(token_logp[len(prompt) + t - 1, ids[0, len(prompt) + t]] for t in range(len(response)))
        assert listed[WORLD.prompts.index(prompt), WORLD.place(response)].item() == pytest.approx(
            by_hand.item(), abs=1e-5
        )


def test_listing_has_a_gradient():
    model = model_of(SMALL, 0)
    exact.sft_loss(SMALL, enumerated(model, SMALL)).backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())


# ---- arithmetic ----


def test_divergences_by_hand_with_two_responses():
    a, b = torch.tensor([[0.5, 0.5]]).double().log(), torch.tensor([[0.25, 0.75]]).double().log()
    assert exact.sequence_kl(a, b).item() == pytest.approx(0.5 * math.log(2) + 0.5 * math.log(2 / 3))
    assert exact.sequence_kl(b, a).item() == pytest.approx(0.25 * math.log(0.5) + 0.75 * math.log(1.5))
    best = exact.optimal_policy(b, torch.tensor([[1.0, 0.0]]).double(), beta=0.5)
    z = 0.25 * math.exp(2) + 0.75
    assert best.log_z.item() == pytest.approx(math.log(z))
    close(best.logp.exp(), [[0.25 * math.exp(2) / z, 0.75 / z]])


def test_the_kl_per_token_by_hand():
    """Token by token, response by response; along the policy itself its sum is that of whole responses."""
    a, b = tables(SMALL, 0), tables(SMALL, 1)

    def next_of(table, x):
        """What has been written -> the probabilities of what comes next."""
        begins = {}
        for response, mass in zip(SMALL.responses, table[x].exp().tolist()):
            for t in range(len(response) + 1):
                begins[response[:t]] = begins.get(response[:t], 0.0) + mass
        return {node: np.array([begins[node + v] / begins[node] for v in SMALL.vocabulary]) for node in SMALL.nodes}

    total, tokens = {"a": 0.0, "b": 0.0}, {"a": 0.0, "b": 0.0}
    for x in range(len(SMALL.prompts)):
        p, q = next_of(a, x), next_of(b, x)
        for y, response in enumerate(SMALL.responses):
            for name, along in (("a", a), ("b", b)):
                mass, nodes = along[x, y].exp().item(), [response[:t] for t in range(len(response))]
                total[name] += mass * sum((p[node] * np.log(p[node] / q[node])).sum() for node in nodes)
                tokens[name] += mass * len(response)
    assert exact.token_kl(SMALL, a, b).item() == pytest.approx(total["a"] / tokens["a"])
    assert exact.token_kl(SMALL, a, b, along=b).item() == pytest.approx(total["b"] / tokens["b"])
    close(exact.token_kl(SMALL, a, b) * exact.expected(SMALL.length, a), exact.sequence_kl(a, b))


def test_population_losses_by_hand():
    a, b = tables(SMALL, 0), tables(SMALL, 1)
    dpo = una = tokens = nll = 0.0
    covered = SMALL.covered.nonzero()[:, 0].tolist()
    for x in range(len(SMALL.prompts)):
        for y in range(len(SMALL.responses)):
            nll -= SMALL.demonstrations[x, y].item() * a[x, y].item()
            tokens += SMALL.demonstrations[x, y].item() * len(SMALL.responses[y])
    for x in covered:
        offered, reward = SMALL.offered[x].numpy(), (BETA * (a - b)[x]).numpy()
        for i in range(len(offered)):
            for j in range(len(offered)):
                wins = 1 / (1 + math.exp(float(SMALL.reward[x, j] - SMALL.reward[x, i])))
                # drawn as (i, j), judged either way
                for chosen, rejected, share in ((i, j, wins), (j, i, 1 - wins)):
                    weight = offered[i] * offered[j] * share / len(covered)
                    dpo += weight * math.log1p(math.exp(reward[rejected] - reward[chosen]))
                    una += weight * 0.5 * (1 / (1 + math.exp(-reward[chosen])) - 1) ** 2
                    una += weight * 0.5 * (1 / (1 + math.exp(-reward[rejected]))) ** 2
    assert exact.sft_loss(SMALL, a).item() == pytest.approx(nll / tokens)
    assert exact.pairwise_loss(SMALL, a, b, BETA).item() == pytest.approx(dpo)
    assert exact.pointwise_loss(SMALL, a, b, BETA).item() == pytest.approx(una)


# ---- optima ----


def gradient_of(function, table):
    z = table.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(function(z.log_softmax(-1)), z)
    return gradient.norm().item()


def test_z_and_the_optimal_policy():
    reference, reward = tables(WORLD), WORLD.reward
    best = exact.optimal_policy(reference, reward, BETA)
    for x in (0, 5):
        z = sum(math.exp(a + r / BETA) for a, r in zip(reference[x].tolist(), reward[x].tolist()))
        assert best.log_z[x].item() == pytest.approx(math.log(z))
    close(best.logp.exp().sum(-1), torch.ones(len(WORLD.prompts)))
    most = exact.regularised_reward(best.logp, reference, reward, BETA)
    assert most.item() == pytest.approx(BETA * best.log_z.mean().item())
    for seed in range(20):
        noise = torch.randn(best.logp.shape, generator=torch.Generator().manual_seed(seed))
        other = (best.logp + 0.1 * noise).log_softmax(-1)
        assert exact.regularised_reward(other, reference, reward, BETA) < most


def test_dpo_on_all_pairs_is_the_optimal_policy():
    """With Bradley-Terry judgements, DPO's margins are those of the reward: π = π_ref exp(r / β) / Z."""
    reference = tables(SMALL)
    best = exact.optimal_policy(reference, SMALL.reward, BETA).logp
    assert gradient_of(lambda p: exact.pairwise_loss(SMALL, p, reference, BETA), best) < 1e-12
    found, solved = joint_optimum(SMALL, reference, BETA, 1.0)
    close(found[SMALL.covered], best[SMALL.covered], atol=1e-9, rtol=0)
    close(found[~SMALL.covered], SMALL.demonstrations[~SMALL.covered].log())
    assert max(m.decrement for m in solved) < 1e-18


def test_robust_dpo_sees_through_flips_and_dpo_does_not():
    world, reference = World("ab", flip=0.2), tables(SMALL)
    best = exact.optimal_policy(reference, world.reward, BETA).logp
    robust = lambda p: exact.pairwise_loss(world, p, reference, BETA, losses.robust_dpo, label_smoothing=0.2)
    assert gradient_of(robust, best) < 1e-12
    assert gradient_of(lambda p: exact.pairwise_loss(world, p, reference, BETA), best) > 1e-3


@pytest.mark.parametrize("loss", [losses.una_mse, losses.una_bce])
def test_una_finds_the_optimal_policy_where_scores_are_normalised(loss):
    """σ(r - β log Z) is a score with f(x) = 0; σ(r) is not, and then the optimum is another policy."""
    reference = tables(SMALL)
    best = exact.optimal_policy(reference, SMALL.reward, BETA)
    normalised = torch.sigmoid(SMALL.reward - BETA * best.log_z[:, None])
    found = pointwise_optimum(SMALL, reference, BETA, normalised, loss)
    close(found[SMALL.covered], best.logp[SMALL.covered], atol=1e-7, rtol=0)
    if loss is losses.una_mse:
        assert exact.pointwise_loss(SMALL, found, reference, BETA, loss, normalised) < 1e-18
    raw = torch.sigmoid(SMALL.reward)
    found = pointwise_optimum(SMALL, reference, BETA, raw, loss)
    assert gradient_of(lambda p: exact.pointwise_loss(SMALL, p, reference, BETA, loss, raw), found) < 1e-9
    assert exact.sequence_kl(best.logp, found, SMALL.covered) > 0.1


def test_una_on_pairs_fits_the_win_rate():
    reference = tables(SMALL)
    found = pointwise_optimum(SMALL, reference, BETA)
    function = lambda p: exact.pointwise_loss(SMALL, p, reference, BETA)
    assert gradient_of(function, found) < 1e-9
    for seed in range(20):
        noise = 0.1 * torch.randn(found.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        assert function((found + noise).log_softmax(-1)) > function(found)


@pytest.mark.parametrize("weight", [0.0, 0.1, 0.5, 0.9])
def test_the_joint_optimum_has_no_gradient(weight):
    reference = tables(WORLD)
    found, solved = joint_optimum(WORLD, reference, BETA, weight)

    def joint(p):
        return (1 - weight) * exact.sft_loss(WORLD, p) + weight * exact.pairwise_loss(WORLD, p, reference, BETA)

    assert gradient_of(joint, found) < 1e-9
    assert max(m.decrement for m in solved) < 1e-18
    if not weight:
        close(found, WORLD.demonstrations.log())


@pytest.fixture(scope="module")
def fronts():
    reference = tables(SMALL)
    betas = (8, 4, 2, 1, 0.5, 0.3, 0.2, 0.1)
    return reference, loss_front(SMALL, reference, BETA), reward_front(SMALL), kl_front(SMALL, reference, betas)


def test_no_policy_dominates_a_point_of_a_front(fronts):
    reference, of_losses, of_rewards, of_kl = fronts

    def values(table):
        reward = exact.expected(SMALL.reward, table, SMALL.covered).item()
        sft, kl = exact.sft_loss(SMALL, table).item(), exact.sequence_kl(table, reference, SMALL.covered).item()
        dpo = exact.pairwise_loss(SMALL, table, reference, BETA).item()
        return (of_losses, (sft, dpo)), (of_rewards, (sft, -reward)), (of_kl, (kl, -reward))

    generator = torch.Generator().manual_seed(0)
    tried = [tables(SMALL, seed, spread) for seed in range(10) for spread in (0.1, 1.0)]
    for front in (of_losses, of_rewards, of_kl):
        for policy in front.policies[:: max(1, len(front.x) // 8)]:
            for size in (0.01, 0.3):
                noise = torch.randn(policy.shape, generator=generator, dtype=torch.float64)
                tried.append((policy + size * noise).log_softmax(-1))
        # mixtures of neighbours
        mixed = torch.logaddexp(front.policies[1:], front.policies[:-1]).log_softmax(-1)
        tried += list(mixed[:: max(1, len(mixed) // 4)])
    for table in tried:
        for front, (x, y) in values(table):
            assert not ((x <= front.x - 1e-9) & (y <= front.y - 1e-9)).any()


def test_fronts_are_convex_curves_between_single_optima(fronts):
    reference, of_losses, of_rewards, of_kl = fronts
    for front in (of_losses, of_rewards, of_kl):
        assert (np.diff(front.x) > 0).all() and (np.diff(front.y) < 0).all()
        assert (np.diff(np.diff(front.y) / np.diff(front.x)) > -1e-7).all()
        close(front.policies.exp().sum(-1), torch.ones(front.policies.shape[:2]))
    best = exact.optimal_policy(reference, SMALL.reward, BETA).logp
    assert of_losses.x[0] == pytest.approx(exact.sft_loss(SMALL, SMALL.demonstrations.log()).item())
    assert of_losses.y[-1] == pytest.approx(exact.pairwise_loss(SMALL, best, reference, BETA).item())
    # its slope is the ratio of the weights: nothing is gained by another trade at these prices
    for k in range(1, len(of_losses.x) - 1):
        x, y, weight = of_losses.x, of_losses.y, of_losses.weight[k]
        assert ((1 - weight) * x + weight * y).argmin() == k
        weight = of_rewards.weight[min(k, len(of_rewards.x) - 1)]
        assert ((1 - weight) * of_rewards.x + weight * of_rewards.y).argmin() == min(k, len(of_rewards.x) - 1)


def test_distances_to_a_front():
    front = Front(np.array([1.0, 2.0, 3.0]), np.array([10.0, 4.0, 0.0]), np.array([0, 0.5, 1]), torch.zeros(3))
    assert front.ideal == (1.0, 0.0) and front.range == (2.0, 10.0)
    assert front.ideal_distance(1.0, 0.0) == 0
    assert front.ideal_distance(3.0, 10.0) == pytest.approx(math.sqrt(2))
    assert front.distance(2.0, 4.0) == pytest.approx(0) and front.distance(1.5, 7.0) == pytest.approx(0)
    assert front.distance(5.0, 0.0) == pytest.approx(1.0) and front.distance(1.0, 30.0) == pytest.approx(2.0)
    assert front.needed(7.0) == pytest.approx(1.5) and front.needed(0.0) == 3.0 and front.needed(99.0) == 1.0


# ---- estimators from samples ----


@pytest.fixture(scope="module")
def listed(policy, reference):
    return policy_of(policy, WORLD), policy_of(reference, WORLD)


def test_log_probabilities_of_every_response_are_the_listed_ones(policy, reference, listed):
    collate = Collator(EOS)
    for x in (0, 7):
        batch = collate(WORLD.every_response(x))
        scored = score(policy, batch, FrozenReference(reference), divergence=True)
        close(scored.logp.double(), listed[0][x], atol=2e-5, rtol=0)
        close(scored.reference_logp.double(), listed[1][x], atol=2e-5, rtol=0)
        close(logp(policy, batch).double(), listed[0][x], atol=2e-5, rtol=0)
        reward = losses.implicit_reward(scored.logp, scored.reference_logp, BETA)
        close(reward.double(), BETA * (listed[0] - listed[1])[x], atol=2e-5, rtol=0)
        # the exact KL at every token of every response, both ways
        for found, (a, b) in ((scored.kl, listed), (scored.reverse_kl, listed[::-1])):
            at_node = (WORLD.token_logp(a).exp() * (WORLD.token_logp(a) - WORLD.token_logp(b))).sum(-1)[x]
            for y in (0, 3, 60, 300):
                nodes = [WORLD.nodes.index(WORLD.responses[y][:t]) for t in range(len(WORLD.responses[y]))]
                close(found[y][batch.shifted[y]].double(), at_node[nodes], atol=2e-5, rtol=0)


def test_kl_along_samples_converges_to_the_exact_one(policy, reference, listed):
    a, b = listed
    batch = Collator(EOS)(WORLD.responses_of(a, 400, seed=0))
    scored = score(policy, batch, FrozenReference(reference), divergence=True)
    of_sequence = exact.sequence_kl(a, b)
    within(scored.logp - scored.reference_logp, of_sequence)  # the simplest estimator
    within(scored.kl.sum(-1), of_sequence)  # exact at each token, sampled along the way
    of_tokens = exact.token_kl(WORLD, a, b).item()
    assert divergence(policy, reference, batch) == pytest.approx(of_tokens, rel=0.03)
    assert scored.kl.sum().item() / scored.length.sum().item() == pytest.approx(of_tokens, rel=0.03)
    # along the same responses the other direction is something else than KL(b ‖ a)
    reverse = exact.token_kl(WORLD, b, a, along=a).item()
    assert scored.reverse_kl.sum().item() / scored.length.sum().item() == pytest.approx(reverse, rel=0.03)


LOSSES = {
    "sft": ("sft", lambda a, b: exact.sft_loss(WORLD, a)),
    "dpo": ({"preset": "dpo", "beta": BETA}, lambda a, b: exact.pairwise_loss(WORLD, a, b, BETA)),
    "ipo": ({"preset": "ipo", "beta": BETA}, lambda a, b: exact.pairwise_loss(WORLD, a, b, BETA, losses.ipo)),
    "simpo": ({"preset": "simpo"}, lambda a, b: exact.pairwise_loss(WORLD, a, b, 2.0, losses.simpo)),
    "una": ({"preset": "una", "beta": BETA}, lambda a, b: exact.pointwise_loss(WORLD, a, b, BETA)),
    "una_bce": ({"preset": "una", "beta": BETA, "loss": "una_bce"},
                lambda a, b: exact.pointwise_loss(WORLD, a, b, BETA, losses.una_bce)),
    "joint": ({"preset": "dpo_nll", "beta": BETA, "sft_weight": 0.3, "preference_weight": 0.7},
              lambda a, b: 0.3 * exact.sft_loss(WORLD, a) + 0.7 * exact.pairwise_loss(WORLD, a, b, BETA)),
}  # fmt: skip


@pytest.mark.parametrize("name", LOSSES)
def test_losses_of_samples_converge_to_population_losses(name, policy, reference, listed):
    spec, expected = LOSSES[name]
    objective = make_objective(spec)
    found = []
    for seed in range(8):
        rows = WORLD.draw_demonstrations(200, seed) + WORLD.draw_pairs(200, seed)
        batch = Collator(EOS)(rows)
        with torch.no_grad():
            scored = score(policy, batch, FrozenReference(reference))
            found.append(objective(scored, objective.counts(batch))[0])
    within(torch.stack(found), expected(*listed), errors=5.5)  # of eight values: a t-distribution


def test_ktos_kl_from_mismatched_responses_converges_too(policy, reference, listed):
    a, b = listed
    if exact.mismatched_kl(WORLD, a, b) == 0:  # they differ in sign, and below 0 is 0
        (a, b), (policy, reference) = (b, a), (reference, policy)
    batch = Collator(EOS)(mismatched(WORLD.draw_pairs(3000, seed=0)))
    scored = score(policy, batch, FrozenReference(reference))
    ratio = (scored.logp - scored.reference_logp)[batch.rows("mismatched")]
    within(ratio.unflatten(0, (-1, 2)).mean(-1), exact.mismatched_kl(WORLD, a, b))
    kto = make_objective({"preset": "kto", "beta": BETA})
    statistics = {"preference": {"kl": ratio.mean().clamp(min=0)}}
    found, _ = kto(scored, kto.counts(batch), statistics)
    assert found.item() == pytest.approx(exact.pointwise_loss(WORLD, a, b, BETA, losses.kto).item(), rel=0.03)


def test_what_the_model_writes_has_the_listed_frequencies(policy, listed):
    """Generation with at most `max_tokens` tokens is the listed distribution, cut responses included."""
    torch.manual_seed(0)
    x, count = WORLD.prompts.index("bc="), 4000
    ids = torch.from_numpy(WORLD.ids("bc=")).long().expand(count, -1)
    written = policy.generate(
        input_ids=ids, attention_mask=torch.ones_like(ids), do_sample=True, max_new_tokens=WORLD.max_tokens, top_k=0,
        eos_token_id=EOS, pad_token_id=EOS,
    )[:, ids.shape[1] :]  # fmt: skip
    places = torch.tensor([WORLD.place(WORLD.text(row)) for row in written.tolist()])
    share, mass = torch.bincount(places, minlength=len(WORLD.responses)) / count, listed[0][x].exp()
    often = mass > 0.005
    assert often.sum() > 10
    assert ((share - mass)[often].abs() < 4.5 * (mass * (1 - mass) / count).sqrt()[often]).all()
    within(WORLD.reward[x, places] + 3, (WORLD.reward[x] * mass).sum() + 3)


def text_of(world, ids):
    return "".join(world.vocabulary[i] for i in ids)


def test_what_is_drawn_has_its_distribution():
    world = World(flip=0.1)
    pairs = world.draw_pairs(6000, seed=0)
    prompts = [world.prompts.index(text_of(world, pair.prompt)) for pair in pairs]
    assert set(prompts) == set(world.covered.nonzero()[:, 0].tolist())
    masses = [exact.pair_mass(world, x) for x in sorted(set(prompts))]
    for side, of_pair in enumerate((lambda mass: mass.sum(1), lambda mass: mass.sum(0))):
        drawn = [world.reward[x, world.place(text_of(world, p.responses[side].tokens))] for x, p in zip(prompts, pairs)]
        expected = sum(of_pair(mass) @ world.reward[x] for x, mass in zip(sorted(set(prompts)), masses)) / len(masses)
        within(torch.stack(drawn), expected)
    demonstrations = world.draw_demonstrations(4000, seed=0)
    lengths = torch.tensor([float(len(example.responses[0].tokens)) for example in demonstrations])
    within(lengths, exact.expected(world.length, world.demonstrations.log()))
    rewards = [world.reward_of(text_of(world, d.prompt), text_of(world, d.responses[0].tokens)) for d in demonstrations]
    within(rewards, exact.expected(world.reward, world.demonstrations.log()))
    for document in world.draw_documents(50, seed=0):
        text = text_of(world, document.responses[0].tokens)
        assert text[:3] in world.prompts and text[3:] in world.responses and not len(document.prompt)


def test_the_tokenizer_is_the_vocabulary():
    tokenizer = tokenizer_of(WORLD)
    assert tokenizer("ab=ba=.").input_ids == WORLD.ids("ab=ba=.").tolist()
    assert tokenizer.decode(WORLD.ids("ab=ba=.")) == "ab=ba=."
    assert tokenizer.pad_token_id == tokenizer.eos_token_id == EOS
