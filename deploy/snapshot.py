"""What a run looks like from outside at one moment, read from its buffer, and rates over several such moments."""

import time
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass

from buffer.groups import Depth
from buffer.run import Buffer
from protocol.clock import ClockState
from protocol.records import ActorStatus, StepRecord

ALIVE_SECONDS = 10.0
RATE_WINDOW_SECONDS = 10.0
PACE_WINDOW_SECONDS = 30.0
WAIT_WINDOW_STEPS = 20


@dataclass(frozen=True, slots=True)
class Snapshot:
    """One reading of the buffer. `progress` is the learner's newest step, of any session."""

    state: str
    clock: ClockState | None
    depth: Depth | None
    progress: StepRecord | None
    actors: list[tuple[str, float, ActorStatus]]


def take_snapshot(buffer: Buffer) -> Snapshot:
    """Read the buffer: five small commands.

    Raises:
        BufferUnavailableError: the server cannot be reached.
    """
    clock = buffer.clock.read()
    return Snapshot(
        state=buffer.control.state(),
        clock=clock,
        depth=None if clock is None else buffer.groups.depth(),
        progress=buffer.control.progress(),
        actors=buffer.actors.list(ALIVE_SECONDS),
    )


class Trend:
    """What successive snapshots say about speed: rewards so far, tokens a second, time left."""

    def __init__(self, num_steps: int, earlier: Iterable[StepRecord] = ()) -> None:
        """`num_steps` of the whole run; `earlier` steps of previous sessions."""
        self._num_steps = num_steps
        self.rewards: dict[int, float] = {r.step: r.reward_mean for r in earlier}
        self._tokens: deque[tuple[float, int]] = deque()
        self._seen_tokens: dict[str, int] = {}
        self._pace: deque[tuple[float, int]] = deque()
        self._waits: deque[tuple[float, float]] = deque(maxlen=WAIT_WINDOW_STEPS)
        self._last_step, self._epoch = -1, 0

    def add(self, snapshot: Snapshot) -> None:
        """Take a snapshot into account."""
        now = time.monotonic()
        for name, _, status in snapshot.actors:
            self._seen_tokens[name] = status.tokens_generated
        self._tokens.append((now, sum(self._seen_tokens.values())))
        _forget(self._tokens, now - RATE_WINDOW_SECONDS)
        record = snapshot.progress
        if record is not None and record.step != self._last_step:
            self._last_step = record.step
            self.rewards[record.step] = record.reward_mean
            if record.epoch == self._epoch:  # a learner's first wait is for engines to start
                self._waits.append((record.wait_seconds, record.step_seconds))
            self._epoch = record.epoch
            self._pace.append((now, record.step))
            _forget(self._pace, now - PACE_WINDOW_SECONDS)

    @property
    def tokens_per_second(self) -> float:
        """Tokens that all actors sampled, over the last seconds."""
        return max(0.0, _slope(self._tokens))

    @property
    def wait_share(self) -> float:
        """Share of the last steps' time in which the learner had no data."""
        total = sum(step for _, step in self._waits)
        return sum(wait for wait, _ in self._waits) / total if total > 0 else 0.0

    @property
    def seconds_left(self) -> float | None:
        """Time to the last step at the present pace; None while it is unknown."""
        pace = _slope(self._pace)
        return (self._num_steps - self._last_step) / pace if pace > 0 else None


def _forget(readings: deque[tuple[float, int]], before: float) -> None:
    while len(readings) > 2 and readings[0][0] < before:
        readings.popleft()


def _slope(readings: deque[tuple[float, int]]) -> float:
    if len(readings) < 2 or readings[-1][0] <= readings[0][0]:
        return 0.0
    return (readings[-1][1] - readings[0][1]) / (readings[-1][0] - readings[0][0])
