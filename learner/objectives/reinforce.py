"""REINFORCE: every token with its advantage, as if the data were the policy's own.

Source: Williams, "Simple statistical gradient-following algorithms" (1992). No importance weight and no setting: what
the other objectives are measured against.
"""

import torch

from learner.objectives.base import Terms, TokenLoss, reinforce_weighted


def reinforce(terms: Terms) -> TokenLoss:
    """−advantage · log π."""
    return reinforce_weighted(terms, torch.ones_like(terms.logprobs))
