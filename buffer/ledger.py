"""The proof that no ticket is lost or doubled: one atomic snapshot of the counters, held against the structures.

The counters move only inside the scripts that move the structures. So any difference means that something else wrote
these keys, that the server lost part of its data, or that a script is wrong; all three are worth stopping for.
"""

from collections import defaultdict
from dataclasses import dataclass
from typing import Any

from buffer.scripts import Scripts

STATES = ("issued", "generating", "retry", "buffered", "leased", "trained", "filtered", "dead")
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
    fields, leases, retries, entries, pending, num_payloads, dead = scripts.run("ledger")
    counters = {fields[i].decode(): int(fields[i + 1]) for i in range(0, len(fields), 2)}
    states = {name: counters.get(name, 0) for name in STATES}
    discrepancies = [
        *_counter_problems(counters, states, leases, retries, entries, pending, dead),
        *_payload_problems(counters, entries, num_payloads),
        *_place_problems(counters, leases, retries, entries, pending, dead),
    ]
    return Ledger(states, {name: counters.get(name, 0) for name in EVENTS}, discrepancies)


def _counter_problems(
    counters: dict[str, int], states: dict[str, int], leases: Any, retries: Any, entries: Any, pending: Any, dead: Any
) -> list[str]:
    checks = [
        ("generating", states["generating"], len(leases), "zset"),
        ("retry", states["retry"], len(retries), "list"),
        ("buffered + leased", states["buffered"] + states["leased"], len(entries), "stream"),
        ("leased", states["leased"], len(pending), "consumer group"),
        ("dead", states["dead"], len(dead), "stream of the dead"),
    ]
    problems = [
        f"{name}: the counters say {expected}, the {structure} holds {found}"
        for name, expected, found, structure in checks
        if expected != found
    ]
    placed = sum(count for name, count in states.items() if name != "issued")
    if placed != states["issued"]:
        problems.append(f"issued: {states['issued']} tickets, but the states add up to {placed}")
    if (span := counters.get("next", 0) - counters.get("first", 0)) != states["issued"]:
        problems.append(f"issued: {states['issued']} tickets, but the index moved by {span}")
    return problems


def _payload_problems(counters: dict[str, int], entries: Any, num_payloads: int) -> list[str]:
    problems = [
        f"groups: entry {entry_id.decode()} of ticket {ticket.decode()} has {found} bytes of {int(expected)}"
        for entry_id, ticket, expected, found in entries
        if int(expected) != found
    ]
    if num_payloads != len(entries):
        problems.append(f"payloads: {num_payloads} for {len(entries)} stream entries")
    stored = sum(int(expected) for _, _, expected, _ in entries)
    if (counted := counters.get("buffered_bytes", 0) + counters.get("leased_bytes", 0)) != stored:
        problems.append(f"bytes: the counters say {counted}, the stream holds {stored}")
    return problems


def _place_problems(
    counters: dict[str, int], leases: Any, retries: Any, entries: Any, pending: Any, dead: Any
) -> list[str]:
    """Tickets that are in two places, were never issued, or are leased without being there."""
    places: dict[int, list[str]] = defaultdict(list)
    for name, tickets in (
        ("generating", leases),
        ("retry", retries),
        ("groups", [ticket for _, ticket, _, _ in entries]),
        ("dead", dead),
    ):
        for ticket in tickets:
            places[int(ticket.partition(b":")[0])].append(name)
    problems = [f"ticket {index} is in {' and in '.join(names)}" for index, names in places.items() if len(names) > 1]
    first, following = counters.get("first", 0), counters.get("next", 0)
    problems += [f"ticket {index} was never issued" for index in places if not first <= index < following]
    present = {entry_id for entry_id, _, _, _ in entries}
    problems += [f"groups: leased entry {i.decode()} is not in the stream" for i in pending if i not in present]
    return problems
