"""What is measured of given responses: against float64, in every layout, with every reference, for no trace."""

import numpy as np
import pytest
import torch
from mixed import dataset, model, trainer
from peft import LoraConfig, get_peft_model

from uft.collation import Collator
from uft.data.mixture import FeedbackDataset
from uft.evaluation.divergence import divergence, divergence_along, sample
from uft.evaluation.likelihood import demonstration_likelihood, imitated
from uft.evaluation.preference import pair_preference, preference
from uft.evaluation.scoring import score_data
from uft.feedback import Example, Response
from uft.head import fuse_head
from uft.models import AdapterReference, FrozenReference
from uft.packing_probe import enable_packing


def louder(policy):
    """Predictions far from uniform, so that a mistake is far from right."""
    with torch.no_grad():
        for p in policy.parameters():
            if p.ndim > 1:
                p.mul_(8)
    return policy.eval()


@pytest.fixture(scope="module")
def policy():
    return louder(model(seed=0))


@pytest.fixture(scope="module")
def other():
    return louder(model(seed=1))


@torch.no_grad()
def by_hand(policy, data, reference=None):
    """In float64, response by response: logp, and KL both ways and entropy summed over the tokens that count."""
    found = []
    for example in data:
        for response in example.responses:
            prompt = response.prompt if response.prompt is not None else example.prompt
            ids = torch.from_numpy(np.concatenate([prompt, response.tokens]).astype(np.int64))
            counts = np.ones(len(response.tokens), bool) if response.in_loss is None else np.array(response.in_loss)
            counts = np.concatenate([np.zeros(len(prompt), bool), counts])[1:]
            both = [m.double()(ids[None]).logits[0, :-1].log_softmax(-1)[counts] for m in (policy, reference) if m]
            ours, theirs = both[0], both[-1]
            kl, back = (ours.exp() * (ours - theirs)).sum(), (theirs.exp() * (theirs - ours)).sum()
            entropy = -(ours.exp() * ours).sum()
            logps = [each.gather(-1, ids[1:][counts][:, None]).sum() for each in both]
            found.append([float(x) for x in (logps[0], logps[-1], kl, back, entropy)] + [counts.sum()])
    policy.float(), reference and reference.float()
    return np.array(found).T


def prepared(policy, other, packed):
    for each in (policy, other):
        fuse_head(each)
        if packed:
            enable_packing(each)
    return Collator(0, packed=packed)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("budget", [40, 8192])
def test_all_columns_against_float64(policy, other, packed, budget):
    data = dataset(n=7)
    gold = by_hand(policy, data, other)
    collate = prepared(policy, other, packed)
    found = score_data(policy, data, collate, reference=FrozenReference(other), divergence=True, token_budget=budget)
    for name, expected in zip(("logp", "reference_logp", "kl", "reverse_kl", "entropy", "length"), gold):
        np.testing.assert_allclose(getattr(found, name), expected, rtol=2e-5, atol=2e-5, err_msg=name)
    assert (gold[2] / np.maximum(gold[5], 1)).max() > 1  # nats: no rounding is taken for a divergence
    assert abs(gold[2] - gold[3]).max() > 0.5  # nor one direction for the other

    rows = [(e.source, r.target) for e in data for r in e.responses]
    assert [found.names[code] for code in found.source] == [name for name, _ in rows]
    np.testing.assert_array_equal(found.target, np.float32([target for _, target in rows]))
    pairs = [i for i, (name, target) in enumerate(rows) if (name, target) == ("pairs", 1.0)]
    assert found.preferences.tolist() == [[i, i + 1] for i in pairs]
    assert np.array_equal(found.example, np.repeat(np.arange(len(data)), [len(e.responses) for e in data]))


def test_unfused_heads_give_the_same(other):
    policy, data = louder(model(seed=3)), dataset(n=3)
    plain = score_data(policy, data, Collator(0), reference=FrozenReference(other), divergence=True)
    fuse_head(policy)
    fused = score_data(policy, data, Collator(0), reference=FrozenReference(other), divergence=True)
    for name in ("logp", "reference_logp", "kl", "reverse_kl"):
        np.testing.assert_allclose(getattr(fused, name), getattr(plain, name), rtol=1e-4, atol=1e-5)


def test_no_divergence_from_oneself(policy):
    found = score_data(policy, dataset(n=3), Collator(0), reference=FrozenReference.of(policy), divergence=True)
    assert np.array_equal(found.logp, found.reference_logp)
    assert abs(found.kl).max() < 1e-5 and abs(found.reverse_kl).max() < 1e-5
    measured = pair_preference(found)
    assert measured["rewards/accuracies"] == 0.5 and measured["rewards/margins"] == 0 == measured["displaced"]


def test_divergence_needs_a_reference(policy):
    with pytest.raises(ValueError, match="needs a reference"):
        score_data(policy, dataset(n=1), Collator(0), divergence=True)
    with pytest.raises(ValueError, match="divergence=True"):
        divergence(score_data(policy, dataset(n=1), Collator(0)))


# ---- references of an adapter ----


def adapted():
    policy = get_peft_model(louder(model(seed=0)), LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"))
    with torch.no_grad():
        for name, p in policy.named_parameters():
            if "lora_B" in name:
                p.normal_(std=0.05)
    return policy.eval()


@pytest.mark.parametrize("packed", [False, True])
def test_an_adapter_against_its_base(packed):
    policy, base, data = adapted(), louder(model(seed=0)), dataset(("pairs",), n=5)
    gold = by_hand(policy, data, base)
    collate = prepared(policy, base, packed)
    before = {name: p.clone() for name, p in policy.named_parameters()}
    trainable = {name for name, p in policy.named_parameters() if p.requires_grad}
    switched = score_data(policy, data, collate, reference=AdapterReference(), divergence=True)
    frozen = score_data(policy, data, collate, reference=FrozenReference(base), divergence=True)
    for name, expected in zip(("logp", "reference_logp", "kl", "reverse_kl"), gold):
        np.testing.assert_allclose(getattr(switched, name), expected, rtol=5e-5, atol=5e-5)
        np.testing.assert_allclose(getattr(frozen, name), expected, rtol=5e-5, atol=5e-5)
    assert gold[2].max() > 0.1
    assert all(torch.equal(p, before[name]) for name, p in policy.named_parameters())
    assert trainable == {name for name, p in policy.named_parameters() if p.requires_grad}


# ---- likelihood ----


def test_likelihood_by_hand(policy):
    """Of what is to be imitated: demonstrations, documents, chosen answers; weighted by tokens, and by sequences."""
    data = dataset(("demonstrations", "pairs", "documents"), n=4)
    logp, *_, length = by_hand(policy, data)
    good = np.array([not response.target < 0.5 for e in data for response in e.responses])
    of = np.array([e.source for e in data for _ in e.responses])
    good &= length > 0
    found = demonstration_likelihood(score_data(policy, data, Collator(0)))
    assert found["nll"] == pytest.approx(-logp[good].sum() / length[good].sum(), rel=1e-5)
    assert found["nll_sequence"] == pytest.approx(-logp[good].mean(), rel=1e-5)
    assert found["perplexity"] == pytest.approx(np.exp(found["nll"]))
    for name in data.sources:
        rows = good & (of == name)
        assert found[f"{name}/nll"] == pytest.approx(-logp[rows].sum() / length[rows].sum(), rel=1e-5)
    assert abs(found["nll"] - found["pairs/nll"]) > 1e-3
    assert "demonstrations/nll" not in demonstration_likelihood(
        score_data(policy, dataset(("demonstrations",)), Collator(0))
    )


def test_the_trainer_finds_the_same(policy, other):
    """Its own evaluation, of the same data, with the same names for the same things."""
    data = dataset(("demonstrations", "pairs"), n=5)
    objective = {"sft": {"loss": "nll"}, "preference": {"loss": "dpo", "beta": 0.1}}
    run = trainer(objective, data, louder(model(seed=0)), eval_dataset=data, reference_model=louder(model(seed=1)))
    theirs = run.evaluate()
    found = score_data(policy, data, Collator(0), reference=FrozenReference(other))
    ours = pair_preference(found, beta=0.1)
    for name in ("rewards/chosen", "rewards/rejected", "rewards/margins", "rewards/accuracies", "logps/chosen"):
        assert ours[name] == pytest.approx(theirs[f"eval_{name}"], rel=1e-4), name
    nll = demonstration_likelihood(found)
    assert nll["demonstrations/nll"] == pytest.approx(theirs["eval_demonstrations/nll"], rel=1e-5)


# ---- preference ----


def test_preference_by_hand():
    """Four pairs: likelihood ranks the first two right, reward the first and third, and the fourth is a tie of both."""
    logp = np.array([[-1.0, -3.0], [-2.0, -4.0], [-5.0, -1.0], [-2.0, -2.0]])
    reference = np.array([[-2.0, -3.0], [-1.0, -6.0], [-9.0, -1.0], [-3.0, -3.0]])
    length = np.array([[1, 4], [1, 1], [5, 1], [1, 1]], float)
    found = preference(logp, length, reference, beta=0.5)
    assert found["likelihood/accuracies"] == pytest.approx(2.5 / 4)
    # by tokens: −1 against −0.75, −2 against −4, −1 against −1, a tie
    assert found["likelihood/token_accuracies"] == pytest.approx(2 / 4)
    # drifts: (1, 0), (−1, 2), (4, 0), (1, 1)
    assert found["rewards/accuracies"] == pytest.approx(2.5 / 4)
    assert found["rewards/margins"] == pytest.approx(0.5 * (1 - 3 + 4 + 0) / 4)
    assert found["agreement"] == pytest.approx(2 / 4)  # on the first and the last
    assert found["drift/chosen"] == pytest.approx(5 / 4) and found["drift/rejected"] == pytest.approx(3 / 4)
    assert found["rewards/chosen"] == pytest.approx(0.5 * 5 / 4)
    assert found["displaced"] == pytest.approx(1 / 4)
    assert found["logps/chosen"] == -2.5 and found["logps/rejected"] == -2.5
    assert preference(logp, length).keys() < found.keys()
    # a tie of one ranking alone agrees by half
    assert preference(np.array([[-1.0, -1]]), np.ones((1, 2)), np.array([[-2.0, -1]]))["agreement"] == 0.5


def test_planted_displacement(policy):
    """A reference that is the policy with every response made likelier: both drift down, and no rank changes."""
    scores = score_data(policy, dataset(("pairs",), n=6), Collator(0), reference=FrozenReference.of(policy))
    planted = type(scores)(**vars(scores) | {"reference_logp": scores.logp + 2.0})
    found = pair_preference(planted)
    assert found["displaced"] == 1 and found["drift/chosen"] == pytest.approx(-2)
    assert found["rewards/margins"] == pytest.approx(0, abs=1e-9)


def test_pairs_by_source_and_rankings(policy, other):
    random = np.random.default_rng(0)

    def one(n, prompt):
        responses = tuple(Response(random.integers(3, 60, 2 + k).astype(np.int32), None, 1 - k / n) for k in range(n))
        return Example(
            "pair", random.integers(3, 60, prompt).astype(np.int32), responses, tuple((k, k + 1) for k in range(n - 1))
        )

    data = FeedbackDataset({"pairs": [one(2, 3), one(2, 4)], "rankings": [one(4, 5)]})
    found = score_data(policy, data, Collator(0), reference=FrozenReference(other))
    assert found.preferences.tolist() == [[0, 1], [2, 3], [4, 5], [5, 6], [6, 7]]
    measured = pair_preference(found)
    parts = [measured[f"{name}/rewards/margins"] for name in ("pairs", "rankings")]
    assert measured["rewards/margins"] == pytest.approx((2 * parts[0] + 3 * parts[1]) / 5)


def test_what_preference_refuses(policy):
    with pytest.raises(ValueError, match=r"length: found \[2\]"):
        preference(np.zeros((2, 2)), np.zeros(2))
    with pytest.raises(ValueError, match="no pairs"):
        preference(np.zeros((0, 2)), np.zeros((0, 2)))
    with pytest.raises(ValueError, match="beta is 0"):
        preference(np.zeros((1, 2)), np.ones((1, 2)), np.zeros((1, 2)), beta=0)
    with pytest.raises(ValueError, match="demonstrations: found no pairs"):
        pair_preference(score_data(policy, dataset(("demonstrations",), n=2), Collator(0)))


# ---- divergence along samples ----

PROMPTS = [np.array(ids, np.int32) for ids in ([5, 6], [7, 8, 9, 10, 11], [12], [5, 6, 7])]


def test_samples_are_the_models_own(policy):
    """The first token of many samples has the model's distribution, in a padded batch and with a cache."""
    prompts = [np.array([7, 8, 9], np.int32)] * 3000 + [np.array([5, 6, 7, 8, 9, 10], np.int32)]
    quiet = model(seed=0).eval()  # near uniform: every token comes up
    written = sample(quiet, prompts, eos=2, max_new_tokens=2, batch_size=512)[:3000]
    with torch.no_grad():
        expected = quiet(torch.tensor([[7, 8, 9]])).logits[0, -1].softmax(-1).numpy()
    counts = np.bincount([row[0] for row in written], minlength=60) / 3000
    assert abs(counts - expected).max() < 5 * np.sqrt(expected.max() / 3000)
    first = np.bincount([row[1] for row in written if len(row) > 1], minlength=60)
    assert (first > 0).sum() > 50


def test_samples_depend_on_their_prompt_alone(policy):
    options = dict(eos=2, max_new_tokens=12)
    together = sample(policy, PROMPTS, batch_size=4, **options)
    alone = sample(policy, PROMPTS, batch_size=1, **options)
    assert all(map(np.array_equal, together, alone))
    again = sample(policy, PROMPTS, seed=1, **options)
    assert not all(map(np.array_equal, together, again))
    assert all((row[:-1] != 2).all() for row in together)
    state = torch.get_rng_state()
    sample(policy, PROMPTS, **options)
    assert torch.equal(state, torch.get_rng_state())


def test_samples_with_a_cache_are_those_without(policy):
    """Each token is what the whole text before it, run anew, puts at the place that was drawn."""
    (written,) = sample(policy, PROMPTS[1:2], eos=2, max_new_tokens=10, seed=3)
    draws = np.random.default_rng([3, 0]).random(10)
    ids = PROMPTS[1].tolist()
    for token, draw in zip(written, draws):
        with torch.no_grad():
            upto = policy(torch.tensor([ids])).logits[0, -1].double().softmax(-1).cumsum(-1)
        assert token == int((upto <= draw * upto[-1]).sum())
        ids.append(int(token))


def test_sampled_divergence_estimates_that_of_responses(policy, other):
    """Of one token, where it can be summed: the mean over samples of the exact KL at each place is the KL of responses
    along the policy's, and not along the reference's."""
    for each in (policy, other):
        fuse_head(each)
    options = dict(prompts=PROMPTS, eos=2, max_new_tokens=6)
    reference = FrozenReference(other)
    found = {
        along: divergence_along(policy, reference, along, Collator(0), **options) for along in ("policy", "reference")
    }
    for along, writer in (("policy", policy), ("reference", other)):
        rows = sample(writer, PROMPTS, eos=2, max_new_tokens=6)
        data = FeedbackDataset(
            {"x": [Example("demonstration", p, (Response(r, None, 1.0),)) for p, r in zip(PROMPTS, rows)]}
        )
        _, _, kl, reverse, entropy, length = by_hand(policy, data, other)
        assert found[along]["kl"] == pytest.approx(kl.sum() / length.sum(), rel=1e-4)
        assert found[along]["reverse_kl_sequence"] == pytest.approx(reverse.mean(), rel=1e-4)
        assert found[along]["entropy"] == pytest.approx(entropy.sum() / length.sum(), rel=1e-4)
    assert found["policy"]["kl"] != pytest.approx(found["reference"]["kl"], rel=1e-3)


def test_sampled_log_ratios_agree_with_the_sequence_kl():
    """KL(π ‖ π_ref) of responses is also the mean log-ratio of the policy's samples; two estimates, one number."""
    ours, theirs = model(seed=0, initializer_range=0.15).eval(), model(seed=1, initializer_range=0.15).eval()
    prompts = [np.array([7, 8], np.int32)] * 600
    found = divergence_along(
        ours, FrozenReference(theirs), "policy", Collator(0), prompts=prompts, eos=2, max_new_tokens=3, batch_size=600
    )
    rows = sample(ours, prompts, eos=2, max_new_tokens=3, batch_size=600)
    data = FeedbackDataset(
        {"x": [Example("demonstration", p, (Response(r, None, 1.0),)) for p, r in zip(prompts, rows)]}
    )
    scores = score_data(ours, data, Collator(0), reference=FrozenReference(theirs))
    ratio = scores.logp - scores.reference_logp
    error = ratio.std() / np.sqrt(len(ratio))
    assert found["kl_sequence"] == pytest.approx(ratio.mean(), abs=4 * error)
    assert error < 0.2 * found["kl_sequence"]


def test_what_sampling_refuses(policy, other):
    with pytest.raises(ValueError, match="along is 'both'"):
        divergence_along(policy, FrozenReference(other), "both", Collator(0), prompts=PROMPTS, eos=2)
    with pytest.raises(ValueError, match="needs data"):
        divergence_along(policy, FrozenReference(other), "responses", Collator(0), prompts=PROMPTS, eos=2)
    with pytest.raises(ValueError, match="no prompts"):
        divergence_along(policy, FrozenReference(other), "policy", Collator(0), eos=2)
    with pytest.raises(ValueError, match="empty prompt"):
        sample(policy, [np.zeros(0, np.int32)], eos=2)


def test_mismatched_responses_are_left_out(policy):
    data = dataset(("labels",), n=4).with_mismatched({"label"}, 64, 1)
    found = score_data(policy, data, Collator(0))
    assert np.isnan(found.logp).tolist() == [False, True] * 4
    assert not np.isin(imitated(found), [1, 3, 5, 7]).any()
