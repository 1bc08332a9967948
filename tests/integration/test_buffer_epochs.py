"""Learner incarnations: what a new epoch takes over, and that an older one can change nothing any more."""

import threading
import time
from collections.abc import Callable

import pytest
from buffer_samples import begin, make_manifest, publish_next, submit_new

from buffer.run import Buffer
from protocol.errors import FencedError, RunMismatchError


def test_epochs_count_and_publish_under_free_numbers(buffer: Buffer) -> None:
    assert begin(buffer) == 1
    clock = buffer.clock.read()
    assert clock is not None
    assert (clock.version, clock.base, clock.base_version) == (-1, 0, 0)
    publish_next(buffer, 1)
    publish_next(buffer, 1)
    assert begin(buffer) == 2
    clock = buffer.clock.read()
    assert clock is not None
    assert (clock.version, clock.epoch, clock.base_version) == (1, 2, 2)
    assert buffer.control.state() == "running"


def test_an_empty_server_continues_the_numbers_of_an_older_run(buffer: Buffer) -> None:
    epoch = begin(buffer, groups_per_version=3, max_lag=1)
    buffer.clock.publish(make_manifest(38, epoch))
    clock = buffer.clock.read()
    assert clock is not None
    assert (clock.version, clock.base_version) == (38, 38)
    assert len(buffer.tickets.issue(38, 100, 60).tickets) == 6


def test_a_run_of_another_identity_is_refused(buffer: Buffer) -> None:
    begin(buffer, run_id="first")
    before = buffer.clock.read()
    with pytest.raises(
        RunMismatchError, match=r"run_id first, this learner belongs to run_id second.*vespo buffer purge"
    ):
        begin(buffer, run_id="second")
    assert buffer.clock.read() == before


def test_uncommitted_groups_come_again_in_order(buffer: Buffer) -> None:
    first = begin(buffer)
    publish_next(buffer, first)
    tickets = submit_new(buffer, 6)
    leased = buffer.groups.lease(first, 2, 1) + buffer.groups.lease(first, 2, 1)
    buffer.groups.commit(first, [leased[1].entry_id], step=1)
    second = begin(buffer)
    assert buffer.groups.depth().leased == 0
    again = buffer.groups.lease(second, 10, 1)
    assert [item.group.ticket for item in again] == [tickets[0], *tickets[2:]]
    assert buffer.ledger().balanced


def test_a_resumed_learner_commits_what_its_checkpoint_holds(buffer: Buffer) -> None:
    first = begin(buffer, groups_per_version=2, max_lag=0)
    publish_next(buffer, first)
    submit_new(buffer, 2)
    entry_ids = [item.entry_id for item in buffer.groups.lease(first, 2, 1)]
    # the checkpoint was written, the commit was not
    second = begin(buffer, groups_per_version=2, max_lag=0)
    assert buffer.groups.commit(second, entry_ids, step=1) == 2
    assert buffer.groups.commit(second, entry_ids, step=1) == 0
    served = publish_next(buffer, second)
    # with max_lag 0 the next version needs room for exactly its own groups, or it would wait for ever
    assert len(buffer.tickets.issue(served, 10, 60).tickets) == 2
    assert buffer.ledger().states["trained"] == 2
    assert buffer.ledger().balanced


@pytest.mark.parametrize("action", ["publish", "lease", "commit", "return_stale", "mark_filtered"])
def test_an_older_epoch_changes_nothing(buffer: Buffer, action: str) -> None:
    old = begin(buffer)
    publish_next(buffer, old)
    submit_new(buffer, 2)
    leased = buffer.groups.lease(old, 1, 1)
    begin(buffer)
    clock, ledger = buffer.clock.read(), buffer.ledger()
    actions: dict[str, Callable[[], object]] = {
        "publish": lambda: buffer.clock.publish(make_manifest(7, old)),
        "lease": lambda: buffer.groups.lease(old, 1, 1),
        "commit": lambda: buffer.groups.commit(old, [leased[0].entry_id], step=1),
        "return_stale": lambda: buffer.groups.return_stale(old, leased),
        "mark_filtered": lambda: buffer.groups.mark_filtered(old, leased),
    }
    with pytest.raises(
        FencedError, match=r"learner epoch 1 is not the current one, which is 2; this learner must stop$"
    ):
        actions[action]()
    assert (buffer.clock.read(), buffer.ledger()) == (clock, ledger)


def test_a_learner_that_waits_learns_at_once_that_it_is_over(buffer: Buffer) -> None:
    old = begin(buffer)
    timer = threading.Timer(0.2, begin, (buffer,))
    timer.start()
    started = time.monotonic()
    with pytest.raises(FencedError):
        buffer.groups.lease(old, 1, 20)
    assert time.monotonic() - started < 5
    timer.join()


def test_without_a_run_every_epoch_is_refused(buffer: Buffer) -> None:
    with pytest.raises(FencedError, match="current one, which is none"):
        buffer.groups.lease(1, 1, 0)
