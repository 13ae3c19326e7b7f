"""Guards: limits by hand, patience, what is written, and a run that is stopped."""

import json
from types import SimpleNamespace

import pytest
from listed_world import config, policy, prompts, rewards
from test_ppo import TOKENIZER
from transformers import TrainerControl

from uft.rlhf.guards import Alarm, HackingGuard, Limits, passed
from uft.rlhf.ppo import RLTrainer

FIRST = {"spread": 0.5, "length": 10.0, "distinct": 0.8}


@pytest.mark.parametrize(
    "limits, now, found",
    [
        (Limits(kl=5.0), {"kl": 5.1}, [("kl", 5.1)]),
        (Limits(kl=5.0), {"kl": 5.0}, []),
        (Limits(spread=2.0), {"spread": 1.25}, [("spread", 2.5)]),
        (Limits(length=1.5), {"length": 16.0}, [("length", 1.6)]),
        (Limits(length=1.5), {"length": 5.0}, [("length", 0.5)]),
        (Limits(length=1.5), {"length": 14.0}, []),
        (Limits(correlation=0.4), {"correlation": -0.5}, [("correlation", -0.5)]),
        (Limits(distinct=0.5), {"distinct": 0.3}, [("distinct", 0.375)]),
        (Limits(ended=0.9), {"ended": 0.8}, [("ended", 0.8)]),
        (Limits(kl=1.0, ended=0.9), {"kl": 2.0, "ended": 0.5}, [("kl", 2.0), ("ended", 0.5)]),
        (Limits(spread=2.0), {"kl": 99.0}, []),  # not watched, not logged
    ],
)
def test_limits_by_hand(limits, now, found):
    alarms = passed(now, FIRST, limits, 7)
    assert [(a.name, pytest.approx(a.found)) for a in alarms] == found
    assert all(a.step == 7 and a.allowed == getattr(limits, a.name) for a in alarms)


def test_a_limit_of_what_is_not_logged_is_no_limit():
    with pytest.raises(ValueError, match="a limit for spread, and this run logs no reward/spread"):
        logged(HackingGuard(Limits(kl=1.0, spread=2.0)), 0.5)


def test_goes_on_where_a_run_is_resumed():
    """What was at the beginning stays what it was; a run that was stopped is not gone on with."""
    guard = HackingGuard(Limits(distinct=0.5), patience=2)
    assert logged(guard, 0.8, 0.3, name="distinct_2") == [False, False]
    state = SimpleNamespace(global_step=2, stateful_callbacks={"HackingGuard": json.loads(json.dumps(guard.state()))})
    resumed = HackingGuard(Limits(distinct=0.5), patience=2)
    resumed.on_train_begin(SimpleNamespace(), state, TrainerControl())
    assert resumed.alarms == guard.alarms
    assert logged(resumed, 0.3, name="distinct_2") == [True]
    state.stateful_callbacks["HackingGuard"] = json.loads(json.dumps(resumed.state()))
    with pytest.raises(ValueError, match=r"was stopped by its guard .step 1: distinct is"):
        HackingGuard(Limits(distinct=0.5)).on_train_begin(SimpleNamespace(), state, TrainerControl())


def logged(guard, *values, name="kl_sequence"):
    """What the control says after each log."""
    state, control, stops = SimpleNamespace(global_step=0), TrainerControl(), []
    for value in values:
        state.global_step += 1
        guard.on_log(SimpleNamespace(), state, control, logs={name: value})
        stops.append(control.should_training_stop)
    return stops


def test_stops_after_so_many_in_a_row():
    assert logged(HackingGuard(Limits(kl=1.0), patience=2), 2.0, 0.5, 2.0, 2.0) == [False, False, False, True]
    assert logged(HackingGuard(Limits(kl=1.0), patience=1), 0.5, 2.0) == [False, True]
    warns = HackingGuard(Limits(kl=1.0), action="warn", patience=1)
    assert logged(warns, 2.0, 3.0) == [False, False]
    assert warns.alarms == [Alarm(1, "kl", 2.0, 1.0), Alarm(2, "kl", 3.0, 1.0)] and warns.stopped is None


def test_compares_with_the_beginning_of_the_run():
    guard = HackingGuard(Limits(distinct=0.5), patience=1)
    assert logged(guard, 0.6, 0.4, 0.29, name="online/distinct_2") == [False, False, True]


def test_logs_of_other_things_are_nothing():
    guard = HackingGuard(Limits(kl=1.0), patience=1)
    guard.on_log(SimpleNamespace(), SimpleNamespace(global_step=1), TrainerControl(), logs={"eval_loss": 3.0})
    assert guard.alarms == []


def test_a_run_is_stopped_and_says_why(tmp_path):
    args = config(
        tmp_path, advantage="rloo", samples=4, per_device_train_batch_size=8, max_steps=40, learning_rate=3e-2,
        kl_coefficient=0.0,
    )  # fmt: skip
    guard = HackingGuard(Limits(kl=0.5))
    trainer = RLTrainer(policy(), rewards, prompts(8), args, TOKENIZER, callbacks=[guard])
    trainer.train()
    assert 2 < trainer.state.global_step < 40
    kept = json.loads((tmp_path / "guard.json").read_text())
    assert kept["stopped"].startswith(f"step {trainer.state.global_step}: kl is") and kept["limits"]["kl"] == 0.5
    assert [alarm["name"] for alarm in kept["alarms"]][-2:] == ["kl", "kl"]
    unguarded = RLTrainer(policy(), rewards, prompts(8), args, TOKENIZER)
    unguarded.train()
    assert unguarded.state.global_step == 40 and unguarded.state.log_history[-2]["kl_sequence"] > 0.5


@pytest.mark.parametrize("make, message", [
    (lambda: Limits(kl=0.0), "limit kl is 0.0; want a number > 0"),
    (lambda: Limits(length=0.9), "want a factor above 1"),
    (lambda: HackingGuard(Limits(), action="shout"), "action is 'shout'; want stop or warn"),
    (lambda: HackingGuard(Limits(), patience=0), "patience is 0; want a whole number of at least 1"),
])  # fmt: skip
def test_refuses(make, message):
    with pytest.raises(ValueError, match=message):
        make()
