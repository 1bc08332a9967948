"""A process that acts: takes tickets, makes groups up, sometimes fails, forgets, repeats itself or sends rubbish."""

import random
import time

import numpy as np

from buffer.connection import connect
from buffer.keys import Keys
from buffer.run import Buffer
from buffer.tickets import ticket_member
from protocol.errors import BufferUnavailableError
from protocol.trajectory import Completion, Group, Ticket, VersionSpan

LEASE_SECONDS = 1.0
BATCH = 6


def act(url: str, run: str, seed: int) -> None:
    """Work until the run is no longer running; a server that stays away for long is waited for anew."""
    rng = random.Random(seed)
    buffer = Buffer(connect(url, reconnect_seconds=20), run)
    while True:
        try:
            clock = buffer.clock.read()
            issued = buffer.tickets.issue(-1 if clock is None else clock.version, BATCH, LEASE_SECONDS)
            if issued.reason == "stopped" and buffer.control.state() == "draining":
                return
            if clock is not None:
                for ticket in issued.tickets:
                    _treat(buffer, ticket, clock.version, rng)
            if not issued.tickets:
                buffer.tickets.wait(issued.cursor, 0.5)
        except BufferUnavailableError:
            continue


def _treat(buffer: Buffer, ticket: Ticket, version: int, rng: random.Random) -> None:
    time.sleep(rng.random() * 0.004)
    group = make_group(ticket, version, rng)
    match rng.choices(["submit", "repeat", "renew", "fail", "return", "forget", "rubbish"], [80, 4, 6, 3, 3, 2, 2])[0]:
        case "fail":
            buffer.tickets.fail(ticket, "made up")
        case "return":
            buffer.tickets.give_back([ticket])
        case "forget":
            pass
        case "rubbish":
            name = rng.randbytes(8).hex()
            stage = ("SET", f"{Keys(buffer.run).payload}:{name}", rng.randbytes(200), "PX", 60_000)
            buffer.groups._scripts.run_after(stage, "submit", ticket_member(ticket), name)
        case "renew":
            if not buffer.tickets.renew([ticket], LEASE_SECONDS):
                buffer.groups.submit(group, 20)
        case choice:
            buffer.groups.submit(group, 20)
            if choice == "repeat":
                buffer.groups.submit(group, 20)


def make_group(ticket: Ticket, version: int, rng: random.Random) -> Group:
    """A group whose prompt is a number that no other group has."""
    length = rng.randint(1, 60)
    completion = Completion(
        tokens=np.arange(length, dtype=np.int32),
        logprobs=np.full(length, -0.5, np.float32),
        mask=np.ones(length, np.uint8),
        spans=(VersionSpan(0, length, version),),
        reward=1.0,
        finish_reason="stop",
    )
    unique = np.frombuffer(rng.randbytes(12), np.uint32).astype(np.int64) % (1 << 31)
    return Group(ticket, ticket.index, unique.astype(np.int32), (completion, completion), "actor", 0.0)
