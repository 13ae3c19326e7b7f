"""Losses of reinforcement learning, as pure functions of log-probabilities.  Per token or per response; nats.

    old_token_logp   log π_old(y_t | x, y_<t) of the policy that wrote the response
    advantage        how much better than expected a token (or the response) turned out, no gradient

[R]     Williams 1992, REINFORCE
[PPO]   Schulman et al. 2017, arXiv:1707.06347
[GAE]   Schulman et al. 2016, arXiv:1506.02438
[K]     Schulman 2020, http://joschu.net/blog/kl-approx.html
[GRPO]  Shao et al. 2024, arXiv:2402.03300
[RLOO]  Ahmadian et al. 2024, arXiv:2402.14740
"""

import torch

from uft.typing import Float, Tensor


def clipped_surrogate(
    logp: Float[Tensor, "*shape"], old_logp: Float[Tensor, "*shape"], advantage: Float[Tensor, "*shape"],
    clip: float = 0.2,
) -> Float[Tensor, "*shape"]:  # fmt: skip
    """−min(ρ A, clip(ρ, 1 − ε, 1 + ε) A), ρ = π / π_old.  [PPO] Eq. 7, to be minimised.

    Of tokens, as in PPO and GRPO, or of whole responses, as RLOO has it (one action per response).
    """
    ratio = (logp - old_logp).exp()
    return -torch.minimum(ratio * advantage, ratio.clamp(1 - clip, 1 + clip) * advantage)


def clipped_value(
    value: Float[Tensor, "*shape"], old_value: Float[Tensor, "*shape"], returns: Float[Tensor, "*shape"],
    clip: float | None = 0.2,
) -> Float[Tensor, "*shape"]:  # fmt: skip
    """½ max[(V − R)², (V_old + clip(V − V_old, ±ε) − R)²]; None: ½ (V − R)².  [PPO] Sec. 5, clipped as in
    the authors' code.
    """
    squared = (value - returns).square()
    if clip is not None:
        near = old_value + (value - old_value).clamp(-clip, clip)
        squared = torch.maximum(squared, (near - returns).square())
    return 0.5 * squared


def k3(token_logp: Float[Tensor, "*shape"], reference_token_logp: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """π_ref / π − log(π_ref / π) − 1 ≥ 0: its mean over tokens of the policy is KL(π ‖ π_ref).  [K]; [GRPO] Eq. 4.

    Its gradient on the policy's own tokens is, in the mean, that of KL(π_ref ‖ π): what GRPO descends.
    """
    log_ratio = reference_token_logp - token_logp
    return log_ratio.exp() - log_ratio - 1
