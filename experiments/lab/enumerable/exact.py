"""What a policy is worth, computed over all responses.  Nats; float64; nothing is sampled.

    logp, reference   [P, Y]: log-probabilities of every response to every prompt
    on                bool [P]: the prompts that count, all of them equally; None means every one

Losses are expectations over the distributions that data are drawn from, which is what a trainer's loss converges to as
its batches grow.  They are differentiable in `logp`.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from uft import losses

from .world import World


def expected(value: Tensor, logp: Tensor, on: Tensor | None = None) -> Tensor:
    """E_x E_{y ~ π} value(x, y), such as `world.reward`."""
    return _mean((logp.exp() * value).sum(-1), on)


def sequence_kl(logp: Tensor, other: Tensor, on: Tensor | None = None) -> Tensor:
    """E_x KL(π(· | x) ‖ other(· | x)), nats per response."""
    return _mean((logp.exp() * (logp - other)).sum(-1), on)


def token_kl(
    world: World, logp: Tensor, other: Tensor, on: Tensor | None = None, along: Tensor | None = None
) -> Tensor:
    """Nats per token: E Σ_t KL(π(· | x, y_<t) ‖ other(· | x, y_<t)) / E |y|, y drawn from `along` (default: π).

    Along π itself the sum over tokens is the KL of whole responses (chain rule).
    """
    a, b = world.token_logp(logp), world.token_logp(other)
    visits = world.edge_mass(logp if along is None else along).exp().sum(-1)  # [P, N]
    kl = (a.exp() * (a - b)).sum(-1)
    return _mean((visits * kl).sum(-1), on) / _mean(visits.sum(-1), on)


def entropy(logp: Tensor, on: Tensor | None = None) -> Tensor:
    return _mean(-(logp.exp() * logp).sum(-1), on)


class Optimal(NamedTuple):
    """logp [P, Y] of the policy, log_z [P]."""

    logp: Tensor
    log_z: Tensor


def optimal_policy(reference: Tensor, reward: Tensor, beta: float) -> Optimal:
    """π*(y | x) = π_ref(y | x) exp(r(x, y) / β) / Z(x): the most of E[r] - β KL(π ‖ π_ref)."""
    tilted = reference + reward / beta
    log_z = tilted.logsumexp(-1)
    return Optimal(tilted - log_z[:, None], log_z)


def regularised_reward(
    logp: Tensor, reference: Tensor, reward: Tensor, beta: float, on: Tensor | None = None
) -> Tensor:
    """E_x { E_π[r] - β KL(π ‖ π_ref) }, whose maximum is β E_x log Z(x)."""
    return expected(reward, logp, on) - beta * sequence_kl(logp, reference, on)


# ---- population losses ----


def sft_loss(world: World, logp: Tensor, on: Tensor | None = None) -> Tensor:
    """-log π of demonstrations, nats per token: what the likelihood term of an objective converges to."""
    nll = -(world.demonstrations * logp).sum(-1)
    return _mean(nll, on) / _mean(world.demonstrations @ world.length, on)


def pairwise_loss(
    world: World, logp: Tensor, reference: Tensor, beta: float, loss: Callable = losses.dpo, **options: Any
) -> Tensor:
    """Any pairwise loss of `uft.losses`, over both responses of a pair and its noisy judgement, on covered prompts."""
    reward = losses.implicit_reward(logp.flatten(), reference.flatten(), beta).view_as(logp)
    n = len(world.responses)
    i, j = (index.flatten() for index in torch.meshgrid(torch.arange(n), torch.arange(n), indexing="ij"))
    total = logp.new_zeros(())
    for x in world.covered.nonzero()[:, 0].tolist():
        available = {"beta": beta}
        for side, index in (("chosen_", i), ("rejected_", j)):
            available |= {side + "reward": reward[x, index], side + "logp": logp[x, index]}
            available |= {side + "reference_logp": reference[x, index], side + "length": world.length[index]}
        total = total + (pair_mass(world, x).flatten() * _called(loss, available, options)).sum()
    return total / world.covered.sum()


def pair_mass(world: World, x: int) -> Tensor:
    """[Y, Y]: the share of the pairs about prompt x in which the first is chosen and the second rejected."""
    offered = world.offered[x]
    return 2 * offered[:, None] * offered[None, :] * world.beats(x)


def pointwise_loss(
    world: World, logp: Tensor, reference: Tensor, beta: float, loss: Callable = losses.una_mse,
    scores: Tensor | None = None, **options: Any,
) -> Tensor:  # fmt: skip
    """Any pointwise loss of `uft.losses` on covered prompts.

    scores   [P, Y] of responses drawn from `world.offered`; None: the sides of pairs, chosen 1 and rejected 0
    """
    reward = losses.implicit_reward(logp.flatten(), reference.flatten(), beta).view_as(logp)[world.covered]
    available = {"beta": beta, "kl": mismatched_kl(world, logp, reference)}

    def of(target: Tensor) -> Tensor:
        return _called(loss, available | {"reward": reward.flatten(), "target": target.flatten()}, options)

    if scores is None:
        wins = win_rate(world)[world.covered].flatten()
        value = wins * of(torch.ones_like(reward)) + (1 - wins) * of(torch.zeros_like(reward))
    else:
        value = of(scores[world.covered])
    return (world.offered[world.covered].flatten() * value).sum() / world.covered.sum()


def win_rate(world: World) -> Tensor:
    """[P, Y]: how often a response is preferred to what it is paired with."""
    return torch.stack([world.beats(x) @ world.offered[x] for x in range(len(world.prompts))])


def mismatched_kl(world: World, logp: Tensor, reference: Tensor) -> Tensor:
    """KTO's z_0: max(0, E[log π(y' | x) - log π_ref(y' | x)]), y' offered for another covered prompt."""
    offered, ratio = world.offered[world.covered], (logp - reference)[world.covered].detach()
    across = ratio @ offered.T  # of answers to column's prompt behind row's
    n = len(across)
    return ((across.sum() - across.diagonal().sum()) / (n * (n - 1))).clamp(min=0)


def preferred_share(world: World, logp: Tensor, reference: Tensor) -> float:
    """How often the chosen response of a pair has the higher implicit reward; a tie is half right."""
    share = 0.0
    for x in world.covered.nonzero()[:, 0].tolist():
        ratio = (logp - reference)[x]
        margin = ratio[:, None] - ratio[None, :]
        right = (margin > 0).double() + 0.5 * (margin == 0).double()
        share += (pair_mass(world, x) * right).sum().item()
    return share / int(world.covered.sum())


def _called(loss: Callable, available: Mapping[str, Any], options: Mapping[str, Any]) -> Tensor:
    """The loss with those of its arguments that are available, by name."""
    wanted = inspect.signature(loss).parameters
    return loss(**{name: value for name, value in available.items() if name in wanted}, **options)


def _mean(per_prompt: Tensor, on: Tensor | None) -> Tensor:
    return (per_prompt if on is None else per_prompt[on]).mean()
