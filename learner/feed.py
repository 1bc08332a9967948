"""Leases groups ahead of the optimizer, so that reading and decoding them never makes it wait.

A thread blocks on the buffer and keeps up to `capacity` groups in memory, in the order of the stream. They stay leased
in the buffer: whatever is not committed comes back to the next learner epoch.
"""

import threading
from collections import deque

from buffer.groups import LeasedGroup
from buffer.run import Buffer

LEASE_SECONDS = 1.0  # longest single wait, so that closing takes no longer


class Feed:
    """Groups of one epoch, leased in the background."""

    def __init__(self, buffer: Buffer, *, epoch: int, capacity: int) -> None:
        self._buffer = buffer
        self._epoch = epoch
        self._capacity = capacity
        self._changed = threading.Condition()
        self._queue: deque[LeasedGroup] = deque()
        self._error: BaseException | None = None
        self._closed = False
        self._thread = threading.Thread(target=self._run, name="feed", daemon=True)
        self._thread.start()

    def take(self, count: int, timeout_seconds: float) -> list[LeasedGroup]:
        """1 to `count` groups; none if `timeout_seconds` passed first.

        Raises:
            VespoError: what leasing failed with.
        """
        with self._changed:
            self._changed.wait_for(lambda: self._queue or self._error is not None, timeout_seconds)
            if not self._queue and self._error is not None:
                raise self._error
            taken = [self._queue.popleft() for _ in range(min(count, len(self._queue)))]
            self._changed.notify_all()
            return taken

    def __len__(self) -> int:
        """Groups in memory, ready to be taken."""
        return len(self._queue)

    def close(self) -> None:
        """Stop leasing; what is in memory stays leased in the buffer."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        self._thread.join(timeout=2 * LEASE_SECONDS)

    def _run(self) -> None:
        try:
            while True:
                with self._changed:
                    self._changed.wait_for(lambda: self._closed or len(self._queue) < self._capacity)
                    room = self._capacity - len(self._queue)
                    if self._closed:
                        return
                leased = self._buffer.groups.lease(self._epoch, room, LEASE_SECONDS)
                if leased:
                    with self._changed:
                        self._queue.extend(leased)
                        self._changed.notify_all()
        except BaseException as error:  # handed to the training thread, which raises it
            with self._changed:
                self._error = error
                self._changed.notify_all()
