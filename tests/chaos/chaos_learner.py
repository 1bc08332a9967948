"""A process that learns by heart: its only weights are the list of groups it was trained on, kept in checkpoints.

The protocol with the buffer is the real learner's: begin an epoch, commit what the newest checkpoint holds, publish,
lease, train, publish, and commit after each checkpoint. Sessions order checkpoints before steps do.
"""

import json
import os
import random
import sys
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path

from buffer_samples import make_manifest

from buffer.connection import connect
from buffer.groups import LeasedGroup
from buffer.run import Buffer
from protocol.errors import BufferUnavailableError, FencedError

GROUPS_PER_STEP = 8
MAX_LAG = 2
DRAINED, FENCED, UNAVAILABLE = 0, 3, 4


@dataclass
class Checkpoint:
    """`lineage`: ticket index and prompt of every group the weights were trained on, in order."""

    step: int = 0
    lineage: list[tuple[int, str]] = field(default_factory=list)
    entry_ids: list[str] = field(default_factory=list)


def newest_checkpoint(directory: Path) -> Checkpoint:
    """Of the latest session that wrote one."""
    files = sorted(directory.glob("session-*.json"))
    return Checkpoint(**json.loads(files[-1].read_text())) if files else Checkpoint()


def learn(url: str, run: str, directory: Path, session: int) -> None:
    """Train until the run drains; exits with a code that tells how it ended."""
    try:
        Learner(url, run, directory, session).train()
    except FencedError:
        sys.exit(FENCED)
    except BufferUnavailableError:
        sys.exit(UNAVAILABLE)


class Learner:
    def __init__(self, url: str, run: str, directory: Path, session: int) -> None:
        self.directory, self.session = directory, session
        self.rng = random.Random(session)
        self.buffer = Buffer(connect(url, reconnect_seconds=20), run)
        self.epoch = self.buffer.begin_epoch(
            run_id="chaos", groups_per_version=GROUPS_PER_STEP, max_lag=MAX_LAG, max_attempts=4, max_bytes=1 << 16
        )
        # only now that no other can commit any more: a checkpoint written later would be missed
        self.state = newest_checkpoint(directory)
        self.buffer.groups.commit(self.epoch, self.state.entry_ids, self.state.step)
        self.uncommitted: list[str] = []
        clock = self.buffer.clock.read()
        if clock is None:
            raise FencedError
        self.version = clock.version
        self.publish()

    def publish(self) -> None:
        self.version += 1
        self.buffer.clock.publish(make_manifest(self.version, self.epoch, self.state.step))

    def train(self) -> None:
        next_checkpoint = self.state.step + self.rng.randint(1, 6)
        while (chosen := self.gather()) is not None:
            time.sleep(self.rng.random() * 0.01)
            self.state.lineage += [
                (item.group.ticket.index, item.group.prompt_tokens.tobytes().hex()) for item in chosen
            ]
            self.uncommitted += [item.entry_id for item in chosen]
            self.state.step += 1
            self.publish()
            if self.state.step >= next_checkpoint:
                self.checkpoint()
                next_checkpoint = self.state.step + self.rng.randint(1, 6)
        self.checkpoint()

    def gather(self) -> list[LeasedGroup] | None:
        chosen: list[LeasedGroup] = []
        while len(chosen) < GROUPS_PER_STEP:
            if self.buffer.control.state() != "running":
                return None
            arrived = self.buffer.groups.lease(self.epoch, GROUPS_PER_STEP - len(chosen), 0.3)
            if not arrived:
                self.buffer.tickets.expire()
            stale = [item for item in arrived if self.version - item.group.oldest_version > MAX_LAG]
            dull = [item for item in arrived if item not in stale and self.rng.random() < 0.02]
            if stale:
                self.buffer.groups.return_stale(self.epoch, stale)
            if dull:
                self.buffer.groups.mark_filtered(self.epoch, dull)
            chosen += [item for item in arrived if item not in stale and item not in dull]
        return chosen

    def checkpoint(self) -> None:
        clock = self.buffer.clock.read()
        if clock is None or clock.epoch != self.epoch:
            raise FencedError
        self.state.entry_ids = [*self.buffer.groups.recently_committed(), *self.uncommitted]
        place = self.directory / f"session-{self.session:06d}-step-{self.state.step:09d}.json"
        fresh = place.with_suffix(".new")
        with fresh.open("w") as file:
            json.dump(asdict(self.state), file)
            file.flush()
            os.fsync(file.fileno())
        fresh.rename(place)
        time.sleep(self.rng.random() * 0.01)  # where a crash hurts most
        self.buffer.groups.commit(self.epoch, self.uncommitted, self.state.step)
        self.uncommitted = []
