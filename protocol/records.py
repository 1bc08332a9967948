"""What processes say of themselves: the learner's line per step, an actor's heartbeat, and the summary at the end."""

from typing import Literal

from pydantic import BaseModel, ConfigDict


class StepRecord(BaseModel):
    """One optimizer update, as the learner saw it. Durations in seconds; log W is the log importance weight."""

    model_config = ConfigDict(extra="forbid")

    step: int
    version: int
    epoch: int
    time: float
    wall_seconds: float
    reward_mean: float
    reward_std: float
    zero_variance_share: float
    loss: float
    grad_norm: float
    skipped: bool
    learning_rate: float
    num_groups: int
    num_sequences: int
    num_tokens: int
    response_tokens_mean: float
    truncated_share: float
    lag_mean: float
    lag_max: int
    lag_counts: dict[int, int]
    log_w_mean: float
    log_w_std: float
    log_w_min: float
    log_w_max: float
    phi_mean_pos: float
    phi_mean_neg: float
    phi_quantiles: list[float]
    log_w_quantiles: list[float]
    ess_w: float
    kernel_mass: float
    starved_positive_share: float
    behaviour_kl: float
    entropy: float
    padding_share: float
    silenced: int
    stale: int
    buffered_groups: int
    wait_seconds: float
    step_seconds: float
    train_seconds: float
    publish_seconds: float


QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)
"""Levels of `log_w_quantiles` and `phi_quantiles`."""


class ActorStatus(BaseModel):
    """What an actor says of itself. Counts and seconds are totals since it started.

    `parity` is that of the newest version probed, `parity_max` the largest with which one was served, `update_seconds`
    the time generation stood still for all versions together.
    """

    model_config = ConfigDict(extra="forbid", ser_json_inf_nan="constants")

    state: Literal["starting", "serving", "waiting", "updating", "quarantined", "draining", "left"]
    pid: int
    host: str
    served_version: int = -1
    parity: float = 0.0
    parity_max: float = 0.0
    tokens_generated: int = 0
    groups_submitted: int = 0
    tickets_failed: int = 0
    versions_loaded: int = 0
    update_seconds: float = 0.0
    busy_seconds: float = 0.0
    wall_seconds: float = 0.0
    running_sequences: int = 0
    error: str = ""


class LagSummary(BaseModel):
    """Lag over every sequence trained on, in versions."""

    mean: float
    p50: float
    p95: float
    max: int


class Summary(BaseModel):
    """The run in numbers."""

    run: str
    seed: int
    complete: bool
    steps: int
    versions: int
    reward_first: float
    reward_last: float
    wall_seconds: float
    training_seconds: float
    tokens_generated: int
    groups_trained: int
    lag: LagSummary
    parity_max: float
    ledger: dict[str, int]
    ledger_balanced: bool
    learner_wait_fraction: float
    actor_busy_fraction: float
    restarts: dict[str, int]
    sessions: int
