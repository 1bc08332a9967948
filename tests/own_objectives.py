"""Objectives of one's own, good and bad, as a recipe would name them: `own_objectives:function`."""

import torch

from learner.objectives.base import SEQUENCE_MEAN, Terms, TokenLoss, reinforce_weighted

A_NUMBER = 3


def scaled(terms: Terms, *, beta: float, offset: float = 1.0) -> TokenLoss:
    """REINFORCE with a factor that has no default and one that has."""
    return reinforce_weighted(terms, torch.full_like(terms.logprobs, beta * offset))


def open_ended(terms: Terms, **options: float) -> TokenLoss:
    """Takes any hyperparameter."""
    return reinforce_weighted(terms, torch.full_like(terms.logprobs, sum(options.values())))


def by_sequence(terms: Terms) -> TokenLoss:
    """Averages over sequences, and hands out weights that carry a gradient."""
    return TokenLoss(-terms.advantages * terms.logprobs, terms.row_mean(terms.logprobs), terms.log_ratio.sum(1))


by_sequence.aggregation = SEQUENCE_MEAN  # type: ignore[attr-defined]


def rescaled(terms: Terms, *, statistics: torch.Tensor | None = None) -> TokenLoss:
    """Advantages divided by their mean size over the tokens of the whole step that have one."""
    total, count = token_sums(terms) if statistics is None else statistics
    return reinforce_weighted(terms, (count / total.clamp(min=1e-6)).to(terms.logprobs.dtype) * terms.mask)


def token_sums(terms: Terms) -> torch.Tensor:
    """Sum of the advantages' size over tokens, and number of tokens that have an advantage."""
    size = terms.advantages.abs().double() * terms.mask
    return torch.stack([size.sum(), (size > 0).sum()])


rescaled.statistics = token_sums  # type: ignore[attr-defined]


def no_argument() -> TokenLoss:
    """Cannot be given the terms."""
    raise AssertionError


def taken_name(terms: Terms, *, normaliser: float = 1.0) -> TokenLoss:
    """A hyperparameter's name that `compute_objective` needs for itself."""
    raise AssertionError


def returns_a_tensor(terms: Terms) -> torch.Tensor:
    """Not what an objective returns."""
    return terms.logprobs


def returns_a_scalar_loss(terms: Terms) -> TokenLoss:
    """A loss that is summed already."""
    return by_sequence(terms)._replace(loss=terms.logprobs.sum())
