"""A world whose responses can be listed, as something to be trained on by reinforcement."""

import copy

import torch
from transformers import LlamaForCausalLM, LlamaForSequenceClassification

from experiments.lab.enumerable.world import World
from tests.lab.listed import model_of
from uft.feedback import Example
from uft.rlhf.config import RLConfig
from uft.rlhf.rollouts import Critic

WORLD = World(letters="ab", uncovered=0)
STEPS = {"use_cpu": True, "report_to": "none", "disable_tqdm": True, "max_new_tokens": WORLD.max_tokens,
         "lr_scheduler_type": "constant", "generation_batch_size": 512}  # fmt: skip


def policy(seed: int = 0, spread: float = 0.2) -> LlamaForCausalLM:
    return model_of(WORLD, seed, spread)


def critic(model: LlamaForCausalLM) -> Critic:
    """The policy's body with a head that says 0."""
    config = copy.deepcopy(model.config)
    config.num_labels, config.pad_token_id = 1, 0
    found = LlamaForSequenceClassification(config)
    found.model.load_state_dict(model.model.state_dict())
    torch.nn.init.zeros_(found.score.weight)
    return Critic(found)


def prompts(times: int = 1) -> list[Example]:
    ids = [WORLD.ids(prompt) for prompt in WORLD.prompts]
    return [Example("demonstration", each, (), row=i) for i, each in enumerate(ids * times)]


def rewards(examples) -> list[list[float]]:
    found = []
    for example in examples:
        x = WORLD.prompts.index("".join(WORLD.vocabulary[i] for i in example.prompt))
        found.append([WORLD.reward[x, WORLD.place(WORLD.text(r.tokens))].item() for r in example.responses])
    return found


def config(folder, **options) -> RLConfig:
    return RLConfig(output_dir=str(folder), **{**STEPS, "save_strategy": "no", **options})
