"""CISPO: REINFORCE on every token, weighted by its clipped ratio without gradient.

Source: arXiv 2506.13585; numerics of verl's `cispo` loss. Defaults: upper bound 5 and no lower bound, the setting of
the ScaleRL study (arXiv 2510.13786) and of TRL.
"""

from learner.objectives.base import Terms, TokenLoss, reinforce_weighted


def cispo(terms: Terms, *, ratio_min: float | None = 0.0, ratio_max: float = 5.0) -> TokenLoss:
    """The ratio is clamped to `[ratio_min, ratio_max]`; 0 and None mean no lower bound.

    Raises:
        ValueError: bounds that are negative or cross.
    """
    if not (ratio_max > 0 and (ratio_min is None or 0 <= ratio_min <= ratio_max)):
        raise ValueError(f"ratio_min {ratio_min} and ratio_max {ratio_max} must be 0 <= min <= max, and max above 0")
    return reinforce_weighted(terms, terms.ratio().clamp(ratio_min, ratio_max))
