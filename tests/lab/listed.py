"""What tests of the world that can be listed share."""

import math

import torch
from transformers import LlamaForCausalLM

from experiments.lab.enumerable.policy import config_of


def model_of(world, seed, spread=0.3):
    """A transformer that is far from uniform, as trained ones are."""
    torch.manual_seed(seed)
    model = LlamaForCausalLM(config_of(world, width=16))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.normal_(0, spread)
    return model.eval()


def within(values, expected, errors=4.5):
    """The mean of independent values is within so many standard errors of what it estimates."""
    values = torch.as_tensor(values).double()
    error = values.std() / math.sqrt(len(values))
    assert abs(values.mean() - float(expected)) < errors * error, (values.mean(), expected, error)
    assert error < 0.1 * abs(float(expected)), "too few samples to see anything"
