"""Tickets on a real server: admission, leases, retries, giving up."""

import threading
import time

import pytest
from buffer_samples import begin, make_group, publish_next, submit_new

from buffer.run import Buffer
from protocol.clock import admission_limit
from protocol.trajectory import Ticket


def in_flight(buffer: Buffer) -> int:
    states = buffer.ledger().states
    return sum(states[name] for name in ("generating", "buffered", "leased", "trained"))


@pytest.mark.parametrize("groups_per_version", [1, 3])
@pytest.mark.parametrize("max_lag", [0, 2])
def test_the_script_admits_what_the_formula_says(buffer: Buffer, groups_per_version: int, max_lag: int) -> None:
    epoch = begin(buffer, groups_per_version=groups_per_version, max_lag=max_lag)
    for _ in range(3):
        publish_next(buffer, epoch)
        clock = buffer.clock.read()
        assert clock is not None
        for served in range(clock.version + 3):
            room = max(0, admission_limit(clock, served) - in_flight(buffer))
            issued = buffer.tickets.issue(served, 100, 60)
            assert len(issued.tickets) == room
            assert issued.reason == ("ok" if room else "admission")
            if room:
                tickets = issued.tickets
                assert buffer.groups.submit(make_group(tickets[0]), 1)
    leased = buffer.groups.lease(epoch, 2, 1)
    buffer.groups.commit(epoch, [item.entry_id for item in leased], step=1)
    # a restarted learner rebases the rule
    epoch = begin(buffer, groups_per_version=groups_per_version, max_lag=max_lag)
    publish_next(buffer, epoch)
    clock = buffer.clock.read()
    assert clock is not None
    assert (clock.base, clock.base_version) == (len(leased), clock.version)
    room = max(0, admission_limit(clock, clock.version) - in_flight(buffer))
    assert len(buffer.tickets.issue(clock.version, 100, 60).tickets) == room


def test_nothing_is_issued_before_a_run_a_version_or_while_stopped(buffer: Buffer) -> None:
    assert buffer.tickets.issue(0, 1, 60).reason == "no run"
    epoch = begin(buffer)
    assert buffer.tickets.issue(0, 1, 60).reason == "admission"
    publish_next(buffer, epoch)
    assert buffer.tickets.issue(-1, 1, 60).reason == "admission"
    buffer.control.set_state("draining", "test")
    assert buffer.tickets.issue(0, 1, 60).reason == "stopped"
    buffer.control.set_state("running", "")
    assert buffer.tickets.issue(0, 1, 60).tickets == [Ticket(0, 0)]


def test_a_run_may_start_at_a_later_ticket(buffer: Buffer) -> None:
    epoch = begin(buffer, first_ticket=70)
    publish_next(buffer, epoch)
    assert [t.index for t in buffer.tickets.issue(0, 2, 60).tickets] == [70, 71]
    assert buffer.ledger().balanced


def test_retries_come_first_and_given_back_work_before_failed(buffer: Buffer) -> None:
    publish_next(buffer, begin(buffer, groups_per_version=8))
    tickets = buffer.tickets.issue(0, 5, 60).tickets
    buffer.tickets.fail(tickets[3], "scorer")
    buffer.tickets.fail(tickets[1], "scorer")
    assert buffer.tickets.give_back([tickets[0], tickets[4]]) == 2
    again = buffer.tickets.issue(0, 5, 60).tickets
    assert again == [Ticket(0, 0), Ticket(4, 0), Ticket(3, 1), Ticket(1, 1), Ticket(5, 0)]


def test_expired_leases_are_issued_again_and_their_groups_refused(buffer: Buffer) -> None:
    publish_next(buffer, begin(buffer))
    (ticket,) = buffer.tickets.issue(0, 1, 0.001).tickets
    time.sleep(0.01)
    assert buffer.tickets.issue(0, 1, 60).tickets == [Ticket(0, 1)]
    assert buffer.tickets.renew([ticket, Ticket(0, 1)], 60) == [ticket]
    assert not buffer.groups.submit(make_group(ticket), 1)
    assert buffer.groups.submit(make_group(Ticket(0, 1)), 1)
    ledger = buffer.ledger()
    assert ledger.balanced
    assert (ledger.events["expired"], ledger.events["refused"], ledger.states["buffered"]) == (1, 1, 1)


def test_renewal_keeps_a_lease(buffer: Buffer) -> None:
    publish_next(buffer, begin(buffer))
    tickets = buffer.tickets.issue(0, 2, 0.05).tickets
    assert buffer.tickets.renew(tickets[:1], 60) == []
    time.sleep(0.06)
    assert buffer.tickets.expire() == 1
    assert buffer.ledger().states["generating"] == 1


def test_a_ticket_is_dead_after_its_attempts(buffer: Buffer) -> None:
    publish_next(buffer, begin(buffer, max_attempts=3))
    for attempt in range(3):
        (ticket,) = buffer.tickets.issue(0, 1, 60).tickets
        assert ticket == Ticket(0, attempt)
        buffer.tickets.fail(ticket, f"error {attempt}")
        buffer.tickets.fail(ticket, "a second report of the same failure")
    (dead,) = buffer.tickets.dead()
    assert (dead.index, dead.attempts, dead.error) == (0, 3, "error 2")
    assert buffer.tickets.issue(0, 1, 60).tickets == [Ticket(1, 0)]
    ledger = buffer.ledger()
    assert ledger.balanced
    assert (ledger.states["dead"], ledger.events["failed"]) == (1, 3)


def test_reports_about_a_lease_that_is_gone_change_nothing(buffer: Buffer) -> None:
    publish_next(buffer, begin(buffer))
    (ticket,) = submit_new(buffer, 1)
    before = buffer.ledger()
    buffer.tickets.fail(ticket, "late")
    assert buffer.tickets.give_back([ticket, Ticket(99, 0)]) == 0
    assert buffer.tickets.renew([], 60) == []
    assert buffer.ledger() == before


def test_a_waiting_actor_is_woken_by_a_version_and_by_room(buffer: Buffer) -> None:
    epoch = begin(buffer, groups_per_version=1, max_lag=0)
    publish_next(buffer, epoch)
    (ticket,) = buffer.tickets.issue(0, 8, 60).tickets
    for wake in (lambda: publish_next(buffer, epoch), lambda: buffer.tickets.fail(ticket, "scorer")):
        issued = buffer.tickets.issue(0, 8, 60)
        assert issued.reason == "admission"
        timer = threading.Timer(0.1, wake)
        timer.start()
        started = time.monotonic()
        buffer.tickets.wait(issued.cursor, 20)
        assert time.monotonic() - started < 5
        timer.join()


def test_a_wake_up_between_issue_and_wait_is_not_lost(buffer: Buffer) -> None:
    epoch = begin(buffer)
    issued = buffer.tickets.issue(0, 1, 60)
    publish_next(buffer, epoch)
    started = time.monotonic()
    buffer.tickets.wait(issued.cursor, 20)
    assert time.monotonic() - started < 5


def test_mistakes_of_the_caller_are_value_errors(buffer: Buffer) -> None:
    with pytest.raises(ValueError, match="limit is 0"):
        buffer.tickets.issue(0, 0, 60)
    with pytest.raises(ValueError, match="lease of 0 seconds"):
        buffer.tickets.issue(0, 1, 0)
    with pytest.raises(ValueError, match="groups_per_version 0"):
        begin(buffer, groups_per_version=0)
