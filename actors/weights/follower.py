"""Fetches the newest policy version on a thread of its own, so that an update pauses generation only to apply it.

Newest wins: a version that was overtaken before or while it was fetched is never loaded. A store that fails is asked
again with backoff while the actor goes on with what it serves.
"""

import logging
import threading
from collections.abc import Callable
from dataclasses import dataclass

from buffer.clock import PolicyClock
from buffer.store import RawTensor, WeightStore
from protocol.errors import BufferUnavailableError, VespoError, WeightStoreError
from protocol.manifest import Manifest

WAIT_SECONDS = 0.5  # bounds how long stopping takes
FIRST_BACKOFF_SECONDS = 0.2
LAST_BACKOFF_SECONDS = 10.0

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, eq=False)
class StagedVersion:
    """A fetched version whose checksums match its manifest."""

    manifest: Manifest
    tensors: list[RawTensor]


class WeightFollower:
    """Calls `deliver` with every staged version, and `fail` once if the clock itself cannot be read any more."""

    def __init__(
        self,
        clock: PolicyClock,
        store: WeightStore,
        deliver: Callable[[StagedVersion], None],
        fail: Callable[[VespoError], None],
    ) -> None:
        self._clock = clock
        self._store = store
        self._deliver = deliver
        self._fail = fail
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, name="weight-follower", daemon=True)
        self.fetch_failures = 0

    def start(self) -> None:
        """Begin with the newest version there is."""
        self._thread.start()

    def stop(self) -> None:
        """End the thread."""
        self._stopped.set()
        self._thread.join(2 * WAIT_SECONDS)

    def _run(self) -> None:
        fetched, backoff = -1, FIRST_BACKOFF_SECONDS
        while not self._stopped.is_set():
            try:
                manifest = self._clock.wait_for_version(fetched, WAIT_SECONDS)
                if manifest is None:
                    continue
                self._deliver(StagedVersion(manifest, self._store.read(manifest)))
                fetched, backoff = manifest.version, FIRST_BACKOFF_SECONDS
            except WeightStoreError as error:
                self.fetch_failures += 1
                log.warning("version not fetched (%s); trying the newest again in %.1f s", error, backoff)
                self._stopped.wait(backoff)
                backoff = min(2 * backoff, LAST_BACKOFF_SECONDS)
            except BufferUnavailableError as error:
                if not self._stopped.is_set():
                    self._fail(error)
                return
