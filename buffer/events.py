"""What every wait of this room blocks on: capped streams of notices that something moved.

A notice carries no state. Whoever waits reads a cursor first, then the state, then blocks for anything after the
cursor: so no wake-up is lost, nobody polls, and it does not matter that old notices are dropped.

A notice wakes everybody who waits on its stream, thousands of actors perhaps. So there is a stream for each thing that
is waited for, and no notice that ends nobody's wait.
"""

import time
from collections.abc import Mapping, Sequence

import redis

from buffer.connection import command

BLOCK_SECONDS = 4.0
"""Longest single blocking read; shorter than the socket timeout, so that a dead connection is told from a quiet one."""


class Events:
    """One stream of notices of a run."""

    def __init__(self, client: redis.Redis, key: str) -> None:
        self._client = client
        self._key = key

    def cursor(self) -> str:
        """Position after the newest notice."""
        return parse_cursor(command(self._client, *cursor_line(self._key)))

    def wait(self, cursor: str, timeout_seconds: float, *, stream: str | None = None, after: str = "0-0") -> bool:
        """Block until there is a notice after `cursor`, or an entry of `stream` after `after`.

        Returns:
            False if `timeout_seconds` passed first.
        """
        positions = {self._key: cursor} if stream is None else {self._key: cursor, stream: after}
        deadline = time.monotonic() + timeout_seconds
        while (remaining := deadline - time.monotonic()) > 0:
            if command(self._client, *wait_line(positions, remaining)):
                return True
        return False


def cursor_line(key: str) -> tuple[str | int, ...]:
    """Command whose reply `parse_cursor` reads."""
    return ("XREVRANGE", key, "+", "-", "COUNT", 1)


def parse_cursor(reply: Sequence[tuple[bytes, object]]) -> str:
    """Position after the newest entry of a stream."""
    return reply[0][0].decode() if reply else "0-0"


def wait_line(positions: Mapping[str, str], remaining_seconds: float) -> tuple[str | int, ...]:
    """Command that blocks until a stream has an entry after its position, for a part of the time at most."""
    milliseconds = max(1, int(1000 * min(remaining_seconds, BLOCK_SECONDS)))
    return ("XREAD", "COUNT", 1, "BLOCK", milliseconds, "STREAMS", *positions, *positions.values())
