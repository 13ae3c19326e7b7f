"""Online unified training: whose responses they are, what their gradient is, and that a step stays a step."""

import copy
import dataclasses
import itertools
import math
import tempfile
import types

import numpy as np
import pytest
import torch
from mixed import Tokenizer, examples, model, parameters
from transformers import TrainerCallback

from experiments.lab.enumerable import exact
from experiments.lab.enumerable.policy import enumerated, policy_of, tokenizer_of
from experiments.lab.enumerable.world import World
from tests.lab.listed import model_of
from uft import losses
from uft.balance import EntropyWeights, Moment, make_balancer
from uft.compute import Cost
from uft.config import UnifiedConfig
from uft.data.mixture import FeedbackDataset
from uft.entropy import summed_entropy
from uft.feedback import Example, Response
from uft.models import response_logits
from uft.presets import make_objective
from uft.recipe import RecipeError, parse
from uft.rlhf.online import Online, OnlineTrainer
from uft.rlhf.online_recipe import online_trainer
from uft.rlhf.sampling import sample
from uft.rlhf.targets import TARGETS, asked, verified
from uft.schedules import Cosine, Rest

WORLD = World(letters="ab", uncovered=0)
RL = {"rl": {"loss": "reinforce"}}
BOTH = {"sft": {"loss": "nll", "weight": 0.5}, "rl": {"loss": "reinforce_tokens"}}


def prompts(n=6, kind="demonstrations"):
    return [dataclasses.replace(example, source="prompts") for example in examples(kind, n, seed=5)]


def data(n=6, **more):
    return FeedbackDataset({"prompts": prompts(n), "demonstrations": examples("demonstrations", 6)} | more)


def lengths(given):
    """A reward that anybody can count: tokens."""
    return [[float(len(response.tokens)) for response in example.responses] for example in given]


def varied(given):
    """A reward that most responses have another of, in [0, 1)."""
    return [[int(response.tokens.sum()) % 7 / 7 for response in example.responses] for example in given]


def trainer(objective=BOTH, rewards=varied, train=None, policy=None, tokenizer=None, **options):
    online = {name: options.pop(name) for name in list(options) if name in Online.__dataclass_fields__}
    handed = {name: options.pop(name, None) for name in ("callbacks", "reference")}
    args = dict(
        use_cpu=True, per_device_train_batch_size=6, max_steps=2, logging_steps=1, save_strategy="no",
        disable_tqdm=True, learning_rate=1e-2, report_to="none", max_grad_norm=0.0, max_length=64,
        reference="cached" if options.pop("cached", False) else "auto",
        output_dir=options.pop("output_dir", None) or tempfile.mkdtemp(prefix="uft-test-"),
    )  # fmt: skip
    return OnlineTrainer(
        policy or model(), objective, UnifiedConfig(**args | options), train or data(),
        processing_class=tokenizer or Tokenizer(), **handed,
        online=Online(rewards, **{"samples": 3, "max_new_tokens": 6, "target": "rloo"} | online),
    )  # fmt: skip


class Watch(TrainerCallback):
    """Calls a function at a moment of every step."""

    def __init__(self, moment, function):
        setattr(self, moment, lambda args, state, control, **kwargs: function(state))


# ---- by hand ----


def test_policy_gradients_by_hand():
    token_logp = torch.tensor([[-1.0, -2.0], [-0.5, 0.0]], requires_grad=True)
    logp, length, advantage = token_logp.sum(-1), torch.tensor([2.0, 1.0]), torch.tensor([3.0, -2.0])
    assert losses.reinforce(logp, advantage).tolist() == [9.0, -1.0]
    assert losses.grpo(logp, length, advantage).tolist() == [4.5, -1.0]
    assert losses.reinforce_tokens(token_logp, advantage).tolist() == [[3.0, 6.0], [-1.0, 0.0]]
    assert losses.reinforce_positive(token_logp, advantage).tolist() == [[3.0, 6.0], [0.0, 0.0]]
    assert losses.reinforce_negative(token_logp, advantage).tolist() == [[0.0, 0.0], [-1.0, 0.0]]
    losses.reinforce(logp, advantage).sum().backward()
    assert token_logp.grad.tolist() == [[-3.0, -3.0], [2.0, 2.0]]


def test_chord_phi_by_hand():
    token_logp = torch.tensor([0.25, 1.0]).log().requires_grad_()
    loss = losses.chord_phi(token_logp)
    loss.sum().backward()
    assert loss.tolist() == pytest.approx([0.1875 * math.log(4), 0.0])
    assert token_logp.grad.tolist() == pytest.approx([-0.1875, 0.0])


def test_targets_by_hand():
    rewards = torch.tensor([1.0, 0.0, 0.0, 0.5, 0.5, 0.5])
    assert TARGETS["rloo"](rewards, 3).tolist() == pytest.approx([1, -0.5, -0.5, 0, 0, 0])
    # the sample's standard deviation of (1, 0, 0) is 1 / sqrt 3
    assert TARGETS["grpo"](rewards, 3).tolist() == pytest.approx([2 / 3**0.5, *[-1 / 3**0.5] * 2, 0, 0, 0], rel=1e-3)
    assert TARGETS["signed"](rewards, 3).tolist() == [1, -1, -1, 0, 0, 0]
    assert TARGETS["sigmoid"](torch.tensor([0.0, math.log(3)]), 1).tolist() == pytest.approx([0.5, 0.75])
    for name in ("score", "signed"):
        with pytest.raises(ValueError, match=r"found a reward of 1\.5; want rewards in"):
            TARGETS[name](torch.tensor([1.5]), 1)


def test_chord_weights_add_up_to_one():
    for name, mu in (("chord", [0.9, 0.475, 0.05]), ("chord_phi", [0.1] * 3)):
        weights = [make_objective(name).weights(p) for p in (0, 0.5, 1)]
        assert [w["sft"] for w in weights] == pytest.approx(mu)
        assert [sum(w.values()) for w in weights] == pytest.approx([1, 1, 1])
    spec = {"preset": "chord", "sft_weight": {"schedule": "linear", "start": 1, "end": 0}}
    assert make_objective(spec).weights(0.25) == {"sft": 0.75, "rl": 0.25}
    assert repr(Rest(Cosine(1, 0))) == "Rest(weight=Cosine(1, 0))"
    with pytest.raises(ValueError, match="is 2; want 0 <= weight <= 1"):
        make_objective({"preset": "chord", "sft_weight": 2})


def test_a_policy_gradient_counts_responses_or_tokens():
    run = trainer(BOTH | RL | {"short": {"loss": "grpo"}})
    batch = run._answered([run.train_dataset[:6]])[0].batches[0]
    tokens = batch.shifted[batch.rows("scores")].sum().item()
    assert run.objective.counts(batch).tolist()[1:] == [18, 18]
    run = trainer()
    batch = run._answered([run.train_dataset[:6]])[0].batches[0]
    assert run.objective.counts(batch).tolist()[1] == tokens


# ---- the gradient is that of the expected reward ----


def world_data():
    answer = (Response(WORLD.ids("."), None, 1.0),)
    rows = [
        Example("demonstration", WORLD.ids(p), answer, source="prompts", row=i) for i, p in enumerate(WORLD.prompts)
    ]
    return FeedbackDataset({"prompts": rows})


def world_rewards(table):
    def rewards(given):
        places = [[WORLD.place(WORLD.text(r.tokens)) for r in example.responses] for example in given]
        return [table[example.row, of_prompt].tolist() for example, of_prompt in zip(given, places)]

    return rewards


def world_trainer(objective, table, policy, **options):
    defaults = dict(
        train=world_data(), tokenizer=tokenizer_of(WORLD), max_new_tokens=WORLD.max_tokens, max_length=16,
        per_device_train_batch_size=4, samples=32, batch_size=256,
    )  # fmt: skip
    return trainer(objective, world_rewards(table), policy=policy, **defaults | options)


def test_mean_gradient_is_that_of_the_expected_reward():
    policy = model_of(WORLD, 1)
    generator = torch.Generator().manual_seed(0)
    table = torch.randn(4, len(WORLD.responses), generator=generator, dtype=torch.float64) + 1.0
    logp = enumerated(policy, WORLD)
    gradients = torch.autograd.grad((logp.exp() * table).sum(-1).mean(), [*policy.parameters()])
    wanted = torch.cat([g.flatten() for g in gradients]).double()
    found = []

    def note(state):
        found.append(-torch.cat([p.grad.flatten() for p in policy.parameters()]).double())

    callbacks = [Watch("on_pre_optimizer_step", note)]
    run = world_trainer(
        RL, table, policy, max_steps=12, learning_rate=0.0, target="rloo", callbacks=callbacks, samples=64
    )
    run.train()
    found = torch.stack(found)
    directions = [wanted / wanted.norm(), *torch.nn.functional.normalize(torch.randn(4, len(wanted)).double())]
    for direction in directions:
        along = found @ direction
        error = along.std() / math.sqrt(len(along))
        assert abs(along.mean() - wanted @ direction) < 4 * error
    assert (found @ directions[0]).std() / math.sqrt(len(found)) < 0.1 * wanted.norm()  # or it would show nothing
    assert abs((found.mean(0) @ directions[0]) / wanted.norm() - 1) < 0.2


def test_online_una_moves_to_the_tilted_reference():
    """pi proportional to pi_ref exp(logit(target) / beta) is where the implicit reward is right, and nothing moves."""
    policy, beta = model_of(WORLD, 2), 0.8
    tilted = copy.deepcopy(policy)
    with torch.no_grad():
        noise = torch.Generator().manual_seed(0)
        tilted.lm_head.weight += 0.3 * torch.randn(tilted.lm_head.weight.shape, generator=noise)
    reference, wanted = policy_of(policy, WORLD), policy_of(tilted, WORLD)
    table = beta * (wanted - reference)  # log pi / pi_ref of a policy: sum of pi_ref exp(reward / beta) is 1
    run = world_trainer(
        {"preset": "online_una", "beta": beta}, table, copy.deepcopy(tilted), target="sigmoid", max_steps=1,
        reference=copy.deepcopy(policy),
    )  # fmt: skip
    run.train()
    log = run.state.log_history[0]
    assert log["loss"] < 1e-10 and log["grad_norm"] < 1e-5
    run = world_trainer(
        {"preset": "online_una", "beta": beta, "loss": "una_bce"}, table, policy, target="sigmoid", max_steps=12
    )
    before = exact.sequence_kl(policy_of(policy, WORLD), wanted)
    run.train()
    assert run.state.log_history[0]["grad_norm"] > 1e-2
    assert exact.sequence_kl(policy_of(policy, WORLD), wanted) < 0.35 * before


# ---- the policy of the step, and no other ----


def test_responses_are_those_of_the_policy_right_before_the_step():
    given, states = [], [model().state_dict()]

    def rewards(answered):
        given.append(copy.deepcopy(answered))
        return lengths(answered)

    note = Watch("on_step_end", lambda state: states.append(copy.deepcopy(policy.state_dict())))
    policy = model()
    run = trainer(rewards=rewards, policy=policy, callbacks=[note], max_steps=4, learning_rate=5e-2)
    run.train()
    assert len(given) == 4

    def again(step, state):
        fresh = model()
        fresh.load_state_dict(states[state])
        asked_for = [run.train_dataset.examples["prompts"][example.index] for example in given[step]]
        places = run._places(asked_for)
        return tokens(
            sample(
                fresh, Tokenizer(), asked_for, samples=3, max_new_tokens=6, seed=[run.args.seed, step], places=places
            )
        )

    def tokens(answered):
        return [response.tokens.tolist() for example in answered for response in example.responses]

    for step in range(4):
        assert tokens(given[step]) == again(step, step)
    # the policy of one step earlier, as a loader that works ahead would ask, writes something else
    assert all(tokens(given[step]) != again(step, step - 1) for step in (1, 2, 3))


def test_every_step_and_every_turn_has_its_own_luck():
    """A prompt that comes twice in a step, or again in a later one, is not answered with the same luck."""
    given = []

    def rewards(answered):
        given.append([response.tokens.tolist() for example in answered for response in example.responses])
        return lengths(answered)

    twice = FeedbackDataset({"prompts": prompts(1)}, {"prompts": 2.0})
    trainer(RL, rewards, twice, learning_rate=0.0, max_steps=2, per_device_train_batch_size=2, samples=8).train()
    first, second = given
    assert first[:8] != first[8:] and first != second


# ---- a step is a step ----


def one_run(**options):
    run = trainer("chord", max_steps=2, target="grpo", train=data(12), learning_rate=1e-3, optim="sgd", **options)
    run.train()
    return parameters(run.model), [entry for entry in run.state.log_history if "loss" in entry], run.counters()


@pytest.fixture(scope="module")
def uncut():
    return one_run(per_device_train_batch_size=12)


@pytest.mark.parametrize(
    "cut",
    [
        {"per_device_train_batch_size": 3, "gradient_accumulation_steps": 4},
        {"token_budget": 64},
        {"layout": "padded", "padding_side": "left"},
    ],
    ids=["accumulation", "token budget", "padded"],
)
def test_split_invariance(cut, uncut):
    start, (whole, logged, counted) = parameters(model()), uncut
    again, logged_again, counted_again = one_run(**{"per_device_train_batch_size": 12} | cut)
    moved = whole - start
    assert ((again - whole).norm() / moved.norm()) < 1e-4
    assert all(log["online/ties"] < 0.5 and log["loss/rl"] != 0 for log in logged)
    for a, b in zip(logged, logged_again, strict=True):
        for name in ("loss", "loss/rl", "online/reward", "online/length", "online/ended", "online/distinct_2"):
            assert a[name] == pytest.approx(b[name], rel=1e-5, abs=1e-7), name
    for name in ("generated_tokens", "tokens", "policy_forwards", "flops"):
        assert counted[name] == counted_again[name]


def test_killed_and_resumed_it_ends_the_same(tmp_path):
    options = dict(
        max_steps=4, save_strategy="steps", save_steps=2, per_device_train_batch_size=3, gradient_accumulation_steps=2,
        logging_steps=3,
    )  # fmt: skip
    whole = trainer(objective="srft", target="signed", rewards=odd, output_dir=str(tmp_path / "whole"), **options)
    whole.train()
    calls = []

    def dies(given):
        calls.append(len(given))
        if len(calls) == 4:
            raise KeyboardInterrupt
        return odd(given)

    dies.__qualname__ = odd.__qualname__
    folder = str(tmp_path / "cut")
    with pytest.raises(KeyboardInterrupt):
        trainer(objective="srft", target="signed", rewards=dies, output_dir=folder, **options).train()
    resumed = trainer(objective="srft", target="signed", rewards=odd, output_dir=folder, **options)
    resumed.train(resume_from_checkpoint=True)
    assert torch.equal(parameters(whole.model), parameters(resumed.model))

    def kept(run):
        return [{k: v for k, v in e.items() if "runtime" not in k and "second" not in k} for e in run.state.log_history]

    assert kept(whole)[:-1] == kept(resumed)[:-1]
    counters = [{k: v for k, v in run.counters().items() if k != "seconds"} for run in (whole, resumed)]
    assert counters[0] == counters[1] and counters[0]["generated_tokens"] > 0
    other = trainer(objective="srft", target="signed", rewards=odd, output_dir=folder, samples=5, **options)
    with pytest.raises(ValueError, match=r"online\.samples is 3 there and 5 here"):
        other.train(resume_from_checkpoint=True)


def odd(given):
    return [[float(response.tokens.sum() % 2) for response in example.responses] for example in given]


# ---- what is logged and counted ----


def taken(run, n):
    """The demonstrations of the first step, which are `n`."""
    first = [run.train_dataset[i] for i in itertools.islice(run._get_train_sampler(), 6)]
    found = [example for example in first if example.source == "demonstrations"]
    assert len(found) == n
    return found


def test_what_is_written_is_logged_and_counted():
    given = []

    def rewards(answered):
        given.extend(answered)
        return lengths(answered)

    run = trainer(rewards=rewards, max_steps=1, max_new_tokens=40)
    run.train()
    log, counted = run.state.log_history[0], run.counters()
    responses = [response.tokens.tolist() for example in given for response in example.responses]
    assert len(responses) == 3 * len(given) > 0 and len({*map(len, responses)}) > 3
    written = np.array([len(tokens) for tokens in responses])
    grams = [gram for tokens in responses for gram in itertools.pairwise(tokens)]
    assert log["online/reward"] == log["online/length"] == pytest.approx(written.mean())
    assert log["online/ended"] == pytest.approx(np.mean([tokens[-1] == 2 for tokens in responses]))
    assert log["online/distinct_2"] == pytest.approx(len(set(grams)) / len(grams))
    ties = [len({len(response.tokens) for response in example.responses}) == 1 for example in given]
    assert log["online/ties"] == pytest.approx(np.mean(ties))
    assert counted["generated_tokens"] == written.sum()
    assert log["online/length_reward_correlation"] == pytest.approx(1)
    assert "prompts/nll" not in log and "demonstrations/nll" in log

    cost, drawn = Cost.of(run.model), {example.index for example in given}
    whole = written + np.repeat([len(example.prompt) for example in given], 3)
    shown = taken(run, 6 - len(given))
    length = np.concatenate([whole, [len(e.prompt) + len(e.responses[0].tokens) for e in shown]])
    scored = np.concatenate([written, [e.responses[0].in_loss.sum() for e in shown]])
    training = (cost.forward(length, scored) + cost.backward(length, scored)).sum()
    assert counted["flops"] == training + cost.forward(whole, written).sum()
    assert counted["policy_forwards"] == 2 * len(responses) + (6 - len(given))
    assert counted["backwards"] == len(responses) + (6 - len(given))
    assert len(drawn) == len(given)
    assert run.record()["online"]["name"].endswith("rewards")


def test_kl_and_spread_are_logged():
    """The KL is that of the responses' log-ratios; before the first step it is 0."""
    seen = []
    run = trainer("online_una", train=FeedbackDataset({"prompts": prompts()}), target="sigmoid", spread=lengths)
    inner = run.scored
    run.scored = lambda *args: seen.append(inner(*args)) or seen[-1]
    run.train()
    first, second, _ = run.state.log_history
    assert first["online/kl"] == 0 and first["online/spread"] == first["online/length"]
    ratio = (seen[1].logp - seen[1].reference_logp).detach()
    assert second["online/kl"] == pytest.approx(float(ratio.mean()), rel=1e-5) != 0


def test_a_step_without_prompts_and_one_without_demonstrations():
    run = trainer("chord", max_steps=6, per_device_train_batch_size=1, target="grpo")
    run.train()
    logs = run.state.log_history[:-1]
    assert {"online/reward" in log for log in logs} == {True, False}
    assert {"loss/sft" in log for log in logs} == {True, False}
    assert torch.isfinite(parameters(run.model)).all()


def test_a_rank_continues_where_lower_ranks_have_drawn_the_same_prompt():
    run = trainer()
    drawn = [run.train_dataset.examples["prompts"][i] for i in (3, 1, 3)]
    assert run._places(drawn) == [(0, 3, 0), (0, 1, 0), (0, 3, 1)]
    lower = [(0, 3), (0, 2)]
    run._gather = lambda objects: [lower, *objects]
    run.args = types.SimpleNamespace(world_size=2, process_index=1)
    assert run._places(drawn) == [(0, 3, 1), (0, 1, 0), (0, 3, 2)]


# ---- weights from the entropy ----


def test_entropy_by_hand():
    run = trainer()
    batch = run._answered([run.train_dataset[:8]])[0].batches[0]
    logp = response_logits(run.model, batch).detach().double().log_softmax(-1)
    of_token = -(logp.exp() * logp).sum(-1)
    rows = batch.shifted.nonzero()[:, 0]
    for on in ("scores", "demonstrations"):
        wanted = of_token[batch.rows(on)[rows]]
        total, n = summed_entropy(run.model, batch, on)
        assert float(total) == pytest.approx(float(wanted.sum()), rel=1e-6) and int(n) == len(wanted) > 0


def test_entropy_weights_by_hand():
    balancer = make_balancer({"method": "entropy", "falls": "sft", "rises": "rl"})
    memory, own = {}, {"sft": 0.5, "rl": 0.1, "kl": 1.0}

    def at(entropy):
        return Moment(0, 0, own, tuple(own), dict, dict, lambda on: entropy)

    assert balancer.weights(at(None), memory) == own
    expected = {"sft": 0.5 * math.exp(-0.7), "rl": 0.1 * math.exp(0.7), "kl": 1.0}
    assert balancer.weights(at(0.7), memory) == pytest.approx(expected)
    assert balancer.weights(at(None), memory) == pytest.approx(expected)  # a step without rows has the last one's
    with pytest.raises(ValueError, match="want different terms of sft, rl"):
        EntropyWeights(falls=("sft", "rl"), rises=("rl",)).check(("sft", "rl"))
    with pytest.raises(ValueError, match="on is 'rollouts'"):
        make_balancer({"method": "entropy", "on": "rollouts"})


def test_srft_weighs_by_the_entropy_before_the_step():
    run = trainer("srft", odd, target="signed", max_steps=1)
    run.train()
    log = run.state.log_history[0]
    entropy = log["balance/entropy"]
    assert 0 < entropy < math.log(60)
    assert log["weight/sft"] == pytest.approx(0.5 * math.exp(-entropy))
    assert log["weight/positive"] == pytest.approx(0.1 * math.exp(entropy))
    assert log["weight/negative"] == 1.0


# ---- faults ----


def shaped(given):
    return [[0.0] for _ in given]


def nan_for_row_3(given):
    return [[math.nan if e.row == 3 else 1.0 for _ in e.responses] for e in given]


def raises_for_row_3(given):
    if any(example.row == 3 for example in given):
        raise RuntimeError("no connection")
    return lengths(given)


@pytest.mark.parametrize(
    "rewards, message",
    [
        (nan_for_row_3, "the reward of a response to row 3 of 'prompts' is nan; want a finite number"),
        (raises_for_row_3, "failed for a response to row 3 of 'prompts': RuntimeError: no connection"),
        (shaped, "found 1 rewards for 3 responses to row 0 of 'prompts'; want one for each"),
        (lambda given: lengths(given)[:-1], "found rewards of 5 prompts; want those of 6"),
    ],
)
def test_a_reward_that_is_none(rewards, message):
    with pytest.raises(ValueError, match=message):
        asked(rewards, sample(model(), Tokenizer(), prompts(), samples=3, max_new_tokens=3), Tokenizer())


def test_a_reward_that_is_none_stops_the_training_before_the_step():
    policy = model()
    with pytest.raises(ValueError, match="row 3 of 'prompts'"):
        trainer(rewards=nan_for_row_3, policy=policy, per_device_train_batch_size=12, max_steps=1).train()
    assert torch.equal(parameters(policy), parameters(model()))


DPO_RL = BOTH | {"preference": {"loss": "dpo"}}


@pytest.mark.parametrize(
    "options, message",
    [
        ({"objective": "sft"}, "holds examples of kind score, which no term"),
        ({"objective": "online_una", "train": FeedbackDataset({"prompts": prompts()})}, "want one of sigmoid, score"),
        ({"target": "sigmoid"}, "loss reinforce_tokens and online responses target 'sigmoid'; want one of reward"),
        ({"sources": "others"}, "found no data set 'others' among prompts, demonstrations"),
        ({"sources": "documents", "train": data(documents=examples("documents"))}, "'documents' holds documents"),
        ({"max_length": 8}, "row 3 of 'prompts': found a prompt of 6 tokens and 6 to come; want at most 8"),
        ({"max_length": 500, "max_new_tokens": 125}, "want at most 128"),
        ({"objective": DPO_RL, "cached": True, "train": data(pairs=examples("pairs"))}, "reference is 'cached'"),
        ({"train": data(scores=examples("scores"))}, "'scores' holds scores, which would be taken for advantages"),
        ({"temperature": 0.7}, "temperature is 0.7 for advantages"),
        ({"samples": 1}, "want at least 2 responses to compare"),
        ({"max_new_tokens": 0}, "max_new_tokens is 0"),
        ({"target": "best"}, "target is 'best'; want one of sigmoid"),
        ({"rewards": 3}, "rewards is 3; want a function"),
    ],
)  # fmt: skip
def test_what_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        trainer(**options)


def test_kto_is_refused_on_what_is_yet_to_be_written():
    with pytest.raises(ValueError, match="wants KTO's KL"):
        trainer({"kto": {"loss": "kto", "on": "scores"}}, train=FeedbackDataset({"prompts": prompts()}), target="score")


@pytest.mark.parametrize(
    "options, message",
    [
        ({"sources": "prompts"}, "want a mapping with rewards"),
        ({"rewards": "number", "sample": 3}, "online: unknown key 'sample'; did you mean 'samples'"),
        ({"rewards": "number", "samples": 0}, "online: samples is 0"),
        ({"rewards": "nowhere:function"}, "No module named 'nowhere'"),
    ],
)
def test_a_recipe_that_cannot_be_used(options, message, tmp_path):
    (tmp_path / "a.jsonl").write_text('{"prompt": "ab=", "completion": "ba"}\n')
    recipe = {"model": "x", "objective": "chord", "train_dataset": {"prompts": {"path": str(tmp_path / "a.jsonl")}}}
    plan = parse(recipe | {"output_dir": str(tmp_path), "use_cpu": True})
    with pytest.raises(RecipeError, match=message):
        online_trainer(plan, options, tokenizer_of(WORLD))


def test_the_answer_of_a_row_is_what_its_responses_are_checked_against():
    tokenizer = tokenizer_of(WORLD)
    rows = [
        Example("demonstration", WORLD.ids("ab="), (Response(WORLD.ids(a)),), source="prompts") for a in ("ba.", "a.")
    ]
    known = FeedbackDataset({"prompts": rows})
    answered = [
        dataclasses.replace(known[i], responses=tuple(Response(WORLD.ids(text)) for text in ("ba.", "a.", "ab")))
        for i in (1, 0)
    ]
    rewards = verified(lambda text, answer: text == answer, tokenizer, known)
    assert rewards(answered) == [[0.0, 1.0, 0.0], [1.0, 0.0, 0.0]]
