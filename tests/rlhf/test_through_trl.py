"""RLOO, GRPO and TRL's reward trainer on our data: TRL sees our tokens, our rewards and our reference."""

import sys

import numpy as np
import pytest
import torch
from mixed import Tokenizer, dataset, model
from tiny import tiny_model, tiny_tokenizer

from uft.data.mixture import load_feedback
from uft.feedback import Example, Response
from uft.head import fuse_head
from uft.rlhf.reward import RewardConfig, RewardModel, train_reward_model
from uft.rlhf.sampling import with_targets
from uft.rlhf.through_trl import Online, grpo_trainer, prompt_rows, reward_function, reward_trainer, rloo_trainer

CPU = {"use_cpu": True, "disable_tqdm": True}


@pytest.fixture(scope="module")
def tokenizer():
    return tiny_tokenizer()


@pytest.fixture(scope="module")
def pairs(tokenizer):
    texts = [("say:", " hello world", " b"), ("say a b c:", " the cat sat", " g"), ("1 + 2 =", " 3", " good bye"),
             ("good:", " bye", " a b c d")]  # fmt: skip
    rows = [dict(zip(("prompt", "chosen", "rejected"), each, strict=True)) for each in texts]
    return list(load_feedback(rows, tokenizer, 64)[0])


def settings(folder, **more):
    options = dict(max_steps=2, prompts=2, samples=2, max_new_tokens=6, learning_rate=1e-2, options=CPU)
    return Online(str(folder), **options | more)


def weights(policy):
    return torch.cat([p.detach().flatten() for p in policy.parameters()])


@pytest.mark.peers
@pytest.mark.parametrize("make", [rloo_trainer, grpo_trainer])
def test_two_steps_against_a_reward_model(make, tmp_path, tokenizer, pairs):
    policy, seen = tiny_model(tokenizer, 0), []
    fuse_head(policy)
    reward_model = RewardModel.of(policy, tokenizer)

    def rewards(examples):
        seen.extend(examples)
        return reward_model(examples)

    before = weights(policy).clone()
    trainer = make(policy, tokenizer, pairs, {"judge": rewards}, settings(tmp_path, micro_batch=2))
    # the reference is the policy as it is now, not what it once was loaded from
    assert torch.equal(weights(trainer.ref_model), before)
    trainer.train()
    assert trainer.state.global_step == 2 and not torch.equal(weights(policy), before)
    assert torch.equal(weights(trainer.ref_model), before)
    assert len(seen) == 2 * 2 * 2
    known = {example.prompt.tobytes() for example in pairs}
    assert all(example.prompt.tobytes() in known and len(example.responses[0].tokens) <= 6 for example in seen)
    log = next(each for each in trainer.state.log_history if "rewards/judge/mean" in each)
    assert log["rewards/judge/mean"] == pytest.approx(np.mean([r for (r,) in reward_model(seen[:4])]), abs=1e-4)


@pytest.mark.peers
def test_a_trained_policy_is_its_own_reference(tmp_path, tokenizer, pairs):
    """TRL alone would load the weights that the policy came with."""
    tiny_model(tokenizer, 0).save_pretrained(tmp_path / "base")
    policy = type(tiny_model(tokenizer, 0)).from_pretrained(tmp_path / "base")
    with torch.no_grad():
        policy.lm_head.weight.add_(1.0)
    trainer = rloo_trainer(policy, tokenizer, pairs, lambda e: [[0.0]] * len(e), settings(tmp_path / "rl"))
    assert torch.equal(weights(trainer.ref_model), weights(policy))


@pytest.mark.peers
def test_trls_reward_trainer_takes_our_step(tmp_path):
    """One step on the same pairs, centred and with margins: the same weights."""
    args = RewardConfig(
        output_dir=str(tmp_path), use_cpu=True, max_steps=1, per_device_train_batch_size=4, learning_rate=0.1,
        optim="sgd", center_rewards_coefficient=0.1, margin=True, report_to="none", save_strategy="no",
        disable_tqdm=True, max_grad_norm=0.0, logging_steps=1, lr_scheduler_type="constant",
    )  # fmt: skip
    data = dataset(("pairs",), 4)
    targets = [(0.9, 0.1), (1.0, 0.0), (0.5, 0.5), (0.7, 0.4)]
    scored = with_targets(data[:], targets)
    tokenizer = tiny_tokenizer()
    ours, theirs = (RewardModel.of(model(), tokenizer) for _ in range(2))
    start = weights(ours.model).clone()
    train_reward_model(ours, type(data)({"pairs": scored}), args)
    trainer = reward_trainer(theirs, scored, args)
    trainer.train()
    moved, other = weights(ours.model) - start, weights(theirs.model) - start
    assert moved.norm() > 0 and (moved - other).norm() <= 1e-4 * moved.norm()


def test_a_reward_function_gets_the_sampled_tokens(pairs):
    found = []

    def rewards(examples):
        found.extend(examples)
        return [[float(len(e.responses[0].tokens))] for e in examples]

    function = reward_function(rewards, pairs, "length")
    given = dict(prompts=["", ""], completions=["", ""], trainer_state=None)
    assert function(completion_ids=[[5, 6, 7], [8]], example=[2, 0], **given) == [3.0, 1.0]
    assert function.__name__ == "length"
    assert [e.row for e in found] == [pairs[2].row, pairs[0].row]
    assert np.array_equal(found[0].prompt, pairs[2].prompt) and found[0].responses[0].tokens.tolist() == [5, 6, 7]


def test_prompts_are_tokenised_to_what_they_were(tokenizer, pairs):
    rows = prompt_rows(pairs, tokenizer)
    assert [tokenizer(row["prompt"])["input_ids"] for row in rows] == [e.prompt.tolist() for e in pairs]
    conversation = [{"prompt": [{"role": "user", "content": "say:"}], "chosen": [{"role": "assistant", "content": "a"}],
                     "rejected": [{"role": "assistant", "content": "b"}]}]  # fmt: skip
    (row,) = prompt_rows(list(load_feedback(conversation, tokenizer, 64)[0]), tokenizer)
    assert row["prompt"].startswith("<|im_start|>user")


def test_a_prompt_with_other_tokens_is_refused(tokenizer):
    """ "the" is one token of this tokenizer, and its letters are three."""
    letters = [tokenizer.convert_tokens_to_ids(letter) for letter in "the"]
    example = Example("score", np.array(letters, dtype=np.int32), (Response(np.array([4])),), (), "mine", 3)
    with pytest.raises(
        ValueError, match=r"data set 'mine', row 3: found a prompt \('the'\) whose text has other tokens"
    ):
        prompt_rows([example], tokenizer)


def test_numbers_that_do_not_fit_are_refused(tmp_path):
    assert settings(tmp_path, prompts=3, samples=4, micro_batch=6).fields()["gradient_accumulation_steps"] == 2
    for wrong in ({"samples": 1}, {"micro_batch": 3}, {"prompts": 0}):
        with pytest.raises(ValueError, match="want at least two samples"):
            settings(tmp_path, **wrong).fields()


@pytest.mark.peers
def test_what_trl_would_leave_out_is_refused(tmp_path):
    args, reward_model = RewardConfig(output_dir=str(tmp_path), use_cpu=True), RewardModel.of(model(), Tokenizer())
    with pytest.raises(ValueError, match="row 0: found an example of kind label; want a pair"):
        reward_trainer(reward_model, list(dataset(("labels",), 2)), args)
    (pair,) = dataset(("pairs",), 1)
    heavy = Example(
        "pair", pair.prompt, tuple(Response(r.tokens, weight=2.0) for r in pair.responses), pair.preferences
    )
    with pytest.raises(ValueError, match=r"found weight 2\.0"):
        reward_trainer(reward_model, [heavy], args)
    args.max_length = 2
    with pytest.raises(ValueError, match="want at most max_length, 2"):
        reward_trainer(reward_model, [pair], args)
    with pytest.raises(ValueError, match="found center"):
        reward_trainer(reward_model.calibrated(list(dataset(("pairs",), 4))), [pair], args)


def test_without_trl_the_message_says_what_to_install(monkeypatch, tmp_path, tokenizer, pairs):
    monkeypatch.setitem(sys.modules, "trl", None)
    with pytest.raises(ImportError, match="extra `peers`"):
        rloo_trainer(tiny_model(tokenizer, 0), tokenizer, pairs, lambda e: [], settings(tmp_path))
