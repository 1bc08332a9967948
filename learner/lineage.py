"""Which groups the surviving line of checkpoints has consumed: each exactly once, whatever dies in between.

    train … train → checkpoint complete on disk → commit its groups → train …

A crash before the rename leaves the groups uncommitted: the next epoch is given them again and trains on them from the
older state. A crash between rename and commit is made good here, before anything is leased: the resumed checkpoint
lists its groups, and those already gone are not counted twice.
"""

import logging
import time
from collections.abc import Sequence
from pathlib import Path

from buffer.groups import LeasedGroup
from buffer.run import Buffer
from learner.checkpoint import Checkpoint, Checkpoints, Totals
from learner.engine import Engine
from learner.journal import open_session
from protocol.errors import CheckpointError, FencedError
from protocol.records import StepRecord
from protocol.settings import Settings

log = logging.getLogger(__name__)


class Lineage:
    """Progress of the run in this process, and how it is kept.

    Attributes:
        step: optimizer updates in the current state.
        version: number of the newest snapshot; before the first one of this epoch, the last of the epoch before.
        epoch: fencing token of this learner.
        totals: counted over all sessions.
        uncommitted_bytes: bytes in the buffer of groups that are trained but in no checkpoint yet.
    """

    def __init__(self, settings: Settings, run_dir: Path, buffer: Buffer, engine: Engine) -> None:
        """Load the newest checkpoint into `engine` and become the run's only learner.

        Raises:
            CheckpointError: there are checkpoints, but none that can be loaded.
            RunMismatchError: the buffer's run belongs to another run directory.
        """
        self.step = 0
        self.totals = Totals()
        self.uncommitted_bytes = 0
        self._uncommitted: list[str] = []
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

    def trained(self, leased: Sequence[LeasedGroup]) -> None:
        """These groups' effect is in the weights: one step more."""
        self.step += 1
        self._uncommitted += [item.entry_id for item in leased]
        self.uncommitted_bytes += sum(item.num_bytes for item in leased)

    def count(self, record: StepRecord) -> None:
        """Add a step to the totals."""
        self.totals.groups_trained += record.num_groups
        self.totals.sequences_trained += record.num_sequences
        self.totals.tokens_trained += record.num_tokens
        self.totals.skipped_steps += record.skipped
        self.totals.stale_groups += record.stale
        self.totals.silenced_sequences += record.silenced

    def checkpoint(self) -> None:
        """Write a checkpoint of the current state, then commit the groups it holds; nothing if there is one already.

        Raises:
            FencedError: a newer learner epoch exists; nothing was written, or what was written is not counted.
            CheckpointError: it cannot be written.
        """
        if self._kept_step == self.step:
            return
        clock = self._buffer.clock.read()
        if clock is None or clock.epoch != self.epoch:
            raise FencedError(f"learner epoch {self.epoch} of run {self._buffer.run} is over; no checkpoint is written")
        self.totals.wall_seconds = self.wall_seconds
        self._checkpoints.write(
            Checkpoint(
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
                totals=self.totals,
            ),
            self._engine.save,
        )
        self._kept_step = self.step
        self._buffer.groups.commit(self.epoch, self._uncommitted, self.step)
        self._uncommitted, self.uncommitted_bytes = [], 0
