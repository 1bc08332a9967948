"""SAPO: a soft sigmoid gate around the token ratio instead of a hard clip.

Source: arXiv 2511.20347; numerics of verl's `sapo` loss. Defaults: τ+ 1.0 and τ− 1.05, as published.
"""

import torch

from learner.objectives.base import Terms, TokenLoss, sequence_sum


def sapo(terms: Terms, *, tau_pos: float = 1.0, tau_neg: float = 1.05) -> TokenLoss:
    """`tau_pos` applies to advantages > 0, `tau_neg` otherwise.

    Raises:
        ValueError: a temperature that is not positive.
    """
    if not (tau_pos > 0 and tau_neg > 0):
        raise ValueError(f"tau_pos {tau_pos} and tau_neg {tau_neg} must be > 0")
    ratio = terms.ratio()
    tau = torch.full_like(terms.advantages, tau_neg).masked_fill(terms.advantages > 0, tau_pos)
    gate = torch.sigmoid(tau * (ratio - 1))
    coefficient = (4 * gate * (1 - gate) * ratio).detach()
    return TokenLoss(
        -gate * (4 / tau) * terms.advantages, terms.row_mean(coefficient), sequence_sum(terms, terms.log_ratio)
    )
