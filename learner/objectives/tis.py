"""TIS: REINFORCE on every token, its importance ratio truncated from above and without gradient.

Source: Yao et al., "Your efficient RL framework secretly brings you off-policy RL training" (2025), default cap 2;
the truncation is that of Ionides (2008). The same formula as CISPO without a lower bound, at another cap.
"""

from learner.objectives.base import Terms, TokenLoss, reinforce_weighted


def tis(terms: Terms, *, ratio_max: float = 2.0) -> TokenLoss:
    """The token ratio is `min(π/μ, ratio_max)`.

    Raises:
        ValueError: a cap that is not positive.
    """
    if not ratio_max > 0:
        raise ValueError(f"ratio_max {ratio_max} must be > 0")
    return reinforce_weighted(terms, terms.ratio().clamp(max=ratio_max))
