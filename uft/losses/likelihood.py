"""Likelihood losses, and the log-probabilities that every other loss is made of.

Tensors in, tensors out: nothing here knows of models, batches, devices or configs, and nothing is reduced over the
batch.

    x, y            prompt and response, y_t the token at position t
    token_logp      log π(y_t | x, y_<t), in nats, one per position
    in_response     True where the position belongs to the response and counts
    logp            log π(y | x), in nats, summed over the response tokens
    reward          β [log π(y | x) − log π_ref(y | x)], the implicit reward

[UFT]  Wang et al. 2024, arXiv:2410.21438
[DPO]  Rafailov et al. 2023, arXiv:2305.18290
[DFT]  Wu et al. 2025, arXiv:2508.05629
[CHORD]  Zhang et al. 2025, arXiv:2508.11408
"""

import torch

from uft.typing import Bool, Float, Tensor


def response_logp(
    token_logp: Float[Tensor, "batch time"], in_response: Bool[Tensor, "batch time"]
) -> Float[Tensor, " batch"]:
    """log π(y | x) = Σ_t log π(y_t | x, y_<t), in nats.  [UFT] Eq. 1."""
    # where, not multiply: 0 · (−inf) at a padded position would be NaN
    return torch.where(in_response, token_logp, 0.0).sum(-1)


def implicit_reward(
    logp: Float[Tensor, " batch"], reference_logp: Float[Tensor, " batch"], beta: float
) -> Float[Tensor, " batch"]:
    """β [log π(y | x) − log π_ref(y | x)], in nats · β.  [UFT] Eq. 5; [DPO] Eq. 5 without its β log Z(x)."""
    return beta * (logp - reference_logp)


def token_nll(token_logp: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """−log π(y_t | x, y_<t) per token, in nats.  [UFT] Eq. 1; the mean over tokens is TRL's `sft`."""
    return -token_logp


def sequence_mean_nll(
    token_logp: Float[Tensor, "batch time"], in_response: Bool[Tensor, "batch time"]
) -> Float[Tensor, " batch"]:
    """−log π(y | x) / |y|, in nats per token; 0 for an empty response.

    The likelihood term of Iterative RPO (arXiv:2404.19733, Eq. 1): every response weighs the same, however long.
    """
    return -response_logp(token_logp, in_response) / in_response.sum(-1).clamp(min=1)


def dft(token_logp: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """−sg[π(y_t)] log π(y_t) per token, in nats; sg stops the gradient.  [DFT]

    Its gradient is −∇π(y_t): a token weighs as much as the model already believes in it.
    """
    return -token_logp.detach().exp() * token_logp


def chord_phi(token_logp: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """−sg[p (1 − p)] log p per token, p = π(y_t), in nats; sg stops the gradient.  [CHORD], CHORD-phi.

    Tokens that the policy already knows, and those it would never write, weigh nothing; at most ¼, where p = ½.
    """
    p = token_logp.detach().exp()
    return -p * (1 - p) * token_logp
