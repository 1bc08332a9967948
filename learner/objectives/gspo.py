"""GSPO: the length-normalised sequence ratio, clipped.

Source: arXiv 2507.18071; numerics of verl's `gspo` loss. Defaults: the clip range (3e-4, 4e-4) of both papers.
"""

import torch

from learner.objectives.base import Terms, TokenLoss, sequence_sum

MAX_MEAN_LOG_RATIO = 10.0


def gspo(terms: Terms, *, clip_low: float = 3e-4, clip_high: float = 4e-4) -> TokenLoss:
    """The ratio is clipped to `[1 - clip_low, 1 + clip_high]`; `weights` is the ratio before clipping.

    Raises:
        ValueError: a clip bound below 0.
    """
    if not (clip_low >= 0 and clip_high >= 0):
        raise ValueError(f"clip_low {clip_low} and clip_high {clip_high} must be >= 0")
    mean_log_ratio = terms.row_mean(terms.log_ratio.detach())
    # Every token has the value of the sequence's mean and the gradient of its own log-prob.
    log_ratio = terms.logprobs - terms.logprobs.detach() + mean_log_ratio[:, None]
    ratio = log_ratio.clamp(max=MAX_MEAN_LOG_RATIO).exp()
    clipped = ratio.clamp(1 - clip_low, 1 + clip_high)
    loss = torch.maximum(-terms.advantages * ratio, -terms.advantages * clipped)
    weights = torch.where(terms.silenced, 0, mean_log_ratio.clamp(max=MAX_MEAN_LOG_RATIO).exp())
    return TokenLoss(loss, weights, sequence_sum(terms, terms.log_ratio))
