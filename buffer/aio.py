"""A run's buffer for actors written with asyncio. The learner, and actors with threads, use `buffer.run`.

What is sent and what replies mean is shared with the classes of that name in `buffer.tickets`, `buffer.groups` and so
on; here is only the waiting. A task that is cancelled loses its connection, and with it nothing that leases do not
bring back.
"""

import time
from collections.abc import Sequence
from typing import Any

import redis
import redis.asyncio

from buffer.aio_connection import connect_async
from buffer.clock import clock_line, parse_clock
from buffer.connection import describe, guard
from buffer.events import cursor_line, parse_cursor, wait_line
from buffer.exchange import Argument
from buffer.keys import Keys
from buffer.registry import status_of_the_gone
from buffer.scripts import by_digest, by_source, typed_error
from buffer.submission import Obstacle, Submission
from buffer.tickets import Issued, fail_arguments, issue_arguments, parse_ticket, renew_arguments, ticket_member
from protocol.clock import ClockState
from protocol.records import ActorStatus
from protocol.trajectory import Group, Ticket

__all__ = ["AsyncBuffer", "connect_async"]


class AsyncBuffer:
    """What an actor needs of one run. Tasks may share it; each call in progress takes a connection.

    Attributes:
        run: name of the run.
        tickets, groups: work, and what is delivered.
        clock: policy versions.
        actors: who is alive.
    """

    def __init__(self, client: redis.asyncio.Redis, run: str) -> None:
        self.run = run
        server = _Server(client, Keys(run))
        self.tickets = AsyncTickets(server)
        self.groups = AsyncGroups(server)
        self.clock = AsyncClock(server)
        self.actors = AsyncRegistry(server)


class AsyncTickets:
    """See `buffer.tickets.Tickets`."""

    def __init__(self, server: "_Server") -> None:
        self._server = server

    async def issue(self, served_version: int, limit: int, lease_seconds: float) -> Issued:
        """Lease up to `limit` tickets to an actor that serves `served_version` (-1: none yet, and none issued)."""
        return Issued.parse(await self._server.script("issue", *issue_arguments(served_version, limit, lease_seconds)))

    async def wait(self, cursor: str, timeout_seconds: float) -> None:
        """Block until something moved after `cursor` (of `issue`), or the timeout."""
        await self._server.wait(self._server.keys.events, cursor, timeout_seconds)

    async def renew(self, tickets: Sequence[Ticket], lease_seconds: float) -> list[Ticket]:
        """Prolong leases; returns the tickets whose lease is gone, whose groups would be refused."""
        if not tickets:
            return []
        gone = await self._server.script("renew", *renew_arguments(tickets, lease_seconds))
        return [parse_ticket(member) for member in gone]

    async def give_back(self, tickets: Sequence[Ticket]) -> int:
        """Return unfinished tickets without counting a failure; returns how many leases there were."""
        return int(await self._server.script("give_back", *map(ticket_member, tickets))) if tickets else 0

    async def fail(self, ticket: Ticket, error: str) -> None:
        """Count a failure: the ticket is retried, or dead after `max_attempts`. Without its lease nothing changes."""
        await self._server.script("fail", *fail_arguments(ticket, error))


class AsyncGroups:
    """See `buffer.groups.Groups`."""

    def __init__(self, server: "_Server") -> None:
        self._server = server
        self._maxmemory: int | None = None

    async def submit(self, group: Group, timeout_seconds: float) -> bool:
        """Deliver the group of a lease, waiting while the buffer or the server's memory is full.

        Returns:
            True if it was accepted; False if the lease is gone: expired, given back, or used by an earlier call.

        Raises:
            CodecError: the group is not one a learner could train on.
            BufferUnavailableError: no room within `timeout_seconds`, or no server.
        """
        submission = Submission(self._server.keys, group, timeout_seconds)
        while True:
            outcome: bool | Obstacle | None = await self._memory_obstacle(submission)
            while outcome is None:
                stage, arguments = submission.lines()
                outcome = submission.outcome(await self._server.script_after(stage, "submit", *arguments))
            if isinstance(outcome, bool):
                return outcome
            remaining = submission.remaining_seconds(outcome)
            await self._server.wait(self._server.keys.space, outcome.cursor, remaining)

    async def _memory_obstacle(self, submission: Submission) -> Obstacle | None:
        if self._maxmemory is None:
            self._maxmemory = await self._memory("maxmemory")
        if not self._maxmemory:
            return None
        cursor = parse_cursor(await self._server.command(*cursor_line(self._server.keys.space)))
        return submission.memory_obstacle(
            await self._memory("used_memory"), self._maxmemory, describe(self._server.client), cursor
        )

    async def _memory(self, figure: str) -> int:
        return int((await self._server.command("INFO", "memory"))[figure])


class AsyncClock:
    """See `buffer.clock.PolicyClock`."""

    def __init__(self, server: "_Server") -> None:
        self._server = server

    async def read(self) -> ClockState | None:
        """One atomic reading, or None if no learner has begun this run. Version -1: nothing is published yet."""
        return parse_clock(await self._server.command(*clock_line(self._server.keys)))


class AsyncRegistry:
    """See `buffer.registry.ActorRegistry`."""

    def __init__(self, server: "_Server") -> None:
        self._server = server

    async def heartbeat(self, name: str, status: ActorStatus) -> None:
        """Say that actor `name` is alive, at the server's time."""
        await self._server.script("heartbeat", name, status.model_dump_json())

    async def leave(self, name: str) -> None:
        """Take an actor off the list of the living; its totals stay."""
        data = await self._server.command("HGET", self._server.keys.actors, name)
        await self._server.script("leave", name, status_of_the_gone(data))


class _Server:
    """Commands, scripts and waits of one run, with failures attributed as everywhere in this room."""

    def __init__(self, client: redis.asyncio.Redis, keys: Keys) -> None:
        self.client = client
        self.keys = keys
        self._all_keys = keys.all()

    async def command(self, *line: Argument) -> Any:
        with guard(self.client):
            return await self.client.execute_command(*line)  # type: ignore[no-untyped-call]

    async def script(self, name: str, *arguments: Argument) -> Any:
        try:
            try:
                return await self.command(*by_digest(name, self._all_keys, arguments))
            except redis.exceptions.NoScriptError:
                return await self.command(*by_source(name, self._all_keys, arguments))
        except redis.ResponseError as error:
            raise typed_error(error) from error

    async def script_after(self, first: Sequence[Argument], name: str, *arguments: Argument) -> Any:
        """Send a plain command and a script in one go, not atomically; the script's reply."""
        with guard(self.client):
            async with self.client.pipeline(transaction=False) as pipeline:
                pipeline.execute_command(*first)
                pipeline.execute_command(*by_digest(name, self._all_keys, arguments))
                replies = await pipeline.execute(raise_on_error=False)
            for reply in replies:
                if isinstance(reply, redis.exceptions.NoScriptError):
                    break
                if isinstance(reply, redis.ResponseError):
                    raise typed_error(reply) from reply
            else:
                return replies[-1]
        return await self.script(name, *arguments)

    async def wait(self, key: str, cursor: str, timeout_seconds: float) -> None:
        deadline = time.monotonic() + timeout_seconds
        while (remaining := deadline - time.monotonic()) > 0:
            if await self.command(*wait_line({key: cursor}, remaining)):
                return
