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
    """A group in the learner's hands, named by `entry_id` until it is committed, returned or filtered."""

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
        deadline = time.monotonic() + timeout_seconds
        while True:
            cursor, *entries = self._scripts.run("lease", epoch, self._reader[1], count)
            leased = self._fetch(epoch, [(entries[i].decode(), entries[i + 1]) for i in range(0, len(entries), 2)])
            remaining = deadline - time.monotonic()
            if leased or (remaining <= 0 and not entries):
                return leased
            if not entries:
                self._events.wait(cursor.decode(), remaining, stream=self._keys.groups, after=self._reader[1])

    def _fetch(self, epoch: int, entries: list[tuple[str, bytes]]) -> list[LeasedGroup]:
        # a server that lost its last second delivers again what this reader already has
        entries = [(entry_id, ticket) for entry_id, ticket in entries if _order(entry_id) > _order(self._reader[1])]
        if not entries:
            return []
        payloads = command(self._client, "HMGET", self._keys.payloads, *(entry_id for entry_id, _ in entries))
        leased = []
        for (entry_id, ticket), payload in zip(entries, payloads, strict=True):
            try:
                leased.append(LeasedGroup(entry_id, _decode(payload, ticket), len(payload)))
            except CodecError as error:
                log.warning("group %s of ticket %s is rejected: %s", entry_id, ticket.decode(), error)
                self._scripts.run("reject", epoch, entry_id, f"CodecError: {error}"[:MAX_ERROR_CHARACTERS])
        self._reader = (epoch, entries[-1][0])
        return leased

    def commit(self, epoch: int, entry_ids: Sequence[str], step: int) -> int:
        """Count groups as trained and delete them, once the checkpoint of `step` that holds their effect is safe.

        Ids that are already gone are not counted again, so a learner that resumes commits its checkpoint's ids anew.

        Returns:
            How many were counted.

        Raises:
            FencedError: a newer learner epoch exists.
        """
        return int(self._scripts.run("commit", epoch, step, *entry_ids))

    def return_stale(self, epoch: int, leased: Sequence[LeasedGroup]) -> None:
        """Remove groups that are too old and have their tickets generated again; no failure is counted."""
        self._scripts.run("return_stale", epoch, *(item.entry_id for item in leased))

    def mark_filtered(self, epoch: int, leased: Sequence[LeasedGroup]) -> None:
        """Remove groups that are not worth training on; their tickets are done."""
        self._scripts.run("mark_filtered", epoch, *(item.entry_id for item in leased))

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


def _order(entry_id: str) -> tuple[int, int]:
    milliseconds, _, sequence = entry_id.partition("-")
    return int(milliseconds), int(sequence)
