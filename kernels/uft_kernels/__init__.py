"""Log-probabilities and divergences of language models.  Knows tensors only, nothing of `uft`."""

from uft_kernels.token_divergence import Divergence, token_divergence
from uft_kernels.token_logprob import IGNORE, token_logprob

__all__ = ["IGNORE", "Divergence", "token_divergence", "token_logprob"]
