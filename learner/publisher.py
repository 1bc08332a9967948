"""Publishing off the training thread: payload to the weight store, then the manifest, then the clock.

    main thread                          publisher thread
    snapshot (a copy, a version number)
    submit ─────────────────────────────► write, with retries → clock.publish → collect
    check, finish ◄───── errors ─────────

One snapshot may be under way and one waiting. A newer one takes the place of the waiting one: its version is then
never published, which is logged and counted; nobody waits for a version in particular. A delta therefore builds on the
last version that was published, whose tensors are kept for it; an epoch's first version is full.
"""

import logging
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from buffer.payloads import StagedVersion
from buffer.retention import Retention
from buffer.run import Buffer
from buffer.store import WeightStore
from learner.weights import raw_tensors
from protocol.errors import WeightStoreError
from protocol.manifest import Manifest, Probe

log = logging.getLogger(__name__)

DEADLINE_SECONDS = 600.0
RETRY_SECONDS = (0.5, 1.0, 2.0, 4.0, 8.0)


@dataclass(frozen=True, slots=True, eq=False)
class Snapshot:
    """Weights of one version, copied: training goes on while they are written."""

    version: int
    step: int
    tensors: dict[str, Tensor]
    probe: Probe


class Publisher:
    """Publishes snapshots of one learner epoch in the order of their versions.

    Attributes:
        num_superseded: snapshots that a newer one replaced before they were written.
        last_seconds: time the newest publication took, from its start to the clock's tick.
    """

    def __init__(
        self,
        buffer: Buffer,
        store: WeightStore,
        *,
        epoch: int,
        versions_kept: int,
        full_every: int = 1,
        frozen: bool = False,
    ) -> None:
        """How versions are written.

        Args:
            versions_kept: as `Retention`.
            full_every: one version in so many is full, the others are deltas where that pays.
            frozen: most tensors never change (LoRA), so one version of the epoch is full, and all others build on it:
                they hold the adapters, and a late joiner reads two payloads.
        """
        self.num_superseded = 0
        self.last_seconds = 0.0
        self._buffer = buffer
        self._store = store
        self._epoch = epoch
        self._full_every = full_every
        self._frozen = frozen
        self._published: StagedVersion | None = None  # only where a delta may build on it
        self._num_deltas = 0  # since the last full version
        self._retention = Retention(buffer.clock, buffer.actors, store, epoch=epoch, versions_kept=versions_kept)
        self._changed = threading.Condition()
        self._waiting: Snapshot | None = None
        self._active: Snapshot | None = None
        self._active_since = 0.0
        self._error: BaseException | None = None
        self._closed = threading.Event()
        # A daemon: a store that hangs must not keep the process alive.
        self._thread = threading.Thread(target=self._run, name="publisher", daemon=True)
        self._thread.start()

    def submit(self, snapshot: Snapshot) -> None:
        """Hand over the newest snapshot; returns at once.

        Raises:
            VespoError: what an earlier publication failed with.
        """
        self.check()
        with self._changed:
            if self._waiting is not None:
                self.num_superseded += 1
                log.warning(
                    "version %d is superseded by %d before it was written: the weight store is slower than the learner",
                    self._waiting.version,
                    snapshot.version,
                )
            self._waiting = snapshot
            self._changed.notify_all()

    def check(self) -> None:
        """Raise what a publication failed with, and fail one that has passed its deadline."""
        with self._changed:
            if self._error is not None:
                raise self._error
            if self._active is not None and time.monotonic() - self._active_since > DEADLINE_SECONDS:
                raise WeightStoreError(
                    f"publishing version {self._active.version} to weight store {self._store.url} has not ended within "
                    f"{DEADLINE_SECONDS:g} s"
                )

    def finish(self) -> None:
        """Wait until everything submitted is published.

        Raises:
            VespoError: what a publication failed with, or that it passed its deadline.
        """
        while True:
            self.check()
            with self._changed:
                if self._waiting is None and self._active is None and self._error is None:
                    return
                self._changed.wait(timeout=1.0)

    def close(self) -> None:
        """Stop without waiting for what is under way."""
        self._closed.set()
        with self._changed:
            self._changed.notify_all()

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._waiting is not None or self._closed.is_set())
                if self._closed.is_set():
                    return
                self._active, self._waiting = self._waiting, None
                self._active_since = time.monotonic()
                snapshot = self._active
            error = None
            try:
                if snapshot is not None:
                    self._publish(snapshot)
            except BaseException as failure:  # handed to the training thread, which raises it
                error = failure
            with self._changed:
                self.last_seconds = time.monotonic() - self._active_since
                self._active, self._error = None, error
                self._changed.notify_all()
            if error is not None:
                return

    def _publish(self, snapshot: Snapshot) -> None:
        tensors = raw_tensors(snapshot.tensors)
        base = self._published if self._frozen or self._num_deltas + 1 < self._full_every else None

        def write() -> Manifest:
            return self._store.write(snapshot.version, self._epoch, snapshot.step, tensors, snapshot.probe, base)

        manifest = self._retried(write, snapshot.version)
        retired = self._retention.retired_by(manifest)
        self._buffer.clock.publish(manifest, retired)
        self._retention.published(manifest, retired)
        self._num_deltas = self._num_deltas + 1 if manifest.kind == "delta" else 0
        if (manifest.kind == "full") if self._frozen else (self._full_every > 1):
            self._published = StagedVersion(manifest, tensors)
        self._collect()

    def _collect(self) -> None:
        try:
            self._retention.collect()
        except WeightStoreError as error:
            log.warning("old versions stay in the weight store for now: %s", error)

    def _retried(self, write: Callable[[], Manifest], version: int) -> Manifest:
        for pause_seconds in RETRY_SECONDS:
            try:
                return write()
            except WeightStoreError as error:
                log.warning("version %d is not written, next try in %g s: %s", version, pause_seconds, error)
                if self._closed.wait(pause_seconds):
                    raise
                self._collect()  # the store may be full
        return write()
