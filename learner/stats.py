"""What one update looked like in numbers: rewards, lag, importance weights, and the signs of a run that learns nothing.

All of it is computed in float64 from one array per quantity, so that it costs the optimizer nothing. Every number is
finite; where a mean has nothing to average, it is 0 (kernel mass: 1, nothing was withheld).
"""

import time
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from learner.batch import StepBatch
from learner.engine import UpdateResult
from protocol.clock import lag
from protocol.records import QUANTILES, StepRecord

STARVED_WEIGHT = 0.1  # an A > 0 sequence with φ below this gets practically no gradient


@dataclass(frozen=True, slots=True)
class StepContext:
    """Where and when a step happened; durations in seconds, `wall_seconds` over all sessions of the run."""

    step: int
    version: int
    epoch: int
    learning_rate: float
    wall_seconds: float
    stale: int
    buffered_groups: int
    wait_seconds: float
    step_seconds: float
    train_seconds: float
    publish_seconds: float


def step_record(batch: StepBatch, update: UpdateResult, context: StepContext) -> StepRecord:
    """The record of one step; `context.version` is the learner's version while it trained."""
    lengths = np.array([len(c.tokens) for c in batch.completions])
    return StepRecord(
        step=context.step,
        version=context.version,
        epoch=context.epoch,
        time=time.time(),
        wall_seconds=context.wall_seconds,
        reward_mean=float(batch.rewards.mean()),
        reward_std=float(batch.rewards.std()),
        zero_variance_share=_zero_variance_share(batch),
        loss=update.loss if np.isfinite(update.loss) else 0.0,
        grad_norm=update.grad_norm,
        skipped=update.skipped,
        learning_rate=context.learning_rate,
        num_groups=int(batch.group_of[-1]) + 1,
        num_sequences=len(batch.completions),
        num_tokens=batch.num_tokens,
        response_tokens_mean=float(lengths.mean()),
        truncated_share=float(np.mean([c.finish_reason == "length" for c in batch.completions])),
        **_lag_fields(batch, context.version),
        **_weight_fields(batch, update),
        padding_share=batch.padding_share,
        silenced=int(update.silenced.sum()),
        stale=context.stale,
        buffered_groups=context.buffered_groups,
        wait_seconds=context.wait_seconds,
        step_seconds=context.step_seconds,
        train_seconds=context.train_seconds,
        publish_seconds=context.publish_seconds,
    )


def _zero_variance_share(batch: StepBatch) -> float:
    num_groups = int(batch.group_of[-1]) + 1
    lowest, highest = np.full(num_groups, np.inf), np.full(num_groups, -np.inf)
    np.minimum.at(lowest, batch.group_of, batch.rewards)
    np.maximum.at(highest, batch.group_of, batch.rewards)
    return float(np.mean(lowest == highest))


def _lag_fields(batch: StepBatch, version: int) -> dict[str, object]:
    lags, counts = np.unique([lag(version, c.spans) for c in batch.completions], return_counts=True)
    return {
        "lag_mean": float((lags * counts).sum() / counts.sum()),
        "lag_max": int(lags[-1]),
        "lag_counts": dict(zip(lags.tolist(), counts.tolist(), strict=True)),
    }


def _weight_fields(batch: StepBatch, update: UpdateResult) -> dict[str, object]:
    num_sampled = np.array([int(c.mask.sum()) for c in batch.completions])
    counted = (num_sampled > 0) & (update.silenced == 0)
    log_w, phi, advantages = update.log_w[counted], update.weights[counted], batch.advantages[counted]
    num_tokens = max(int(num_sampled[counted].sum()), 1)
    positive, negative = phi[advantages > 0], phi[advantages < 0]
    mass = float(np.abs(batch.advantages).sum())  # what is silenced is withheld too
    return {
        "log_w_mean": _mean(log_w),
        "log_w_std": float(log_w.std()) if len(log_w) else 0.0,
        "log_w_min": float(log_w.min(initial=np.inf)) if len(log_w) else 0.0,
        "log_w_max": float(log_w.max(initial=-np.inf)) if len(log_w) else 0.0,
        "phi_mean_pos": _mean(positive),
        "phi_mean_neg": _mean(negative),
        "phi_quantiles": _quantiles(phi),
        "log_w_quantiles": _quantiles(log_w),
        "ess_w": _effective_share(log_w),
        "kernel_mass": float((phi * np.abs(advantages)).sum()) / mass if mass > 0 else 1.0,
        "starved_positive_share": _mean(positive < STARVED_WEIGHT),
        "behaviour_kl": float(update.behaviour_kl[counted].sum()) / num_tokens,
        "entropy": float(update.entropy[counted].sum()) / num_tokens,
    }


def _mean(values: NDArray[np.float64] | NDArray[np.bool_]) -> float:
    return float(values.mean()) if len(values) else 0.0


def _quantiles(values: NDArray[np.float64]) -> list[float]:
    return np.quantile(values, QUANTILES).tolist() if len(values) else [0.0] * len(QUANTILES)


def _effective_share(log_w: NDArray[np.float64]) -> float:
    """Effective sample size (ΣW)² / ΣW² as a share of the number of sequences."""
    if not len(log_w):
        return 0.0
    w = np.exp(log_w - log_w.max())
    return float(w.sum() ** 2 / (len(w) * np.square(w).sum()))
