"""Conservation: the ledger equals a plain-Python model after every step of random histories, and notices tampering."""

import random
import time
from collections import Counter
from collections.abc import Callable

import pytest
import redis
from buffer_samples import begin, make_group, publish_next, submit_new

from buffer.groups import LeasedGroup
from buffer.keys import Keys
from buffer.ledger import STATES
from buffer.run import Buffer
from protocol.trajectory import Ticket

MAX_ATTEMPTS = 3


class RandomHistory:
    """Does random transitions, and keeps beside the buffer where each ticket should be."""

    def __init__(self, buffer: Buffer, redis_client: redis.Redis, seed: int) -> None:
        self.buffer = buffer
        self.redis = redis_client
        self.keys = Keys(buffer.run)
        self.random = random.Random(seed)
        self.places: dict[int, str] = {}
        self.generating: list[Ticket] = []
        self.gone: list[Ticket] = []
        self.leased: list[LeasedGroup] = []
        self.epoch = self.version = 0
        self.begin_epoch()

    def begin_epoch(self) -> None:
        self.epoch = begin(self.buffer, groups_per_version=3, max_lag=2, max_attempts=MAX_ATTEMPTS)
        self.version = publish_next(self.buffer, self.epoch)
        self.leased.clear()
        self.places.update({index: "buffered" for index, place in self.places.items() if place == "leased"})

    def publish(self) -> None:
        self.version = publish_next(self.buffer, self.epoch)

    def issue(self) -> None:
        issued = self.buffer.tickets.issue(self.version, self.random.randint(1, 5), 60).tickets
        retries = sum(place == "retry" for place in self.places.values())
        assert all(self.places.get(ticket.index) == "retry" for ticket in issued[:retries])
        self.places.update({ticket.index: "generating" for ticket in issued})
        self.generating += issued

    def pick(self) -> Ticket | None:
        """A leased ticket, no longer in our list; sometimes one whose lease is gone, which must change nothing."""
        if self.gone and self.random.random() < 0.2:
            return self.random.choice(self.gone)
        if not self.generating:
            return None
        self.gone.append(self.generating.pop(self.random.randrange(len(self.generating))))
        return self.gone[-1]

    def act(self, ticket: Ticket | None, action: Callable[[Ticket], object], place: str) -> None:
        if ticket is None:
            return
        held = self.redis.zscore(self.keys.generating, f"{ticket.index}:{ticket.attempt}") is not None
        action(ticket)
        if held:
            self.places[ticket.index] = place
            self.generating = [other for other in self.generating if other != ticket]

    def after_failure(self, ticket: Ticket | None) -> str:
        return "dead" if ticket is not None and ticket.attempt + 1 >= MAX_ATTEMPTS else "retry"

    def submit(self) -> None:
        self.act(self.pick(), lambda ticket: self.buffer.groups.submit(make_group(ticket), 1), "buffered")

    def fail(self) -> None:
        ticket = self.pick()
        self.act(ticket, lambda ticket: self.buffer.tickets.fail(ticket, "scorer"), self.after_failure(ticket))

    def give_back(self) -> None:
        self.act(self.pick(), lambda ticket: self.buffer.tickets.give_back([ticket]), "retry")

    def expire(self) -> None:
        ticket = self.pick()

        def overdue(ticket: Ticket) -> None:
            self.buffer.tickets.renew([ticket], 0.001)
            time.sleep(0.003)
            self.buffer.tickets.expire()

        self.act(ticket, overdue, self.after_failure(ticket))

    def lease(self) -> None:
        leased = self.buffer.groups.lease(self.epoch, self.random.randint(1, 4), 0)
        self.leased += leased
        self.places.update({item.group.ticket.index: "leased" for item in leased})

    def poison(self) -> None:
        for entry_id, fields in self.redis.xrange(self.keys.groups):
            index, attempt = map(int, fields[b"ticket"].split(b":"))
            if self.places[index] == "buffered":
                size = int(fields[b"bytes"])
                self.redis.hset(self.keys.payloads, entry_id, b"x" * size)
                self.places[index] = self.after_failure(Ticket(index, attempt))
                others = self.buffer.groups.lease(self.epoch, 1000, 0)
                self.leased += others
                self.places.update({item.group.ticket.index: "leased" for item in others})
                return

    def finish(self, action: Callable[[list[LeasedGroup]], object], place: str) -> None:
        taken = self.leased[: self.random.randint(0, 3)]
        self.leased = self.leased[len(taken) :]
        action(taken)
        self.places.update({item.group.ticket.index: place for item in taken})

    def commit(self) -> None:
        def commit(items: list[LeasedGroup]) -> object:
            return self.buffer.groups.commit(self.epoch, [item.entry_id for item in items], step=1)

        self.finish(commit, "trained")

    def stale(self) -> None:
        self.finish(lambda items: self.buffer.groups.return_stale(self.epoch, items), "retry")

    def filtered(self) -> None:
        self.finish(lambda items: self.buffer.groups.mark_filtered(self.epoch, items), "filtered")

    def step(self) -> str:
        actions = [self.issue] * 4 + [self.submit] * 6 + [self.lease, self.commit, self.publish] * 2
        actions += [self.fail, self.give_back, self.expire, self.stale, self.filtered, self.poison, self.begin_epoch]
        action = self.random.choice(actions)
        action()
        return action.__name__


@pytest.mark.parametrize("seed", range(4))
def test_the_ledger_balances_after_every_step(buffer: Buffer, redis_client: redis.Redis, seed: int) -> None:
    history = RandomHistory(buffer, redis_client, seed)
    done = []
    for _ in range(300):
        done.append(history.step())
        ledger = buffer.ledger()
        assert ledger.discrepancies == [], done
        found = {name: count for name, count in ledger.states.items() if name != "issued" and count}
        assert found == dict(Counter(history.places.values())), done
        assert ledger.states["issued"] == len(history.places), done
    assert len(history.places) > 20, done
    assert set(ledger.states) == set(STATES)


def tamper_stream(client: redis.Redis, keys: Keys) -> None:
    client.xdel(keys.groups, client.xrange(keys.groups)[-1][0])


def tamper_pending(client: redis.Redis, keys: Keys) -> None:
    client.xdel(keys.groups, client.xrange(keys.groups)[0][0])


def tamper_retry(client: redis.Redis, keys: Keys) -> None:
    client.rpush(keys.retry, "0:1")


def tamper_generating(client: redis.Redis, keys: Keys) -> None:
    client.zrem(keys.generating, client.zrange(keys.generating, 0, 0)[0])


def tamper_payload(client: redis.Redis, keys: Keys) -> None:
    client.hset(keys.payloads, client.xrange(keys.groups)[0][0], b"short")


def tamper_counter(client: redis.Redis, keys: Keys) -> None:
    client.hincrby(keys.tickets, "trained", 1)


def tamper_dead(client: redis.Redis, keys: Keys) -> None:
    client.xadd(keys.dead, {"index": 99, "attempts": 1, "error": ""})


@pytest.mark.parametrize(
    ("tamper", "finding"),
    [
        (tamper_stream, "buffered + leased: the counters say 3, the stream holds 2"),
        (tamper_pending, "is not in the stream"),
        (tamper_retry, "ticket 0 is in retry and in groups"),
        (tamper_generating, "generating: the counters say 1, the zset holds 0"),
        (tamper_payload, "has 5 bytes of"),
        (tamper_counter, "issued: 4 tickets, but the states add up to 5"),
        (tamper_dead, "ticket 99 was never issued"),
    ],
)
def test_the_ledger_notices_other_hands(
    buffer: Buffer, redis_client: redis.Redis, tamper: Callable[[redis.Redis, Keys], None], finding: str
) -> None:
    epoch = begin(buffer)
    publish_next(buffer, epoch)
    submit_new(buffer, 3)
    buffer.groups.lease(epoch, 1, 1)
    buffer.tickets.issue(0, 1, 60)
    assert buffer.ledger().balanced
    tamper(redis_client, Keys(buffer.run))
    ledger = buffer.ledger()
    assert not ledger.balanced
    assert any(finding in discrepancy for discrepancy in ledger.discrepancies), ledger.discrepancies


def test_a_run_nobody_began_balances(buffer: Buffer) -> None:
    ledger = buffer.ledger()
    assert ledger.balanced
    assert set(ledger.states.values()) == {0}
