"""Which groups the surviving line of checkpoints has consumed: each exactly once, whatever dies in between.

    training thread      train → copy the state → train … train → copy the state, when the one before is committed → …
    checkpoint thread                 └─► write, sync, rename → commit its groups

One checkpoint at most is under way. It holds the policy as a Hugging Face directory too, which `vespo export` copies.

A crash before the rename leaves the groups uncommitted: the next epoch is given them again and trains on them from the
older state. A crash between rename and commit is made good here, before anything is leased: the resumed checkpoint
lists its groups, and those already gone are not counted twice.
"""

import logging
import time
from collections.abc import Sequence
from pathlib import Path

from torch import Tensor

from buffer.groups import LeasedGroup
from buffer.run import Buffer
from learner.background import Background
from learner.checkpoint import MODEL, Checkpoint, Checkpoints, Totals
from learner.crew import LeadEngine
from learner.journal import open_session
from learner.weights import write_model_directory
from protocol.errors import CheckpointError, FencedError
from protocol.records import StepRecord
from protocol.settings import Settings

log = logging.getLogger(__name__)

CLOSE_SECONDS = 60.0


class Lineage:
    """Progress of the run in this process, and how it is kept.

    Attributes:
        step: optimizer updates in the current state.
        version: number of the current weights; before the first of this epoch, the last one of the epoch before.
        epoch: fencing token of this learner.
        totals: counted over all sessions.
    """

    def __init__(self, settings: Settings, run_dir: Path, model_dir: Path, buffer: Buffer, engine: LeadEngine) -> None:
        """Load the newest checkpoint into `engine` and become the run's only learner.

        Raises:
            CheckpointError: there are checkpoints, but none that can be loaded.
            RunMismatchError: the buffer's run belongs to another run directory.
        """
        self.step = 0
        self.totals = Totals()
        self._uncommitted: list[str] = []  # trained, and in no checkpoint yet
        self._uncommitted_bytes = self._pending_bytes = 0  # of these, and of what the checkpoint under way will commit
        self._max_bytes = settings.buffer.max_bytes
        self._writer = Background("checkpoint")
        self._weights: dict[str, Tensor] | None = None
        self._model_dir = model_dir
        self._buffer = buffer
        self._engine = engine
        self._checkpoints = Checkpoints(run_dir / "checkpoints", keep=settings.learner.checkpoints_kept)
        self._run_id, self._session = open_session(run_dir)
        resumed = self._checkpoints.load_newest(self._load)
        lost = buffer.clock.read() is None
        self._first_ticket = 0
        if resumed:
            self.step, self.totals = resumed.step, resumed.totals
            # A buffer that has lost everything goes on after the tickets it had issued, not from the first prompt.
            self._first_ticket = resumed.next_ticket if lost else resumed.first_ticket
            log.info("resumed at step %d, written by learner session %d", resumed.step, resumed.session)
        self.epoch = buffer.begin_epoch(
            run_id=self._run_id,
            groups_per_version=settings.groups_per_version,
            max_lag=settings.buffer.max_lag,
            max_attempts=settings.buffer.max_attempts,
            max_bytes=settings.buffer.max_bytes,
            first_ticket=self._first_ticket,
            step=self.step,
        )
        if resumed and not lost:
            buffer.groups.commit(self.epoch, resumed.entry_ids, self.step)
        clock = buffer.clock.read()
        if clock is None or clock.epoch != self.epoch:
            raise FencedError(f"run {buffer.run} was begun by another learner, or purged, while this one started")
        self.version = clock.base_version - 1
        self._started = time.monotonic() - self.totals.wall_seconds
        self._kept_step = self.step  # without a checkpoint: the initial model

    def _load(self, place: Path, checkpoint: Checkpoint) -> None:
        if checkpoint.run_id != self._run_id:
            raise CheckpointError(f"it belongs to run {checkpoint.run_id}, this directory to {self._run_id}")
        if checkpoint.layout != self._engine.layout:
            raise CheckpointError(f"it holds {checkpoint.layout}; the recipe asks for {self._engine.layout}")
        self._engine.load(place)

    @property
    def wall_seconds(self) -> float:
        """Time learners of this run have lived, up to the resumed checkpoint and in this session."""
        return time.monotonic() - self._started

    def weights(self) -> dict[str, Tensor]:
        """Copies of the current weights on the CPU; made once for each state."""
        if self._weights is None:
            self._weights = self._engine.tensors()
        return self._weights

    def trained(self, leased: Sequence[LeasedGroup]) -> None:
        """These groups' effect is in the weights: one step more."""
        self.step += 1
        self._weights = None
        self._uncommitted += [item.entry_id for item in leased]
        self._uncommitted_bytes += sum(item.num_bytes for item in leased)

    def count(self, record: StepRecord) -> None:
        """Add a step to the totals."""
        self.totals.groups_trained += record.num_groups
        self.totals.sequences_trained += record.num_sequences
        self.totals.tokens_trained += record.num_tokens
        self.totals.skipped_steps += record.skipped
        self.totals.stale_groups += record.stale
        self.totals.filtered_groups += record.filtered
        self.totals.silenced_sequences += record.silenced

    def relieve(self) -> None:
        """Trained groups stay in the buffer until they are committed: keep their bytes from filling the server.

        Raises:
            VespoError: as `checkpoint`.
        """
        if self._uncommitted_bytes + self._pending_bytes <= self._max_bytes:
            return
        self.finish()
        if self._uncommitted_bytes > self._max_bytes:
            self.checkpoint()

    def checkpoint(self) -> None:
        """Begin a checkpoint of the current state, once the one before is committed; nothing if there is one already.

        Raises:
            FencedError: a newer learner epoch exists; nothing was written, or what was written is not counted.
            CheckpointError: it, or the one before, cannot be written.
        """
        self.check()
        if self._kept_step == self.step:
            return
        self.finish()
        clock = self._buffer.clock.read()
        if clock is None or clock.epoch != self.epoch:
            raise FencedError(f"learner epoch {self.epoch} of run {self._buffer.run} is over; no checkpoint is written")
        self.totals.wall_seconds = self.wall_seconds
        checkpoint = Checkpoint(
            run_id=self._run_id,
            session=self._session,
            step=self.step,
            version=self.version,
            epoch=self.epoch,
            layout=self._engine.layout,
            first_ticket=self._first_ticket,
            next_ticket=self._first_ticket + self._buffer.ledger().states["issued"],
            # A crash of the server may undo the latest commits, and this process may not live to repeat them.
            entry_ids=[*self._buffer.groups.recently_committed(), *self._uncommitted],
            totals=self.totals.model_copy(),
        )
        fresh = self._checkpoints.begin(checkpoint)
        write, weights = self._engine.capture(fresh), self.weights()
        entry_ids, self._uncommitted = self._uncommitted, []
        self._pending_bytes, self._uncommitted_bytes = self._uncommitted_bytes, 0
        self._kept_step = self.step

        def write_all() -> None:
            write()
            write_model_directory(weights, self._model_dir, fresh / MODEL)

        def keep() -> None:
            self._checkpoints.complete(checkpoint, write_all)
            self._buffer.groups.commit(self.epoch, entry_ids, checkpoint.step)
            self._pending_bytes = 0

        self._writer.start(keep)

    def check(self) -> None:
        """Raise what the checkpoint under way failed with."""
        self._writer.check()

    def finish(self) -> None:
        """Wait until every checkpoint is on disk and its groups are committed.

        Raises:
            CheckpointError, FencedError, BufferUnavailableError: what it failed with.
        """
        self._writer.finish()

    def close(self) -> None:
        """Give the checkpoint under way a minute to end."""
        self._writer.close(CLOSE_SECONDS)
