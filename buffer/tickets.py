"""Tickets: permission to generate, handed out under the admission rule and held by a lease.

An actor's loop: `issue`; with nothing issued, `wait` with the cursor it got; while generating, `renew`; at the end
`Groups.submit`, `fail` or `give_back`. Whatever it forgets, expiry undoes.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import redis

from buffer.connection import command
from buffer.events import Events
from buffer.keys import Keys
from buffer.scripts import Scripts
from protocol.trajectory import Ticket

EXPIRED_PER_CALL = 1000
MAX_ERROR_CHARACTERS = 2000


@dataclass(frozen=True, slots=True)
class Issued:
    """Answer to a request for tickets.

    Attributes:
        tickets: what was issued; may be fewer than asked for.
        reason: "ok"; without tickets "admission" (actors are far enough ahead), "stopped" (the run is not running) or
            "no run" (no learner has begun it).
        cursor: hand it to `Tickets.wait`.
    """

    tickets: list[Ticket]
    reason: str
    cursor: str

    @classmethod
    def parse(cls, reply: Sequence[bytes]) -> Self:
        """Read what the script replies."""
        return cls([parse_ticket(member) for member in reply[2:]], reply[0].decode(), reply[1].decode())


@dataclass(frozen=True, slots=True)
class DeadTicket:
    """A ticket given up after `attempts` failures, the last of them `error`."""

    index: int
    attempts: int
    error: str


class Tickets:
    """The run's tickets, as actors see them."""

    def __init__(self, client: redis.Redis, keys: Keys, scripts: Scripts, events: Events) -> None:
        self._client = client
        self._keys = keys
        self._scripts = scripts
        self._events = events

    def issue(self, served_version: int, limit: int, lease_seconds: float) -> Issued:
        """Lease up to `limit` tickets to an actor that serves `served_version` (-1: none yet, and none issued).

        Overdue leases are ended first; tickets to retry are issued before new ones.
        """
        return Issued.parse(self._scripts.run("issue", *issue_arguments(served_version, limit, lease_seconds)))

    def wait(self, cursor: str, timeout_seconds: float) -> None:
        """Block until something moved after `cursor` (of `issue`), or the timeout."""
        self._events.wait(cursor, timeout_seconds)

    def renew(self, tickets: Sequence[Ticket], lease_seconds: float) -> list[Ticket]:
        """Prolong leases; returns the tickets whose lease is gone, whose groups would be refused."""
        if not tickets:
            return []
        gone = self._scripts.run("renew", *renew_arguments(tickets, lease_seconds))
        return [parse_ticket(member) for member in gone]

    def give_back(self, tickets: Sequence[Ticket]) -> int:
        """Return unfinished tickets to the front of the queue without counting a failure; returns how many it held."""
        return int(self._scripts.run("give_back", *map(ticket_member, tickets))) if tickets else 0

    def fail(self, ticket: Ticket, error: str) -> None:
        """Count a failure: the ticket is retried, or dead after `max_attempts`. Without its lease nothing changes."""
        self._scripts.run("fail", *fail_arguments(ticket, error))

    def expire(self) -> int:
        """End every overdue lease, each a failure of its ticket; returns how many there were."""
        total = 0
        while (ended := int(self._scripts.run("expire", EXPIRED_PER_CALL))) > 0:
            total += ended
        return total

    def retry_dead(self, indices: Sequence[int] | None = None) -> int:
        """Try tickets that were given up again, with all their attempts: those of `indices`, or every one.

        Returns:
            How many of them were dead.
        """
        if indices is not None and not indices:
            return 0
        return int(self._scripts.run("retry_dead", *(indices or ())))

    def dead(self, limit: int = 100) -> list[DeadTicket]:
        """The `limit` tickets given up last, newest first."""
        entries = command(self._client, "XREVRANGE", self._keys.dead, "+", "-", "COUNT", limit)
        return [
            DeadTicket(int(fields[b"index"]), int(fields[b"attempts"]), fields[b"error"].decode("utf-8", "replace"))
            for _, fields in entries
        ]


def issue_arguments(served_version: int, limit: int, lease_seconds: float) -> tuple[int, int, int]:
    """What the script `issue` takes."""
    if limit < 1:
        raise ValueError(f"limit is {limit}; ask for at least one ticket")
    return served_version, limit, _milliseconds(lease_seconds)


def renew_arguments(tickets: Sequence[Ticket], lease_seconds: float) -> tuple[int | str, ...]:
    """What the script `renew` takes."""
    return (_milliseconds(lease_seconds), *map(ticket_member, tickets))


def fail_arguments(ticket: Ticket, error: str) -> tuple[str, str]:
    """What the script `fail` takes."""
    return ticket_member(ticket), error[:MAX_ERROR_CHARACTERS]


def ticket_member(ticket: Ticket) -> str:
    """How a ticket is written in Redis: `index:attempt`."""
    return f"{ticket.index}:{ticket.attempt}"


def parse_ticket(member: bytes) -> Ticket:
    """Inverse of `ticket_member`."""
    index, _, attempt = member.partition(b":")
    return Ticket(int(index), int(attempt))


def _milliseconds(lease_seconds: float) -> int:
    if not 0 < lease_seconds < 1e6:
        raise ValueError(f"a lease of {lease_seconds} seconds is not between 0 and 1e6")
    return max(1, round(1000 * lease_seconds))
