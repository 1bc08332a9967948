"""Policy objectives: one public call, one small file for each.

VESPO is what a run trains with unless its recipe chooses another; `learner.objectives.lookup` says what a function of
one's own looks like.
"""

from typing import Any

from torch import Tensor

from learner.objectives.base import SEQUENCE_MEAN, TOKEN_MEAN, ObjectiveResult, Terms, TokenLoss, aggregate, prepare
from learner.objectives.lookup import OBJECTIVES, Objective, find_objective

__all__ = [
    "OBJECTIVES",
    "Objective",
    "ObjectiveResult",
    "compute_objective",
    "compute_statistics",
    "find_objective",
]


def compute_objective(
    name: str,
    logprobs: Tensor,
    behaviour_logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor,
    *,
    aggregation: str | None = None,
    normaliser: Tensor | float | None = None,
    statistics: Tensor | None = None,
    **hyperparameters: Any,
) -> ObjectiveResult:
    """Loss of a batch of sequences under a policy objective, differentiable in `logprobs`.

    What is non-finite at a masked position changes nothing. At an unmasked position, or as an advantage, it silences
    its own sequence: weight 0, no gradient, its tokens still counted in the mean. Rows without unmasked tokens
    contribute nothing, and a batch without any gives loss 0.

    Args:
        name: a key of `OBJECTIVES`, or `package.module:function` of your own.
        logprobs: `[B, T]` float, log-probs of the policy being trained.
        behaviour_logprobs: `[B, T]` float, log-probs of the distribution the tokens were sampled from.
        advantages: `[B]` numbers, one for each sequence.
        mask: `[B, T]`, non-zero where a token counts.
        aggregation: "token-mean" or "sequence-mean-token-mean"; the objective's published one by default.
        normaliser: number of unmasked tokens (token-mean) or of non-empty sequences in the whole step, when this batch
            is a part of it: the parts' losses then add up to the loss of the whole. By default this batch's count.
        statistics: for an objective that looks at the whole step (bapo), the sum of `compute_statistics` over its
            parts. By default this batch is the whole step.
        hyperparameters: those of the objective's function; its published ones by default.

    Raises:
        ValueError: unknown objective, aggregation or hyperparameter, a value out of range, shapes that do not fit.
    """
    objective = find_objective(name)
    complete = objective.complete(hyperparameters)
    aggregation = aggregation or objective.aggregation
    if aggregation not in (TOKEN_MEAN, SEQUENCE_MEAN):
        raise ValueError(f"aggregation {aggregation!r} is neither {TOKEN_MEAN!r} nor {SEQUENCE_MEAN!r}")
    if objective.statistics is not None:
        complete["statistics"] = statistics
    elif statistics is not None:
        raise ValueError(f"{name} takes no statistics: its loss does not depend on how a step is cut")
    terms = prepare(logprobs, behaviour_logprobs, advantages, mask)
    tokens = objective.function(terms, **complete)
    _check_result(objective, terms, tokens)
    return ObjectiveResult(
        loss=aggregate(terms, tokens.loss, aggregation, normaliser),
        weights=tokens.weights.detach(),
        sequence_log_ratio=tokens.sequence_log_ratio.detach(),
        silenced=terms.silenced,
        num_tokens=terms.num_tokens,
    )


def compute_statistics(
    name: str, logprobs: Tensor, behaviour_logprobs: Tensor, advantages: Tensor, mask: Tensor, **hyperparameters: Any
) -> Tensor | None:
    """What an objective must know about a whole step, of this part of it; sum over the parts. None for most objectives.

    Arguments and errors are those of `compute_objective`.
    """
    objective = find_objective(name)
    complete = objective.complete(hyperparameters)
    if objective.statistics is None:
        return None
    return objective.statistics(prepare(logprobs, behaviour_logprobs, advantages, mask), **complete).detach()


def _check_result(objective: Objective, terms: Terms, tokens: TokenLoss) -> None:
    """Raises ValueError where a function of one's own returned something else than it should."""
    if not isinstance(tokens, TokenLoss):
        raise ValueError(f"{objective.name} returned {type(tokens).__name__}, not learner.objectives.base.TokenLoss")
    rows = terms.num_tokens.shape
    for field, shape in (("loss", terms.mask.shape), ("weights", rows), ("sequence_log_ratio", rows)):
        if getattr(tokens, field).shape != shape:
            actual = tuple(getattr(tokens, field).shape)
            raise ValueError(f"{objective.name} returned {field} {actual}, must be {tuple(shape)}")
