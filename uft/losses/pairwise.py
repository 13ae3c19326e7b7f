"""Losses of a chosen and a rejected response, as pure functions of log-probabilities.

Tensors in, tensors out, one number per pair; nothing here knows of models, batches or configs.

    x, y_w, y_l     prompt, chosen and rejected response
    logp            log π(y | x), in nats, summed over the response tokens
    length          |y|, the number of response tokens
    reward          r = β [log π(y | x) − log π_ref(y | x)], the implicit reward, β included
    r_w, r_l, Δ     chosen_reward, rejected_reward, r_w − r_l
    ε               label_smoothing, how often the label is wrong

A loss that takes neither a reward nor a reference log-probability needs no reference model.  Hyperparameters are
keyword-only.  Where a name is TRL's `loss_type`, the value is TRL's (1.16) and differences from the paper are stated.

[DPO]       Rafailov et al. 2023, arXiv:2305.18290          [CPO]       Xu et al. 2024, arXiv:2401.08417
[cDPO]      Mitchell 2023, ericmitchell.ai/cdpo.pdf         [SimPO]     Meng et al. 2024, arXiv:2405.14734
[rDPO]      Chowdhury et al. 2024, arXiv:2403.00409         [NCA]       Chen et al. 2024, arXiv:2402.05369
[IPO]       Azar et al. 2023, arXiv:2310.12036              [EXO]       Ji et al. 2024, arXiv:2402.00856
[SLiC]      Zhao et al. 2023, arXiv:2305.10425              [SPPO]      Wu et al. 2024, arXiv:2405.00675
[RSO]       Liu et al. 2023, arXiv:2309.06657               [APO]       D'Oosterlinck et al. 2024, arXiv:2408.06266
[Tulu3]     Lambert et al. 2024, arXiv:2411.15124           [DiscoPOP]  Lu et al. 2024, arXiv:2406.08414
[DPOP]      Pal et al. 2024, arXiv:2402.13228               [BCO]       Jung et al. 2024, arXiv:2404.04656
[Cal-DPO]   Xiao et al. 2024, arXiv:2412.14516              [MPO]       Wang et al. 2024, arXiv:2411.10442
"""

import math

import torch
import torch.nn.functional as F

from uft.typing import Float, Tensor

# --- logistic losses of the margin --------------------------------------------------------------------------------


def smoothed_nll(margin: Float[Tensor, " pairs"], label_smoothing: float) -> Float[Tensor, " pairs"]:
    """−(1 − ε) log σ(m) − ε log σ(−m): cross-entropy of a label that is wrong with probability ε, in nats."""
    if not 0 <= label_smoothing <= 0.5:
        raise ValueError(f"label_smoothing is {label_smoothing}; want 0 <= label_smoothing <= 0.5")
    return -(1 - label_smoothing) * F.logsigmoid(margin) - label_smoothing * F.logsigmoid(-margin)


def dpo(
    chosen_reward: Float[Tensor, " pairs"],
    rejected_reward: Float[Tensor, " pairs"],
    *,
    label_smoothing: float = 0.0,
) -> Float[Tensor, " pairs"]:
    """−log σ(Δ), in nats.  [DPO] Eq. 7; TRL's `sigmoid`.

    With ε > 0 this is conservative DPO, −(1 − ε) log σ(Δ) − ε log σ(−Δ), [cDPO] Eq. 3, at its smallest where
    Δ = log (1 − ε)/ε.  TRL's `sigmoid` ignores `label_smoothing`; its CPO has it.
    """
    return smoothed_nll(chosen_reward - rejected_reward, label_smoothing)


def cdpo(
    chosen_reward: Float[Tensor, " pairs"],
    rejected_reward: Float[Tensor, " pairs"],
    *,
    label_smoothing: float = 0.1,
) -> Float[Tensor, " pairs"]:
    """`dpo` with label smoothing by default.  [cDPO] Eq. 3."""
    return dpo(chosen_reward, rejected_reward, label_smoothing=label_smoothing)


def robust_dpo(
    chosen_reward: Float[Tensor, " pairs"],
    rejected_reward: Float[Tensor, " pairs"],
    *,
    label_smoothing: float = 0.1,
) -> Float[Tensor, " pairs"]:
    """[−(1 − ε) log σ(Δ) + ε log σ(−Δ)] / (1 − 2ε), in nats.  [rDPO]; TRL's `robust`.

    If a fraction ε < 1/2 of the labels is flipped, its expectation is the DPO loss on clean labels.  It has no lower
    bound for ε > 0.
    """
    if not 0 <= label_smoothing < 0.5:
        raise ValueError(f"label_smoothing of robust_dpo is {label_smoothing}; want 0 <= label_smoothing < 0.5")
    margin = chosen_reward - rejected_reward
    clean = -(1 - label_smoothing) * F.logsigmoid(margin)
    flipped = -label_smoothing * F.logsigmoid(-margin)
    return (clean - flipped) / (1 - 2 * label_smoothing)


def dpo_norm(
    chosen_reward: Float[Tensor, " pairs"],
    rejected_reward: Float[Tensor, " pairs"],
    chosen_length: Float[Tensor, " pairs"],
    rejected_length: Float[Tensor, " pairs"],
) -> Float[Tensor, " pairs"]:
    """−log σ(r_w / |y_w| − r_l / |y_l|), in nats: length-normalised DPO.  [Tulu3]; TRL's `sigmoid_norm`."""
    return -F.logsigmoid(_per_token(chosen_reward, chosen_length) - _per_token(rejected_reward, rejected_length))


def dpop(
    chosen_reward: Float[Tensor, " pairs"],
    rejected_reward: Float[Tensor, " pairs"],
    *,
    penalty: float = 50.0,
) -> Float[Tensor, " pairs"]:
    """−log σ(Δ − λ max(0, −r_w)), in nats: no reward for making y_w less likely than the reference does.  [DPOP] Eq. 3.

    λ is `penalty`; β multiplies the penalty as well, and is in the rewards.  Some published code puts the penalty
    outside the logarithm instead.
    """
    return -F.logsigmoid(chosen_reward - rejected_reward - penalty * F.relu(-chosen_reward))


# --- reference-free ------------------------------------------------------------------------------------------------


def cpo(
    chosen_logp: Float[Tensor, " pairs"],
    rejected_logp: Float[Tensor, " pairs"],
    beta: float,
    *,
    label_smoothing: float = 0.0,
) -> Float[Tensor, " pairs"]:
    """−log σ(β [log π(y_w) − log π(y_l)]), in nats: DPO with a uniform reference.  [CPO] Eq. 3; TRL's CPO `sigmoid`.

    CPO adds the likelihood of the chosen response, which is a term of its own here.
    """
    return smoothed_nll(beta * (chosen_logp - rejected_logp), label_smoothing)


def simpo(
    chosen_logp: Float[Tensor, " pairs"],
    rejected_logp: Float[Tensor, " pairs"],
    chosen_length: Float[Tensor, " pairs"],
    rejected_length: Float[Tensor, " pairs"],
    beta: float,
    *,
    gamma: float = 0.5,
    label_smoothing: float = 0.0,
) -> Float[Tensor, " pairs"]:
    """−log σ(β [log π(y_w) / |y_w| − log π(y_l) / |y_l|] − γ), in nats.  [SimPO] Eq. 6; TRL's CPO `simpo`.

    β is of another size than elsewhere (the paper uses 2 to 10) because the reward is a mean over tokens.
    """
    margin = _per_token(chosen_logp, chosen_length) - _per_token(rejected_logp, rejected_length)
    return smoothed_nll(beta * margin - gamma, label_smoothing)


# --- other functions of the margin ---------------------------------------------------------------------------------


def hinge(
    chosen_reward: Float[Tensor, " pairs"], rejected_reward: Float[Tensor, " pairs"], *, margin: float = 1.0
) -> Float[Tensor, " pairs"]:
    """max(0, m − Δ), in nats · β.  [RSO]'s hinge-norm; TRL's `hinge`.

    [SLiC], which TRL cites for it, has the difference of policy log-probabilities alone, without reference and β.
    """
    return F.relu(margin - (chosen_reward - rejected_reward))


def ipo(
    chosen_reward: Float[Tensor, " pairs"],
    rejected_reward: Float[Tensor, " pairs"],
    chosen_length: Float[Tensor, " pairs"],
    rejected_length: Float[Tensor, " pairs"],
    beta: float,
) -> Float[Tensor, " pairs"]:
    """[r_w / (β |y_w|) − r_l / (β |y_l|) − 1 / (2β)]², in (nats per token)².  [IPO] Eq. 17 with τ = β; TRL's `ipo`.

    The paper's equation has log-ratios summed over the response; TRL divides them by the length, which its authors
    confirmed with those of IPO.
    """
    log_ratio = _per_token(chosen_reward, chosen_length) - _per_token(rejected_reward, rejected_length)
    return (log_ratio / beta - 1 / (2 * beta)).square()


def exo(
    chosen_reward: Float[Tensor, " pairs"],
    rejected_reward: Float[Tensor, " pairs"],
    *,
    label_smoothing: float = 1e-3,
) -> Float[Tensor, " pairs"]:
    """KL(p_θ ‖ p_h), in nats, p_θ = (σ(Δ), σ(−Δ)), p_h = (1 − ε, ε).  [EXO] Eq. 16; TRL's `exo_pair`.

    DPO with label smoothing is the KL the other way round, up to a constant.
    """
    if not 0 < label_smoothing < 1:
        raise ValueError(f"label_smoothing of exo is {label_smoothing}; want 0 < label_smoothing < 1")
    margin = chosen_reward - rejected_reward
    chosen = torch.sigmoid(margin) * (F.logsigmoid(margin) - math.log1p(-label_smoothing))
    rejected = torch.sigmoid(-margin) * (F.logsigmoid(-margin) - math.log(label_smoothing))
    return chosen + rejected


def discopop(
    chosen_reward: Float[Tensor, " pairs"], rejected_reward: Float[Tensor, " pairs"], *, tau: float = 0.05
) -> Float[Tensor, " pairs"]:
    """[1 − σ(Δ/τ)] · [−log σ(Δ)] + σ(Δ/τ) · exp(−Δ).  [DiscoPOP] Eq. 5 (log-ratio modulated loss); TRL's `discopop`.

    Not monotonic in Δ: near Δ = 0 it rises with the margin.
    """
    margin = chosen_reward - rejected_reward
    logistic = torch.sigmoid(-margin / tau) * -F.logsigmoid(margin)
    # one exponent: exp(−Δ) alone overflows where σ(Δ/τ) makes the product vanish
    exponential = torch.exp(F.logsigmoid(margin / tau) - margin)
    return logistic + exponential


# --- losses of the two rewards, not only of their difference -------------------------------------------------------


def cal_dpo(
    chosen_reward: Float[Tensor, " pairs"],
    rejected_reward: Float[Tensor, " pairs"],
    beta: float,
    *,
    calibration: float = 1.0,
) -> Float[Tensor, " pairs"]:
    """−log σ(h_w − h_l) + c [(h_w − 1/(2β))² + (h_l + 1/(2β))²] with h = r / β, in nats and nats².  [Cal-DPO]

    β sets only where the log-ratios h are drawn to; it is not in the logistic term.  c is `calibration`: 1 in the
    paper, 1/2 in its authors' code.
    """
    chosen, rejected = chosen_reward / beta, rejected_reward / beta
    squares = (chosen - 0.5 / beta).square() + (rejected + 0.5 / beta).square()
    return -F.logsigmoid(chosen - rejected) + calibration * squares


def sppo(
    chosen_reward: Float[Tensor, " pairs"], rejected_reward: Float[Tensor, " pairs"], beta: float
) -> Float[Tensor, " pairs"]:
    """(r_w / β − 1/(2β))² + (r_l / β + 1/(2β))², in nats².  [SPPO] Eq. 4.7 with η = 1/β; TRL's `sppo_hard`.

    The paper estimates P(y beats π) with a preference model; here it is 1 for the chosen and 0 for the rejected.
    """
    return ((chosen_reward - 0.5) / beta).square() + ((rejected_reward + 0.5) / beta).square()


def nca(chosen_reward: Float[Tensor, " pairs"], rejected_reward: Float[Tensor, " pairs"]) -> Float[Tensor, " pairs"]:
    """−log σ(r_w) − ½ log σ(−r_w) − ½ log σ(−r_l), in nats.  [NCA], pairs; TRL's `nca_pair`."""
    return -F.logsigmoid(chosen_reward) - 0.5 * (F.logsigmoid(-chosen_reward) + F.logsigmoid(-rejected_reward))


def bco_pair(
    chosen_reward: Float[Tensor, " pairs"], rejected_reward: Float[Tensor, " pairs"]
) -> Float[Tensor, " pairs"]:
    """−log σ(r_w) − log σ(−r_l), in nats.  TRL's `bco_pair`, the quality term of [MPO].

    [BCO] subtracts a running mean δ from both rewards (`pointwise.bco`); TRL 1.16 does not, and its documentation
    shows a difference of rewards that its code does not have.
    """
    return -F.logsigmoid(chosen_reward) - F.logsigmoid(-rejected_reward)


def apo_zero(
    chosen_reward: Float[Tensor, " pairs"], rejected_reward: Float[Tensor, " pairs"]
) -> Float[Tensor, " pairs"]:
    """[1 − σ(r_w)] + σ(r_l): chosen up, rejected down.  [APO] Eq. 7, shifted by 1 as in TRL's `apo_zero`."""
    return torch.sigmoid(-chosen_reward) + torch.sigmoid(rejected_reward)


def apo_down(
    chosen_reward: Float[Tensor, " pairs"], rejected_reward: Float[Tensor, " pairs"]
) -> Float[Tensor, " pairs"]:
    """σ(r_w) + [1 − σ(r_w − r_l)]: both down, rejected more.  [APO] Eq. 8, shifted by 1 as in TRL's `apo_down`."""
    return torch.sigmoid(chosen_reward) + torch.sigmoid(rejected_reward - chosen_reward)


def _per_token(x: Float[Tensor, " pairs"], length: Float[Tensor, " pairs"]) -> Float[Tensor, " pairs"]:
    # an empty response has log-probability 0, and 0 per token
    return x / length.clamp(min=1)
