"""GRPO: token importance ratio, clipped on both sides, the pessimistic one of clipped and unclipped.

Source: arXiv 2402.03300, with the asymmetric range of DAPO (arXiv 2503.14476) that the VESPO paper compares against;
numerics of verl's `vanilla` loss. `dual_clip` caps the ratio of negative advantages (arXiv 1912.09729); None means no
cap.
"""

import torch

from learner.objectives.base import Terms, TokenLoss, sequence_sum


def grpo(terms: Terms, *, clip_low: float = 0.2, clip_high: float = 0.28, dual_clip: float | None = 3.0) -> TokenLoss:
    """The ratio is clipped to `[1 - clip_low, 1 + clip_high]`.

    Raises:
        ValueError: a clip bound below 0, or `dual_clip` not above 1.
    """
    if clip_low < 0 or clip_high < 0 or (dual_clip is not None and dual_clip <= 1):
        raise ValueError(
            f"clip_low {clip_low} and clip_high {clip_high} must be >= 0, dual_clip {dual_clip} above 1 or None"
        )
    ratio, advantages = terms.ratio(), terms.advantages
    clipped = ratio.clamp(1 - clip_low, 1 + clip_high)
    loss = torch.maximum(-advantages * ratio, -advantages * clipped)
    beyond = torch.where(advantages >= 0, ratio > 1 + clip_high, ratio < 1 - clip_low)
    if dual_clip is not None:
        loss = torch.where(advantages < 0, torch.minimum(loss, -advantages * dual_clip), loss)
        beyond = beyond | ((advantages < 0) & (ratio > dual_clip))
    coefficient = torch.where(beyond, 0, ratio).detach()
    return TokenLoss(loss, terms.row_mean(coefficient), sequence_sum(terms, terms.log_ratio))
