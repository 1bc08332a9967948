"""Groups on their way from actor to learner: submitted once, leased to one epoch, gone when a checkpoint has them.

Left out: several learner readers. One process leases (rank 0) and hands groups to its other ranks.
"""

import logging
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Self

import redis

from buffer.connection import command, describe, guard
from buffer.events import Events
from buffer.keys import Keys
from buffer.scripts import Scripts
from buffer.submission import Obstacle, Submission
from buffer.tickets import MAX_ERROR_CHARACTERS, parse_ticket, ticket_member
from protocol.codec import decode_group
from protocol.errors import CodecError
from protocol.trajectory import Group, Ticket

LINGER_SECONDS = 0.002
"""Pause between the first group that ends a wait and leasing it: those right behind it come along in one go."""
FETCH_BYTES = 1 << 19
"""Payloads read in one reply: a client that gets many megabytes at once spends its time copying."""
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

    def __init__(self, client: redis.Redis, keys: Keys, scripts: Scripts, events: Events, space: Events) -> None:
        self._client = client
        self._keys = keys
        self._scripts = scripts
        self._events = events
        self._space = space
        self._maxmemory: int | None = None
        self._reader = (0, "0-0")  # the epoch that leases here, and the last entry it has seen
        self._held: dict[int, str] = {}  # index of each ticket in the learner's hands → its stream entry
        self._server = b""  # process that answered last
        self._cursor = ""  # of the events, where the last lease found fewer groups than it might have taken

    def submit(self, group: Group, timeout_seconds: float) -> bool:
        """Deliver the group of a lease, waiting while the buffer or the server's memory is full.

        Returns:
            True if it was accepted; False if the lease is gone: expired, given back, or used by an earlier call.

        Raises:
            CodecError: the group is not one a learner could train on.
            BufferUnavailableError: no room within `timeout_seconds`, or no server.
        """
        submission = Submission(self._keys, group, timeout_seconds)
        while True:
            outcome: bool | Obstacle | None = self._memory_obstacle(submission)
            while outcome is None:
                stage, arguments = submission.lines()
                outcome = submission.outcome(self._scripts.run_after(stage, "submit", *arguments))
            if isinstance(outcome, bool):
                return outcome
            self._space.wait(outcome.cursor, submission.remaining_seconds(outcome))

    def _memory_obstacle(self, submission: Submission) -> Obstacle | None:
        if self._maxmemory is None:
            self._maxmemory = int(self._memory("maxmemory"))
        if not self._maxmemory:
            return None
        cursor = self._space.cursor()
        return submission.memory_obstacle(self._memory("used_memory"), self._maxmemory, describe(self._client), cursor)

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
            self._reader, self._cursor = (epoch, "0-0"), ""
            self._held.clear()
        deadline = time.monotonic() + timeout_seconds
        while True:
            if self._cursor and (remaining := deadline - time.monotonic()) > LINGER_SECONDS:
                self._events.wait(self._cursor, remaining, stream=self._keys.groups, after=self._reader[1])
                time.sleep(LINGER_SECONDS)
            cursor, entries = self._take(epoch, count)
            self._cursor = cursor if len(entries) < count else ""
            leased = self._fetch(epoch, entries)
            if leased or (not entries and time.monotonic() >= deadline):
                return leased

    def _take(self, epoch: int, count: int) -> "tuple[str, list[_Entry]]":
        """Position in the events, and up to `count` entries of the stream that are leased now."""
        server, cursor, *entries = self._scripts.run("lease", epoch, self._reader[1], count)
        if self._server not in (server, b""):
            log.warning("Redis at %s was restarted; repeating what it may have lost", describe(self._client))
            self._scripts.repeat_recent()
        self._server = server
        return cursor.decode(), [_Entry.parse(entry) for entry in entries]

    def _fetch(self, epoch: int, entries: "list[_Entry]") -> list[LeasedGroup]:
        # a server that lost its last second delivers again what this reader already has
        entries = [entry for entry in entries if _order(entry.stream_id) > _order(self._reader[1])]
        leased = []
        for entry, payload in zip(entries, self._payloads(entries), strict=True):
            again = entry.ticket.index in self._held
            self._held[entry.ticket.index] = entry.stream_id
            if again:  # the server forgot the group that is held, and had its ticket generated anew
                continue
            try:
                leased.append(LeasedGroup(entry.entry_id, _decode(payload, entry.ticket), len(payload or b"")))
            except CodecError as error:
                log.warning("group %s is rejected: %s", entry.entry_id, error)
                del self._held[entry.ticket.index]
                reason = f"CodecError: {error}"[:MAX_ERROR_CHARACTERS]
                self._scripts.run_repeatably("reject", epoch, entry.stream_id, reason)
        if entries:
            self._reader = (epoch, entries[-1].stream_id)
        return leased

    def _payloads(self, entries: "list[_Entry]") -> Iterator[bytes | None]:
        """Payload of each entry in turn, None if it is gone."""
        start = 0
        while start < len(entries):
            end, num_bytes = start + 1, entries[start].num_bytes
            while end < len(entries) and num_bytes + entries[end].num_bytes <= FETCH_BYTES:
                num_bytes += entries[end].num_bytes
                end += 1
            names = [f"{self._keys.payload}:{entry.payload}" for entry in entries[start:end]]
            yield from command(self._client, "MGET", *names)
            start = end

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


@dataclass(frozen=True, slots=True)
class _Entry:
    """What the stream holds of a group; `payload` names where its bytes are."""

    stream_id: str
    ticket: Ticket
    num_bytes: int
    payload: str

    @classmethod
    def parse(cls, fields: Sequence[bytes]) -> Self:
        stream_id, ticket, num_bytes, payload = fields
        return cls(stream_id.decode(), parse_ticket(ticket), int(num_bytes), payload.decode())

    @property
    def entry_id(self) -> str:
        return f"{self.stream_id}/{ticket_member(self.ticket)}"


def _decode(payload: bytes | None, ticket: Ticket) -> Group:
    if payload is None:
        raise CodecError("its payload is missing")
    group = decode_group(payload)
    if group.ticket != ticket:
        raise CodecError(f"it says it belongs to {group.ticket}")
    return group


def _order(stream_id: str) -> tuple[int, int]:
    milliseconds, _, sequence = stream_id.partition("-")
    return int(milliseconds), int(sequence)
