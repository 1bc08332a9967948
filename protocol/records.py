"""What processes say of themselves: the learner's line per step, an actor's heartbeat, and the summary at the end."""

from typing import Literal

from pydantic import BaseModel, ConfigDict


class StepRecord(BaseModel):
    """One optimizer update, as the learner saw it; log W is the log importance weight, φ the objective's weight.

    Fields with a default came later: a line without them is of an older learner. Rewards are the task's, before
    shaping; `zero_variance_share` is over the groups trained on and their shaped rewards, what was `filtered` comes on
    top. Seconds are those of the training thread from the last record to this one, `step_seconds`: `wait` for groups,
    `build` until a batch whose groups are there is laid out, `train` for forward, backward and, as part of it,
    `optimizer`, `publish` and `checkpoint` for copying what other threads write. `tokens_per_second` are response
    tokens over `step_seconds`.
    """

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
    reference_kl: float = 0.0
    padding_share: float
    silenced: int
    stale: int
    buffered_groups: int
    wait_seconds: float
    step_seconds: float
    train_seconds: float
    publish_seconds: float
    reward_min: float = 0.0
    reward_max: float = 0.0
    shaped_reward_mean: float = 0.0
    response_tokens_max: int = 0
    ess_phi: float = 0.0
    log_w_quantiles_pos: list[float] = []
    log_w_quantiles_neg: list[float] = []
    phi_quantiles_pos: list[float] = []
    phi_quantiles_neg: list[float] = []
    filtered: int = 0
    build_seconds: float = 0.0
    optimizer_seconds: float = 0.0
    checkpoint_seconds: float = 0.0
    tokens_per_second: float = 0.0


QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)
"""Levels of the quantiles of log W and φ; `_pos` and `_neg` are over sequences of positive and negative advantage."""


class ActorStatus(BaseModel):
    """What an actor says of itself. Counts and seconds are totals since it started.

    `parity` is that of the newest version probed, `parity_max` the largest with which one was served, `update_seconds`
    the time generation stood still for all versions together, `served_seconds` the time since `served_version` was
    verified, `parity_violations` probes over the tolerance, `reloads` the loads that were to cure one, and
    `engine_rebuilds` the fresh engines. `error` says why an actor is quarantined. `fetching_version` is what the weight
    store is being read for, -1 for nothing; `fetch_failures` counts reads that brought no version, `fetch_fallbacks`
    those that a bad delta sent back to a full one.
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
    served_seconds: float = 0.0
    parity_violations: int = 0
    reloads: int = 0
    engine_rebuilds: int = 0
    fetching_version: int = -1
    fetch_failures: int = 0
    fetch_fallbacks: int = 0
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
