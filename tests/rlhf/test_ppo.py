"""RLTrainer: against exact gradients and the exact optimum, split invariance, resumption, counts, refusals."""

import json
import math
import os
import signal
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from listed_world import WORLD, config, critic, policy, prompts, rewards
from transformers import TrainerCallback

from experiments.lab.enumerable.exact import expected, optimal_policy, regularised_reward, sequence_kl
from experiments.lab.enumerable.policy import enumerated, policy_of, tokenizer_of
from uft.compute import Cost
from uft.rlhf.ppo import RLTrainer
from uft.rlhf.rollouts import correlation, distinct

TOKENIZER = tokenizer_of(WORLD)


def trainer_of(folder, model, *, advantage="rloo", times=8, given=rewards, spread=None, **options) -> RLTrainer:
    samples = 1 if advantage == "gae" else 4
    batch = options.pop("per_device_train_batch_size", 32 if advantage == "gae" else 8)
    samples = options.pop("samples", samples)
    args = config(folder, advantage=advantage, samples=samples, per_device_train_batch_size=batch, **options)
    own = critic(model) if advantage == "gae" else None
    return RLTrainer(model, given, prompts(times), args, TOKENIZER, critic=own, spread=spread)


@pytest.mark.parametrize("advantage, steps", [("rloo", 80), ("gae", 80)])
def test_reaches_the_optimum_of_the_bandit(tmp_path, advantage, steps):
    """max E[r] − β KL(π ‖ π_ref) has a closed form, π_ref exp(r / β) / Z; four fifths of what can be gained is."""
    model, beta = policy(), 1.0
    reference = policy_of(model, WORLD)
    trainer = trainer_of(
        tmp_path, model, advantage=advantage, max_steps=steps, kl_coefficient=beta, learning_rate=5e-3,
        critic_learning_rate=1e-2, lam=1.0, whiten=False, value_clip=0.0, per_device_train_batch_size=64 // 4 if
        advantage == "rloo" else 64, times=16, lr_scheduler_type="cosine",
    )  # fmt: skip
    trainer.train()
    worth = lambda logp: regularised_reward(logp, reference, WORLD.reward, beta).item()
    before, after, best = worth(reference), worth(policy_of(model, WORLD)), beta_log_z(reference, beta)
    assert best == pytest.approx(worth(optimal_policy(reference, WORLD.reward, beta).logp))
    assert after - before > 0.8 * (best - before), (before, after, best)


def beta_log_z(reference, beta) -> float:
    return beta * optimal_policy(reference, WORLD.reward, beta).log_z.mean().item()


@pytest.mark.parametrize(
    "advantage, kl_in, beta, least",
    [
        ("rloo", "reward", 0.5, 0.95),
        ("gae", "reward", 0.5, 0.93),
        ("grpo", "reward", 0.5, 0.8),
        ("rloo", "reward", 50.0, 0.95),
        ("rloo", "loss", 0.5, 0.93),
        ("rloo", "loss", 50.0, 0.85),
        ("grpo", "loss", 0.5, 0.8),
    ],
)
def test_gradient_is_that_of_what_is_wanted(tmp_path, advantage, kl_in, beta, least):
    """Of 4,096 responses, beside the exact gradient of E[r] − β KL; at β = 50 the KL is nearly all of it.

    Directions are compared: GRPO divides by the deviation of each group, PPO and GRPO take means over tokens, and the
    KL as a loss holds the states fixed that were sampled.
    """
    model = policy()
    reference = policy_of(policy(seed=1), WORLD)
    exact = policy()
    logp = enumerated(exact, WORLD)
    (-(expected(WORLD.reward, logp) - beta * sequence_kl(logp, reference))).backward()
    trainer = trainer_of(
        tmp_path, model, advantage=advantage, max_steps=1, kl_in=kl_in, kl_coefficient=beta, learning_rate=0.0, lam=1.0,
        whiten=False, times=1024, samples=1 if advantage == "gae" else 8,
        per_device_train_batch_size=4096 if advantage == "gae" else 512, max_grad_norm=0.0, value_coefficient=0.0,
    )  # fmt: skip
    trainer.reference.model.load_state_dict(policy(seed=1).state_dict())
    kept = {}
    trainer.add_callback(_Gradients(kept, model))
    trainer.train()
    found = torch.cat([kept[name].flatten() for name, _ in model.named_parameters()]).double()
    wanted = torch.cat([parameter.grad.flatten() for parameter in exact.parameters()]).double()
    cosine = torch.nn.functional.cosine_similarity(found, wanted, dim=0).item()
    assert cosine > least, cosine


class _Gradients(TrainerCallback):
    def __init__(self, kept, model):
        self.kept, self.model = kept, model

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        self.kept |= {name: p.grad.detach().clone() for name, p in self.model.named_parameters()}


@pytest.mark.parametrize(
    "options",
    [
        {"advantage": "rloo"},
        {"advantage": "gae"},
        {"advantage": "grpo", "kl_in": "loss"},
        {"advantage": "grpo", "kl_in": "loss", "kl_loss": "k3"},
    ],
    ids=str,
)
def test_does_not_depend_on_micro_batches(tmp_path, options):
    results = []
    for size in (0, 5):
        model = policy()
        trainer_of(
            tmp_path, model, max_steps=4, minibatches=2, learning_rate=1e-2, micro_batch_size=size, **options
        ).train()
        results.append(policy_of(model, WORLD))
    assert (results[0] - results[1]).abs().max() < 1e-4
    assert (results[0] - policy_of(policy(), WORLD)).abs().max() > 0.05, "something was learnt"


def test_a_resumed_run_is_the_same(tmp_path):
    options = {"advantage": "gae", "max_steps": 8, "epochs_per_rollout": 2, "minibatches": 2, "learning_rate": 1e-2,
               "kl_target": 0.1, "save_strategy": "steps", "save_steps": 4}  # fmt: skip
    whole, again = policy(), policy()
    trainer_of(tmp_path / "a", whole, **options).train()
    resumed = trainer_of(tmp_path / "a", again, **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-4"))
    for one, other in zip(whole.parameters(), again.parameters()):
        assert torch.equal(one, other)
    record = json.loads((tmp_path / "a" / "run.json").read_text())
    assert record["steps"] == 8 and record["compute"]["rollouts"] == 2
    assert record["compute"]["backwards"] == 2 * 2 * 32, "each response is trained on twice"
    for changed, message in (({"kl_coefficient": 9.0}, "kl_coefficient"), ({"given": other_rewards}, "reward")):
        with pytest.raises(ValueError, match=rf"is of another run.*{message}"):
            trainer_of(tmp_path / "a", policy(), **options, **changed).train(
                resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-4")
            )


def other_rewards(examples):
    return rewards(examples)


def test_a_signal_is_followed_at_the_end_of_the_rollout(tmp_path):
    """A checkpoint inside of one could not be gone on from exactly."""
    trainer = trainer_of(tmp_path, policy(), max_steps=8, epochs_per_rollout=4, learning_rate=1e-3)
    trainer.add_callback(_Signal())
    with pytest.raises(KeyboardInterrupt, match="after step 4 of 8"):
        trainer.train()
    assert (tmp_path / "checkpoint-4").is_dir()


class _Signal(TrainerCallback):
    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == 1:
            os.kill(os.getpid(), signal.SIGINT)


def test_gradient_checkpointing_changes_nothing(tmp_path):
    results = []
    for on in (False, True):
        model = policy()
        trainer_of(tmp_path, model, advantage="gae", max_steps=2, learning_rate=1e-2, gradient_checkpointing=on).train()
        results.append(policy_of(model, WORLD))
    assert (results[0] - results[1]).abs().max() < 1e-5


def test_counts_generation(tmp_path):
    """The head of the policy sees what is scored alone; an ensemble that is asked for its spread is asked twice."""
    model = policy()
    body = critic(model).model
    own = Cost.of(body)

    def ensemble(examples):
        return rewards(examples)

    ensemble.members = [SimpleNamespace(model=body), SimpleNamespace(model=body)]
    trainer = trainer_of(tmp_path, model, max_steps=1, learning_rate=0.0, given=ensemble, spread=rewards)
    trainer.train()
    counters, cost = trainer.run_state.counters, Cost.of(model)
    lengths = [(len(e.prompt) + len(r.tokens), len(r.tokens)) for e in trainer.rollout.examples for r in e.responses]
    n, scored = np.array(lengths).T
    assert len(n) == 32 and counters["generated_tokens"] == sum(n - 3) == sum(scored)
    # written once, scored by policy and reference, and then trained on
    of_policy = (4 * cost.forward(n, scored) + cost.backward(n, scored)).sum()
    assert counters["flops"] == int(of_policy + 4 * own.forward(n).sum())
    assert counters["policy_forwards"] == 3 * 32 and counters["reference_forwards"] == 32
    assert counters["reward_forwards"] == 4 * 32


def test_logs_what_guards_and_people_look_at(tmp_path):
    trainer = trainer_of(tmp_path, policy(), advantage="gae", max_steps=2, learning_rate=1e-3)
    trainer.train()
    first = trainer.state.log_history[0]
    assert first["kl_sequence"] == 0.0, "the policy is its reference before the first step"
    assert first["policy/clipped"] == 0.0 and first["policy/kl_old"] == 0.0
    for name in ("reward", "length", "ended", "distinct_2", "entropy", "length_reward_correlation", "loss/value",
                 "value/explained_variance", "reward/std"):  # fmt: skip
        assert math.isfinite(first[name]), name
    found = rewards(trainer.rollout.examples)
    assert trainer.state.log_history[1]["reward"] == pytest.approx(np.mean(found), abs=1e-5)


def test_without_a_reference_no_kl_is_told(tmp_path):
    trainer = trainer_of(tmp_path, policy(), max_steps=1, kl_in="none")
    trainer.train()
    assert trainer.reference is None and "kl_sequence" not in trainer.state.log_history[0]


def test_clipping_is_seen_where_a_rollout_is_used_often(tmp_path):
    trainer = trainer_of(tmp_path, policy(), max_steps=6, epochs_per_rollout=6, learning_rate=3e-2)
    trainer.train()
    clipped = [entry["policy/clipped"] for entry in trainer.state.log_history if "policy/clipped" in entry]
    assert clipped[0] == 0.0 and clipped[-1] > 0.05


@pytest.mark.parametrize(
    "options, message",
    [
        ({"advantage": "rloo", "samples": 1}, "rloo.*with 1 response per prompt; want 2 or more"),
        ({"advantage": "best"}, "advantage is 'best'; want one of gae, rloo, grpo"),
        ({"gradient_accumulation_steps": 2}, "want micro_batch_size"),
        ({"minibatches": 2, "max_steps": 3}, "want multiples of the 2 steps"),
        ({"minibatches": 2, "save_strategy": "steps", "save_steps": 3}, "no checkpoint falls inside"),
        ({"max_steps": -1}, "max_steps is -1"),
        ({"layout": "padded"}, "layout is 'padded', which has no effect here"),
        ({"kl_in": "none", "kl_target": 3.0}, "kl_target is set and kl_in is 'none'"),
        ({"lam": 1.5}, r"lam is 1.5; want it in \[0, 1\]"),
    ],
)
def test_refuses_settings(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        config(tmp_path, **{"max_steps": 4, "advantage": "rloo", "samples": 4, **options})


def test_refuses_what_does_not_fit(tmp_path):
    args = config(tmp_path, max_steps=1, advantage="gae")
    with pytest.raises(ValueError, match="want a critic"):
        RLTrainer(policy(), rewards, prompts(8), args, TOKENIZER)
    with pytest.raises(ValueError, match="found 4 prompts; want at least the 8 of a rollout"):
        trainer_of(tmp_path, policy(), max_steps=1, times=1)

    with pytest.raises(
        ValueError, match=r"row 0 of 'train': found a prompt of 3 tokens and 14 to come; want at most 16"
    ):
        trainer_of(tmp_path, policy(), max_steps=1, max_new_tokens=14)

    def broken(examples):
        return [[float("nan") if e.row == 5 else 1.0 for _ in e.responses] for e in examples]

    with pytest.raises(ValueError, match=r"a response to row 5 of 'train' \('ab='\) is nan; want a finite number"):
        trainer_of(tmp_path, policy(), max_steps=4, given=broken).train()


def test_distinct_and_correlation():
    from uft.feedback import Example, Response

    def example(*texts):
        return Example("score", WORLD.ids("ab="), tuple(Response(WORLD.ids(text)) for text in texts))

    assert distinct([example("aaa"), example("aab.")]) == pytest.approx(3 / 5)  # aa twice more
    assert distinct([example("a")]) == 1.0
    assert correlation([1, 2, 3], [2, 4, 6]) == pytest.approx(1.0)
    assert correlation([1, 2, 3], [5, 5, 5]) == 0.0


@pytest.mark.gpu
@pytest.mark.parametrize(
    "options", [{"advantage": "gae"}, {"advantage": "rloo"}, {"advantage": "grpo", "kl_in": "loss"}], ids=str
)
def test_trains_on_a_gpu(tmp_path, options):
    model = policy()
    trainer = trainer_of(
        tmp_path, model, max_steps=20, learning_rate=1e-2, use_cpu=False, bf16=True, micro_batch_size=16, **options
    )
    trainer.train()
    log = trainer.state.log_history
    assert next(model.parameters()).is_cuda and log[0]["kl_sequence"] == 0.0
    assert log[19]["reward"] > log[0]["reward"] + 0.2 and math.isfinite(log[19]["loss"])
