"""The run in numbers: `summary.json` from the metrics of all sessions, the ledger and the actors' totals."""

import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from pydantic import ValidationError

from buffer.run import Buffer
from deploy.rundir import History, RunDirectory, write_atomically
from protocol.records import LagSummary, StepRecord, Summary
from protocol.settings import Settings

FIRST_STEPS = 5
LAST_STEPS = 10


def read_metrics(path: Path) -> list[StepRecord]:
    """Every complete line of metrics.jsonl; a line that a crash cut short is left out."""
    try:
        lines = path.read_text("utf-8").splitlines()
    except FileNotFoundError:
        return []
    records: list[StepRecord] = []
    for line in lines:
        try:
            records.append(StepRecord.model_validate_json(line))
        except ValidationError:
            continue
    return records


def write_summary(settings: Settings, directory: RunDirectory, buffer: Buffer, history: History) -> Summary:
    """Compute the summary and replace summary.json.

    Raises:
        BufferUnavailableError: the server is gone.
    """
    summary = build_summary(settings, read_metrics(directory.metrics), buffer, history)
    write_atomically(directory.summary, summary.model_dump_json(indent=2) + "\n")
    return summary


def read_summary(directory: RunDirectory) -> Summary | None:
    """Contents of summary.json, or None if there is none that can be read."""
    try:
        return Summary.model_validate_json(directory.summary.read_bytes())
    except (FileNotFoundError, ValidationError):
        return None


def build_summary(settings: Settings, records: Sequence[StepRecord], buffer: Buffer, history: History) -> Summary:
    """Summarise all sessions; rewards of a run without a step are 0."""
    ledger = buffer.ledger()
    totals = buffer.actors.totals()
    clock = buffer.clock.read()
    steps = records[-1].step if records else 0
    waits, durations = _step_times(records)
    return Summary(
        run=settings.run.name,
        seed=settings.run.seed,
        complete=steps >= settings.run.steps,
        steps=steps,
        versions=max(0, clock.version) if clock is not None else 0,
        reward_first=_mean([r.reward_mean for r in records[:FIRST_STEPS]]),
        reward_last=_mean([r.reward_mean for r in records[-LAST_STEPS:]]),
        wall_seconds=_worked_seconds(history, records),
        training_seconds=sum(durations),
        tokens_generated=totals.tokens_generated,
        groups_trained=ledger.states["trained"],
        lag=summarise_lag(records),
        parity_max=totals.parity_max,
        ledger=ledger.states,
        ledger_balanced=ledger.balanced,
        learner_wait_fraction=_ratio(sum(waits), sum(durations)),
        actor_busy_fraction=_ratio(totals.busy_seconds, totals.wall_seconds),
        restarts=dict(history.restarts),
        sessions=len(history.sessions),
    )


def summarise_lag(records: Sequence[StepRecord]) -> LagSummary:
    """Lag over every sequence trained on; zeros if there was none."""
    counts: Counter[int] = Counter()
    for record in records:
        counts.update(record.lag_counts)
    total = counts.total()
    if not total:
        return LagSummary(mean=0.0, p50=0.0, p95=0.0, max=0)
    mean = sum(lag * count for lag, count in counts.items()) / total
    return LagSummary(mean=mean, p50=_quantile(counts, 0.5), p95=_quantile(counts, 0.95), max=max(counts))


def format_summary(summary: Summary, directory: RunDirectory) -> str:
    """The summary for a person, with where to look next."""
    state = "complete" if summary.complete else "not complete: the same command goes on with it"
    restarts = ", ".join(f"{name} {count}" for name, count in sorted(summary.restarts.items())) or "none"
    ledger = "balanced" if summary.ledger_balanced else f"NOT BALANCED {json.dumps(summary.ledger)}"
    return "\n".join(
        [
            f"run {summary.run}: {summary.steps} steps, {state}",
            f"  reward        {summary.reward_first:.3f} (first {FIRST_STEPS} steps) -> {summary.reward_last:.3f} "
            f"(last {LAST_STEPS})",
            f"  time          {summary.training_seconds:.1f} s training, {summary.wall_seconds:.1f} s in all, "
            f"{summary.sessions} session{'s' if summary.sessions != 1 else ''}",
            f"  lag           mean {summary.lag.mean:.2f}, 95 % {summary.lag.p95:g}, max {summary.lag.max} versions",
            f"  data          {summary.groups_trained} groups trained, {summary.tokens_generated} tokens generated",
            f"  busy          actors {summary.actor_busy_fraction:.0%}; learner waited "
            f"{summary.learner_wait_fraction:.0%} of its time",
            f"  parity        {summary.parity_max:.1e}    ledger {ledger}    restarts {restarts}",
            f"  report        {directory.report}",
            f"  model         {directory.model}" if directory.model.exists() else "  model         (when complete)",
        ]
    )


def _quantile(counts: Counter[int], level: float) -> float:
    """Smallest lag such that at least `level` of all sequences have no larger one."""
    total, seen = counts.total(), 0
    for lag in sorted(counts):
        seen += counts[lag]
        if seen >= level * total:
            return float(lag)
    return 0.0


def _step_times(records: Sequence[StepRecord]) -> tuple[list[float], list[float]]:
    """Wait and duration of each step; the first wait of a learner's life is for engines to start and left out."""
    waits, durations = [], []
    epoch = 0
    for record in records:
        starting = record.epoch != epoch
        epoch = record.epoch
        waits.append(0.0 if starting else record.wait_seconds)
        durations.append(record.train_seconds + record.publish_seconds if starting else record.step_seconds)
    return waits, durations


def _worked_seconds(history: History, records: Sequence[StepRecord]) -> float:
    """Time of all sessions; one that was killed lasted until its last step."""
    seconds = 0.0
    for number, session in enumerate(history.sessions):
        ended = session.ended_at
        if ended is None:
            following = history.sessions[number + 1].started_at if number + 1 < len(history.sessions) else float("inf")
            ended = max((r.time for r in records if session.started_at <= r.time < following), default=0.0)
        seconds += max(0.0, ended - session.started_at)
    return seconds


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else 0.0


def _ratio(part: float, whole: float) -> float:
    return part / whole if whole > 0 else 0.0
