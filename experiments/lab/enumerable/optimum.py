"""The best that any policy could do: optima of joint objectives over all tables π(y | x), and Pareto fronts.

A table has a free number z for every response, π = softmax(z) per prompt, and prompts have nothing in common, so that
each is a problem of its own, solved by Newton's method in float64:

    likelihood   -p·z + log Σ exp z                                             convex in z
    pairs        Σ_ij m_ij softplus(-(r_i - r_j)), r = β (z - z_ref)            convex: log Z cancels in the difference
    points       Σ_i m_i ℓ(r_i, s_i),              r = β (log π - log π_ref)    not convex; ℓ from `uft.losses`

So for DPO + likelihood the policies that no other dominates are those of (1 - λ) f_SFT + λ f_DPO, 0 <= λ <= 1.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from scipy.optimize import brentq
from torch import Tensor
from torch.func import grad, vmap

from uft import losses

from .exact import (
    expected,
    optimal_policy,
    pair_mass,
    pairwise_loss,
    sequence_kl,
    sft_loss,
    win_rate,
)
from .world import World

# of (1 - λ) f_SFT + λ f_preference; closer where the front bends most
WEIGHTS = (
    0.0, 0.005, 0.01, 0.02, 0.03, 0.05, 0.07, 0.1, 0.15, 0.2, 0.25, 0.3, 0.35, 0.4, 0.45, 0.5, 0.55, 0.6, 0.65, 0.7,
    0.75, 0.8, 0.85, 0.9, 0.93, 0.95, 0.97, 0.98, 0.99, 0.995, 0.998, 1.0,
)  # fmt: skip


# ---- terms of an objective at one prompt: value, gradient [Y] and Hessian [Y, Y] in z ----


@dataclass(frozen=True)
class Likelihood:
    weight: float
    target: Tensor  # [Y], sums to 1

    def value(self, z: Tensor) -> Tensor:
        return self.weight * (z.logsumexp(-1) - self.target @ z)

    def derivatives(self, z: Tensor) -> tuple[Tensor, Tensor]:
        policy = z.softmax(-1)
        hessian = policy.diag() - policy[:, None] * policy[None, :]
        return self.weight * (policy - self.target), self.weight * hessian


@dataclass(frozen=True)
class Pairs:
    weight: float
    mass: Tensor  # [Y, Y], chosen before rejected
    reference: Tensor  # [Y]
    beta: float

    def _margins(self, z: Tensor) -> Tensor:
        reward = self.beta * (z - self.reference)
        return reward[:, None] - reward[None, :]

    def value(self, z: Tensor) -> Tensor:
        return self.weight * (self.mass * torch.nn.functional.softplus(-self._margins(z))).sum()

    def derivatives(self, z: Tensor) -> tuple[Tensor, Tensor]:
        wrong = torch.sigmoid(-self._margins(z))
        pull = self.mass * wrong
        gradient = -self.beta * (pull.sum(1) - pull.sum(0))
        curvature = (self.mass + self.mass.T) * wrong * (1 - wrong)
        return self.weight * gradient, self.weight * self.beta**2 * (curvature.sum(1).diag() - curvature)


@dataclass(frozen=True)
class Points:
    weight: float
    mass: Tensor  # [Y]
    target: Tensor  # [Y]
    reference: Tensor  # [Y]
    beta: float
    loss: Callable = losses.una_mse

    def _each(self, reward: Tensor, target: Tensor) -> Tensor:
        return self.loss(reward[None], target[None])[0]

    def _reward(self, z: Tensor) -> Tensor:
        return self.beta * (z.log_softmax(-1) - self.reference)

    def value(self, z: Tensor) -> Tensor:
        return self.weight * (self.mass * self.loss(self._reward(z), self.target)).sum()

    def derivatives(self, z: Tensor) -> tuple[Tensor, Tensor]:
        policy, reward = z.softmax(-1), self._reward(z)
        slope = self.mass * vmap(grad(self._each))(reward, self.target)
        bend = self.mass * vmap(grad(grad(self._each)))(reward, self.target)
        # dr/dz = β (I - 1 πᵀ)
        gradient = self.beta * (slope - slope.sum() * policy)
        crossed = bend[:, None] * policy[None, :]
        hessian = bend.diag() - crossed - crossed.T + bend.sum() * policy[:, None] * policy[None, :]
        of_normaliser = policy.diag() - policy[:, None] * policy[None, :]
        return self.weight * gradient, self.weight * (self.beta**2 * hessian - self.beta * slope.sum() * of_normaliser)


class Minimum(NamedTuple):
    """z [Y] is log π.  `decrement` bounds how far the value is above the minimum of a convex objective (twice)."""

    z: Tensor
    value: float
    gradient: float
    decrement: float
    steps: int


def minimise(terms: Sequence[Likelihood | Pairs | Points], start: Tensor, steps: int = 200) -> Minimum:
    """Newton's method with a line search, from log-probabilities `start` [Y].

    Where the Hessian has directions of negative curvature, these are walked downhill (saddle-free Newton), so that the
    end is a minimum of what is not convex, though perhaps a local one.
    """

    def value(z: Tensor) -> Tensor:
        return sum(term.value(z) for term in terms)

    z = start.log_softmax(-1)
    here, decrement = value(z), float("inf")
    for step in range(steps):  # noqa: B007
        found = [term.derivatives(z) for term in terms]
        gradient, hessian = sum(g for g, _ in found), sum(h for _, h in found)
        direction = _newton_direction(gradient, hessian)
        decrement = -(gradient @ direction).item()
        if decrement < 1e-20:
            break
        size = 1.0
        while size > 1e-8 and not value(z + size * direction) <= here - 1e-4 * size * decrement + 1e-16:
            size /= 2
        z = (z + size * direction).log_softmax(-1)
        here = value(z)
    return Minimum(z, here.item(), gradient.norm().item(), decrement, step)


def _newton_direction(gradient: Tensor, hessian: Tensor) -> Tensor:
    """-H⁻¹ g for the z that sum to anything: H is singular along 1, which changes no policy."""
    scale = hessian.diagonal().abs().clamp(min=1e-300).sqrt()
    scaled = hessian / scale[:, None] / scale[None, :]
    null = scale / scale.norm()
    scaled = scaled + null[:, None] * null[None, :]
    factor, failed = torch.linalg.cholesky_ex(scaled)
    if not failed:
        return -torch.cholesky_solve((gradient / scale)[:, None], factor)[:, 0] / scale
    values, vectors = torch.linalg.eigh(scaled)
    inverse = 1 / values.abs().clamp(min=1e-6)
    return -(vectors @ (inverse * (vectors.T @ (gradient / scale)))) / scale


# ---- optima over all prompts ----


def joint_optimum(
    world: World, reference: Tensor, beta: float, weight: float, start: Tensor | None = None
) -> tuple[Tensor, list[Minimum]]:
    """[P, Y] log-probabilities that minimise (1 - weight) f_SFT + weight f_DPO, and how each covered prompt was solved.

    Prompts that no preference covers keep the demonstrations, also where weight is 1 and nothing asks for that: of all
    the policies that are best for preferences, the one that is best for likelihood.
    """
    policy = world.demonstrations.log()
    start, solved = policy if start is None else start, []
    tokens = (world.demonstrations @ world.length).mean() * len(world.prompts)
    for x in world.covered.nonzero()[:, 0].tolist():
        terms: list[Likelihood | Pairs | Points] = []
        if weight < 1:
            terms.append(Likelihood(float((1 - weight) / tokens), world.demonstrations[x]))
        if weight > 0:
            share = float(weight / world.covered.sum())
            terms.append(Pairs(share, pair_mass(world, x), reference[x], beta))
        solved.append(minimise(terms, start[x]))
        policy[x] = solved[-1].z
    return policy, solved


def pointwise_optimum(
    world: World, reference: Tensor, beta: float, scores: Tensor | None = None, loss: Callable = losses.una_mse
) -> Tensor:
    """[P, Y] log-probabilities that minimise `exact.pointwise_loss` alone, found from the reference, which stays where
    no preference covers a prompt.

    scores   [P, Y]; None: chosen 1 and rejected 0, whose squares and logarithms are least for the win rate as score
    """
    policy, scores = reference.clone(), win_rate(world) if scores is None else scores
    for x in world.covered.nonzero()[:, 0].tolist():
        term = Points(1.0, world.offered[x], scores[x], reference[x], beta, loss)
        policy[x] = minimise([term], reference[x]).z
    return policy


# ---- fronts ----


class Front(NamedTuple):
    """Pareto-optimal policies, from the best for likelihood (or for the base) to the best for preferences.

    x, y       what they have of the two losses; smaller is better, rewards are negative
    weight     of the second
    policies   [weights, P, Y]
    """

    x: np.ndarray
    y: np.ndarray
    weight: np.ndarray
    policies: Tensor

    @property
    def ideal(self) -> tuple[float, float]:
        """Both losses at their least, which no policy has."""
        return float(self.x.min()), float(self.y.min())

    @property
    def range(self) -> tuple[float, float]:
        """From the ideal to what the policy that is best for the other loss has."""
        return float(np.ptp(self.x)), float(np.ptp(self.y))

    def ideal_distance(self, x: float, y: float) -> float:
        """From both optima at once, each gap as a share of the front's range ([XR] arXiv:2410.15483, scaled)."""
        return float(np.hypot(*self._scaled(x, y)))

    def distance(self, x: float, y: float) -> float:
        """To the nearest point that can be reached and is at least as good in both; in shares of the front's range."""
        point = np.array(self._scaled(x, y))
        corners = np.stack(self._scaled(self.x, self.y), axis=1)
        start, along = corners[:-1], np.diff(corners, axis=0)
        t = ((point - start) * along).sum(1) / np.maximum((along**2).sum(1), 1e-300)
        nearest = start + np.clip(t, 0, 1)[:, None] * along
        return float(np.linalg.norm(point - nearest, axis=1).min())

    def needed(self, y: float) -> float:
        """The least first loss with which the second can be this low.  What a policy has above it was avoidable."""
        order = np.argsort(self.y)
        return float(np.interp(y, self.y[order], self.x[order]))

    def _scaled(self, x, y):
        return (x - self.ideal[0]) / self.range[0], (y - self.ideal[1]) / self.range[1]


def loss_front(world: World, reference: Tensor, beta: float, weights: Sequence[float] = WEIGHTS) -> Front:
    """x: f_SFT, nats per token.  y: f_DPO against the reference, nats per pair."""
    policies, start = [], None
    for weight in weights:
        start, _ = joint_optimum(world, reference, beta, weight, start)
        policies.append(start)
    return _front(world, policies, weights, lambda p: pairwise_loss(world, p, reference, beta).item())


def reward_front(world: World, weights: Sequence[float] = WEIGHTS[:-5]) -> Front:
    """x: f_SFT, nats per token.  y: minus the expected reward on covered prompts.  Knows no reference and no beta.

    It ends before weight 1, where nothing would be left of demonstrations that are not the best response.
    """
    tokens = float((world.demonstrations @ world.length).sum())
    policies = []
    for weight in weights:
        policy = world.demonstrations.clone()
        for x in world.covered.nonzero()[:, 0].tolist():
            rewarded = weight / int(world.covered.sum()) * world.reward[x]
            policy[x] = _rewarded(world.demonstrations[x], rewarded, (1 - weight) / tokens)
        policies.append(policy.log())
    return _front(world, policies, weights, lambda p: -expected(world.reward, p, world.covered).item())


def _rewarded(target: Tensor, reward: Tensor, weight: float) -> Tensor:
    """[Y]: where weight · Σ target log π + Σ π reward is largest: weight · target / (ν - reward), summing to 1."""

    def excess(nu: float) -> float:
        return (weight * target / (nu - reward)).sum().item() - 1

    top = reward.max()
    # with the first the best responses alone have all of the mass, with the second all together have less
    low, high = (top + weight * target[reward == top].sum()).item(), top.item() + weight * (1 + 1e-12)
    nu = low if excess(low) <= 0 else brentq(excess, low, high, xtol=1e-16, rtol=1e-15)
    return weight * target / (nu - reward)


def kl_front(world: World, reference: Tensor, betas: Sequence[float]) -> Front:
    """x: KL(π ‖ reference), nats per response.  y: minus the expected reward.  Covered prompts, one point per beta."""
    policies = [reference, *(optimal_policy(reference, world.reward, beta).logp for beta in betas)]
    x = np.array([sequence_kl(policy, reference, world.covered).item() for policy in policies])
    y = np.array([-expected(world.reward, policy, world.covered).item() for policy in policies])
    return Front(x, y, np.array([0.0, *(1 / beta for beta in betas)]), torch.stack(policies))


def _front(world: World, policies: Sequence[Tensor], weights: Sequence[float], second: Callable) -> Front:
    x = np.array([sft_loss(world, policy).item() for policy in policies])
    y = np.array([second(policy) for policy in policies])
    return Front(x, y, np.array(weights), torch.stack(list(policies)))
