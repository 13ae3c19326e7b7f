"""Which pairs to label next: each rule by hand, coverage against its guarantee, and the command on a tiny model."""

import itertools
import json
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import tiny_model, tiny_tokenizer

from uft.data import selection
from uft.data.candidates import pair_source, read_candidates
from uft.data.embedding import pair_embedding, pair_features, states
from uft.data.mixture import load_feedback
from uft.data.queue import read_queue
from uft.data.rows import DataError
from uft.data.selection import RULES, Pool, diversity, expected_change, k_center, select
from uft.rlhf.reward_model import RewardModel


def test_margin_and_disagreement_by_hand():
    margins = np.array([[3.0, -1.0, 0.2, 5.0], [3.0, 1.4, 0.4, -5.5]])
    pool = Pool(margins=margins)
    chosen = select("margin", pool, 2)
    assert chosen.order.tolist() == [1, 3]  # means 3, 0.2, 0.3, −0.25
    assert chosen.value == pytest.approx([-0.2, -0.25])
    chosen = select("disagreement", pool, 2)
    assert chosen.order.tolist() == [3, 1] and chosen.value == pytest.approx([5.25, 1.2])


def test_expected_change_is_the_mean_norm_of_the_gradient():
    """By autograd, over both labels, each with its probability."""
    torch.manual_seed(0)
    features, w = torch.randn(5, 3, dtype=torch.float64), torch.randn(3, dtype=torch.float64, requires_grad=True)
    expected = []
    for delta in features:
        p = torch.sigmoid(w @ delta)
        total = 0.0
        for sign, probability in ((1, p), (-1, 1 - p)):
            (gradient,) = torch.autograd.grad(-torch.nn.functional.logsigmoid(sign * (w @ delta)), w)
            total += probability.item() * gradient.norm().item()
        expected.append(total)
    found = expected_change((features @ w).detach().numpy(), features.numpy())
    assert found == pytest.approx(expected, rel=1e-12)
    chosen = select("change", Pool(margins=(features @ w).detach().numpy()[None], features=features.numpy()), 5)
    assert chosen.value == pytest.approx(sorted(expected, reverse=True))


def test_coverage_by_hand():
    """On a line with 0 labelled: the farthest is 10, then 4 (4 from 0), then 6 and 1 are 2 and 1 away."""
    line = np.array([[1.0], [4.0], [6.0], [10.0]])
    chosen = select("coverage", Pool(embedding=line, labelled=np.array([[0.0]])), 4)
    assert chosen.order.tolist() == [3, 1, 2, 0] and chosen.value.tolist() == [10, 4, 2, 1]


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10_000), st.integers(1, 4))
def test_coverage_is_at_most_twice_the_best_radius(seed, k):
    """Gonzalez 1985, Theorem 2.2, against every set of k."""
    points = np.random.default_rng(seed).normal(size=(9, 2))

    def radius(centres):
        return np.linalg.norm(points[:, None] - points[list(centres)], axis=-1).min(1).max()

    best = min(radius(each) for each in itertools.combinations(range(9), k))
    order = k_center(points, k, seed=seed).order
    assert len(set(order.tolist())) == k and radius(order) <= 2 * best + 1e-9


def test_doubles_are_chosen_last_and_once():
    points = np.array([[0.0], [0.0], [5.0], [5.0]])
    order = k_center(points, 4, seed=0).order
    assert set(order[:2] // 2) == {0, 1} and sorted(order) == [0, 1, 2, 3]


def test_ties_are_broken_by_the_seed_not_by_place():
    orders = {tuple(select("margin", Pool(margins=np.zeros((1, 20))), 5, seed).order) for seed in range(5)}
    assert len(orders) == 5
    assert sorted(select("random", Pool(size=8), 8, 3).order) == list(range(8))


NEEDS = {"margin": "margins", "change": "features", "disagreement": "margins", "coverage": "embedding"}


@pytest.mark.parametrize("rule", NEEDS)
def test_rules_say_what_they_need(rule):
    given = {"margins": np.zeros((1, 4))} if rule == "change" else {"size": 4}
    with pytest.raises(ValueError, match=f"rule '{rule}' needs {NEEDS[rule]}; found"):
        select(rule, Pool(**given), 2)


def test_what_cannot_be_selected_is_refused():
    with pytest.raises(ValueError, match="count is 5; want 1 to 4"):
        select("random", Pool(size=4), 5)
    with pytest.raises(ValueError, match="rule is 'best'"):
        select("best", Pool(size=4), 1)
    with pytest.raises(ValueError, match="found one reward"):
        select("disagreement", Pool(margins=np.zeros((1, 4))), 1)
    with pytest.raises(ValueError, match="want one number of pairs"):
        Pool(margins=np.zeros((1, 4)), embedding=np.zeros((5, 2)))
    with pytest.raises(ValueError, match=r"margins: found \[4\]"):
        Pool(margins=np.zeros(4))
    with pytest.raises(ValueError, match="not finite"):
        Pool(margins=np.array([[1.0, math.nan]]))


def test_diversity_by_hand():
    found = diversity(np.array([[3.0, 0.0], [0.0, 4.0]]), np.array([[3.0, 0.0], [3.0, 2.0]]))
    assert found == pytest.approx((5.0, 5.0, 2.0, 2.0))  # orthogonal: two different ones
    same = diversity(np.tile([[1.0, 2.0, 3.0]], (4, 1)))
    assert same[:3] == pytest.approx((0, 0, 1), abs=1e-6) and math.isnan(same.radius)
    # three of one kind and one of another: entropy of (3/4, 1/4)
    vendi = diversity(np.array([[1.0, 0.0]] * 3 + [[0.0, 2.0]])).vendi
    assert vendi == pytest.approx(math.exp(-(0.75 * math.log(0.75) + 0.25 * math.log(0.25))))
    with pytest.raises(ValueError, match="at least two"):
        diversity(np.zeros((1, 3)))


@pytest.mark.parametrize("shape", [(4, 9), (9, 4)])
def test_vendi_is_the_same_by_both_products(shape):
    points = np.random.default_rng(0).normal(size=shape)
    unit = points / np.linalg.norm(points, axis=1, keepdims=True)
    values = np.linalg.eigvalsh(unit @ unit.T / len(unit))
    values = values[values > 1e-12]
    assert diversity(points).vendi == pytest.approx(np.exp(-(values * np.log(values)).sum()))


# ---- with a model ----

TOKENIZER = tiny_tokenizer()
ROWS = [
    {"prompt": f"say {a} {b}:", "response_a": " the cat sat", "response_b": f" {c} mat"}
    for a, b, c in zip("abcdefgh", "hgfedcba", "aabbccdd")
]


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("selection")
    model = tiny_model(TOKENIZER, 0)
    model.save_pretrained(folder / "model")
    TOKENIZER.save_pretrained(folder / "model")
    for k in range(2):
        RewardModel.of(model, TOKENIZER, seed=k).save(folder / f"reward{k}")
    turned = {"prompt": ROWS[3]["prompt"], "response_a": ROWS[3]["response_b"], "response_b": ROWS[3]["response_a"]}
    (folder / "pool.jsonl").write_text("\n".join(map(json.dumps, [*ROWS, turned])))
    known = [{"prompt": r["prompt"], "chosen": r["response_b"], "rejected": r["response_a"]} for r in ROWS[:3]]
    (folder / "known.jsonl").write_text("\n".join(map(json.dumps, known)))
    return folder


def test_embeddings_are_means_over_tokens_and_features_give_margins(files):
    pairs = read_candidates(pair_source(str(files / "pool.jsonl")), TOKENIZER).pairs
    model = tiny_model(TOKENIZER, 0).eval()
    found = states(model.base_model, pairs, TOKENIZER.pad_token_id, batch_size=3)
    for example, own in zip(pairs, found):
        for response, value in zip(example.responses, own):
            ids = torch.tensor(np.concatenate([example.prompt, response.tokens])[None]).long()
            with torch.no_grad():
                alone = model.base_model(input_ids=ids).last_hidden_state[0].mean(0).numpy()
            np.testing.assert_allclose(value, alone, atol=1e-4)
    embedding = pair_embedding(model.base_model, pairs, TOKENIZER.pad_token_id)
    np.testing.assert_allclose(embedding[2], found[2].mean(0), atol=1e-5)

    reward = RewardModel.load(files / "reward1")
    reward = RewardModel(reward.model, TOKENIZER, center=2.0, scale=0.5)
    margin = np.array([a - b for a, b in reward(pairs)])
    features = pair_features(reward, pairs)
    np.testing.assert_allclose(features @ reward.model.score.weight[0].detach().numpy(), margin, atol=1e-4)


@pytest.mark.parametrize("rule", RULES)
def test_command_writes_a_queue_of_new_pairs(files, rule, capsys):
    out = files / f"{rule}.jsonl"
    words = [str(files / "pool.jsonl"), "--rule", rule, "--count", "3", "--output", str(out)]
    words += ["--labelled", str(files / "known.jsonl")]
    if rule in ("margin", "change", "disagreement"):
        words += ["--reward_model", *(str(files / f"reward{k}") for k in range(1 + (rule == "disagreement")))]
    elif rule == "coverage":
        words += ["--model", str(files / "model")]
    assert selection.main(words) == 0
    assert "left out: 1 doubles, 3 labelled already" in capsys.readouterr().out
    items = [json.loads(line) for line in out.read_text().splitlines()]
    assert len(read_queue(out)) == 3 and {item["rule"] for item in items} == {rule}
    assert {item["prompt"] for item in items} <= {row["prompt"] for row in ROWS[3:]}
    assert [item["value"] for item in items] == sorted((item["value"] for item in items), reverse=True)
    texts = {row["prompt"]: {row["response_a"], row["response_b"]} for row in ROWS}
    assert all({item["response_a"], item["response_b"]} == texts[item["prompt"]] for item in items)


def test_rewards_are_trained_on_what_is_labelled(files):
    out = files / "trained.jsonl"
    words = [str(files / "pool.jsonl"), "--rule", "margin", "--count", "2", "--output", str(out)]
    words += ["--model", str(files / "model"), "--labelled", str(files / "known.jsonl")]
    assert selection.main(words) == 0 and len(read_queue(out)) == 2


def test_a_model_is_asked_for_before_anything_is_read():
    words = ["no_such_file.jsonl", "--count", "2", "--output", "out.jsonl"]
    with pytest.raises(DataError, match="rule 'margin' needs rewards"):
        selection.main([*words, "--rule", "margin", "--model", "none"])
    with pytest.raises(DataError, match="rule 'coverage' needs hidden states"):
        selection.main([*words, "--rule", "coverage"])


def test_a_queue_that_is_there_is_not_lost(files):
    """It may hold choices already."""
    out = files / "handed_out.jsonl"
    out.write_text("earlier work")
    words = [str(files / "pool.jsonl"), "--count", "2", "--output"]
    with pytest.raises(DataError, match=r"handed_out.jsonl' is there already; want another --output, or --overwrite"):
        selection.main([*words, str(out)])
    assert out.read_text() == "earlier work"
    assert selection.main([*words, str(out), "--overwrite"]) == 0 and len(read_queue(out)) == 2
    pool = (files / "pool.jsonl").read_bytes()
    with pytest.raises(DataError, match=r"pool.jsonl' is a file that is read"):
        selection.main([*words, str(files / "pool.jsonl"), "--overwrite"])
    assert (files / "pool.jsonl").read_bytes() == pool


def test_nothing_new_is_an_error(files):
    known = pair_source(str(files / "known.jsonl"))
    from uft.data.readers import read_text

    with pytest.raises(DataError, match="found 3 labelled pairs and no other"):
        read_candidates(known, None, exclude=list(read_text(known).examples))
    assert len(load_feedback([known], TOKENIZER)[0]) == 3
