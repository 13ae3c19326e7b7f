"""A function of one's own as a loss: known by name wherever the library's are, refused where it could not be called."""

import math

import pytest
import torch

from uft import losses
from uft.presets import make_objective

NAMES = ("squared_gap", "capped", "sharpened")


@pytest.fixture(autouse=True)
def tables_as_before():
    yield
    for table in (losses.LIKELIHOOD, losses.PAIRWISE, losses.POINTWISE):
        for name in NAMES:
            table.pop(name, None)


def squared_gap(chosen_reward, rejected_reward, *, gap=1.0):
    return (chosen_reward - rejected_reward - gap).square()


def test_arguments_say_which_table():
    def capped(reward, target, beta):
        return reward

    def sharpened(token_logp):
        return -token_logp

    for function, table in ((squared_gap, "PAIRWISE"), (capped, "POINTWISE"), (sharpened, "LIKELIHOOD")):
        assert losses.register(function) is function
        assert getattr(losses, table)[function.__name__] is function


def test_objectives_find_it_by_name_with_its_option():
    losses.register(squared_gap)
    written = {"sft": {"loss": "nll"}, "preference": {"loss": "squared_gap", "beta": 0.5, "gap": 3.0}}
    for spec in (written, {"preset": "dpo_nll", "loss": "squared_gap", "beta": 0.5, "gap": 3.0}):
        preference = make_objective(spec).terms[1]
        assert preference.function is squared_gap
        assert (preference.beta, dict(preference.options)) == (0.5, {"gap": 3.0})
        assert preference.needs_reference
    assert make_objective("squared_gap").terms[0].function is squared_gap
    with pytest.raises(ValueError, match="squared_gap of term 'preference' has no option 'margin'; want gap"):
        make_objective({"preference": {"loss": "squared_gap", "margin": 3.0}})


def test_the_value_is_the_functions():
    losses.register(squared_gap)
    value = losses.PAIRWISE["squared_gap"](torch.tensor([2.0]), torch.tensor([-1.0]), gap=math.e)
    torch.testing.assert_close(value, torch.tensor([(3 - math.e) ** 2]))


def test_registered_again_it_is_replaced_also_in_another_table():
    losses.register(squared_gap)

    def of_one_response(reward, target):
        return reward

    of_one_response.__name__ = "squared_gap"
    losses.register(of_one_response)
    assert losses.POINTWISE["squared_gap"] is of_one_response
    assert "squared_gap" not in losses.PAIRWISE


def renamed(function, name):
    function.__name__ = name
    return function


@pytest.mark.parametrize(
    "function, told",
    [
        (renamed(lambda chosen_reward, rejected_reward: 0, "dpo"), "loss 'dpo' is one of the library's"),
        (renamed(lambda token_logp, target: 0, "grpo"), "loss 'grpo' is one of the library's"),
        (lambda chosen_reward: 0, "is called '<lambda>'; want a function with a name"),
        (renamed(lambda reward_chosen: 0, "capped"), "takes reward_chosen; want some of token_logp, in_response; or"),
        (renamed(lambda chosen_reward, target: 0, "capped"), "takes chosen_reward, target; want"),
        (renamed(lambda beta: 0, "capped"), "takes beta; want"),
        (renamed(lambda: 0, "capped"), "takes nothing; want"),
        (renamed(lambda reward, **more: 0, "capped"), "takes reward, more; want"),
        (renamed(lambda reward, *, tau: 0, "capped"), "option 'tau' of loss 'capped' has no default; want one"),
    ],
)
def test_what_could_not_be_called_is_refused(function, told):
    with pytest.raises(ValueError) as error:
        losses.register(function)
    assert told in str(error.value)
    assert all(name not in table for table in (losses.PAIRWISE, losses.POINTWISE) for name in NAMES)
