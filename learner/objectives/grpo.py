"""GRPO: token importance ratio, clipped on both sides, the pessimistic one of clipped and unclipped.

Source: arXiv 2402.03300, with the asymmetric range of DAPO (arXiv 2503.14476) that the VESPO paper compares against;
numerics of verl's `vanilla` loss. `dual_clip` caps the ratio of negative advantages (arXiv 1912.09729); None means no
cap.
"""

import torch
from torch import Tensor

from learner.objectives.base import Terms, TokenLoss, sequence_sum


def grpo(terms: Terms, *, clip_low: float = 0.2, clip_high: float = 0.28, dual_clip: float | None = 3.0) -> TokenLoss:
    """The ratio is clipped to `[1 - clip_low, 1 + clip_high]`.

    Raises:
        ValueError: a clip bound below 0, or `dual_clip` not above 1.
    """
    if not (clip_low >= 0 and clip_high >= 0 and (dual_clip is None or dual_clip > 1)):
        raise ValueError(
            f"clip_low {clip_low} and clip_high {clip_high} must be >= 0, dual_clip {dual_clip} above 1 or None"
        )
    return clipped(terms, 1 - clip_low, 1 + clip_high, dual_clip)


def clipped(terms: Terms, low: float | Tensor, high: float | Tensor, dual_clip: float | None) -> TokenLoss:
    """The clipped surrogate with the ratio's bounds `[low, high]`, two numbers or two scalar tensors."""
    ratio, advantages = terms.ratio(), terms.advantages
    within = ratio.clamp(low, high)  # type: ignore[arg-type]  # its stub wants both of one kind, which they are
    loss = torch.maximum(-advantages * ratio, -advantages * within)
    beyond = torch.where(advantages >= 0, ratio > high, ratio < low)
    if dual_clip is not None:
        loss = torch.where(advantages < 0, torch.minimum(loss, -advantages * dual_clip), loss)
        beyond = beyond | ((advantages < 0) & (ratio > dual_clip))
    coefficient = torch.where(beyond, 0, ratio).detach()
    return TokenLoss(loss, terms.row_mean(coefficient), sequence_sum(terms, terms.log_ratio))
