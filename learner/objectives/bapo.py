"""BAPO: GRPO's clipping with bounds that move until positive tokens have their share of the step's objective.

Source: arXiv 2510.18927; search and numerics of the authors' code (github.com/WooooDyy/BAPO, commit 7287044). Defaults:
share 0.5, lower bound in [0.6, 0.9], upper bound in [1.2, 3.0] as their readme gives for the paper, steps of 0.05 as in
their configuration. Their search has a step for the lower bound too. A clipped negative token counts with its bound, so
raising the lower bound never raises the share: where its start does not suffice the search ends at its maximum whatever
the step, which is therefore left out.

The bounds belong to a whole step: chosen in each micro-batch they would depend on how the step is cut. What the search
reads is a sum over tokens for every candidate bound, so `contributions` computes it in a first pass over the parts, and
the added-up sums go into every part's `bapo`. Without them `bapo` takes the batch it is given for the whole step.
"""

import math

import torch
from torch import Tensor

from learner.objectives.base import Terms, TokenLoss
from learner.objectives.grpo import clipped

MAX_CANDIDATES = 1000


def bapo(
    terms: Terms,
    *,
    statistics: Tensor | None = None,
    positive_share: float = 0.5,
    low_start: float = 0.6,
    low_max: float = 0.9,
    high_start: float = 1.2,
    high_max: float = 3.0,
    high_step: float = 0.05,
    dual_clip: float | None = 3.0,
) -> TokenLoss:
    """The ratio is clipped to `[low, high]`; short of the share at both starts, `low` goes to its maximum and `high`
    moves up until the share is reached.

    Args:
        terms: of the batch.
        statistics: `contributions` summed over the whole step, with the same bounds; by default of this batch.
        positive_share: share of Σ |clipped ratio · advantage| that tokens with a positive advantage are to have.
        low_start, low_max: the lower bounds.
        high_start, high_max, high_step: candidates of the upper bound.
        dual_clip: caps the ratio of negative advantages, as in GRPO; None means no cap.

    Raises:
        ValueError: bounds that cross, a step that is not positive or too small, a share outside (0, 1), or `dual_clip`
            not above 1.
    """
    if not (0 < positive_share < 1 and (dual_clip is None or dual_clip > 1)):
        raise ValueError(f"positive_share {positive_share} must be in (0, 1), dual_clip {dual_clip} above 1 or None")
    highs = _highs(terms, low_start, low_max, high_start, high_max, high_step)
    if statistics is None:
        statistics = _sums(terms, highs, low_start, low_max)
    positive, at_start, at_max = statistics[:-2], statistics[-2], statistics[-1]
    sufficient = positive[0] >= positive_share * (positive[0] + at_start)
    reached = positive >= positive_share * (positive + at_max)
    last = len(highs) - 1  # where nothing reaches the share
    index = torch.where(sufficient, 0, torch.where(reached.any(), reached.int().argmax(), last))  # without a read
    low = torch.full_like(at_start, low_max).masked_fill(sufficient, low_start)  # float64, as `where` would not be
    return clipped(terms, low.to(terms.log_ratio.dtype), highs[index].to(terms.log_ratio.dtype), dual_clip)


def contributions(
    terms: Terms,
    *,
    low_start: float,
    low_max: float,
    high_start: float,
    high_max: float,
    high_step: float,
    **_: float | None,
) -> Tensor:
    """`[K]` float64, additive over parts of a step: what positive tokens contribute under each upper bound, then what
    negative ones do under both lower bounds. Takes all hyperparameters of `bapo`.
    """
    highs = _highs(terms, low_start, low_max, high_start, high_max, high_step)
    return _sums(terms, highs, low_start, low_max)


def _sums(terms: Terms, highs: Tensor, low_start: float, low_max: float) -> Tensor:
    ratio = torch.where(terms.mask, terms.ratio().detach(), 0).double()
    size = torch.where(terms.mask, terms.advantages.abs(), 0).double()
    up, down = size * (terms.advantages > 0), size * (terms.advantages < 0)
    positive = [(ratio.clamp(max=high) * up).sum() for high in highs]
    return torch.stack([*positive, *((ratio.clamp(min=low) * down).sum() for low in (low_start, low_max))])


def _highs(
    terms: Terms, low_start: float, low_max: float, high_start: float, high_max: float, high_step: float
) -> Tensor:
    """Upper bounds in the order of the search, `[H]` float64."""
    if not 0 <= low_start <= low_max <= 1 <= high_start <= high_max < math.inf:
        raise ValueError(
            f"low_start {low_start}, low_max {low_max}, high_start {high_start} and high_max {high_max} must be "
            "0 <= low_start <= low_max <= 1 <= high_start <= high_max"
        )
    if not (high_step > 0 and (high_max - high_start) / high_step <= MAX_CANDIDATES):
        raise ValueError(
            f"high_step {high_step} must be > 0, and at most {MAX_CANDIDATES} steps from {high_start} to {high_max}"
        )
    num_steps = math.ceil((high_max - high_start) / high_step - 1e-9)
    bounds = [*(high_start + i * high_step for i in range(num_steps)), high_max]
    return torch.tensor(bounds, dtype=torch.float64, device=terms.log_ratio.device)
