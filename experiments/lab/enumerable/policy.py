"""A transformer as a policy of the world: its log-probability of every response, from one pass."""

from __future__ import annotations

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from .world import END, World


def tokenizer_of(world: World) -> PreTrainedTokenizerFast:
    """One token per character; what pads is never read."""
    tokenizer = Tokenizer(models.WordLevel({token: i for i, token in enumerate(world.vocabulary)}, unk_token=END))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), behavior="isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token=END, eos_token=END)


def config_of(world: World, width: int = 48, layers: int = 2) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=len(world.vocabulary),
        hidden_size=width,
        intermediate_size=3 * width,
        num_hidden_layers=layers,
        num_attention_heads=4,
        max_position_embeddings=16,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=0,
    )


def fresh_model(world: World, seed: int, width: int = 48, layers: int = 2) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    return LlamaForCausalLM(config_of(world, width, layers))


def enumerated(model: PreTrainedModel, world: World) -> Tensor:
    """[P, Y] float64: log π(y | x) of every response, in nats.  Has a gradient where the model's parameters want one.

    Every node is the beginning of a longest one, so a pass over those, behind each prompt, has them all.
    """
    depth, written = world.max_tokens - 1, len(world.vocabulary) - 1
    longest = [node for node in world.nodes if len(node) == depth]
    texts = [prompt + node for prompt in world.prompts for node in longest]
    ids = torch.stack([torch.from_numpy(world.ids(text)) for text in texts]).long()
    ids = ids.to(next(model.parameters()).device)
    before = len(world.prompts[0])
    logits = model(input_ids=ids, use_cache=False).logits[:, before - 1 :].double().cpu()
    token_logp = logits.log_softmax(-1).unflatten(0, (len(world.prompts), len(longest)))
    # a node of n tokens is read off the first of the longest nodes that begin with it
    nodes = [token_logp[:, :: written ** (depth - n), n] for n in range(depth + 1)]
    return world.summed(torch.cat(nodes, dim=1))


@torch.no_grad()
def policy_of(model: PreTrainedModel, world: World) -> Tensor:
    """[P, Y] float64: log π(y | x) of every response, without dropout and without gradient."""
    was_training = model.training
    try:
        return enumerated(model.eval(), world)
    finally:
        model.train(was_training)
