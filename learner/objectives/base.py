"""What every policy objective starts from and returns: sanitised terms in, a loss per token out.

An objective is a function `(Terms, **hyperparameters) -> TokenLoss` in a file of its own, with its published settings
as defaults. Cleaning the inputs, choosing the aggregation and dividing by the global batch happen once, here and in
`learner.objectives`, so that an objective's file holds nothing but its formula.
"""

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

MAX_LOG_RATIO = 20.0  # token log ratios are clamped to ±20 by VESPO's authors and by verl
TOKEN_MEAN = "token-mean"
SEQUENCE_MEAN = "sequence-mean-token-mean"


@dataclass(frozen=True, slots=True)
class Terms:
    """Inputs of an objective, with nothing non-finite left in them.

    Attributes:
        logprobs: `[B, T]` float32 or float64, the policy's log-probs; 0 and without gradient where `mask` is False.
        log_ratio: `[B, T]` `logprobs` minus the behaviour policy's; 0 where `mask` is False.
        advantages: `[B, 1]`.
        mask: `[B, T]` bool, the tokens that count; all False in a silenced row.
        num_tokens: `[B]` unmasked tokens of each row, those of silenced rows included.
        silenced: `[B]` bool, rows with something non-finite at an unmasked position or as their advantage.
    """

    logprobs: Tensor
    log_ratio: Tensor
    advantages: Tensor
    mask: Tensor
    num_tokens: Tensor
    silenced: Tensor

    def ratio(self) -> Tensor:
        """`[B, T]` token importance ratios, their logarithm clamped to ±20."""
        return self.log_ratio.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp()

    def row_mean(self, values: Tensor) -> Tensor:
        """`[B]` mean of `values` `[B, T]` over each row's counted tokens; 0 for a row without any."""
        return torch.where(self.mask, values, 0).sum(1) / self.num_tokens.clamp(min=1)


class TokenLoss(NamedTuple):
    """What an objective computes.

    `loss` `[B, T]` carries the gradient; `weights` `[B]` and `sequence_log_ratio` `[B]` are detached.
    """

    loss: Tensor
    weights: Tensor
    sequence_log_ratio: Tensor


@dataclass(frozen=True, slots=True)
class ObjectiveResult:
    """Loss of a batch and what it was made of.

    Attributes:
        loss: scalar; backward through it gives the policy gradient.
        weights: `[B]` detached coefficient of each sequence (VESPO: φ; GSPO: the length-normalised ratio before
            clipping; token-level objectives: the mean coefficient of the row's tokens); 0 for a silenced row.
        sequence_log_ratio: `[B]` detached sum of the row's token log ratios (VESPO: each clamped to ±20).
        silenced: `[B]` bool, rows left out because something unmasked in them was not finite.
        num_tokens: `[B]` unmasked tokens of each row.
    """

    loss: Tensor
    weights: Tensor
    sequence_log_ratio: Tensor
    silenced: Tensor
    num_tokens: Tensor

    @property
    def stats(self) -> dict[str, float]:
        """Plain numbers about the batch, computed on demand because reading them waits for the device.

        `num_tokens`, `num_sequences` (with at least one unmasked token), `silenced`, and over the sequences that count:
        `weight_mean`, `weight_max`, `weight_ess` (effective sample size as a share), `log_ratio_mean`, `log_ratio_std`.
        """
        counted = (self.num_tokens > 0) & ~self.silenced
        weights, log_ratio = self.weights[counted].double(), self.sequence_log_ratio[counted].double()
        numbers = {
            "num_tokens": float(self.num_tokens.sum()),
            "num_sequences": float((self.num_tokens > 0).sum()),
            "silenced": float(self.silenced.sum()),
        }
        if len(weights) == 0:
            empty = ("weight_mean", "weight_max", "weight_ess", "log_ratio_mean", "log_ratio_std")
            return numbers | dict.fromkeys(empty, 0.0)
        square_sum = float(weights.square().sum())
        return numbers | {
            "weight_mean": float(weights.mean()),
            "weight_max": float(weights.max()),
            "weight_ess": float(weights.sum()) ** 2 / (len(weights) * square_sum) if square_sum > 0 else 0.0,
            "log_ratio_mean": float(log_ratio.mean()),
            "log_ratio_std": float(log_ratio.std(correction=0)),
        }


def prepare(logprobs: Tensor, behaviour_logprobs: Tensor, advantages: Tensor, mask: Tensor) -> Terms:
    """Check shapes, lift half precision to float32, neutralise masked positions and silence non-finite rows.

    Raises:
        ValueError: shapes do not belong together; the message names them.
    """
    shape = tuple(logprobs.shape)
    if len(shape) != 2 or tuple(behaviour_logprobs.shape) != shape or tuple(mask.shape) != shape:
        raise ValueError(
            f"logprobs {shape}, behaviour_logprobs {tuple(behaviour_logprobs.shape)} and mask {tuple(mask.shape)} must "
            "be of one shape [B, T]"
        )
    if tuple(advantages.shape) != shape[:1]:
        raise ValueError(f"advantages {tuple(advantages.shape)} must be [B] = {shape[:1]}, one for each sequence")
    dtype = torch.promote_types(torch.promote_types(logprobs.dtype, behaviour_logprobs.dtype), torch.float32)
    counts = mask.bool()
    finite = logprobs.isfinite() & behaviour_logprobs.isfinite()
    silenced = (counts & ~finite).any(1) | (~advantages.isfinite() & counts.any(1))
    active = counts & ~silenced[:, None]
    clean_logprobs = torch.where(active, logprobs.to(dtype), 0)
    log_ratio = clean_logprobs - torch.where(active, behaviour_logprobs.detach().to(dtype), 0)
    return Terms(
        logprobs=clean_logprobs,
        log_ratio=log_ratio,
        advantages=advantages.detach().to(dtype).nan_to_num(0.0, 0.0, 0.0)[:, None],
        mask=active,
        num_tokens=counts.sum(1),
        silenced=silenced,
    )


def reinforce_weighted(terms: Terms, coefficient: Tensor) -> TokenLoss:
    """−coefficient · advantage · log π for every token; `coefficient` `[B, T]` is detached."""
    coefficient = coefficient.detach()
    return TokenLoss(
        -coefficient * terms.advantages * terms.logprobs,
        terms.row_mean(coefficient),
        sequence_sum(terms, terms.log_ratio),
    )


def sequence_sum(terms: Terms, log_ratio: Tensor) -> Tensor:
    """`[B]` detached sum over each row's counted tokens, accumulated in float64 because φ amplifies rounding."""
    return torch.where(terms.mask, log_ratio.detach(), 0).sum(1, dtype=torch.float64).to(log_ratio.dtype)


def aggregate(terms: Terms, token_loss: Tensor, aggregation: str, normaliser: Tensor | float | None) -> Tensor:
    """Scalar loss from `[B, T]` token losses; empty rows contribute nothing, an empty batch gives 0.

    Args:
        normaliser: what to divide by: tokens (token-mean) or non-empty rows (sequence-mean-token-mean) of the whole
            step; None takes the count of this batch. 0 goes with a step of nothing, whose loss is 0.

    Raises:
        ValueError: a normaliser that is negative or not finite (of a tensor only its shape is looked at, since reading
            it would wait for the device).
    """
    if aggregation == TOKEN_MEAN:
        total = torch.where(terms.mask, token_loss, 0).sum()
        count = terms.num_tokens.sum()
    else:
        total = terms.row_mean(token_loss).sum()
        count = (terms.num_tokens > 0).sum()
    if normaliser is None:
        return total / count.clamp(min=1)
    if isinstance(normaliser, Tensor):
        if normaliser.numel() != 1:
            raise ValueError(f"normaliser {tuple(normaliser.shape)} must be one number")
        divisor = normaliser.detach().reshape(())
        return total / torch.where(divisor == 0, 1, divisor)
    if not 0 <= normaliser < math.inf:
        raise ValueError(f"normaliser {normaliser} must be a count: finite and >= 0")
    return total / (normaliser or 1)
