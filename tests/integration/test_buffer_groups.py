"""Groups on a real server: submitted once, leased in order, committed once, refused when poisoned or without room."""

import threading
import time

import pytest
import redis
from buffer_samples import begin, make_group, payload_key, publish_next, submit_new

from buffer.groups import Depth
from buffer.keys import Keys
from buffer.run import Buffer
from buffer.scripts import Scripts
from protocol.codec import encode_group
from protocol.errors import BufferUnavailableError, CodecError
from protocol.trajectory import Ticket


@pytest.fixture
def epoch(buffer: Buffer) -> int:
    epoch = begin(buffer, groups_per_version=10)
    publish_next(buffer, epoch)
    return epoch


def test_a_group_arrives_as_it_was_sent(buffer: Buffer, epoch: int) -> None:
    (ticket,) = buffer.tickets.issue(0, 1, 60).tickets
    group = make_group(ticket, num_tokens=7)
    assert buffer.groups.submit(group, 1)
    (leased,) = buffer.groups.lease(epoch, 8, 1)
    assert encode_group(leased.group) == encode_group(group)
    assert buffer.groups.depth() == Depth(buffered=0, leased=1, num_bytes=leased.num_bytes)


def test_submitting_twice_counts_once(buffer: Buffer, epoch: int) -> None:
    (ticket,) = submit_new(buffer, 1)
    assert not buffer.groups.submit(make_group(ticket), 1)
    ledger = buffer.ledger()
    assert ledger.balanced
    assert (ledger.states["buffered"], ledger.events["refused"]) == (1, 1)


def test_repeating_a_packet_whose_answer_was_lost_changes_nothing(
    buffer: Buffer, epoch: int, redis_client: redis.Redis
) -> None:
    (ticket,) = buffer.tickets.issue(0, 1, 60).tickets
    keys, payload = Keys(buffer.run), encode_group(make_group(ticket))
    key = f"{keys.payload}:name"
    packet = ("SET", key, payload, "PX", 60_000, "NX"), "submit", f"{ticket.index}:{ticket.attempt}", "name"
    scripts = Scripts(redis_client, keys)
    assert [scripts.run_after(*packet) for _ in range(3)] == [[1], [1], [1]]
    assert redis_client.ttl(key) == -1
    assert (buffer.ledger().states["buffered"], buffer.ledger().events["refused"]) == (1, 0)
    (leased,) = buffer.groups.lease(epoch, 1, 1)
    assert buffer.groups.commit(epoch, [leased.entry_id], step=1) == 1
    assert scripts.run_after(*packet) == [0]
    assert not redis_client.exists(key)
    assert scripts.run("submit", f"{ticket.index}:{ticket.attempt}", "name") == [0]


def test_a_payload_that_died_on_its_way_is_sent_again(buffer: Buffer, epoch: int, redis_client: redis.Redis) -> None:
    (ticket,) = buffer.tickets.issue(0, 1, 60).tickets
    scripts = Scripts(redis_client, Keys(buffer.run))
    assert scripts.run("submit", f"{ticket.index}:{ticket.attempt}", "name") == [3]
    assert buffer.groups.submit(make_group(ticket), 1)


def test_no_payload_is_left_behind(buffer: Buffer, epoch: int, redis_client: redis.Redis) -> None:
    tickets = submit_new(buffer, 6)
    assert not buffer.groups.submit(make_group(tickets[0]), 1)
    leased = buffer.groups.lease(epoch, 4, 1)
    buffer.groups.commit(epoch, [leased[0].entry_id], step=1)
    buffer.groups.return_stale(epoch, leased[1:2])
    buffer.groups.mark_filtered(epoch, leased[2:3])
    pattern = Keys(buffer.run).payload.replace("{", "*").replace("}", "*") + "*"
    assert len(list(redis_client.scan_iter(pattern))) == 3
    buffer.purge()
    assert list(redis_client.scan_iter(pattern)) == []


def test_a_group_no_learner_could_use_is_not_submitted(buffer: Buffer, epoch: int) -> None:
    (ticket,) = buffer.tickets.issue(0, 1, 60).tickets
    with pytest.raises(CodecError, match="completion without tokens"):
        buffer.groups.submit(make_group(ticket, num_tokens=0), 1)
    assert buffer.ledger().states["generating"] == 1


def test_leases_come_in_order_and_wait_until_the_deadline(buffer: Buffer, epoch: int) -> None:
    tickets = submit_new(buffer, 5)
    first, second = buffer.groups.lease(epoch, 3, 1), buffer.groups.lease(epoch, 3, 1)
    assert [item.group.ticket for item in first + second] == tickets
    assert (len(first), len(second)) == (3, 2)
    started = time.monotonic()
    assert buffer.groups.lease(epoch, 3, 0.2) == []
    assert 0.2 <= time.monotonic() - started < 3


def test_a_waiting_learner_gets_the_first_group_to_come(buffer: Buffer, epoch: int) -> None:
    timer = threading.Timer(0.1, submit_new, (buffer, 1))
    timer.start()
    started = time.monotonic()
    assert len(buffer.groups.lease(epoch, 3, 20)) == 1
    assert time.monotonic() - started < 5
    timer.join()


def test_a_lease_whose_reply_was_lost_is_given_again(buffer: Buffer, epoch: int, redis_client: redis.Redis) -> None:
    tickets = submit_new(buffer, 4)
    Scripts(redis_client, Keys(buffer.run)).run("lease", epoch, "0-0", 2)
    leased = buffer.groups.lease(epoch, 4, 1) + buffer.groups.lease(epoch, 4, 1)
    assert [item.group.ticket for item in leased] == tickets


def test_groups_delivered_twice_by_a_server_that_forgot_are_dropped(
    buffer: Buffer, epoch: int, redis_client: redis.Redis
) -> None:
    submit_new(buffer, 2)
    leased = buffer.groups.lease(epoch, 4, 1)
    keys = Keys(buffer.run)
    redis_client.xack(keys.groups, f"learner:{epoch}", *(item.entry_id.split("/")[0] for item in leased))
    redis_client.xgroup_setid(keys.groups, f"learner:{epoch}", "0")
    assert buffer.groups.lease(epoch, 4, 0.1) == []


def test_commit_counts_each_group_once(buffer: Buffer, epoch: int) -> None:
    submit_new(buffer, 3)
    entry_ids = [item.entry_id for item in buffer.groups.lease(epoch, 3, 1)]
    assert buffer.groups.commit(epoch, entry_ids[:2], step=1) == 2
    assert buffer.groups.commit(epoch, entry_ids, step=1) == 1
    assert buffer.groups.commit(epoch, entry_ids, step=1) == 0
    ledger = buffer.ledger()
    assert ledger.balanced
    assert (ledger.states["trained"], ledger.states["leased"]) == (3, 0)
    assert buffer.groups.depth().num_bytes == 0


def test_stale_groups_are_generated_again_and_filtered_ones_are_not(buffer: Buffer, epoch: int) -> None:
    submit_new(buffer, 3)
    leased = buffer.groups.lease(epoch, 3, 1)
    buffer.groups.return_stale(epoch, leased[:1])
    buffer.groups.mark_filtered(epoch, leased[1:2])
    buffer.groups.return_stale(epoch, leased[:2])
    ledger = buffer.ledger()
    assert ledger.balanced
    assert (ledger.states["retry"], ledger.states["filtered"], ledger.states["leased"]) == (1, 1, 1)
    assert ledger.events["stale"] == 1
    assert buffer.tickets.issue(0, 1, 60).tickets == [Ticket(0, 0)]


def test_poison_fails_its_ticket_and_leaves_the_batch_alone(
    buffer: Buffer, epoch: int, redis_client: redis.Redis
) -> None:
    keys = Keys(buffer.run)
    submit_new(buffer, 4)
    first, second, third, fourth = (payload_key(redis_client, keys, position) for position in range(4))
    redis_client.set(first, b"junk")
    redis_client.set(third, redis_client.get(second))
    redis_client.delete(fourth)
    assert [item.group.ticket.index for item in buffer.groups.lease(epoch, 4, 1)] == [1]
    ledger = buffer.ledger()
    assert (ledger.states["retry"], ledger.events["poisoned"], ledger.states["leased"]) == (3, 3, 1)
    assert ledger.balanced
    assert buffer.tickets.issue(0, 3, 60).tickets == [Ticket(0, 1), Ticket(2, 1), Ticket(3, 1)]


def test_entries_of_other_hands_do_not_reach_the_learner(buffer: Buffer, epoch: int, redis_client: redis.Redis) -> None:
    keys = Keys(buffer.run)
    redis_client.xadd(keys.groups, {"a": "b"})
    submit_new(buffer, 2)
    redis_client.xdel(keys.groups, redis_client.xrange(keys.groups)[1][0])
    assert [item.group.ticket.index for item in buffer.groups.lease(epoch, 4, 1)] == [1]
    assert not buffer.ledger().balanced


def test_poison_is_dead_in_the_end(buffer: Buffer, redis_client: redis.Redis) -> None:
    epoch = begin(buffer, max_attempts=1)
    publish_next(buffer, epoch)
    submit_new(buffer, 1)
    keys = Keys(buffer.run)
    redis_client.set(payload_key(redis_client, keys), b"junk" * 10)
    assert buffer.groups.lease(epoch, 1, 0) == []
    (dead,) = buffer.tickets.dead()
    assert dead.error.startswith("CodecError: not a group of format 1")
    assert buffer.ledger().balanced


def test_submitters_wait_while_too_many_bytes_wait(buffer: Buffer) -> None:
    size = len(encode_group(make_group(Ticket(0, 0))))
    epoch = begin(buffer, max_bytes=2 * size + size // 2)
    publish_next(buffer, epoch)
    submit_new(buffer, 2)
    (ticket,) = buffer.tickets.issue(0, 1, 60).tickets
    with pytest.raises(
        BufferUnavailableError, match=rf"{2 * size} bytes of groups wait .*max_bytes is {5 * size // 2};"
    ):
        buffer.groups.submit(make_group(ticket), 0.1)
    timer = threading.Timer(0.2, buffer.groups.lease, (epoch, 1, 1))
    timer.start()
    started = time.monotonic()
    assert buffer.groups.submit(make_group(ticket), 20)
    assert time.monotonic() - started < 5
    timer.join()
    assert buffer.ledger().balanced


def test_a_group_larger_than_the_limit_passes_alone(buffer: Buffer) -> None:
    epoch = begin(buffer, max_bytes=10)
    publish_next(buffer, epoch)
    submit_new(buffer, 1)
    assert len(buffer.groups.lease(epoch, 1, 1)) == 1


def test_runs_on_one_server_do_not_touch_each_other(buffer: Buffer, epoch: int, redis_client: redis.Redis) -> None:
    other = Buffer(redis_client, f"{buffer.run}-other")
    try:
        publish_next(other, begin(other))
        submit_new(buffer, 2)
        assert other.ledger().states["issued"] == 0
        assert buffer.purge()
        assert not buffer.purge()
        assert other.clock.read() is not None
    finally:
        other.purge()
