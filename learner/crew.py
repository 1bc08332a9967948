"""One policy on all ranks: rank 0 leads with the verbs of an engine, the others follow in lock-step.

Every verb that needs collectives is announced before it is begun, so that all ranks enter the same one. Batches travel
ahead of the order to train on them: the others decode and lay them out while the step before is computed.
"""

import logging
import queue
import threading
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from torch import Tensor

from learner.background import Background
from learner.batch import StepBatch
from learner.engine import Engine, UpdateResult
from learner.ranks import Message, Order, Ranks, attributed
from protocol.codec import decode_group, encode_group
from protocol.errors import CheckpointError, RankError
from protocol.manifest import Probe
from protocol.trajectory import Group

log = logging.getLogger(__name__)

CLOSE_SECONDS = 60.0


class LeadEngine:
    """The engine of rank 0, which takes the other ranks along.

    Attributes:
        layout, vocab_size: as those of the engine.
    """

    def __init__(self, engine: Engine, ranks: Ranks) -> None:
        self.layout = engine.layout
        self.vocab_size = engine.vocab_size
        self._engine = engine
        self._ranks = ranks

    def lay_out(self, number: int, groups: Sequence[Group]) -> StepBatch:
        """Lay out the batch of that number, and send its groups to the other ranks; any thread may call.

        Numbers grow.
        """
        if self._ranks.size > 1:
            self._ranks.say(Order.BATCH, number, [encode_group(group) for group in groups])
        return self._engine.lay_out(groups)

    def update(self, number: int, batch: StepBatch) -> UpdateResult:
        """Train on a batch that was laid out under this number."""
        self._ranks.say(Order.TRAIN, number)
        with attributed():
            return self._engine.update(batch)

    def tensors(self) -> dict[str, Tensor]:
        """As `Engine.tensors`."""
        self._ranks.say(Order.TENSORS)
        with attributed():
            return self._engine.tensors()

    def probe(self, sequences: Sequence[Sequence[int]]) -> Probe:
        """As `Engine.probe`."""
        self._ranks.say(Order.PROBE, parts=[np.asarray(sequence, "<i8").tobytes() for sequence in sequences])
        with attributed():
            return self._engine.probe(sequences)

    def load(self, directory: Path) -> None:
        """Restore the state of all ranks.

        Raises:
            CheckpointError: one of them does not find its share.
        """
        self._ranks.say(Order.LOAD, parts=[str(directory).encode()])
        _load(self._engine, self._ranks, directory)

    def capture(self, directory: Path) -> Callable[[], None]:
        """Copy the state of all ranks; what is returned writes it, and returns when all ranks have.

        Raises:
            CheckpointError, when it is written: one of the ranks could not.
        """
        self._ranks.say(Order.CAPTURE, parts=[str(directory).encode()])
        with attributed():
            write = self._engine.capture(directory)
        return lambda: _write(write, self._ranks)


def follow(engine: Engine, ranks: Ranks) -> None:
    """Do what rank 0 says until it says stop.

    Raises:
        RankError: rank 0, or another rank, failed or is gone.
    """
    follower = _Follower(engine, ranks)
    try:
        with attributed():
            while follower.obey(ranks.hear()):
                pass
    finally:
        follower.close()


class _Follower:
    """A rank other than 0, between two orders."""

    def __init__(self, engine: Engine, ranks: Ranks) -> None:
        self._engine = engine
        self._ranks = ranks
        self._writer = Background("checkpoint")
        self._encoded: queue.SimpleQueue[Message | None] = queue.SimpleQueue()
        self._batches: queue.SimpleQueue[tuple[int, StepBatch] | BaseException] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._prepare, name="feed", daemon=True)
        self._thread.start()

    def obey(self, message: Message) -> bool:
        """Carry out one order; False if it was to stop."""
        path = Path(message.parts[0].decode()) if message.order in (Order.LOAD, Order.CAPTURE) else Path()
        match message.order:
            case Order.BATCH:
                self._encoded.put(message)
            case Order.TRAIN:
                self._engine.update(self._batch(message.number))
            case Order.TENSORS:
                self._engine.tensors()
            case Order.PROBE:
                self._engine.probe([np.frombuffer(part, "<i8").tolist() for part in message.parts])
            case Order.LOAD:
                _load(self._engine, self._ranks, path)
            case Order.CAPTURE:
                self._writer.finish()
                write = self._engine.capture(path)
                self._writer.start(lambda: _write(write, self._ranks))
            case Order.STOP:
                self._writer.finish()
                return False
        return True

    def close(self) -> None:
        """End the threads."""
        self._encoded.put(None)
        self._thread.join(CLOSE_SECONDS)
        self._writer.close(CLOSE_SECONDS)

    def _batch(self, number: int) -> StepBatch:
        """The batch of that number; earlier ones, which rank 0 has taken apart, are passed over."""
        while True:
            ready = self._batches.get()
            if isinstance(ready, BaseException):
                raise ready
            if ready[0] == number:
                return ready[1]

    def _prepare(self) -> None:
        try:
            while (message := self._encoded.get()) is not None:
                groups = [decode_group(part) for part in message.parts]
                self._batches.put((message.number, self._engine.lay_out(groups)))
        except BaseException as error:  # handed to the training thread, which raises it
            self._batches.put(error)


def _load(engine: Engine, ranks: Ranks, directory: Path) -> None:
    problem = ""
    try:
        with attributed():
            engine.load(directory)
    except CheckpointError as error:
        problem = str(error)
        if ranks.size == 1:
            raise
    try:
        ranks.agree("load", problem)
    except RankError as error:
        if ranks.rank == 0:
            raise CheckpointError(str(error)) from error
        log.warning("%s", error)


def _write(write: Callable[[], None], ranks: Ranks) -> None:
    problem = ""
    try:
        write()
    except OSError as error:
        problem = f"the checkpoint cannot be written: {error}"
        if ranks.size == 1:
            raise
    try:
        ranks.agree("checkpoint", problem)
    except RankError as error:
        raise CheckpointError(str(error)) from error
