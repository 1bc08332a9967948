"""BAPO: GRPO's clipping with bounds that move until positive tokens have their share of the step's objective.

Source: arXiv 2510.18927; search and numerics of the authors' code (github.com/WooooDyy/BAPO, commit 7287044). Defaults:
share 0.5, lower bound in [0.6, 0.9], upper bound in [1.2, 3.0] as their readme gives for the paper, steps of 0.05 as in
their configuration.

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
    low_step: float = 0.05,
    high_start: float = 1.2,
    high_max: float = 3.0,
    high_step: float = 0.05,
    dual_clip: float | None = 3.0,
) -> TokenLoss:
    """The ratio is clipped to `[low, high]`: first `low` moves up, then `high`, each until the share is reached.

    Args:
        terms: of the batch.
        statistics: `contributions` summed over the whole step, with these bounds and steps; by default of this batch.
        positive_share: share of Σ |clipped ratio · advantage| that tokens with a positive advantage are to have.
        low_start, low_max, low_step: candidates of the lower bound.
        high_start, high_max, high_step: candidates of the upper bound.
        dual_clip: caps the ratio of negative advantages, as in GRPO; None means no cap.

    Raises:
        ValueError: bounds that cross, steps that are not positive or too small, a share outside (0, 1), or `dual_clip`
            not above 1.
    """
    if not (0 < positive_share < 1 and (dual_clip is None or dual_clip > 1)):
        raise ValueError(f"positive_share {positive_share} must be in (0, 1), dual_clip {dual_clip} above 1 or None")
    lows, highs = _candidates(terms, low_start, low_max, low_step, high_start, high_max, high_step)
    if statistics is None:
        statistics = _sums(terms, lows, highs)
    positive, negative = statistics[: len(highs)], statistics[len(highs) :]
    low = _first(positive[0] >= positive_share * (positive[0] + negative))
    high = _first(positive >= positive_share * (positive + negative[low]))
    return clipped(terms, lows[low].to(terms.log_ratio.dtype), highs[high].to(terms.log_ratio.dtype), dual_clip)


def contributions(
    terms: Terms,
    *,
    low_start: float,
    low_max: float,
    low_step: float,
    high_start: float,
    high_max: float,
    high_step: float,
    **_: float | None,
) -> Tensor:
    """`[K]` float64, additive over parts of a step: what positive tokens contribute under each upper bound, then what
    negative ones do under each lower bound. Takes all hyperparameters of `bapo`.
    """
    return _sums(terms, *_candidates(terms, low_start, low_max, low_step, high_start, high_max, high_step))


def _sums(terms: Terms, lows: Tensor, highs: Tensor) -> Tensor:
    ratio = torch.where(terms.mask, terms.ratio().detach(), 0).double()
    size = torch.where(terms.mask, terms.advantages.abs(), 0).double()
    up, down = size * (terms.advantages > 0), size * (terms.advantages < 0)
    positive = [(ratio.clamp(max=high) * up).sum() for high in highs]
    negative = [(ratio.clamp(min=low) * down).sum() for low in lows]
    return torch.stack(positive + negative)


def _candidates(
    terms: Terms,
    low_start: float,
    low_max: float,
    low_step: float,
    high_start: float,
    high_max: float,
    high_step: float,
) -> tuple[Tensor, Tensor]:
    """Lower and upper bounds in the order of the search, `[L]` and `[H]` float64."""
    if not 0 <= low_start <= low_max <= 1 <= high_start <= high_max < math.inf:
        raise ValueError(
            f"low_start {low_start}, low_max {low_max}, high_start {high_start} and high_max {high_max} must be "
            "0 <= low_start <= low_max <= 1 <= high_start <= high_max"
        )
    for name, start, end, step in (
        ("low_step", low_start, low_max, low_step),
        ("high_step", high_start, high_max, high_step),
    ):
        if not (step > 0 and (end - start) / step <= MAX_CANDIDATES):
            raise ValueError(f"{name} {step} must be > 0, and at most {MAX_CANDIDATES} steps from {start} to {end}")
    device = terms.log_ratio.device
    return _ladder(low_start, low_max, low_step, device), _ladder(high_start, high_max, high_step, device)


def _ladder(start: float, end: float, step: float, device: torch.device) -> Tensor:
    num_steps = math.ceil((end - start) / step - 1e-9)
    return torch.tensor([*(start + i * step for i in range(num_steps)), end], dtype=torch.float64, device=device)


def _first(reached: Tensor) -> Tensor:
    """Index of the first candidate that reached the target, the last one if none did; stays on the device."""
    return torch.where(reached.any(), reached.int().argmax(), len(reached) - 1)
