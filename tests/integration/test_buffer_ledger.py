"""The ledger notices whatever other hands do to a run; that it balances otherwise, `test_buffer_model` shows."""

from collections.abc import Callable

import pytest
import redis
from buffer_samples import begin, payload_key, publish_next, submit_new

from buffer.keys import Keys
from buffer.run import Buffer

MAX_ATTEMPTS = 3


def tamper_stream(client: redis.Redis, keys: Keys) -> None:
    client.xdel(keys.groups, client.xrange(keys.groups)[-1][0])


def tamper_pending(client: redis.Redis, keys: Keys) -> None:
    client.xdel(keys.groups, client.xrange(keys.groups)[0][0])


def tamper_retry(client: redis.Redis, keys: Keys) -> None:
    client.rpush(keys.retry, "0:1")


def tamper_generating(client: redis.Redis, keys: Keys) -> None:
    client.zrem(keys.generating, client.zrange(keys.generating, 0, 0)[0])


def tamper_payload(client: redis.Redis, keys: Keys) -> None:
    client.set(payload_key(client, keys), b"short")


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
