"""Repair: whatever other hands did to a run's keys, afterwards every ticket is in one place and work goes on."""

import random
from collections.abc import Callable

import pytest
import redis
from buffer_samples import begin, make_group, payload_key, publish_next, submit_new

from buffer.keys import Keys
from buffer.run import Buffer
from protocol.errors import BufferUnavailableError

Harm = Callable[[redis.Redis, Keys, random.Random], object]


@pytest.fixture
def epoch(buffer: Buffer) -> int:
    """A run with tickets in every state: 20 issued, 2 of them in generation."""
    epoch = begin(buffer, groups_per_version=20, max_attempts=2)
    publish_next(buffer, epoch)
    submit_new(buffer, 14)
    leased = buffer.groups.lease(epoch, 10, 1)
    buffer.groups.commit(epoch, [item.entry_id for item in leased[:4]], step=1)
    buffer.groups.mark_filtered(epoch, leased[4:6])
    tickets = buffer.tickets.issue(0, 6, 60).tickets
    buffer.tickets.fail(tickets[0], "scorer")
    buffer.tickets.give_back(tickets[1:3])
    begin(buffer, groups_per_version=20, max_attempts=1)
    buffer.tickets.fail(tickets[3], "scorer")
    epoch = begin(buffer, groups_per_version=20, max_attempts=3)
    publish_next(buffer, epoch)
    buffer.groups.lease(epoch, 3, 1)
    assert list(buffer.ledger().states.values()) == [20, 2, 3, 5, 3, 4, 2, 1]
    return epoch


def some_entry(client: redis.Redis, keys: Keys, rng: random.Random) -> bytes:
    return rng.choice(client.xrange(keys.groups) or [(b"1-1", {})])[0]


def some_payload(client: redis.Redis, keys: Keys, rng: random.Random) -> str:
    num_entries = client.xlen(keys.groups)
    return payload_key(client, keys, rng.randrange(num_entries)) if num_entries else f"{keys.payload}:none"


HARMS: dict[str, Harm] = {
    "entry deleted": lambda c, k, r: c.xdel(k.groups, some_entry(c, k, r)),
    "payload deleted": lambda c, k, r: c.delete(some_payload(c, k, r)),
    "payload cut": lambda c, k, r: c.set(some_payload(c, k, r), b"short"),
    "payload without entry": lambda c, k, r: c.set(f"{k.payload}:orphan", b"x"),
    "foreign entry": lambda c, k, r: c.xadd(k.groups, {"a": "b"}),
    "ticket doubled in the stream": lambda c, k, r: c.xadd(k.groups, {"ticket": f"{r.randrange(25)}:0", "bytes": 0}),
    "acknowledged": lambda c, k, r: c.xack(k.groups, "learner:3", "1-1", *[e[0] for e in c.xrange(k.groups)[:2]]),
    "entry added": lambda c, k, r: c.xadd(k.groups, {"ticket": "99:0", "bytes": 5, "payload": "none"}),
    "reader destroyed": lambda c, k, r: c.exists(k.groups) and c.xgroup_destroy(k.groups, "learner:3"),
    "lease deleted": lambda c, k, r: c.zpopmin(k.generating),
    "lease doubled": lambda c, k, r: c.zadd(k.generating, {f"{r.randrange(25)}:1": 1e15}),
    "lease malformed": lambda c, k, r: c.zadd(k.generating, {"nonsense": 1}),
    "retry doubled": lambda c, k, r: c.rpush(k.retry, f"{r.randrange(25)}:0"),
    "retry popped": lambda c, k, r: c.rpop(k.retry),
    "dead added": lambda c, k, r: c.xadd(k.dead, {"index": r.randrange(25), "attempts": 1, "error": ""}),
    "dead trimmed": lambda c, k, r: c.xtrim(k.dead, maxlen=0),
    "counter moved": lambda c, k, r: c.hincrby(k.tickets, r.choice(["trained", "retry", "leased_bytes"]), 1),
    "counter deleted": lambda c, k, r: c.hdel(k.tickets, r.choice(["trained", "filtered", "buffered", "issued"])),
    "next index back": lambda c, k, r: c.hincrby(k.tickets, "next", -7),
    "done forgotten": lambda c, k, r: c.setbit(k.done, 0, 0),
    **{
        f"{name} deleted": lambda c, k, r, name=name: c.delete(getattr(k, name))  # type: ignore[misc]
        for name in ("generating", "retry", "groups", "dead", "events", "control")
    },
}


HARMLESS = ("events deleted", "control deleted", "payload without entry")


def goes_on(buffer: Buffer, epoch: int) -> None:
    """Every ticket that is not done can be finished, and the ledger balances at the end."""
    buffer.control.set_state("running", "")
    buffer.tickets.retry_dead()
    while True:
        issued = buffer.tickets.issue(99, 100, 60).tickets
        assert all(buffer.groups.submit(make_group(ticket), 1) for ticket in issued)
        fresh = Buffer(buffer._client, buffer.run)
        leased = fresh.groups.lease(epoch, 100, 0)
        fresh.groups.commit(epoch, [item.entry_id for item in leased], step=2)
        states = buffer.ledger().states
        if not issued and states["generating"] + states["retry"] + states["buffered"] + states["leased"] == 0:
            assert buffer.ledger().discrepancies == []
            return
        expire_now(buffer)


def expire_now(buffer: Buffer) -> None:
    for member in buffer._client.zrange(Keys(buffer.run).generating, 0, -1):
        buffer._client.zadd(Keys(buffer.run).generating, {member: 0})


@pytest.mark.parametrize("harm", HARMS)
def test_each_harm_is_found_and_repaired(buffer: Buffer, epoch: int, redis_client: redis.Redis, harm: str) -> None:
    keys, before = Keys(buffer.run), buffer.ledger()
    HARMS[harm](redis_client, keys, random.Random(3))
    assert buffer.ledger().balanced == (harm in HARMLESS)
    buffer.repair()
    after = buffer.ledger()
    assert after.discrepancies == []
    done = after.states["trained"] + after.states["filtered"]
    assert done >= before.states["trained"] + before.states["filtered"]
    assert buffer.repair() == []
    assert buffer.ledger() == after


@pytest.mark.parametrize("seed", range(12))
def test_several_harms_at_once_are_repaired(buffer: Buffer, epoch: int, redis_client: redis.Redis, seed: int) -> None:
    rng = random.Random(seed)
    for harm in rng.sample(sorted(HARMS), 4):
        HARMS[harm](redis_client, Keys(buffer.run), rng)
    buffer.repair()
    assert buffer.ledger().discrepancies == []
    goes_on(buffer, epoch)


def test_what_is_lost_is_generated_again_and_what_is_done_is_not(
    buffer: Buffer, epoch: int, redis_client: redis.Redis
) -> None:
    redis_client.delete(Keys(buffer.run).groups, Keys(buffer.run).generating)
    assert [line.split(" ", 1)[0] for line in buffer.repair()] == ["10", "8"]
    assert list(redis_client.scan_iter(f"{Keys(buffer.run).payload}:*".replace("{", "?").replace("}", "?"))) == []
    states = buffer.ledger().states
    assert (states["retry"], states["trained"], states["filtered"], states["dead"]) == (13, 4, 2, 1)


def test_a_bitmap_that_is_gone_is_taken_from_what_is_missing(
    buffer: Buffer, epoch: int, redis_client: redis.Redis
) -> None:
    before = buffer.ledger()
    redis_client.delete(Keys(buffer.run).done)
    assert "trained + filtered: the counters say 6, the bitmap of the done holds 0" in buffer.ledger().discrepancies
    buffer.repair()
    assert buffer.ledger() == before


def test_a_run_without_its_description_is_beyond_repair(buffer: Buffer, epoch: int, redis_client: redis.Redis) -> None:
    redis_client.delete(Keys(buffer.run).tickets)
    with pytest.raises(BufferUnavailableError, match="vespo buffer purge"):
        buffer.repair()


def test_a_stream_that_is_gone_is_a_typed_error(buffer: Buffer, epoch: int, redis_client: redis.Redis) -> None:
    redis_client.delete(Keys(buffer.run).groups)
    with pytest.raises(BufferUnavailableError, match="vespo buffer audit --repair"):
        buffer.groups.lease(epoch, 1, 0)
    buffer.repair()
    assert buffer.groups.lease(epoch, 1, 0) == []


def test_a_sound_ledger_is_left_alone(buffer: Buffer, epoch: int) -> None:
    before = buffer.ledger()
    assert buffer.repair() == []
    assert buffer.ledger() == before
