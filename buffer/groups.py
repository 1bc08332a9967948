"""Groups on their way from actor to learner: submitted once, leased to one epoch, gone when a checkpoint has them.

Left out: several learner readers. One process leases (rank 0) and hands groups to its other ranks.
"""

import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass

import redis

from buffer.connection import command, describe, guard
from buffer.events import Events
from buffer.keys import Keys
from buffer.scripts import Scripts
from buffer.tickets import MAX_ERROR_CHARACTERS, parse_ticket, ticket_member
from protocol.codec import decode_group, encode_group
from protocol.errors import BufferUnavailableError, CodecError
from protocol.trajectory import Group

MEMORY_RESERVE = 0.1
"""Share of the server's maxmemory that submitters leave free, so that transitions can go on."""
log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class LeasedGroup:
    """A group in the learner's hands.

    Attributes:
        entry_id: names it until it is committed, returned or filtered, in checkpoints too: stream id and ticket.
        num_bytes: size of its encoding.
    """

    entry_id: str
    group: Group
    num_bytes: int


@dataclass(frozen=True, slots=True)
class Depth:
    """Groups waiting for the learner, groups it holds uncommitted, and the bytes of both."""

    buffered: int
    leased: int
    num_bytes: int


class Groups:
    """The run's stream of groups."""

    def __init__(self, client: redis.Redis, keys: Keys, scripts: Scripts, events: Events) -> None:
        self._client = client
        self._keys = keys
        self._scripts = scripts
        self._events = events
        self._maxmemory: int | None = None
        self._reader = (0, "0-0")  # the epoch that leases here, and the last entry it has seen
        self._held: dict[int, str] = {}  # index of each ticket in the learner's hands → its stream entry
        self._server = b""  # process that answered last

    def submit(self, group: Group, timeout_seconds: float) -> bool:
        """Deliver the group of a lease, waiting while the buffer or the server's memory is full.

        Returns:
            True if it was accepted; False if the lease is gone: expired, given back, or used by an earlier call.

        Raises:
            CodecError: the group is not one a learner could train on.
            BufferUnavailableError: no room within `timeout_seconds`, or no server.
        """
        payload = encode_group(group)
        deadline = time.monotonic() + timeout_seconds
        warned = False
        while True:
            outcome, obstacle, cursor = self._try_submit(ticket_member(group.ticket), payload)
            if outcome is not None:
                return outcome
            if not warned:
                log.warning("ticket %d waits to be submitted: %s", group.ticket.index, obstacle)
                warned = True
            remaining = deadline - time.monotonic()
            if remaining <= 0:
                raise BufferUnavailableError(
                    f"ticket {group.ticket.index}: no room for {len(payload)} bytes within {timeout_seconds:g} s: "
                    f"{obstacle}; is the learner alive?"
                )
            self._events.wait(cursor, remaining)

    def _try_submit(self, ticket: str, payload: bytes) -> tuple[bool | None, str, str]:
        """Whether it was accepted; None, what is full and where to wait, if it has to wait."""
        if self._maxmemory is None:
            self._maxmemory = int(self._memory("maxmemory"))
        if self._maxmemory:
            cursor = self._events.cursor()
            used = int(self._memory("used_memory"))
            if used + len(payload) > self._maxmemory * (1 - MEMORY_RESERVE):
                return None, f"Redis at {describe(self._client)} uses {used} of {self._maxmemory} bytes", cursor
        reply = self._scripts.run("submit", ticket, payload)
        if reply[0] < 2:
            return reply[0] == 1, "", ""
        _, waiting, most, cursor = reply
        return None, f"{waiting} bytes of groups wait for the learner, buffer.max_bytes is {most}", cursor.decode()

    def _memory(self, figure: str) -> int:
        with guard(self._client):
            return int(self._client.info("memory")[figure])

    def lease(self, epoch: int, count: int, timeout_seconds: float) -> list[LeasedGroup]:
        """Take up to `count` groups in the order of submission: what is there, or the first to come.

        Groups that cannot be decoded never arrive here: their tickets fail.

        Returns:
            1 to `count` groups; none if `timeout_seconds` passed first.

        Raises:
            FencedError: a newer learner epoch exists; also raised while waiting.
        """
        if count < 1:
            raise ValueError(f"count is {count}; lease at least one group")
        if self._reader[0] != epoch:
            self._reader = (epoch, "0-0")
            self._held.clear()
        deadline = time.monotonic() + timeout_seconds
        while True:
            server, cursor, *entries = self._scripts.run("lease", epoch, self._reader[1], count)
            if self._server not in (server, b""):
                log.warning("Redis at %s was restarted; repeating what it may have lost", describe(self._client))
                self._scripts.repeat_recent()
            self._server = server
            leased = self._fetch(epoch, [(entries[i].decode(), entries[i + 1]) for i in range(0, len(entries), 2)])
            remaining = deadline - time.monotonic()
            if leased or (remaining <= 0 and not entries):
                return leased
            if not entries:
                self._events.wait(cursor.decode(), remaining, stream=self._keys.groups, after=self._reader[1])

    def _fetch(self, epoch: int, entries: list[tuple[str, bytes]]) -> list[LeasedGroup]:
        # a server that lost its last second delivers again what this reader already has
        entries = [(stream_id, ticket) for stream_id, ticket in entries if _order(stream_id) > _order(self._reader[1])]
        if not entries:
            return []
        payloads = command(self._client, "HMGET", self._keys.payloads, *(stream_id for stream_id, _ in entries))
        leased = []
        for (stream_id, ticket), payload in zip(entries, payloads, strict=True):
            index = parse_ticket(ticket).index
            again = index in self._held
            self._held[index] = stream_id
            if again:  # the server forgot the group that is held, and had its ticket generated anew
                continue
            try:
                leased.append(LeasedGroup(f"{stream_id}/{ticket.decode()}", _decode(payload, ticket), len(payload)))
            except CodecError as error:
                log.warning("group %s of ticket %s is rejected: %s", stream_id, ticket.decode(), error)
                del self._held[index]
                reason = f"CodecError: {error}"[:MAX_ERROR_CHARACTERS]
                self._scripts.run_repeatably("reject", epoch, stream_id, reason)
        self._reader = (epoch, entries[-1][0])
        return leased

    def commit(self, epoch: int, entry_ids: Sequence[str], step: int) -> int:
        """Count groups as trained and delete them, once the checkpoint of `step` that holds their effect is safe.

        Tickets that are already trained are not counted again, so a learner that resumes commits its checkpoint's ids
        anew. A ticket whose group the server has lost counts as trained all the same, and is not generated again.

        Returns:
            How many were counted.

        Raises:
            FencedError: a newer learner epoch exists.
        """
        seen = self._reader[1] if self._reader[0] == epoch else "0-0"
        pairs = [entry_id.split("/") for entry_id in entry_ids]
        num_trained = int(
            self._scripts.run_repeatably("commit", epoch, step, seen, *(part for pair in pairs for part in pair))
        )
        self._release(entry_ids)
        return num_trained

    def recently_committed(self) -> list[str]:
        """Ids of the latest commits, which a crash of the server may undo.

        A checkpoint that lists them beside its own keeps them from being trained twice if the learner dies as well.
        """
        commits = ([*map(str, arguments[3:])] for name, arguments in self._scripts.recent() if name == "commit")
        return [f"{pairs[i]}/{pairs[i + 1]}" for pairs in commits for i in range(0, len(pairs), 2)]

    def return_stale(self, epoch: int, leased: Sequence[LeasedGroup]) -> None:
        """Remove groups that are too old and have their tickets generated again; no failure is counted."""
        self._scripts.run_repeatably("return_stale", epoch, *self._release([item.entry_id for item in leased]))

    def mark_filtered(self, epoch: int, leased: Sequence[LeasedGroup]) -> None:
        """Remove groups that are not worth training on; their tickets are done."""
        self._scripts.run_repeatably("mark_filtered", epoch, *self._release([item.entry_id for item in leased]))

    def _release(self, entry_ids: Sequence[str]) -> list[str]:
        """The groups are no longer held; returns the stream entries that stand for them."""
        pairs = (entry_id.split("/") for entry_id in entry_ids)
        return [self._held.pop(parse_ticket(ticket.encode()).index, stream_id) for stream_id, ticket in pairs]

    def depth(self) -> Depth:
        """One atomic reading of what is in the stream."""
        values = command(
            self._client, "HMGET", self._keys.tickets, "buffered", "leased", "buffered_bytes", "leased_bytes"
        )
        buffered, leased, buffered_bytes, leased_bytes = (int(value or 0) for value in values)
        return Depth(buffered, leased, buffered_bytes + leased_bytes)


def _decode(payload: bytes | None, ticket: bytes) -> Group:
    if payload is None:
        raise CodecError("its payload is missing")
    group = decode_group(payload)
    if group.ticket != parse_ticket(ticket):
        raise CodecError(f"it says it belongs to {group.ticket}")
    return group


def _order(stream_id: str) -> tuple[int, int]:
    milliseconds, _, sequence = stream_id.partition("-")
    return int(milliseconds), int(sequence)
