"""Fetches the newest policy version on a thread of its own, so that an update pauses generation only to apply it.

Newest wins: a version that was overtaken before or while it was fetched is never loaded. What is delivered is whole and
verified; a store that fails, or does not answer in time, is asked again with backoff while the actor goes on with what
it serves.
"""

import logging
import queue
import threading
from collections.abc import Callable

from actors.weights.chain import ChainReader
from buffer.adapter import merge
from buffer.clock import PolicyClock
from buffer.payloads import Deadline, StagedVersion
from buffer.store import WeightStore
from protocol.errors import BufferUnavailableError, CodecError, VespoError, WeightStoreError
from protocol.manifest import Manifest

__all__ = ["StagedVersion", "WeightFollower"]

WAIT_SECONDS = 0.5  # bounds how long stopping takes
FIRST_BACKOFF_SECONDS = 0.2
LAST_BACKOFF_SECONDS = 10.0
FETCH_SECONDS = 600.0

log = logging.getLogger(__name__)


class WeightFollower:
    """Calls `deliver` with every staged version, and `fail` once if the clock itself cannot be read any more.

    Attributes:
        fetching_version: the version that the store is being read for, -1 if it is not.
        fetch_failures: fetches that brought nothing new.
    """

    def __init__(
        self,
        clock: PolicyClock,
        store: WeightStore,
        deliver: Callable[[StagedVersion], None],
        fail: Callable[[VespoError], None],
    ) -> None:
        self.fetching_version = -1
        self.fetch_failures = 0
        self._clock = clock
        self._store = store
        self._deliver = deliver
        self._fail = fail
        self._reader = ChainReader(clock, store)
        self._earlier_fallbacks = 0
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, name="weight-follower", daemon=True)

    @property
    def fetch_fallbacks(self) -> int:
        """Fetches that damage on the way sent back to a full version."""
        return self._earlier_fallbacks + self._reader.num_fallbacks

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
                staged = self._fetch(manifest)
                if staged is None:
                    return
                served = StagedVersion(staged.manifest, merge(staged.tensors))
                fetched = staged.manifest.version
                self._deliver(served)
                if fetched < manifest.version:
                    raise WeightStoreError(f"version {manifest.version} is damaged, version {fetched} is taken instead")
                backoff = FIRST_BACKOFF_SECONDS
            except (WeightStoreError, CodecError) as error:
                self.fetch_failures += 1
                log.warning("newest version not fetched (%s); trying again in %.1f s", error, backoff)
                self._stopped.wait(backoff)
                backoff = min(2 * backoff, LAST_BACKOFF_SECONDS)
            except BufferUnavailableError as error:
                if not self._stopped.is_set():
                    self._fail(error)
                return

    def _fetch(self, manifest: Manifest) -> StagedVersion | None:
        """A version for which the store was read in a thread that may be left behind; None if this is to stop.

        Raises:
            WeightStoreError: damaged, unreachable, or not there in time.
        """
        self.fetching_version = manifest.version
        answer: queue.SimpleQueue[StagedVersion | BaseException] = queue.SimpleQueue()
        deadline = Deadline.after(FETCH_SECONDS)
        # A daemon: a driver that hangs must not keep the process alive, nor this thread from its deadline.
        threading.Thread(target=_read, args=(self._reader, manifest, deadline, answer), daemon=True).start()
        try:
            while not self._stopped.is_set():
                try:
                    result = answer.get(timeout=WAIT_SECONDS)
                except queue.Empty:
                    if deadline.seconds_left > -WAIT_SECONDS:  # it is about to notice by itself
                        continue
                    self._earlier_fallbacks += self._reader.num_fallbacks
                    self._reader = ChainReader(self._clock, self._store, self._reader.held)
                    raise WeightStoreError(
                        f"weight store {self._store.url} has not answered for {FETCH_SECONDS:g} s"
                    ) from None
                if isinstance(result, BaseException):
                    raise result
                return result
            return None
        finally:
            self.fetching_version = -1


def _read(
    reader: ChainReader,
    manifest: Manifest,
    deadline: Deadline,
    answer: "queue.SimpleQueue[StagedVersion | BaseException]",
) -> None:
    try:
        answer.put(reader.fetch(manifest, deadline))
    except BaseException as error:  # handed to the follower's thread, which raises it
        answer.put(error)
