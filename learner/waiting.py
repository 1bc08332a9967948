"""What the learner does while it has no groups: end overdue leases, say what it waits for, not wait for the dead."""

import logging
import time

from buffer.run import Buffer
from protocol.errors import StarvedError

log = logging.getLogger(__name__)

ALIVE_SECONDS = 15.0  # an actor that has been silent for longer does not end the wait
WARN_SECONDS = 10.0


class Wait:
    """One wait for groups, from the first missing one to the last."""

    def __init__(self, buffer: Buffer, *, needed: int, starvation_seconds: float) -> None:
        self._buffer = buffer
        self._needed = needed
        self._starvation_seconds = starvation_seconds
        self._started = self._progressed = self._warned = time.monotonic()

    def progressed(self) -> None:
        """Groups have arrived: nobody is starving."""
        self._progressed = time.monotonic()

    @property
    def silent_seconds(self) -> float:
        """Time since the last group arrived."""
        return time.monotonic() - self._progressed

    def tick(self, have: int) -> None:
        """To be called about once a second while groups are missing.

        Raises:
            StarvedError: nothing has arrived for `starvation_seconds` and no actor is alive.
        """
        self._buffer.tickets.expire()
        now = time.monotonic()
        starving = self.silent_seconds > self._starvation_seconds
        if not starving and now - self._warned < WARN_SECONDS:
            return
        facts = self._facts(have)
        if starving and not self._buffer.actors.list(ALIVE_SECONDS):
            raise StarvedError(
                f"no group has arrived for {self.silent_seconds:.0f} s and no actor is alive: {facts}. Start actors "
                "(vespo actor RECIPE) and run the learner again; it resumes from its last checkpoint"
            )
        if now - self._warned >= WARN_SECONDS:
            self._warned = now
            log.warning("waiting for groups for %.0f s: %s", now - self._started, facts)

    def _facts(self, have: int) -> str:
        states = self._buffer.ledger().states
        actors = [
            f"{name} {status.state}, heartbeat {age:.0f} s ago, serves version {status.served_version}"
            + (f", error: {status.error}" if status.error else "")
            for name, age, status in self._buffer.actors.list(3600.0)
        ]
        tickets = ", ".join(f"{states[name]} {name}" for name in ("generating", "retry", "buffered", "leased", "dead"))
        return (
            f"{have} of {self._needed} groups of this step; tickets: {tickets}; actors: {'; '.join(actors) or 'none'}"
        )
