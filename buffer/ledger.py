"""The proof that no ticket is lost or doubled: one atomic snapshot of the counters, held against the structures.

The counters move only inside the scripts that move the structures. So any difference means that something else wrote
these keys, that the server lost part of its data, or that a script is wrong; all three are worth stopping for.
"""

from collections import defaultdict
from dataclasses import dataclass
from itertools import islice

from buffer.scripts import Scripts

STATES = ("issued", "generating", "retry", "buffered", "leased", "trained", "filtered", "dead")
NOWHERE_SHOWN = 20
EVENTS = ("expired", "failed", "returned", "stale", "poisoned", "refused")


@dataclass(frozen=True, slots=True)
class Ledger:
    """Where every ticket is.

    Attributes:
        states: tickets `issued`, and how many of them are in each state.
        events: how often leases expired, tickets failed or were returned, groups were stale, poisoned or refused.
        discrepancies: what does not add up, in words; empty when all does.
    """

    states: dict[str, int]
    events: dict[str, int]
    discrepancies: list[str]

    @property
    def balanced(self) -> bool:
        """Whether every ticket ever issued is in exactly one state, by counters and by structures."""
        return not self.discrepancies


def read_ledger(scripts: Scripts) -> Ledger:
    """Take the snapshot and verify it."""
    snapshot = _Snapshot(*scripts.run("ledger"))
    states = {name: snapshot.counters.get(name, 0) for name in STATES}
    discrepancies = [
        *_counter_problems(snapshot, states),
        *_group_problems(snapshot),
        *_place_problems(snapshot),
    ]
    return Ledger(states, {name: snapshot.counters.get(name, 0) for name in EVENTS}, discrepancies)


class _Snapshot:
    """Reply of `scripts/ledger.lua`, read."""

    def __init__(
        self,
        fields: list[bytes],
        leases: list[bytes],
        retries: list[bytes],
        entries: list[tuple[bytes, bytes, bytes, int]],
        pending: list[bytes],
        dead: list[bytes],
        done: bytes,
    ) -> None:
        self.counters = {fields[i].decode(): _integer(fields[i + 1]) for i in range(0, len(fields), 2)}
        self.places = {
            "generating": [_index(ticket) for ticket in leases],
            "retry": [_index(ticket) for ticket in retries],
            "groups": [_index(ticket) for _, ticket, _, _ in entries],
            "dead": [_integer(index) for index in dead],
        }
        self.entries = [(entry_id.decode(), _integer(expected), found) for entry_id, _, expected, found in entries]
        self.pending = [entry_id.decode() for entry_id in pending]
        self.first, self.next = self.counters.get("first", 0), self.counters.get("next", 0)
        self._done = done
        self.num_done = int.from_bytes(done, "big").bit_count()

    def is_done(self, index: int) -> bool:
        """Whether a ticket is trained or filtered."""
        byte, bit = divmod(index - self.first, 8)
        return 0 <= byte < len(self._done) and bool(self._done[byte] & 0x80 >> bit)


def _counter_problems(snapshot: _Snapshot, states: dict[str, int]) -> list[str]:
    places = {name: len(indices) for name, indices in snapshot.places.items()}
    checks = [
        ("generating", states["generating"], places["generating"], "zset"),
        ("retry", states["retry"], places["retry"], "list"),
        ("buffered + leased", states["buffered"] + states["leased"], places["groups"], "stream"),
        ("leased", states["leased"], len(snapshot.pending), "consumer group"),
        ("dead", states["dead"], places["dead"], "stream of the dead"),
        ("trained + filtered", states["trained"] + states["filtered"], snapshot.num_done, "bitmap of the done"),
    ]
    problems = [
        f"{name}: the counters say {expected}, the {structure} holds {found}"
        for name, expected, found, structure in checks
        if expected != found
    ]
    placed = sum(count for name, count in states.items() if name != "issued")
    if placed != states["issued"]:
        problems.append(f"issued: {states['issued']} tickets, but the states add up to {placed}")
    if (span := snapshot.next - snapshot.first) != states["issued"]:
        problems.append(f"issued: {states['issued']} tickets, but the index moved by {span}")
    return problems


def _group_problems(snapshot: _Snapshot) -> list[str]:
    """Groups whose bytes are not all there, and groups leased without being there."""
    problems = [
        f"groups: entry {entry_id} has {found} bytes of {expected}"
        for entry_id, expected, found in snapshot.entries
        if expected != found
    ]
    stored = sum(expected for _, expected, _ in snapshot.entries)
    counted = snapshot.counters.get("buffered_bytes", 0) + snapshot.counters.get("leased_bytes", 0)
    if counted != stored:
        problems.append(f"bytes: the counters say {counted}, the stream holds {stored}")
    present = {entry_id for entry_id, _, _ in snapshot.entries}
    absent = (entry_id for entry_id in snapshot.pending if entry_id not in present)
    return problems + [f"groups: leased entry {entry_id} is not in the stream" for entry_id in absent]


def _place_problems(snapshot: _Snapshot) -> list[str]:
    """Tickets that are in two places or in none, or were never issued."""
    places: dict[int, list[str]] = defaultdict(list)
    for name, indices in snapshot.places.items():
        for index in indices:
            places[index].append(name)
    issued = range(snapshot.first, snapshot.next)
    problems = [f"ticket {index} was never issued" for index in places if index not in issued]
    for index, names in places.items():
        names += ["done"] * snapshot.is_done(index)
        if len(names) > 1:
            problems.append(f"ticket {index} is in {' and in '.join(names)}")
    if len(places) + snapshot.num_done != len(issued):
        nowhere = (index for index in issued if index not in places and not snapshot.is_done(index))
        problems += [f"ticket {index} is nowhere" for index in islice(nowhere, NOWHERE_SHOWN)]
    return problems


def _index(ticket: bytes) -> int:
    return _integer(ticket.partition(b":")[0])


def _integer(text: bytes) -> int:
    """The number that other hands may have left instead of ours; -1 if it is none, which is never right."""
    try:
        return int(text)
    except ValueError:
        return -1
