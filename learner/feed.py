"""Makes the next step's batch while the optimizer works on this one: leases, decodes, selects, shapes and lays out.

    feed thread     lease → select → … until the step is full → lay out ──► one batch, waiting
                      ▲ what is too old by the time it is wanted                 │
    main thread       └──────────────────────────────────────────────────────── take

One batch waits and the groups of the one after it are gathered; everything stays leased in the buffer, and whatever is
not committed comes back to the next learner epoch. How old a group may be depends on the version that trains on it, so
`take` checks again; a batch that fails is taken apart, and its step is filled up anew.

The thread shares the interpreter with the optimizer, which on a toy is Python for the most part: there, laying out
ahead neither gains nor loses. With models for which a step is kernels, it hides the layout entirely.
"""

import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from buffer.groups import LeasedGroup
from buffer.run import Buffer
from learner.batch import StepBatch
from learner.selection import Chosen, Selection
from protocol.trajectory import Group

LEASE_SECONDS = 1.0  # longest single wait, so that closing takes no longer


@dataclass(frozen=True, slots=True)
class NextStep:
    """All that a step is trained on.

    Attributes:
        number: counts batches, from 1.
        leased: its groups, as they came.
        batch: the same, shaped and laid out.
        num_stale, num_filtered: groups turned away so far, as too old and as uninformative.
        complete_at: when its last group was there, by `time.monotonic`.
    """

    number: int
    leased: tuple[LeasedGroup, ...]
    batch: StepBatch
    num_stale: int
    num_filtered: int
    complete_at: float


class Feed:
    """Batches of one epoch, made in the background."""

    def __init__(
        self,
        buffer: Buffer,
        selection: Selection,
        lay_out: Callable[[int, Sequence[Group]], StepBatch],
        *,
        epoch: int,
        groups_per_step: int,
    ) -> None:
        """`lay_out` takes a batch's number and groups, in the feed's thread."""
        self._buffer = buffer
        self._selection = selection
        self._lay_out = lay_out
        self._epoch = epoch
        self._needed = groups_per_step
        self._changed = threading.Condition()
        self._gathered: list[Chosen] = []  # for the batch after `_ready`; replaced by the thread alone
        self._ready: NextStep | None = None
        self._waiting: list[Chosen] = []  # groups of `_ready`
        self._rejected: list[Chosen] = []  # of a batch that was too old when it was taken
        self._oldest_version = 0
        self._num_arrived = 0
        self._error: BaseException | None = None
        self._closed = False
        self._thread = threading.Thread(target=self._run, name="feed", daemon=True)
        self._thread.start()

    def take(self, oldest_version: int, timeout_seconds: float) -> NextStep | None:
        """The next batch, no group of which is older than `oldest_version`; None if `timeout_seconds` passed first.

        Raises:
            VespoError: what leasing, selecting or shaping failed with.
        """
        deadline = time.monotonic() + timeout_seconds
        with self._changed:
            self._oldest_version = oldest_version
            while True:
                remaining = deadline - time.monotonic()
                if not self._changed.wait_for(lambda: self._ready or self._error, max(0.0, remaining)):
                    return None
                if self._ready is None:
                    assert self._error is not None
                    raise self._error
                step, chosen = self._ready, self._waiting
                self._ready, self._waiting = None, []
                stale = any(item.leased.group.oldest_version < oldest_version for item in chosen)
                if stale:
                    self._rejected = chosen
                self._changed.notify_all()
                if not stale:
                    return step

    @property
    def num_arrived(self) -> int:
        """Groups leased so far; grows while the buffer delivers."""
        return self._num_arrived

    @property
    def num_gathered(self) -> int:
        """Groups of the step that is being gathered."""
        return len(self._gathered)

    def __len__(self) -> int:
        """Groups in memory."""
        return len(self._gathered) + len(self._waiting)

    def close(self) -> None:
        """Stop leasing; what is in memory stays leased in the buffer."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        self._thread.join(timeout=2 * LEASE_SECONDS)

    def _run(self) -> None:
        try:
            self._gather()
        except BaseException as error:  # handed to the training thread, which raises it
            with self._changed:
                self._error = error
                self._changed.notify_all()

    def _gather(self) -> None:
        number, complete_at = 1, 0.0
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._closed or self._rejected or self._has_work())
                if self._closed:
                    return
                returned, self._rejected = self._rejected, []
                oldest_version = self._oldest_version
            self._gathered = self._selection.still_fresh(returned + self._gathered, oldest_version)
            if len(self._gathered) < self._needed:
                leased = self._buffer.groups.lease(self._epoch, self._needed - len(self._gathered), LEASE_SECONDS)
                self._num_arrived += len(leased)
                self._gathered = self._gathered + self._selection.admit(leased, oldest_version)
                complete_at = time.monotonic()
            if len(self._gathered) < self._needed or self._ready is not None:
                continue
            chosen, rest = self._gathered[: self._needed], self._gathered[self._needed :]
            batch = self._lay_out(number, [item.shaped for item in chosen])
            leased_groups = tuple(item.leased for item in chosen)
            counts = self._selection.num_stale, self._selection.num_filtered
            with self._changed:
                self._ready = NextStep(number, leased_groups, batch, *counts, complete_at)
                self._waiting, self._gathered = chosen, rest
                self._changed.notify_all()
            number += 1

    def _has_work(self) -> bool:
        return self._ready is None or len(self._gathered) < self._needed
