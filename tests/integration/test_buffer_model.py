"""Property-based: whatever the order of calls, a real server does what the plain-Python model does."""

import os
import time
import uuid

import hypothesis.strategies as st
import pytest
import redis
from buffer_model import Entry, Model
from buffer_samples import begin, make_group, make_manifest, payload_key
from hypothesis import HealthCheck, Phase, settings
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from buffer.groups import LeasedGroup
from buffer.keys import Keys
from buffer.run import Buffer
from protocol.codec import encode_group
from protocol.errors import BufferUnavailableError, FencedError
from protocol.trajectory import Group, Ticket

EXAMPLES = int(os.environ.get("VESPO_TEST_EXAMPLES", "80"))
STEPS = 80


class BufferMachine(RuleBasedStateMachine):
    """Calls of actors and of one learner after another, in any order, each compared with the model."""

    client: redis.Redis

    def __init__(self) -> None:
        super().__init__()
        self.buffer = Buffer(self.client, f"model-{uuid.uuid4().hex[:12]}")
        self.keys = Keys(self.buffer.run)
        self.known: list[Ticket] = []
        self.finished: list[Entry] = []
        self.groups: dict[str, LeasedGroup] = {}

    def teardown(self) -> None:
        self.buffer.purge()

    @initialize(first=st.sampled_from([0, 7, 1000]), max_attempts=st.integers(1, 3))
    def create(self, first: int, max_attempts: int) -> None:
        self.model = Model(first)
        self._begin(groups_per_version=4, max_lag=2, max_attempts=max_attempts, max_bytes=1 << 20)
        self.publish(1)

    def _begin(self, **changes: int) -> None:
        epoch = begin(self.buffer, first_ticket=self.model.first, **changes)
        assert epoch == self.model.begin_epoch(**changes)

    @rule(
        groups_per_version=st.integers(1, 6),
        max_lag=st.integers(0, 3),
        max_attempts=st.integers(1, 3),
        max_bytes=st.sampled_from([1, 700, 1 << 20]),
    )
    def begin_epoch(self, groups_per_version: int, max_lag: int, max_attempts: int, max_bytes: int) -> None:
        self._begin(
            groups_per_version=groups_per_version, max_lag=max_lag, max_attempts=max_attempts, max_bytes=max_bytes
        )

    @rule(ahead=st.integers(0, 2))
    def publish(self, ahead: int) -> None:
        manifest = make_manifest(max(0, self.model.clock.version + ahead), self.model.clock.epoch)
        if manifest.version > self.model.clock.version:
            self.buffer.clock.publish(manifest)
            self.model.publish(manifest.version)
        elif self.model.published_epoch != self.model.clock.epoch:
            with pytest.raises(ValueError, match="is not above"):
                self.buffer.clock.publish(manifest)

    @rule(running=st.booleans())
    def set_state(self, running: bool) -> None:
        self.model.state = "running" if running else "draining"
        self.buffer.control.set_state("running" if running else "draining", "")

    @rule(behind=st.integers(-1, 2), limit=st.integers(1, 6))
    def issue(self, behind: int, limit: int) -> None:
        served = max(-1, self.model.clock.version - behind)
        issued = self.buffer.tickets.issue(served, limit, 600)
        assert (issued.tickets, issued.reason) == self.model.issue(served, limit)
        self.known += issued.tickets

    def a_ticket(self, data: st.DataObject) -> Ticket:
        """One in generation, mostly; or one whose lease may be gone, or that was never issued."""
        pools = [pool for pool in (self.model.generating, self.model.generating, self.known) if pool]
        return data.draw(st.sampled_from(data.draw(st.sampled_from(pools)))) if pools else Ticket(self.model.next, 0)

    @rule(data=st.data())
    def renew(self, data: st.DataObject) -> None:
        tickets = list(dict.fromkeys([self.a_ticket(data), self.a_ticket(data)]))
        assert self.buffer.tickets.renew(tickets, 600) == self.model.renew(tickets)

    @rule(data=st.data())
    def let_lapse(self, data: st.DataObject) -> None:
        ticket = self.a_ticket(data)
        self.buffer.tickets.renew([ticket], 0.001)
        self.model.lapse(ticket)
        time.sleep(0.003)  # so that leases end in the order in which they were let lapse

    @rule(count=st.integers(1, 6))
    def produce(self, count: int) -> None:
        """What actors do when all goes well."""
        issued = self.buffer.tickets.issue(self.model.clock.version, count, 600).tickets
        assert issued == self.model.issue(self.model.clock.version, count)[0]
        self.known += issued
        for ticket in issued:
            self.submit_group(make_group(ticket))

    @rule()
    def expire(self) -> None:
        assert self.buffer.tickets.expire() == self.model.expire()

    @rule(data=st.data(), num_tokens=st.sampled_from([1, 30]))
    def submit(self, data: st.DataObject, num_tokens: int) -> None:
        self.submit_group(make_group(self.a_ticket(data), num_tokens=num_tokens))

    def submit_group(self, group: Group) -> None:
        expected = self.model.submit(group.ticket, len(encode_group(group)))
        if expected is None:
            with pytest.raises(BufferUnavailableError, match="no room"):
                self.buffer.groups.submit(group, 0)
        else:
            assert self.buffer.groups.submit(group, 0) is expected

    @rule(data=st.data())
    def give_back(self, data: st.DataObject) -> None:
        tickets = list(dict.fromkeys([self.a_ticket(data), self.a_ticket(data)]))
        assert self.buffer.tickets.give_back(tickets) == self.model.give_back(tickets)

    @rule(data=st.data())
    def fail(self, data: st.DataObject) -> None:
        ticket = self.a_ticket(data)
        self.buffer.tickets.fail(ticket, "scorer")
        self.model.fail(ticket)

    @precondition(lambda self: self.model.dead)
    @rule(data=st.data(), everything=st.booleans())
    def retry_dead(self, data: st.DataObject, everything: bool) -> None:
        indices = None if everything else [data.draw(st.sampled_from(self.model.dead)), self.model.next]
        assert self.buffer.tickets.retry_dead(indices) == self.model.retry_dead(indices)

    @precondition(lambda self: self.model.buffered())
    @rule(data=st.data())
    def poison(self, data: st.DataObject) -> None:
        entry = data.draw(st.sampled_from(self.model.buffered()))
        key = payload_key(self.client, self.keys, self.model.stream.index(entry))
        self.client.set(key, b"x" * entry.num_bytes)
        entry.poisoned = True

    @rule(count=st.integers(1, 5))
    def lease(self, count: int) -> None:
        leased = self.buffer.groups.lease(self.model.clock.epoch, count, 0)
        expected = self.model.lease(count)
        assert [item.group.ticket for item in leased] == [entry.ticket for entry in expected]
        for item, entry in zip(leased, expected, strict=True):
            entry.entry_id = item.entry_id
            self.groups[item.entry_id] = item

    def some_leased(self, data: st.DataObject) -> list[Entry]:
        return data.draw(st.lists(st.sampled_from(self.model.leased), unique_by=id, max_size=4))

    @rule(data=st.data())
    def commit(self, data: st.DataObject) -> None:
        """Of what this learner holds, of what its predecessor held, and of what is committed already."""
        known = [entry for entry in self.model.stream if entry.entry_id and not entry.poisoned] + self.finished
        if not known:
            return
        entries = data.draw(st.lists(st.sampled_from(known), unique_by=id, max_size=5))
        epoch, entry_ids = self.model.clock.epoch, [entry.entry_id for entry in entries]
        assert self.buffer.groups.commit(epoch, entry_ids, step=0) == self.model.commit(entries)
        self.finished += entries

    @precondition(lambda self: self.model.leased)
    @rule(data=st.data())
    def return_stale(self, data: st.DataObject) -> None:
        entries = self.some_leased(data)
        self.buffer.groups.return_stale(self.model.clock.epoch, [self.groups[entry.entry_id] for entry in entries])
        self.model.return_stale(entries)

    @precondition(lambda self: self.model.leased)
    @rule(data=st.data())
    def mark_filtered(self, data: st.DataObject) -> None:
        entries = self.some_leased(data)
        self.buffer.groups.mark_filtered(self.model.clock.epoch, [self.groups[entry.entry_id] for entry in entries])
        self.model.mark_filtered(entries)

    @precondition(lambda self: self.model.clock.epoch > 1)
    @rule()
    def a_zombie_tries(self) -> None:
        zombie, version = self.model.clock.epoch - 1, self.model.clock.version
        entry_ids = [entry.entry_id for entry in self.model.leased]
        with pytest.raises(FencedError):
            self.buffer.groups.commit(zombie, entry_ids, step=0)
        with pytest.raises(FencedError):
            self.buffer.clock.publish(make_manifest(version + 1, zombie))

    @invariant()
    def agrees_with_the_model(self) -> None:
        ledger = self.buffer.ledger()
        assert ledger.discrepancies == []
        assert ledger.states == self.model.states()
        assert ledger.events == self.model.events
        assert self.buffer.clock.read() == self.model.clock
        assert self.buffer.groups.depth().num_bytes == sum(entry.num_bytes for entry in self.model.stream)


def test_the_buffer_does_what_the_model_does(redis_client: redis.Redis) -> None:
    BufferMachine.client = redis_client
    run_state_machine_as_test(
        BufferMachine,
        settings=settings(
            max_examples=EXAMPLES,
            stateful_step_count=STEPS,
            deadline=None,
            derandomize="VESPO_TEST_EXAMPLES" not in os.environ,
            database=None,
            phases=[Phase.generate, Phase.shrink],
            suppress_health_check=list(HealthCheck),
        ),
    )
