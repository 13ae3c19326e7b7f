"""Log-probabilities and divergences of language models.  Knows tensors only, nothing of `uft`."""

from uft_kernels.backend import form
from uft_kernels.linear_divergence import LinearDivergence, linear_divergence
from uft_kernels.linear_logprob import LinearLogprob, linear_logprob
from uft_kernels.linear_preference_loss import PreferenceLoss, linear_preference_loss
from uft_kernels.token_divergence import Divergence, token_divergence
from uft_kernels.token_logprob import IGNORE, TokenLogprob, token_logprob

__all__ = [
    "IGNORE",
    "Divergence",
    "LinearDivergence",
    "LinearLogprob",
    "PreferenceLoss",
    "TokenLogprob",
    "form",
    "linear_divergence",
    "linear_logprob",
    "linear_preference_loss",
    "token_divergence",
    "token_logprob",
]
