"""What every wait of this room blocks on: a capped stream of notices that something moved.

A notice carries no state. Whoever waits reads a cursor first, then the state, then blocks for anything after the
cursor: so no wake-up is lost, nobody polls, and it does not matter that old notices are dropped.
"""

import time

import redis

from buffer.connection import command
from buffer.keys import Keys

BLOCK_SECONDS = 4.0
"""Longest single blocking read; shorter than the socket timeout, so that a dead connection is told from a quiet one."""


class Events:
    """Notices of one run."""

    def __init__(self, client: redis.Redis, keys: Keys) -> None:
        self._client = client
        self._key = keys.events

    def cursor(self) -> str:
        """Position after the newest notice."""
        newest = command(self._client, "XREVRANGE", self._key, "+", "-", "COUNT", 1)
        return newest[0][0].decode() if newest else "0-0"

    def wait(self, cursor: str, timeout_seconds: float, *, stream: str | None = None, after: str = "0-0") -> bool:
        """Block until there is a notice after `cursor`, or an entry of `stream` after `after`.

        Returns:
            False if `timeout_seconds` passed first.
        """
        streams, cursors = [self._key], [cursor]
        if stream is not None:
            streams.append(stream)
            cursors.append(after)
        deadline = time.monotonic() + timeout_seconds
        while (remaining := deadline - time.monotonic()) > 0:
            milliseconds = max(1, int(1000 * min(remaining, BLOCK_SECONDS)))
            reply = command(self._client, "XREAD", "COUNT", 1, "BLOCK", milliseconds, "STREAMS", *streams, *cursors)
            if reply:
                return True
        return False
