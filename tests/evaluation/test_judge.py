"""Win rates by hand, judges with a bias that has to cancel, and a tiny reward model."""

import math
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from scipy import stats
from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer

from tests.data.tiny_tokenizers import assistant, make, user
from uft.data.readers import TextExample
from uft.data.template import Template
from uft.evaluation.generation import Generation
from uft.evaluation.judge import RewardModelJudge, as_judge, interval, length_controlled, load_judge, win_rate


def sigma(x):
    return 1 / (1 + math.exp(-x))


def logit(p):
    return math.log(p / (1 - p))


GOOD = {"good": 1.0, "fine": 0.5, "bad": 0.0}


def fair(prompt, a, b):
    """Sure of itself, and right."""
    return 0.5 + (GOOD[a] > GOOD[b]) / 2 - (GOOD[a] < GOOD[b]) / 2


# --- by hand ------------------------------------------------------------------------------------------------------


def test_win_rate_by_hand():
    """Two wins, a tie and a loss of four: (2 + 1/2) / 4."""
    a, b = ["good", "fine", "bad", "bad"], ["bad", "bad", "bad", "good"]
    found = win_rate(["w", "x", "y", "z"], a, b, fair)
    assert (found.n, found.win, found.tie, found.loss, found.win_rate) == (4, 0.5, 0.25, 0.25, 0.625)
    assert found.probabilities == (1.0, 1.0, 0.5, 0.0) and found.preference == 0.625 and found.position_bias == 0.0
    assert (found.length_a, found.length_b) == (3.5, 3.25)
    assert (found.low, found.high) == interval(0.625, 4)
    other = win_rate(["w", "x", "y", "z"], b, a, fair)
    assert (other.win, other.loss, other.win_rate) == (found.loss, found.win, 1 - found.win_rate)
    assert other.length_controlled == pytest.approx(1 - found.length_controlled, abs=1e-6)
    assert other.length_effect == pytest.approx(found.length_effect, abs=1e-5)


def test_probabilities_of_both_orders_are_averaged():
    """0.9 when asked first and 0.2 for the other in first place: p = (0.9 + 0.8) / 2, first place favoured by 0.1."""
    found = win_rate(["x"], ["a"], ["b"], lambda prompt, first, second: 0.9 if first == "a" else 0.2)
    assert found.probabilities == (pytest.approx(0.85),) and found.position_bias == pytest.approx(0.1)
    assert (found.win, found.win_rate, found.preference) == (1.0, 1.0, pytest.approx(0.85))


def test_a_bias_for_a_position_cancels_and_is_reported():
    a, b = ["good", "bad", "fine", "good"], ["bad", "good", "fine", "bad"]
    prompts = list("wxyz")
    unbiased = win_rate(prompts, a, b, fair)
    for bias in (0.3, -0.3):

        def biased(prompt, first, second, bias=bias):
            return 0.5 + bias + (fair(prompt, first, second) - 0.5) * 0.4

        found = win_rate(prompts, a, b, biased)
        assert (found.win, found.tie, found.loss) == (unbiased.win, unbiased.tie, unbiased.loss) == (0.5, 0.25, 0.25)
        assert found.position_bias == pytest.approx(2 * bias)
    # one who sees nothing but the place says nothing
    blind = win_rate(prompts, a, b, lambda prompt, first, second: 1.0)
    assert (blind.tie, blind.win_rate, blind.position_bias) == (1.0, 0.5, 1.0)


def test_scores_are_compared_by_bradley_terry():
    seen = []

    def score(prompt, response):
        seen.append((prompt, response))
        return {"a": 2.0, "b": 1.0}[response]

    found = win_rate(["x", "y"], ["a", "b"], ["b", "b"], score)
    assert found.probabilities == (pytest.approx(sigma(1.0)), 0.5) and found.position_bias == 0.0
    assert (found.win, found.tie) == (0.5, 0.5)
    assert seen == [("x", "a"), ("y", "b"), ("x", "b"), ("y", "b")]


def test_generations_are_taken_and_checked():
    messages = [user("hello")]
    a = [Generation(messages, "good", 2, True), Generation("y", "bad", 2, True)]
    assert win_rate([messages, "y"], a, ["bad", "good"], fair).probabilities == (1.0, 0.0)
    with pytest.raises(ValueError, match="prompt 1: found a response to 'y'; want to 'z'"):
        win_rate([messages, "z"], a, ["bad", "good"], fair)


# --- intervals ----------------------------------------------------------------------------------------------------


def test_intervals():
    assert interval(0.8, 10) == (pytest.approx(0.4902, abs=1e-4), pytest.approx(0.9433, abs=1e-4))
    for method in ("wilson", "exact"):
        for wins, n in [(0, 10), (1, 7), (50, 100), (10, 10)]:
            for confidence in (0.9, 0.95):
                wanted = stats.binomtest(wins, n).proportion_ci(confidence, method=method)
                assert interval(wins / n, n, confidence, method) == pytest.approx((wanted.low, wanted.high), abs=1e-9)
        low, high = interval(2.5 / 4, 4, method=method)  # with a tie
        assert interval(0.5, 4, method=method)[0] < low < 0.625 < high < interval(0.75, 4, method=method)[1]
    with pytest.raises(ValueError, match="'bootstrap'; want wilson or exact"):
        interval(0.5, 10, method="bootstrap")
    assert win_rate(["x"], ["good"], ["bad"], fair, method="exact").low == pytest.approx(0.025)


# --- lengths ------------------------------------------------------------------------------------------------------


def test_length_controlled_by_hand():
    """d = ±1, so x = ±tanh(1): theta is in the middle between the logits of 0.8 and 0.6, phi tanh(1) half of what is
    between them."""
    p, difference = np.array([0.8, 0.6] * 5000), np.array([1.0, -1.0] * 5000)
    rate, effect = length_controlled(p, difference)
    assert rate == pytest.approx(sigma((logit(0.8) + logit(0.6)) / 2), abs=1e-5)
    assert effect == pytest.approx((logit(0.8) - logit(0.6)) / 2 / math.tanh(1), abs=1e-3)


def test_length_controlled_where_a_is_often_longer():
    """Of four, three are longer by 1 and win with 0.8, one is shorter by 1 and wins with 0.2; s = sqrt(3) / 2."""
    p, difference = np.array([0.8, 0.8, 0.8, 0.2] * 2000), np.array([1.0, 1.0, 1.0, -1.0] * 2000)
    rate, effect = length_controlled(p, difference)
    assert p.mean() == pytest.approx(0.65) and rate == pytest.approx(0.5, abs=1e-5)
    assert effect == pytest.approx(logit(0.8) / math.tanh(2 / math.sqrt(3)), abs=1e-3)


def texts(lengths):
    return ["x" * int(n) for n in lengths]


@pytest.mark.parametrize("sure", [True, False])
def test_a_judge_that_likes_length_is_seen_through(sure):
    random = np.random.default_rng(0)
    base = random.integers(20, 200, 400)
    more = random.normal(40, 60, 400).astype(int)  # a writes more, three times of four

    def longer(prompt, a, b):
        return float(len(a) > len(b)) + (len(a) == len(b)) / 2 if sure else sigma((len(a) - len(b)) / 60)

    found = win_rate([""] * 400, texts(base + more.clip(-20)), texts(base), longer)
    assert found.preference > 0.6 and found.length_a > found.length_b + 30
    assert found.length_controlled == pytest.approx(0.5, abs=0.03) and found.length_effect > 0.5


def test_a_judge_that_does_not_see_length_is_left_alone():
    random = np.random.default_rng(1)
    difference = random.normal(50, 60, 2000)
    p = np.full(2000, 0.7)
    assert length_controlled(p, difference) == (pytest.approx(0.7, abs=1e-3), pytest.approx(0.0, abs=1e-2))


def test_lengths_that_say_nothing():
    assert length_controlled(np.array([1.0, 0.5]), np.zeros(2)) == (0.75, 0.0)
    assert np.isnan(length_controlled(np.array([1.0, 0.5]), np.full(2, 3.0))).all()
    rate, effect = length_controlled(np.ones(10), np.arange(10.0))  # always better: nothing overflows
    assert rate > 0.99 and math.isfinite(effect)
    words = win_rate(
        ["", ""], ["a b", "c"], ["d", "e f"], lambda prompt, first, second: 0.5, length=lambda text: len(text.split())
    )
    assert (words.length_a, words.length_b) == (1.5, 1.5)


# --- what judges may not say --------------------------------------------------------------------------------------


@pytest.mark.parametrize("said", [math.nan, -0.1, 1.1, math.inf, None, "better"])
@pytest.mark.parametrize("order", [0, 1])
def test_what_no_probability_is_names_the_prompt(said, order):
    def judge(prompt, a, b):
        return said if prompt == "y" and a == ("good", "bad")[order] else 0.5

    with pytest.raises(ValueError, match=r"prompt 1: the judge says .*; want a probability in \[0, 1\]"):
        win_rate(["x", "y", "z"], ["good"] * 3, ["bad"] * 3, judge)


def test_scores_are_finite():
    def score(prompt, response):
        return math.nan if prompt == "y" else 7.0

    with pytest.raises(ValueError, match="prompt 1: the judge says nan; want a score"):
        win_rate(["x", "y"], ["good"] * 2, ["bad"] * 2, score)


def test_what_is_refused():
    for prompts, a, b in [(["x"], ["good"], []), (["x", "y"], ["good"], ["bad"]), ([], [], [])]:
        with pytest.raises(ValueError, match=f"found {len(prompts)} prompts, {len(a)} and {len(b)} responses"):
            win_rate(prompts, a, b, fair)
    # of what takes any number of arguments it is not known what it says
    for judge in (7, dict, RewardModelJudge, lambda prompt: 0.5, lambda *_: 0.5, print):
        with pytest.raises(ValueError, match="judge: found"):
            as_judge(judge)
    assert as_judge(fair) is fair and hasattr(as_judge(lambda prompt, response, scale=1.0: scale), "scores")


# --- judges by name -----------------------------------------------------------------------------------------------


def test_judges_are_found_by_name(tmp_path, monkeypatch):
    (tmp_path / "judges_of_mine.py").write_text(
        "def better(prompt, a, b):\n    return 0.75\n"
        "class Judge:\n    def score(self, prompt, response):\n        return len(response)\n"
        "longest = Judge()\n"
    )
    monkeypatch.chdir(tmp_path)
    path = list(sys.path)
    assert load_judge("judges_of_mine:better")("x", "a", "b") == 0.75
    found = win_rate(["x"], ["aa"], ["b"], load_judge("judges_of_mine:longest.score"))
    assert found.probabilities == (pytest.approx(sigma(1.0)),)
    assert sys.path == path
    with pytest.raises(ValueError, match="found no 'worse' in judges_of_mine"):
        load_judge("judges_of_mine:worse")
    with pytest.raises(ValueError, match="judge: found <class"):
        load_judge("judges_of_mine:Judge")
    with pytest.raises(ModuleNotFoundError, match="no_such_module"):
        load_judge("no_such_module:judge")
    for name in ("judges_of_mine", "judges_of_mine:", ":better"):
        with pytest.raises(ValueError, match=r"package\.module:function"):
            load_judge(name)


# --- a reward model -----------------------------------------------------------------------------------------------


def reward_model(tokenizer, pad, outputs=1):
    config = AutoConfig.for_model(
        "llama", vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64, initializer_range=0.2,
        pad_token_id=pad, num_labels=outputs,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return AutoModelForSequenceClassification.from_config(config, dtype=torch.float32)


PROMPTS = ["the cat", [user("hello world good bye")], "a", "a b c d e f g"]
RESPONSES = [" sat on the mat", "good", "", " 1 2 3 + = ? 1 2 3"]


@torch.no_grad()
def scores_by_hand(model, tokenizer):
    """The score head on the last hidden state of each sequence, which is that of EOS."""
    model.eval()
    scores = []
    for prompt, response in zip(PROMPTS, RESPONSES):
        written = response if isinstance(prompt, str) else [assistant(response)]
        example = Template(tokenizer)(TextExample("demonstration", prompt, (written,), (1.0,))).examples[0]
        ids = [*example.prompt.tolist(), *example.responses[0].tokens.tolist()]
        assert ids[-1] == tokenizer.eos_token_id
        scores.append(model.score(model.model(torch.tensor([ids])).last_hidden_state)[0, -1, 0].item())
    return scores


@pytest.mark.parametrize("pad", ["<pad>", None])
@pytest.mark.parametrize("batch_size", [1, 3, 8])
def test_scores_are_those_of_each_sequence_alone(pad, batch_size):
    tokenizer = make(adds_bos=True)
    model = reward_model(tokenizer, pad and tokenizer.convert_tokens_to_ids(pad))
    wanted = scores_by_hand(model, tokenizer)
    model.train()
    judge = RewardModelJudge(model, tokenizer, batch_size=batch_size)
    assert judge.scores(PROMPTS, RESPONSES) == pytest.approx(wanted, abs=1e-5)
    assert judge(PROMPTS[1], RESPONSES[1]) == pytest.approx(wanted[1], abs=1e-5)
    assert model.training and all(module.training for module in model.modules())
    assert np.ptp(wanted) > 0.1


def test_win_rate_by_a_reward_model(tmp_path):
    tokenizer = make()
    model = reward_model(tokenizer, tokenizer.pad_token_id)
    judge = RewardModelJudge(model, tokenizer)
    others = RESPONSES[::-1]
    found = win_rate(PROMPTS, RESPONSES, others, judge)
    differences = judge.scores(PROMPTS, RESPONSES) - judge.scores(PROMPTS, others)
    assert found.probabilities == pytest.approx([sigma(d) for d in differences]) and found.position_bias == 0.0
    assert found.win == np.mean(differences > 0)

    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    again = RewardModelJudge.from_pretrained(str(tmp_path))
    assert again.scores(PROMPTS, RESPONSES) == pytest.approx(judge.scores(PROMPTS, RESPONSES), abs=1e-6)
    assert AutoTokenizer.from_pretrained(tmp_path).eos_token_id == again.template.eos


def test_a_long_prompt_is_cut_and_a_long_response_refused():
    tokenizer = make(adds_bos=True)
    judge = RewardModelJudge(reward_model(tokenizer, tokenizer.pad_token_id), tokenizer)
    assert math.isfinite(judge("x" * 500, " y"))
    assert judge("x" * 500, " y") == pytest.approx(judge("z" * 9 + "x" * 500, " y"))
    with pytest.raises(ValueError, match=r"prompt 1: .*too long"):
        judge.scores(["x", "x"], ["y", "y" * 100])
    with pytest.raises(ValueError, match=r"prompt 0: .*special token"):
        judge.scores(["x"], ["<eos>"])


def test_a_classifier_is_no_reward_model():
    tokenizer = make()
    with pytest.raises(ValueError, match="found 2 outputs; want 1"):
        RewardModelJudge(reward_model(tokenizer, 1, outputs=2), tokenizer)
    with pytest.raises(ValueError, match="found None outputs"):
        RewardModelJudge(SimpleNamespace(config=SimpleNamespace()), tokenizer)
