"""When a version is published, and when it is only counted.

Versions are counted in updates, because admission and lag are: an actor that serves version v may have generated for
`(v + max_lag + 1)` versions of updates. `weights.seconds_per_publish` therefore cannot stretch a version; it leaves out
publications. Leaving out `max_lag` in a row would let admission run dry while the learner waits for groups, so one is
due after `max_lag` versions at the latest, while the groups of one more version may still come.
"""

import time


class Cadence:
    """Decides which versions of one session are published; the first always is."""

    def __init__(self, *, seconds: float, max_lag: int) -> None:
        """`seconds` at least between two publications, but never more than `max_lag` versions."""
        self._seconds = seconds
        self._most_versions = max(1, max_lag)
        self._published = -1
        self._published_at = -float("inf")

    def due(self, version: int) -> bool:
        """Whether `version` has to be published; if so, it counts as published from now on."""
        now = time.monotonic()
        if now - self._published_at < self._seconds and version - self._published < self._most_versions:
            return False
        self._published, self._published_at = version, now
        return True
