"""The threads between a rollout loop and the buffer. They put messages into one inbox; the loop never waits for Redis.

listener  blocks on the event stream, wakes the feed, reports the run's state
feed      takes tickets while the loop wants some
submitter delivers finished groups
keeper    renews leases and sends the heartbeat
"""

import logging
import queue
import threading
from collections.abc import Callable
from dataclasses import dataclass

from buffer.run import Buffer
from protocol.errors import CodecError, VespoError
from protocol.records import ActorStatus
from protocol.trajectory import Group, Ticket

WAIT_SECONDS = 0.5  # bounds how long a link takes to end
FEED_WAIT_SECONDS = 1.0
HEARTBEAT_SECONDS = 2.0
SUBMIT_TIMEOUT_SECONDS = 600.0

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class TicketsTaken:
    """New work."""

    tickets: list[Ticket]


@dataclass(frozen=True, slots=True)
class LeasesLost:
    """Work that was issued to somebody else meanwhile and must not be delivered."""

    tickets: list[Ticket]


@dataclass(frozen=True, slots=True)
class RunState:
    """The run's state changed, see `buffer.control`."""

    state: str


@dataclass(frozen=True, slots=True)
class LinkFailed:
    """A link can not go on."""

    error: VespoError


class Links:
    """Owns the four threads. `inbox` also takes what others tell the loop (a fetched version, a failed follower)."""

    def __init__(self, buffer: Buffer, name: str, lease_seconds: float, status: Callable[[], ActorStatus]) -> None:
        self.inbox: queue.Queue[object] = queue.Queue()
        self._buffer = buffer
        self._name = name
        self._lease_seconds = lease_seconds
        self._status = status
        self._stopped = threading.Event()
        self._changed = threading.Condition()  # guards the next four
        self._held: set[Ticket] = set()
        self._capacity, self._served_version = 0, -1
        self._may_take = False
        self._outbox: queue.Queue[Group | None] = queue.Queue()
        self._groups_submitted = self._tickets_failed = 0
        loops = (self._submit, self._listen, self._feed, self._keep)
        self._submitter, *self._others = [
            threading.Thread(target=self._guard, args=(f,), name=f.__name__, daemon=True) for f in loops
        ]

    def start(self) -> None:
        """Start all threads."""
        for thread in (self._submitter, *self._others):
            thread.start()

    def close(self, timeout_seconds: float) -> None:
        """Deliver what is in the outbox, give every other ticket back, and end the threads."""
        self._outbox.put(None)
        self._submitter.join(timeout_seconds)
        self._stopped.set()
        with self._changed:
            self._wake()
        for thread in self._others:
            thread.join(2 * WAIT_SECONDS)
        self.give_back(self.held())
        self._buffer.actors.heartbeat(self._name, self._status())  # so that the totals are complete
        self._buffer.actors.leave(self._name)

    @property
    def groups_submitted(self) -> int:
        """Groups that the buffer accepted."""
        return self._groups_submitted

    @property
    def tickets_failed(self) -> int:
        """Tickets reported as failed."""
        return self._tickets_failed

    def held(self) -> list[Ticket]:
        """Tickets whose leases are kept alive: taken, and neither delivered nor given up."""
        with self._changed:
            return list(self._held)

    def serve(self, capacity: int, served_version: int) -> None:
        """Say how many tickets the loop can hold at once, and under which verified version it would start new ones."""
        with self._changed:
            if (capacity, served_version) != (self._capacity, self._served_version):
                self._capacity, self._served_version = capacity, served_version
                self._wake()

    def submit(self, group: Group) -> None:
        """Deliver a group; its lease is kept until it is accepted or refused."""
        self._outbox.put(group)

    def give_back(self, tickets: list[Ticket]) -> None:
        """Return tickets unfinished; somebody else gets them."""
        if tickets:
            self._buffer.tickets.give_back(tickets)
        self._release(tickets)

    def fail(self, ticket: Ticket, error: str) -> None:
        """Report that a ticket's prompt, generation or scoring failed."""
        log.warning("ticket %d failed: %s", ticket.index, error)
        self._buffer.tickets.fail(ticket, error)
        self._tickets_failed += 1
        self._release([ticket])

    def _release(self, tickets: list[Ticket]) -> None:
        with self._changed:
            self._held.difference_update(tickets)
            self._wake()

    def _wake(self) -> None:
        """Something changed that may let the feed take tickets; called with the lock held."""
        self._may_take = True
        self._changed.notify_all()

    def _guard(self, loop: Callable[[], None]) -> None:
        try:
            loop()
        except VespoError as error:
            if not self._stopped.is_set():
                self.inbox.put(LinkFailed(error))

    def _listen(self) -> None:
        state = ""
        while not self._stopped.is_set():
            cursor = self._buffer.events.cursor()
            if (now := self._buffer.control.state()) != state:
                state = now
                self.inbox.put(RunState(state))
            with self._changed:
                self._wake()
            self._buffer.events.wait(cursor, WAIT_SECONDS)

    def _feed(self) -> None:
        while not self._stopped.is_set():
            with self._changed:
                self._changed.wait_for(lambda: self._may_take or self._stopped.is_set(), FEED_WAIT_SECONDS)
                self._may_take = False
                wanted, version = self._capacity - len(self._held), self._served_version
            if wanted <= 0 or version < 0 or self._stopped.is_set():
                continue
            issued = self._buffer.tickets.issue(version, wanted, self._lease_seconds)
            if issued.tickets:
                with self._changed:
                    self._held.update(issued.tickets)
                self.inbox.put(TicketsTaken(issued.tickets))

    def _submit(self) -> None:
        while (group := self._outbox.get()) is not None:
            try:
                accepted = self._buffer.groups.submit(group, SUBMIT_TIMEOUT_SECONDS)
            except CodecError as error:
                self.fail(group.ticket, str(error))
                continue
            self._release([group.ticket])
            self._groups_submitted += accepted
            if not accepted:
                log.warning(
                    "ticket %d attempt %d was refused: its lease is gone", group.ticket.index, group.ticket.attempt
                )

    def _keep(self) -> None:
        interval = min(HEARTBEAT_SECONDS, self._lease_seconds / 3)
        while not self._stopped.is_set():
            held = self.held()
            if held and (lost := self._buffer.tickets.renew(held, self._lease_seconds)):
                # A ticket released since `held` was read was delivered, not lost.
                with self._changed:
                    lost = [ticket for ticket in lost if ticket in self._held]
                self._release(lost)
                if lost:
                    self.inbox.put(LeasesLost(lost))
            self._buffer.actors.heartbeat(self._name, self._status())
            self._stopped.wait(interval)
