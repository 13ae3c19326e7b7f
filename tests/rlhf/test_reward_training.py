"""Training a reward model: the step's loss does not depend on how the step is cut, and what is learnt generalises."""

import math
import os

import numpy as np
import pytest
import torch
from mixed import Tokenizer, dataset, examples, model
from ranks import run
from tiny import tiny_tokenizer

from uft.collation import Collator
from uft.compute import Cost
from uft.data.mixture import FeedbackDataset
from uft.feedback import Example, Response
from uft.rlhf.reward import RewardConfig, RewardModel, train_reward_model
from uft.rlhf.reward_training import RewardTrainer, margins, total


def config(folder, **more):
    defaults = dict(
        use_cpu=True, per_device_train_batch_size=8, max_steps=2, learning_rate=1e-2, logging_steps=1,
        save_strategy="no", report_to="none", disable_tqdm=True, max_grad_norm=0.0, lr_scheduler_type="constant",
    )  # fmt: skip
    return RewardConfig(output_dir=str(folder), **defaults | more)


def weights(reward_model):
    return torch.cat([p.detach().flatten() for p in reward_model.model.parameters()])


def trained(folder, data, eval_data=None, callbacks=(), **more):
    return train_reward_model(
        RewardModel.of(model(), Tokenizer()), data, config(folder, **more), eval_data, callbacks=callbacks
    )


def scored(example, chosen, rejected):
    responses = tuple(
        Response(response.tokens, target=target)
        for response, target in zip(example.responses, (chosen, rejected), strict=True)
    )
    return Example("pair", example.prompt, responses, example.preferences, example.source, example.row)


# ---- the step ----


@pytest.mark.parametrize("size, accumulation", [(1, 12), (5, 3)])
def test_a_step_does_not_depend_on_how_it_is_cut(tmp_path, size, accumulation):
    """Pairs, labels and scores mixed and ragged: each kind is divided by its own count over the step."""
    data = dataset(("pairs", "labels", "scores"), 4)
    options = dict(max_steps=1, center_rewards_coefficient=0.1, optim="sgd")
    whole = trained(tmp_path, data, per_device_train_batch_size=12, **options)
    cut = trained(tmp_path, data, per_device_train_batch_size=size, gradient_accumulation_steps=accumulation, **options)
    start = weights(RewardModel.of(model(), Tokenizer()))
    moved, other = weights(whole) - start, weights(cut) - start
    assert moved.norm() > 0
    assert (moved - other).norm() <= 1e-5 * moved.norm()
    first, second = (found.training_record["metrics"][0] for found in (whole, cut))
    for name in ("loss", "loss/preference", "loss/regression", "rewards/margins"):
        assert first[name] == pytest.approx(second[name], rel=1e-5), name


def test_the_steps_loss_by_hand(tmp_path):
    data = FeedbackDataset(
        {"pairs": [scored(e, 0.9, 0.4) for e in examples("pairs", 4)], "labels": examples("labels", 2)}
    )
    reward_model = RewardModel.of(model(), Tokenizer())
    (w, x, y, z), (a, b) = reward_model(data[:4]), reward_model(data[4:])
    targets = [response.target for example in data[4:] for response in example.responses]
    of_pairs = sum(
        math.log1p(math.exp(-(chosen - rejected - 2 * 0.5))) + 0.1 * (chosen + rejected) ** 2
        for chosen, rejected in (w, x, y, z)
    )
    single = sum((1 / (1 + math.exp(-r)) - t) ** 2 for (r,), t in zip((a, b), targets, strict=True))
    found = trained(
        tmp_path, data, max_steps=1, per_device_train_batch_size=6, margin=True, margin_scale=2.0,
        center_rewards_coefficient=0.1, regression="mse",
    )  # fmt: skip
    assert found.training_record["metrics"][0]["loss"] == pytest.approx(of_pairs / 4 + single / 2, rel=1e-5)


def test_a_weight_multiplies_the_loss_of_its_row(tmp_path):
    plain = examples("pairs", 2)
    heavy = [
        Example(e.kind, e.prompt, tuple(Response(r.tokens, None, r.target, factor) for r in e.responses), e.preferences,
                e.source, e.row)
        for e, factor in zip(plain, (3.0, 0.0), strict=True)
    ]  # fmt: skip
    (chosen, rejected), _ = RewardModel.of(model(), Tokenizer())(plain)
    found = trained(tmp_path, FeedbackDataset({"pairs": heavy}), max_steps=1)
    expected = 3 * math.log1p(math.exp(rejected - chosen)) / 2  # two rows, whatever they weigh
    assert found.training_record["metrics"][0]["loss"] == pytest.approx(expected, rel=1e-5)


def test_margins_come_from_scores_alone():
    plain, much, tie = examples("pairs", 3)
    batch = Collator(0, ("pairs",))([plain, scored(much, 0.75, 0.25), scored(tie, 0.5, 0.5)])
    assert margins(batch).tolist() == [0.0, 0.5, 0.0]


def test_a_count_may_be_a_fraction():
    """Half a pair per rank: gradients of two ranks are averaged, and one of them has none."""
    zero, two = (torch.tensor(0.0),) * 2, (torch.tensor(2.0),) * 2
    sums = {"loss/preference": two, "loss/centering": two, "loss/regression": zero}
    assert total(sums, torch.tensor([0.5, 0.0], dtype=torch.float64), 0.5).item() == (2 + 0.5 * 2) / 0.5


def _of_ranks(folder, name, world):
    """An epoch of ten rows in steps of eight: in the last one a rank has no pair and the other no score."""
    data = dataset(("pairs", "scores"), 5)
    options = dict(per_device_train_batch_size=8 // world, max_steps=2, optim="sgd", center_rewards_coefficient=0.1)
    found = trained(folder / name, data, data, ddp_backend="gloo" if world > 1 else None, **options)
    if int(os.environ.get("RANK", 0)) == 0:
        torch.save((weights(found), found.training_record), folder / f"{name}.pt")


@pytest.mark.slow
def test_two_ranks_take_the_step_of_one(tmp_path):
    _of_ranks(tmp_path, "one", 1)
    run(_of_ranks, tmp_path, 2, "two", 2)
    (one, record), (two, other) = (torch.load(tmp_path / f"{name}.pt", weights_only=False) for name in ("one", "two"))
    start = weights(RewardModel.of(model(), Tokenizer()))
    assert (one - two).norm() <= 1e-5 * (one - start).norm()
    for name in ("examples", "tokens", "flops"):
        assert record[name] == other[name]
    assert record["eval"]["eval_loss"] == pytest.approx(other["eval"]["eval_loss"], rel=1e-5)


@pytest.mark.peers
@pytest.mark.parametrize("center", [None, 0.05])
@pytest.mark.parametrize("with_margin", [False, True])
def test_the_loss_is_trls_on_the_same_rewards(tmp_path, center, with_margin):
    from types import SimpleNamespace

    from trl import RewardTrainer as Theirs

    torch.manual_seed(0)
    rewards, margin = torch.randn(10) * 3, torch.rand(5)
    data = [scored(e, 1 - m / 2, (1 - m) / 2) for e, m in zip(examples("pairs", 5), (1 - margin).tolist(), strict=True)]
    batch = Collator(0, ("pairs",))(data)
    ours = RewardTrainer(
        RewardModel.of(model(), Tokenizer()), FeedbackDataset({"pairs": data}),
        config(tmp_path, margin=with_margin, center_rewards_coefficient=center or 0.0),
    )  # fmt: skip
    assert margins(batch).tolist() == pytest.approx([0.5] * 5)
    found = total(ours.sums(rewards, batch), torch.tensor([5.0, 0.0]), center or 0.0)

    stub = SimpleNamespace(
        model=SimpleNamespace(training=False), args=SimpleNamespace(center_rewards_coefficient=center),
        accelerator=SimpleNamespace(gather=lambda x: x, gather_for_metrics=lambda x: x),
        _metrics={"eval": {name: [] for name in
                           ("num_tokens", "min_reward", "mean_reward", "max_reward", "accuracy", "margin")}},
        _total_train_tokens=0,
    )  # fmt: skip
    better, worse = batch.preferences.unbind(-1)
    inputs = {"attention_mask": batch.attention_mask} | ({"margin": margins(batch)} if with_margin else {})
    theirs = Theirs.compute_loss(
        stub, lambda **_: SimpleNamespace(logits=torch.cat([rewards[better], rewards[worse]])[:, None]), inputs
    )
    torch.testing.assert_close(found, theirs)


# ---- a run ----


def test_a_planted_preference_is_learnt(tmp_path):
    """Answers that hold token 7 are better, on prompts that were not seen."""

    def pairs(n, seed):
        random = np.random.default_rng(seed)
        found = []
        for i in range(n):
            prompt, both = random.integers(8, 60, 4), [random.integers(8, 60, random.integers(2, 6)) for _ in range(2)]
            both[0][random.integers(len(both[0]))] = 7
            tokens = [Response(np.append(ids, 2).astype(np.int32), None, 1.0 - k) for k, ids in enumerate(both)]
            found.append(Example("pair", prompt.astype(np.int32), tuple(tokens), ((0, 1),), "pairs", i))
        return FeedbackDataset({"pairs": found})

    found = trained(
        tmp_path, pairs(256, 0), pairs(64, 1), max_steps=40, per_device_train_batch_size=32, learning_rate=3e-3
    )
    held_out = found.training_record["eval"]
    assert held_out["eval_rewards/accuracies"] > 0.9
    chosen, rejected = np.array(found(list(pairs(64, 1)))).T
    assert held_out["eval_rewards/accuracies"] == pytest.approx((chosen > rejected).mean())
    assert held_out["eval_loss"] == pytest.approx(np.log1p(np.exp(rejected - chosen)).mean(), rel=1e-4)


def test_the_record_counts_what_was_run(tmp_path):
    data = dataset(("pairs",), 8)
    found = trained(tmp_path, data, max_steps=3, per_device_train_batch_size=4)
    record, cost = found.training_record, Cost.of(found.model)
    # an epoch and a half: which rows those are is the sampler's
    assert record["examples"] == 12 and record["steps"] == 3
    assert record["tokens"] == record["metrics"][2]["num_tokens"]
    one_epoch = trained(tmp_path, data, max_steps=2, per_device_train_batch_size=4).training_record
    n = np.array([len(e.prompt) + len(r.tokens) for e in data for r in e.responses])
    assert one_epoch["tokens"] == n.sum()
    assert one_epoch["flops"] == (cost.forward(n) + cost.backward(n)).sum()
    assert one_epoch["seconds"] > 0


def test_a_resumed_run_ends_with_the_same_weights_and_counts(tmp_path):
    data, options = dataset(("pairs", "scores"), 8), dict(max_steps=4, per_device_train_batch_size=4)
    whole = trained(tmp_path / "whole", data, save_strategy="steps", save_steps=2, **options)
    resumed = train_reward_model(
        RewardModel.of(model(), Tokenizer()), data, config(tmp_path / "whole", **options),
        resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"),
    )  # fmt: skip
    assert torch.equal(weights(whole), weights(resumed))
    for name in ("examples", "tokens", "flops"):
        assert whole.training_record[name] == resumed.training_record[name]


def test_a_checkpoint_of_another_run_or_a_torn_one_is_refused(tmp_path):
    data, options = dataset(("pairs",), 8), dict(max_steps=4, per_device_train_batch_size=4)
    trained(tmp_path, data, save_strategy="steps", save_steps=2, **options)

    def resume(**changed):
        args = config(tmp_path, **options | changed)
        train_reward_model(
            RewardModel.of(model(), Tokenizer()), data, args, resume_from_checkpoint=str(tmp_path / "checkpoint-2")
        )

    with pytest.raises(ValueError, match=r"is of another run.*center_rewards_coefficient"):
        resume(center_rewards_coefficient=0.5)
    (tmp_path / "checkpoint-2" / "model.safetensors").write_bytes(b"half")
    with pytest.raises(ValueError, match="cannot resume"):
        resume()


def test_what_cannot_be_learnt_from_is_refused(tmp_path):
    with pytest.raises(ValueError, match="'demonstrations' holds examples of kind demonstration"):
        trained(tmp_path, dataset(("pairs", "demonstrations"), 4))
    with pytest.raises(ValueError, match=r"data set 'pairs', row \d+: found \d+ tokens; want at most max_length, 8"):
        trained(tmp_path, dataset(("pairs",), 8), max_length=8)
    unknown = [
        Example("score", e.prompt, (Response(e.responses[0].tokens),), (), "s", 5) for e in examples("scores", 2)
    ]
    with pytest.raises(ValueError, match="row 5: found a response without a target"):
        trained(tmp_path, FeedbackDataset({"s": unknown}))


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"regression": "huber"}, "want bce or mse"),
        ({"margin_scale": -1.0}, "margin_scale is -1.0"),
        ({"center_rewards_coefficient": float("inf")}, "center_rewards_coefficient is inf"),
        ({"label_smoothing_factor": 0.1}, "label_smoothing_factor"),
    ],
)
def test_a_configuration_without_meaning_is_refused(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        config(tmp_path, **changes)


def test_dropout_is_off(tmp_path):
    policy = model(attention_dropout=0.5)
    data, args = dataset(("pairs",), 4), config(tmp_path, max_steps=1)
    noisy, quiet = RewardModel.of(policy, tiny_tokenizer()), RewardModel.of(model(), tiny_tokenizer())
    found = [train_reward_model(each, data, args).training_record["metrics"][0]["loss"] for each in (noisy, quiet)]
    assert found[0] == found[1]
