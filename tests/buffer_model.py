"""What the buffer should do, in plain Python: one run, one learner, no server, no time."""

from dataclasses import dataclass, field

from protocol.clock import ClockState, admission_limit
from protocol.trajectory import Ticket


@dataclass(eq=False)
class Entry:
    """A group in the stream."""

    ticket: Ticket
    num_bytes: int
    entry_id: str = ""  # known once it was leased
    poisoned: bool = False
    seen: bool = False  # by the current learner


@dataclass
class Model:
    """Every ticket's place, and the clock. Methods return what the buffer's methods of the same name return."""

    first: int
    max_attempts: int = 0
    max_bytes: int = 0
    state: str = "none"
    clock: ClockState = field(default_factory=lambda: ClockState(-1, 0, 0, 0, 0, 0, 0))
    published_epoch: int = 0
    generating: list[Ticket] = field(default_factory=list)
    overdue: list[Ticket] = field(default_factory=list)  # a part of `generating`, in the order of expiry
    retry: list[Ticket] = field(default_factory=list)
    stream: list[Entry] = field(default_factory=list)
    leased: list[Entry] = field(default_factory=list)  # a part of `stream`
    dead: list[int] = field(default_factory=list)
    trained: set[int] = field(default_factory=set)
    filtered: set[int] = field(default_factory=set)
    events: dict[str, int] = field(default_factory=lambda: dict.fromkeys(EVENTS, 0))

    def __post_init__(self) -> None:
        self.next = self.first

    def begin_epoch(self, groups_per_version: int, max_lag: int, max_attempts: int, max_bytes: int) -> int:
        old = self.clock
        self.clock = ClockState(
            version=old.version,
            step=0,
            epoch=old.epoch + 1,
            groups_per_version=groups_per_version,
            max_lag=max_lag,
            base=len(self.trained),
            base_version=old.version + 1,
        )
        self.max_attempts, self.max_bytes, self.state = max_attempts, max_bytes, "running"
        self.leased = []
        for entry in self.stream:
            entry.seen = False
        return self.clock.epoch

    def publish(self, version: int) -> None:
        base_version = version if self.published_epoch != self.clock.epoch else self.clock.base_version
        self.published_epoch = self.clock.epoch
        self.clock = _changed(self.clock, version=version, base_version=base_version)

    def states(self) -> dict[str, int]:
        return {
            "issued": self.next - self.first,
            "generating": len(self.generating),
            "retry": len(self.retry),
            "buffered": len(self.stream) - len(self.leased),
            "leased": len(self.leased),
            "trained": len(self.trained),
            "filtered": len(self.filtered),
            "dead": len(self.dead),
        }

    def buffered(self) -> list[Entry]:
        return [entry for entry in self.stream if entry not in self.leased]

    def issue(self, served_version: int, limit: int) -> tuple[list[Ticket], str]:
        if self.state != "running":
            return [], "stopped"
        self.expire()
        taken = len(self.stream) + len(self.trained) + len(self.generating)
        room = admission_limit(self.clock, served_version) - taken
        if min(served_version, self.clock.version) < 0 or room <= 0:
            return [], "admission"
        issued = []
        for _ in range(min(room, limit)):
            if self.retry:
                issued.append(self.retry.pop(0))
            else:
                issued.append(Ticket(self.next, 0))
                self.next += 1
        self.generating += issued
        return issued, "ok"

    def lapse(self, ticket: Ticket) -> None:
        self.renew([ticket])
        if ticket in self.generating:
            self.overdue.append(ticket)

    def renew(self, tickets: list[Ticket]) -> list[Ticket]:
        self.overdue = [ticket for ticket in self.overdue if ticket not in tickets]
        return [ticket for ticket in tickets if ticket not in self.generating]

    def expire(self) -> int:
        ended, self.overdue = self.overdue, []
        for ticket in ended:
            self._leave(ticket)
            self.events["expired"] += 1
            self._retry_or_bury(ticket)
        return len(ended)

    def _leave(self, ticket: Ticket) -> bool:
        """End a lease; whether there was one."""
        held = ticket in self.generating
        self.generating = [other for other in self.generating if other != ticket]
        self.overdue = [other for other in self.overdue if other != ticket]
        return held

    def _retry_or_bury(self, ticket: Ticket) -> None:
        if ticket.attempt + 1 < self.max_attempts:
            self.retry.append(Ticket(ticket.index, ticket.attempt + 1))
        else:
            self.dead.append(ticket.index)

    def submit(self, ticket: Ticket, num_bytes: int) -> bool | None:
        """None: no room."""
        waiting = sum(entry.num_bytes for entry in self.buffered())
        if ticket not in self.generating:
            self.events["refused"] += 1
            return False
        if waiting and waiting + num_bytes > self.max_bytes:
            return None
        self._leave(ticket)
        self.stream.append(Entry(ticket, num_bytes))
        return True

    def give_back(self, tickets: list[Ticket]) -> int:
        held = [ticket for ticket in tickets if self._leave(ticket)]
        self.retry = held + self.retry
        self.events["returned"] += len(held)
        return len(held)

    def fail(self, ticket: Ticket) -> None:
        if self._leave(ticket):
            self.events["failed"] += 1
            self._retry_or_bury(ticket)

    def retry_dead(self, indices: list[int] | None) -> int:
        chosen = [index for index in self.dead if indices is None or index in indices]
        self.dead = [index for index in self.dead if index not in chosen]
        self.retry += [Ticket(index, 0) for index in chosen]
        return len(chosen)

    def lease(self, count: int) -> list[Entry]:
        """At most `count` of the stream that are not leased; a call that finds only poison goes on."""
        while True:
            taken = self.buffered()[:count]
            for entry in taken:
                entry.seen = True
            good = [entry for entry in taken if not entry.poisoned]
            self.leased += good
            for entry in taken:
                if entry.poisoned:
                    self.stream.remove(entry)
                    self.events["poisoned"] += 1
                    self._retry_or_bury(entry.ticket)
            if good or not taken:
                return good

    def commit(self, entries: list[Entry]) -> int:
        fresh = [entry for entry in entries if entry.ticket.index not in self.trained]
        unseen = sum(not entry.seen for entry in fresh)
        self.clock = _changed(self.clock, base=self.clock.base + unseen)
        self.trained.update(entry.ticket.index for entry in fresh)
        self._remove(fresh)
        return len(fresh)

    def return_stale(self, entries: list[Entry]) -> None:
        self.retry += [entry.ticket for entry in entries]
        self.events["stale"] += len(entries)
        self._remove(entries)

    def mark_filtered(self, entries: list[Entry]) -> None:
        self.filtered.update(entry.ticket.index for entry in entries)
        self._remove(entries)

    def _remove(self, entries: list[Entry]) -> None:
        self.stream = [entry for entry in self.stream if entry not in entries]
        self.leased = [entry for entry in self.leased if entry not in entries]


EVENTS = ("expired", "failed", "returned", "stale", "poisoned", "refused")


def _changed(clock: ClockState, **changes: int) -> ClockState:
    values = {name: getattr(clock, name) for name in ClockState.__slots__}
    return ClockState(**(values | changes))
