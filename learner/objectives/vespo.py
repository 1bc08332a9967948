"""VESPO: the true sequence importance weight W through the kernel φ(W) = W^k · exp(λ (1 − W)).

Source: arXiv 2602.10693 and the authors' code (github.com/FloyedShen/VESPO, commit aa1f3045). Defaults: their launch
scripts. No length normalisation: W is the product over the sequence's tokens. φ carries no gradient; the loss of a
token is −φ(W) · advantage · log π.
"""

import numpy as np
import torch
from torch import Tensor

from learner.objectives.base import MAX_LOG_RATIO, Terms, TokenLoss, sequence_sum

MIN_WEIGHT = 1e-8  # log W is floored at log(1e-8)
MIN_LAMBDA = 1e-4


def vespo(
    terms: Terms, *, k_pos: float = 2.0, lambda_pos: float = 3.0, k_neg: float = 3.0, lambda_neg: float = 2.0
) -> TokenLoss:
    """`(k_pos, lambda_pos)` applies to advantages ≥ 0 (negative zero included), `(k_neg, lambda_neg)` below.

    Raises:
        ValueError: k < 1 or λ ≤ 0, with which the second moment of the weights is unbounded.
    """
    for sign, k, rate in (("pos", k_pos, lambda_pos), ("neg", k_neg, lambda_neg)):
        if not (k >= 1 and rate > 0):
            raise ValueError(f"k_{sign} = {k} and lambda_{sign} = {rate}: VESPO needs k >= 1 and lambda > 0")
    log_w = sequence_sum(terms, terms.log_ratio.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO))
    positive = terms.advantages[:, 0] >= 0
    weights = torch.where(positive, kernel(log_w, k_pos, lambda_pos), kernel(log_w, k_neg, lambda_neg))
    weights = torch.where(terms.silenced, 0, weights)
    return TokenLoss(-weights[:, None] * terms.advantages * terms.logprobs, weights, log_w)


def kernel(log_w: Tensor, k: float, rate: float) -> Tensor:
    """φ of sequence log weights `[B]`, in their dtype but evaluated in float64; 0 where it would not be finite.

    k and λ are rounded to float32 first, as the authors hold them.
    """
    k, rate = float(np.float32(k)), float(np.float32(max(rate, MIN_LAMBDA)))
    w = log_w.double().clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp()
    phi = (rate + k * w.clamp(min=MIN_WEIGHT).log() - rate * w).exp()
    return phi.nan_to_num(0.0, 0.0, 0.0).to(log_w.dtype)
