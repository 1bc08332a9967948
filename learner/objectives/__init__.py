"""Policy objectives: one public call, one small file for each.

VESPO is what the learner trains with; the others exist for comparison on the same inputs.
"""

import difflib
import inspect
from collections.abc import Callable

from torch import Tensor

from learner.objectives.base import SEQUENCE_MEAN, TOKEN_MEAN, ObjectiveResult, TokenLoss, aggregate, prepare
from learner.objectives.cispo import cispo
from learner.objectives.grpo import grpo
from learner.objectives.gspo import gspo
from learner.objectives.sapo import sapo
from learner.objectives.vespo import vespo

__all__ = ["OBJECTIVES", "ObjectiveResult", "compute_objective"]

OBJECTIVES: dict[str, tuple[Callable[..., TokenLoss], str]] = {
    "vespo": (vespo, TOKEN_MEAN),
    "grpo": (grpo, TOKEN_MEAN),
    "gspo": (gspo, SEQUENCE_MEAN),
    "sapo": (sapo, SEQUENCE_MEAN),
    "cispo": (cispo, TOKEN_MEAN),
}
"""Name → function and published aggregation."""


def compute_objective(
    name: str,
    logprobs: Tensor,
    behaviour_logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor,
    *,
    aggregation: str | None = None,
    normaliser: Tensor | float | None = None,
    **hyperparameters: float | None,
) -> ObjectiveResult:
    """Loss of a batch of sequences under a policy objective, differentiable in `logprobs`.

    What is non-finite at a masked position changes nothing. At an unmasked position, or as an advantage, it silences
    its own sequence: weight 0, no gradient, its tokens still counted in the mean. Rows without unmasked tokens
    contribute nothing, and a batch without any gives loss 0.

    Args:
        name: a key of `OBJECTIVES`.
        logprobs: `[B, T]` float, log-probs of the policy being trained.
        behaviour_logprobs: `[B, T]` float, log-probs of the distribution the tokens were sampled from.
        advantages: `[B]` float, one for each sequence.
        mask: `[B, T]`, non-zero where a token counts.
        aggregation: "token-mean" or "sequence-mean-token-mean"; the objective's published one by default.
        normaliser: number of unmasked tokens (token-mean) or of non-empty sequences in the whole step, when this batch
            is a part of it: the parts' losses then add up to the loss of the whole. By default this batch's count.
        hyperparameters: those of the objective's function; its published ones by default.

    Raises:
        ValueError: unknown objective, aggregation or hyperparameter, a value out of range, shapes that do not fit.
    """
    if name not in OBJECTIVES:
        raise ValueError(f"no objective {name!r}{_nearest(name, OBJECTIVES)}; there are {', '.join(OBJECTIVES)}")
    function, published_aggregation = OBJECTIVES[name]
    known = [p for p in inspect.signature(function).parameters if p != "terms"]
    for key in hyperparameters:
        if key not in known:
            raise ValueError(f"{name} has no hyperparameter {key!r}{_nearest(key, known)}; it has {', '.join(known)}")
    aggregation = aggregation or published_aggregation
    if aggregation not in (TOKEN_MEAN, SEQUENCE_MEAN):
        raise ValueError(f"aggregation {aggregation!r} is neither {TOKEN_MEAN!r} nor {SEQUENCE_MEAN!r}")
    terms = prepare(logprobs, behaviour_logprobs, advantages, mask)
    tokens = function(terms, **hyperparameters)
    return ObjectiveResult(
        loss=aggregate(terms, tokens.loss, aggregation, normaliser),
        weights=tokens.weights,
        sequence_log_ratio=tokens.sequence_log_ratio,
        silenced=terms.silenced,
        num_tokens=terms.num_tokens,
    )


def _nearest(word: str, known: object) -> str:
    matches = difflib.get_close_matches(word, list(known), 1)  # type: ignore[call-overload]
    return f" (did you mean {matches[0]!r}?)" if matches else ""
