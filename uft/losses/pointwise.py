"""Losses of one response and how good it is said to be, as pure functions of log-probabilities.

    x, y            prompt and response
    logp            log π(y | x), in nats, summed over the response tokens
    reward          r = β [log π(y | x) − log π_ref(y | x)], the implicit reward, β included
    target          s in [0, 1]: 1 desired, 0 undesired, between them a score
    kl              KTO's z_0 in nats (without β), one number for the whole optimiser step
    delta           BCO's reward shift δ (with β), one number

Where a loss knows only desired and undesired, target ≥ 0.5 is desired.

[UFT]  Wang et al. 2024, arXiv:2410.21438
[UNA]  Wang et al. 2024, arXiv:2408.15339
[KTO]  Ethayarajh et al. 2024, arXiv:2402.01306
[BCO]  Jung et al. 2024, arXiv:2404.04656
[APO]  D'Oosterlinck et al. 2024, arXiv:2408.06266

Policy gradients are losses of this form as well, of responses that the policy has just written; their target is an
advantage A, any number:

[R]      Williams 1992, Machine Learning 8, REINFORCE
[GRPO]   Shao et al. 2024, arXiv:2402.03300
[DAPO]   Yu et al. 2025, arXiv:2503.14476
[SRFT]   Fu et al. 2025, arXiv:2506.19767
"""

from dataclasses import asdict, dataclass

import torch
import torch.nn.functional as F

from uft.typing import Float, Tensor


def una_mse(reward: Float[Tensor, " responses"], target: Float[Tensor, " responses"]) -> Float[Tensor, " responses"]:
    """[σ(r) − s]², in probability squared.  [UNA] Eq. 11 (s in {0, 1}) and Eq. 13 (scores); [UFT] Eq. 7 is s = 1.

    s = 0.5 asks for the reference; every response with s > 0.5 is made likelier.  The weight of ∇log π vanishes
    as σ(r) → 0 or 1.
    """
    return (torch.sigmoid(reward) - target).square()


def una_bce(reward: Float[Tensor, " responses"], target: Float[Tensor, " responses"]) -> Float[Tensor, " responses"]:
    """−s log σ(r) − (1 − s) log σ(−r), in nats.  [UNA] Eq. 12, for scores in between as well.

    For s in {0, 1} it is BCO with δ = 0.
    """
    return F.binary_cross_entropy_with_logits(reward, target, reduction="none")


def kto(
    reward: Float[Tensor, " responses"],
    target: Float[Tensor, " responses"],
    kl: Float[Tensor, ""],
    beta: float,
    *,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
) -> Float[Tensor, " responses"]:
    """λ_D [1 − σ(r − β z_0)] if desired, λ_U [1 − σ(β z_0 − r)] if not, in units of λ.  [KTO] Eq. 7; TRL's `kto`.

    z_0 = max(0, mean of log π(y' | x) − log π_ref(y' | x)) over responses y' written for other prompts; no gradient
    flows through it.
    """
    shift = beta * kl.detach().clamp(min=0)
    # σ(−u), not 1 − σ(u): no cancellation where the loss is small
    return torch.where(
        target >= 0.5,
        desirable_weight * torch.sigmoid(shift - reward),
        undesirable_weight * torch.sigmoid(reward - shift),
    )


def bco(
    reward: Float[Tensor, " responses"],
    target: Float[Tensor, " responses"],
    delta: Float[Tensor, ""],
    *,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
) -> Float[Tensor, " responses"]:
    """−λ_D log σ(r − δ) if desired, −λ_U log σ(δ − r) if not, in nats.  [BCO]

    δ is the mean reward seen so far (`RunningMean`), so that the two classes are told apart around it; no gradient
    flows through it.  TRL 1.16 has only the paired form without δ (`bco_pair`).
    """
    shifted = reward - delta.detach()
    return torch.where(
        target >= 0.5, -desirable_weight * F.logsigmoid(shifted), -undesirable_weight * F.logsigmoid(-shifted)
    )


def apo_zero_unpaired(
    reward: Float[Tensor, " responses"],
    target: Float[Tensor, " responses"],
    *,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
) -> Float[Tensor, " responses"]:
    """λ_D [1 − σ(r)] if desired, λ_U σ(r) if not: KTO with z_0 = 0.  [APO] Eq. 7 taken apart; TRL's KTOTrainer."""
    return torch.where(
        target >= 0.5, desirable_weight * torch.sigmoid(-reward), undesirable_weight * torch.sigmoid(reward)
    )


# ---- policy gradients: one update per response, so that the ratio to the policy that wrote it is 1 ----


def reinforce(logp: Float[Tensor, " responses"], target: Float[Tensor, " responses"]) -> Float[Tensor, " responses"]:
    """−A log π(y | x).  [R]; its mean gradient over the policy's own responses is −∇E[reward].

    Subtracting from the reward what does not depend on y leaves that so, and the gradient varies less.
    """
    return -target * logp


def reinforce_tokens(
    token_logp: Float[Tensor, "responses time"], target: Float[Tensor, " responses"]
) -> Float[Tensor, "responses time"]:
    """−A log π(y_t | x, y_<t), averaged over the tokens of all responses.  [DAPO], with ratio 1."""
    return -target[:, None] * token_logp


def grpo(
    logp: Float[Tensor, " responses"], length: Float[Tensor, " responses"], target: Float[Tensor, " responses"]
) -> Float[Tensor, " responses"]:
    """−A log π(y | x) / |y|: every response weighs the same, however long.  [GRPO] Eq. 3 with ratio 1, without KL."""
    return -target * logp / length.clamp(min=1)


def reinforce_positive(
    token_logp: Float[Tensor, "responses time"], target: Float[Tensor, " responses"]
) -> Float[Tensor, "responses time"]:
    """`reinforce_tokens` of what is to be made likelier, 0 for the rest.  [SRFT], y+."""
    return reinforce_tokens(token_logp, target.clamp(min=0))


def reinforce_negative(
    token_logp: Float[Tensor, "responses time"], target: Float[Tensor, " responses"]
) -> Float[Tensor, "responses time"]:
    """`reinforce_tokens` of what is to be made less likely, 0 for the rest.  [SRFT], y−."""
    return reinforce_tokens(token_logp, target.clamp(max=0))


@dataclass(frozen=True)
class RunningMean:
    """Mean of everything seen so far: BCO's δ.

    Sums and counts are of a whole optimiser step, so that δ does not depend on how the step is cut up.  TRL's former
    BCO averaged the means of micro-batches, which is the same where those are equally large.
    """

    mean: float = 0.0
    count: float = 0.0

    def updated(self, total: float, count: float) -> "RunningMean":
        """The mean after `count` more values that sum to `total`."""
        seen = self.count + count
        return RunningMean(self.mean + (total - count * self.mean) / seen, seen) if count else self

    def state_dict(self) -> dict[str, float]:
        """Plain numbers: RunningMean(**state) is the same mean again."""
        return asdict(self)
