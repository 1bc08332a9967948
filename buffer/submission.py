"""One group on its way into the buffer: what is sent for it, and what the replies mean.

Shared by clients that wait in threads (`buffer.groups`) and in tasks (`buffer.aio`), which add the sending and waiting.
"""

import logging
import secrets
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from buffer.keys import Keys
from buffer.tickets import ticket_member
from protocol.codec import encode_group
from protocol.errors import BufferUnavailableError
from protocol.trajectory import Group

MEMORY_RESERVE = 0.1
"""Share of the server's maxmemory that submitters leave free, so that transitions can go on."""
STAGED_MILLISECONDS = 60_000
"""Life of a payload that no script accepts. Its script follows in microseconds, unless the server stands still."""
REFUSED, ACCEPTED, NO_ROOM, PAYLOAD_IS_GONE = range(4)  # replies of submit.lua
log = logging.getLogger("buffer.groups")


@dataclass(frozen=True, slots=True)
class Obstacle:
    """Why a group has to wait, in words, and the position in the notices of space after which to ask again."""

    why: str
    cursor: str


class Submission:
    """Tries to deliver one group until a deadline."""

    def __init__(self, keys: Keys, group: Group, timeout_seconds: float) -> None:
        """Encode the group.

        Raises:
            CodecError: it is not one a learner could train on.
        """
        self._keys = keys
        self._ticket = group.ticket
        self._payload = encode_group(group)
        self._timeout_seconds = timeout_seconds
        self._deadline = time.monotonic() + timeout_seconds
        self._warned = False

    def memory_obstacle(self, used_bytes: int, most_bytes: int, where: str, cursor: str) -> Obstacle | None:
        """What the memory of the server says against it, read after `cursor`."""
        if used_bytes + len(self._payload) <= most_bytes * (1 - MEMORY_RESERVE):
            return None
        return Obstacle(f"Redis at {where} uses {used_bytes} of {most_bytes} bytes", cursor)

    def lines(self) -> tuple[tuple[str | bytes | int, ...], tuple[str, str]]:
        """The command that stages the payload under a new name, and the arguments of `submit` that accept it."""
        ticket = ticket_member(self._ticket)
        name = f"{ticket}:{secrets.token_hex(8)}"
        stage = ("SET", f"{self._keys.payload}:{name}", self._payload, "PX", STAGED_MILLISECONDS, "NX")
        return stage, (ticket, name)

    def outcome(self, reply: Sequence[Any]) -> bool | Obstacle | None:
        """What `submit` said: accepted or refused for good, an obstacle, or None to send everything again."""
        if reply[0] == PAYLOAD_IS_GONE:
            return None
        if reply[0] != NO_ROOM:
            return bool(reply[0] == ACCEPTED)
        _, waiting, most, cursor = reply
        return Obstacle(f"{waiting} bytes of groups wait for the learner, buffer.max_bytes is {most}", cursor.decode())

    def remaining_seconds(self, obstacle: Obstacle) -> float:
        """How long it may wait for the obstacle to go away; the first one is logged.

        Raises:
            BufferUnavailableError: its time is over.
        """
        if not self._warned:
            log.warning("ticket %d waits to be submitted: %s", self._ticket.index, obstacle.why)
            self._warned = True
        remaining = self._deadline - time.monotonic()
        if remaining <= 0:
            raise BufferUnavailableError(
                f"ticket {self._ticket.index}: no room for {len(self._payload)} bytes within "
                f"{self._timeout_seconds:g} s: {obstacle.why}; is the learner alive?"
            )
        return remaining
