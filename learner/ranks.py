"""How rank 0 of a learner of several processes tells the others what to do, and all learn that one is gone.

    rank 0                                             every other rank
    say(order, bytes …) ── header, sizes, bytes ─────► ear thread ──► hear()
    pulse thread, "still here" ──────────────────────►
    agree(problem) ◄────────── all, before anybody goes on ─────────► agree(problem)

Orders travel as tensors of plain bytes over gloo, whatever carries the gradients: rank 0 alone reads from the buffer,
and its CPU's bytes need no GPU. Nothing is pickled, and sizes are checked before anything is allocated.

A rank that dies closes its connections, which ends every exchange with it at once; one that stands still is noticed by
the lack of a pulse (rank 0) or by the timeout of a collective (`learner.rank_timeout_seconds`). A GPU's collective does
not notice that a peer is gone, so a process that is still in one half a minute later is ended. Left out: going on
without a rank.
"""

import logging
import os
import queue
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from enum import IntEnum

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from protocol.codec import MAX_BODY_BYTES, MAX_HEADER_BYTES
from protocol.errors import RankError

log = logging.getLogger(__name__)

PULSE_SECONDS = 5.0
GRACE_SECONDS = 30.0
CLOSE_SECONDS = 10.0
SILENCE_SECONDS = 60.0  # without a pulse, rank 0 is taken for gone
MAX_PART_BYTES = MAX_HEADER_BYTES + MAX_BODY_BYTES + 1024
MAX_PARTS = 1 << 20
MAX_PROBLEM_BYTES = 4096


def meet() -> None:
    """Wait until every process of the group is here.

    Raises:
        RankError: one of them is gone.
    """
    with attributed():
        dist.barrier()


class Order(IntEnum):
    """What rank 0 says, and what comes with it."""

    PULSE = 0
    BATCH = 1  # number; encoded groups
    TRAIN = 2  # number of the batch
    TENSORS = 3
    PROBE = 4  # token sequences, int64
    LOAD = 5  # path
    CAPTURE = 6  # path
    STOP = 7  # why, empty when all is well


@dataclass(frozen=True, slots=True)
class Message:
    """One order with its number and parts."""

    order: Order
    number: int = 0
    parts: tuple[bytes, ...] = ()


class Ranks:
    """The processes of one learner; every rank makes one, at the same place. Alone, it does nothing.

    Attributes:
        rank, size: this process, and how many there are.
    """

    def __init__(self, timeout_seconds: float) -> None:
        """Join what the process group (`learner.sharding`) has; `timeout_seconds` as `learner.rank_timeout_seconds`."""
        self.rank, self.size = dist.get_rank(), dist.get_world_size()
        self._lock = threading.Lock()
        self._closed = threading.Event()
        self._error: RankError | None = None
        self._heard: queue.SimpleQueue[Message | RankError] = queue.SimpleQueue()
        if self.size == 1:
            return
        silence = timedelta(seconds=SILENCE_SECONDS)
        self._orders = dist.new_group(backend="gloo", timeout=silence)
        # one for each thread that may be in it: training, and checkpoints
        limit = timedelta(seconds=timeout_seconds)
        self._agreements = {name: dist.new_group(backend="gloo", timeout=limit) for name in ("load", "checkpoint")}
        work = self._beat if self.rank == 0 else self._listen
        self._thread = threading.Thread(target=work, name="ranks", daemon=True)
        self._thread.start()

    def say(self, order: Order, number: int = 0, parts: Sequence[bytes] = ()) -> None:
        """Rank 0: tell the others. Threads may share it.

        Raises:
            RankError: one of them is gone.
        """
        if self.size == 1:
            return
        self.check()
        with self._lock, attributed():
            sizes = [len(part) for part in parts]
            self._broadcast(torch.tensor([order, number, len(parts)]))
            if parts:
                self._broadcast(torch.tensor(sizes))
                self._broadcast(torch.from_numpy(np.frombuffer(b"".join(parts), np.uint8).copy()))

    def hear(self, timeout_seconds: float | None = None) -> Message:
        """Another rank: the next order.

        Raises:
            RankError: rank 0 is gone, or failed.
        """
        heard = self._heard.get(timeout=timeout_seconds)
        if isinstance(heard, RankError):
            raise heard
        return heard

    def agree(self, where: str, problem: str = "") -> None:
        """Wait until all ranks have come here, `where` being "load" or "checkpoint".

        Raises:
            RankError: one of them has a problem, or is gone.
        """
        if self.size == 1:
            return
        group = self._agreements[where]
        text = problem.encode()[:MAX_PROBLEM_BYTES].ljust(MAX_PROBLEM_BYTES, b"\0")
        mine = torch.from_numpy(np.frombuffer(text, np.uint8).copy())
        everyone = [torch.empty_like(mine) for _ in range(self.size)]
        with attributed():
            dist.all_gather(everyone, mine, group=group)
        for rank, text_of_rank in enumerate(everyone):
            if said := text_of_rank.numpy().tobytes().rstrip(b"\0").decode(errors="replace"):
                raise RankError(f"rank {rank}: {said}")

    def check(self) -> None:
        """Raise that another rank is gone, if that has been noticed."""
        if self._error is not None:
            raise self._error

    def stop(self, why: str = "") -> None:
        """This rank is done; rank 0 also ends the others, as far as it reaches them. `why`: empty if all is well."""
        self._closed.set()
        if self.size > 1 and self.rank == 0 and self._error is None:
            try:
                self.say(Order.STOP, parts=[why.encode()])
            except RankError as error:
                log.warning("%s", error)
        if self.size > 1:
            self._thread.join(CLOSE_SECONDS)
            if dist.get_backend() == "gloo":  # its threads must not outlive the interpreter
                dist.destroy_process_group()

    def _broadcast(self, tensor: Tensor) -> Tensor:
        dist.broadcast(tensor, src=0, group=self._orders)
        return tensor

    def _beat(self) -> None:
        while not self._closed.wait(PULSE_SECONDS):
            try:
                self.say(Order.PULSE)
            except RankError as error:
                self._lose(error)
                return

    def _listen(self) -> None:
        try:
            with attributed():
                while True:
                    message = self._receive()
                    if message.order == Order.STOP and (why := message.parts[0].decode()):
                        raise RankError(f"rank 0 failed: {why}")
                    if message.order != Order.PULSE:
                        self._heard.put(message)
                    if message.order == Order.STOP:
                        return
        except RankError as error:
            self._lose(error)

    def _lose(self, error: RankError) -> None:
        """Tell the training thread, and end the process if that is stuck."""
        self._error = error
        self._heard.put(error)
        if not self._closed.wait(GRACE_SECONDS):
            log.critical("%s. This process is still in a collective and is ended", error)
            os._exit(1)

    def _receive(self) -> Message:
        order, number, num_parts = self._broadcast(torch.zeros(3, dtype=torch.int64)).tolist()
        if not 0 <= num_parts <= MAX_PARTS:
            raise RankError(f"rank 0 announces {num_parts} parts")
        if num_parts == 0:
            return Message(Order(order), number)
        sizes = self._broadcast(torch.zeros(num_parts, dtype=torch.int64)).tolist()
        if min(sizes) < 0 or max(sizes) > MAX_PART_BYTES:
            raise RankError(f"rank 0 announces a part of {max(sizes)} bytes; at most {MAX_PART_BYTES} are taken")
        whole = self._broadcast(torch.empty(sum(sizes), dtype=torch.uint8)).numpy().tobytes()
        ends = np.cumsum(sizes)
        parts = tuple(whole[end - size : end] for size, end in zip(sizes, ends, strict=True))
        return Message(Order(order), number, parts)


@contextmanager
def attributed() -> Iterator[None]:
    """Turn what a collective raises when a rank is gone into a typed error."""
    try:
        yield
    except (dist.DistError, RuntimeError) as error:
        if not isinstance(error, dist.DistError) and "gloo" not in str(error):
            raise
        raise RankError(
            f"another rank of the learner is gone or stands still: {str(error).splitlines()[0]}; its own output says "
            "why. Start all ranks again: they resume from the last checkpoint"
        ) from error
