"""Scripted actors for `deploy.bench.scale`: what an actor written with asyncio says to the server, with no engine."""

import asyncio
import multiprocessing
import os
import random
import resource
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from multiprocessing.connection import Connection
from multiprocessing.synchronize import Event

import numpy as np

from buffer.aio import AsyncBuffer, connect_async
from protocol.records import ActorStatus
from protocol.trajectory import Completion, Group, Ticket, VersionSpan

COMPLETIONS, TOKENS = 8, 64
LEASE_SECONDS = 60.0
HEARTBEAT_SECONDS = 10.0
"""Less than the 15 seconds after which a learner takes an actor for dead."""
WAIT_SECONDS = 30.0
SUBMIT_SECONDS = 60.0
START_SECONDS = 60.0
CONNECTING_AT_ONCE = 50
CANCEL_SECONDS = 1.0
FILES_BESIDE_CONNECTIONS = 200


@dataclass(frozen=True, slots=True)
class FleetJob:
    """What a process of actors does: `num_actors` of them, each taking `generation_seconds` for a group, one by one."""

    url: str
    run: str
    num_actors: int
    generation_seconds: float


@dataclass(slots=True)
class Latencies:
    """Seconds that calls took while the measurement ran."""

    issue: list[float] = field(default_factory=list)
    submit: list[float] = field(default_factory=list)


class Fleet:
    """Actors in processes of their own, connected; use `running`."""

    def __init__(self, jobs: list[FleetJob]) -> None:
        context = multiprocessing.get_context("spawn")
        self._recording, self._stopped = context.Event(), context.Event()
        self._pipes, self._processes = [], []
        for job in jobs:
            ours, theirs = context.Pipe()
            process = context.Process(target=_act, args=(job, theirs, self._recording, self._stopped), daemon=True)
            process.start()
            theirs.close()
            self._pipes.append(ours)
            self._processes.append(process)

    def wait_connected(self) -> None:
        """Return once every actor has its connection.

        Raises:
            RuntimeError: a process of actors ended, or takes too long; what it printed says why.
        """
        for pipe in self._pipes:
            self._receive(pipe)

    def record(self) -> None:
        """From now on latencies count."""
        self._recording.set()

    def finish(self) -> Latencies:
        """Stop counting and acting; what was counted."""
        self._recording.clear()
        self._stopped.set()
        every = [self._receive(pipe) for pipe in self._pipes]
        for process in self._processes:
            process.join()
        return Latencies([s for one in every for s in one.issue], [s for one in every for s in one.submit])

    def kill(self) -> None:
        """End what is still there."""
        for process in self._processes:
            process.kill()
            process.join()

    @staticmethod
    def _receive(pipe: "Connection") -> Latencies:
        try:
            if pipe.poll(START_SECONDS):
                received: Latencies = pipe.recv()
                return received
        except EOFError:
            pass
        raise RuntimeError("a process of the bench's actors ended or hangs; see what it printed")


@contextmanager
def running(jobs: list[FleetJob]) -> Iterator[Fleet]:
    """A fleet, gone at the end whatever happens."""
    fleet = Fleet(jobs)
    try:
        yield fleet
    finally:
        fleet.kill()


def _act(job: FleetJob, pipe: "Connection", recording: Event, stopped: Event) -> None:
    """Body of a process."""
    wanted = job.num_actors + FILES_BESIDE_CONNECTIONS
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (min(wanted, hard), hard))
    pipe.send(asyncio.run(_fleet(job, pipe, recording, stopped)))


async def _fleet(job: FleetJob, pipe: "Connection", recording: Event, stopped: Event) -> Latencies:
    latencies = Latencies()
    gate = asyncio.Semaphore(CONNECTING_AT_ONCE)

    async def connected() -> AsyncBuffer:
        async with gate:
            return AsyncBuffer(await connect_async(job.url, run=job.run), job.run)

    buffers = await asyncio.gather(*(connected() for _ in range(job.num_actors)))
    pipe.send(Latencies())
    actors = {asyncio.create_task(_actor(job, buffer, recording, latencies)) for buffer in buffers}
    ended = asyncio.create_task(asyncio.to_thread(stopped.wait))
    await asyncio.wait({ended, *actors}, return_when=asyncio.FIRST_COMPLETED)
    for actor in actors:
        if actor.done():
            actor.result()  # none returns, so it failed
    while actors:
        for actor in actors:
            actor.cancel()
        _, actors = await asyncio.wait(actors, timeout=CANCEL_SECONDS)  # redis-py may take one for a timeout of its own
    return latencies


async def _actor(job: FleetJob, buffer: AsyncBuffer, recording: Event, latencies: Latencies) -> None:
    """The newest version, a ticket, a pause that stands for generation, a group; for ever."""
    name = f"{os.getpid()}-{id(buffer)}"
    await asyncio.sleep(random.uniform(0, job.generation_seconds))
    beat = 0.0
    while True:
        version = await _version(buffer)
        if time.monotonic() - beat > HEARTBEAT_SECONDS:
            beat = time.monotonic()
            await buffer.actors.heartbeat(name, ActorStatus(state="serving", pid=os.getpid(), host="bench"))
        started = time.monotonic()
        issued = await buffer.tickets.issue(version, 1, LEASE_SECONDS)
        if recording.is_set():
            latencies.issue.append(time.monotonic() - started)
        if not issued.tickets:
            await buffer.tickets.wait(issued.cursor, WAIT_SECONDS)
            continue
        await asyncio.sleep(job.generation_seconds)
        group = make_group(issued.tickets[0], version)
        started = time.monotonic()
        await buffer.groups.submit(group, SUBMIT_SECONDS)
        if recording.is_set():
            latencies.submit.append(time.monotonic() - started)


async def _version(buffer: AsyncBuffer) -> int:
    clock = await buffer.clock.read()
    return -1 if clock is None else clock.version


def make_group(ticket: Ticket, version: int) -> Group:
    """A group of `COMPLETIONS` times `TOKENS` tokens."""
    return replace(
        _TEMPLATE, ticket=ticket, prompt_index=ticket.index, completions=(_completion(version),) * COMPLETIONS
    )


def _completion(version: int) -> Completion:
    return Completion(
        tokens=np.arange(TOKENS, dtype=np.int32),
        logprobs=np.full(TOKENS, -0.5, np.float32),
        mask=np.ones(TOKENS, np.uint8),
        spans=(VersionSpan(0, TOKENS, version),),
        reward=1.0,
        finish_reason="stop",
    )


_TEMPLATE = Group(Ticket(0, 0), 0, np.arange(32, dtype=np.int32), (_completion(0),), "bench", 1.0)
