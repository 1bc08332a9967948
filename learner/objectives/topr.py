"""TOPR: sequences with a positive advantage count in full, negative ones by their truncated sequence weight.

Source: arXiv 2503.14286, its canonical setting: no importance sampling for advantages ≥ 0, and W truncated to [0, 1]
below, W being the product over the sequence's tokens. The paper sums a sequence's tokens and averages over sequences;
token-mean is the one of the two aggregations here with the same relative weight of every token.
"""

import math

import torch

from learner.objectives.base import Terms, TokenLoss, sequence_sum


def topr(terms: Terms, *, ratio_max: float = 1.0) -> TokenLoss:
    """`ratio_max` truncates the sequence weight of negative advantages.

    Raises:
        ValueError: a bound that is not positive.
    """
    if not ratio_max > 0:
        raise ValueError(f"ratio_max {ratio_max} must be > 0")
    log_w = sequence_sum(terms, terms.log_ratio)
    weights = torch.where(terms.advantages[:, 0] >= 0, 1, log_w.clamp(max=math.log(ratio_max)).exp())
    weights = torch.where(terms.silenced, 0, weights)
    return TokenLoss(-weights[:, None] * terms.advantages * terms.logprobs, weights, log_w)
