"""What one update looked like in numbers: rewards, lag, importance weights, and the signs of a run that learns nothing.

All of it is computed in float64 from one array per quantity, so that it costs the optimizer nothing. Every number is
finite; where a mean has nothing to average, it is 0 (kernel mass: 1, nothing was withheld).
"""

import time
from collections.abc import Sequence
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
    filtered: int
    buffered_groups: int
    wait_seconds: float
    build_seconds: float
    step_seconds: float
    train_seconds: float
    publish_seconds: float
    checkpoint_seconds: float


def step_record(
    batch: StepBatch, update: UpdateResult, context: StepContext, rewards: Sequence[float] | None = None
) -> StepRecord:
    """The record of one step; `context.version` is the learner's version while it trained.

    Args:
        rewards: the task's, `[S]`, where the batch has shaped ones.
    """
    task_rewards = batch.rewards if rewards is None else np.array(rewards, np.float64)
    lengths = np.array([len(c.tokens) for c in batch.completions])
    return StepRecord(
        step=context.step,
        version=context.version,
        epoch=context.epoch,
        time=time.time(),
        wall_seconds=context.wall_seconds,
        reward_mean=float(task_rewards.mean()),
        reward_std=float(task_rewards.std()),
        reward_min=float(task_rewards.min()),
        reward_max=float(task_rewards.max()),
        shaped_reward_mean=float(batch.rewards.mean()),
        zero_variance_share=_zero_variance_share(batch),
        loss=update.loss if np.isfinite(update.loss) else 0.0,
        grad_norm=update.grad_norm,
        skipped=update.skipped,
        learning_rate=context.learning_rate,
        num_groups=int(batch.group_of[-1]) + 1,
        num_sequences=len(batch.completions),
        num_tokens=batch.num_tokens,
        response_tokens_mean=float(lengths.mean()),
        response_tokens_max=int(lengths.max()),
        truncated_share=float(np.mean([c.finish_reason == "length" for c in batch.completions])),
        **_lag_fields(batch, context.version),
        **_weight_fields(batch, update),
        padding_share=batch.padding_share,
        silenced=int(update.silenced.sum()),
        stale=context.stale,
        filtered=context.filtered,
        buffered_groups=context.buffered_groups,
        wait_seconds=context.wait_seconds,
        step_seconds=context.step_seconds,
        train_seconds=context.train_seconds,
        publish_seconds=context.publish_seconds,
        build_seconds=context.build_seconds,
        optimizer_seconds=update.optimizer_seconds,
        checkpoint_seconds=context.checkpoint_seconds,
        tokens_per_second=batch.num_tokens / context.step_seconds if context.step_seconds > 0 else 0.0,
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
    good, bad = advantages > 0, advantages < 0
    positive, negative = phi[good], phi[bad]
    mass = float(np.abs(batch.advantages[num_sampled > 0]).sum())  # what is silenced is withheld too
    return {
        "log_w_mean": _mean(log_w),
        "log_w_std": float(log_w.std()) if len(log_w) else 0.0,
        "log_w_min": float(log_w.min(initial=np.inf)) if len(log_w) else 0.0,
        "log_w_max": float(log_w.max(initial=-np.inf)) if len(log_w) else 0.0,
        "phi_mean_pos": _mean(positive),
        "phi_mean_neg": _mean(negative),
        "phi_quantiles": _quantiles(phi),
        "phi_quantiles_pos": _quantiles(positive),
        "phi_quantiles_neg": _quantiles(negative),
        "log_w_quantiles": _quantiles(log_w),
        "log_w_quantiles_pos": _quantiles(log_w[good]),
        "log_w_quantiles_neg": _quantiles(log_w[bad]),
        "ess_w": _effective_share(np.exp(log_w - log_w.max(initial=-np.inf))),
        "ess_phi": _effective_share(phi),
        "kernel_mass": float((phi * np.abs(advantages)).sum()) / mass if mass > 0 else 1.0,
        "starved_positive_share": _mean(positive < STARVED_WEIGHT),
        "behaviour_kl": float(update.behaviour_kl[counted].sum()) / num_tokens,
        "entropy": float(update.entropy[counted].sum()) / num_tokens,
        "reference_kl": float(update.reference_kl[counted].sum()) / num_tokens,
    }


def _mean(values: NDArray[np.float64] | NDArray[np.bool_]) -> float:
    return float(values.mean()) if len(values) else 0.0


def _quantiles(values: NDArray[np.float64]) -> list[float]:
    return np.quantile(values, QUANTILES).tolist() if len(values) else [0.0] * len(QUANTILES)


def _effective_share(weights: NDArray[np.float64]) -> float:
    """Effective sample size (Σw)² / Σw² of weights `[S]` ≥ 0 as a share of S."""
    squares = float(np.square(weights).sum())
    return float(weights.sum()) ** 2 / (len(weights) * squares) if squares > 0 else 0.0
