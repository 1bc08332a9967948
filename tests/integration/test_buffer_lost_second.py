"""A server that loses its last moments in a crash: the learner, which is further, makes it catch up."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from buffer_samples import begin, make_group, publish_next, submit_new
from server_faults import forgetting, kill

from buffer.connection import connect
from buffer.embedded import EmbeddedServer
from buffer.groups import LeasedGroup
from buffer.run import Buffer
from protocol.trajectory import Ticket


class Scene:
    """A learner and an actor on a server that can be made to forget."""

    def __init__(self, directory: Path, max_lag: int = 1) -> None:
        self.server = EmbeddedServer.start(directory)
        self.client = connect(self.server.url, reconnect_seconds=20)
        self.client.config_set("appendfsync", "always")
        self.learner, self.actor = Buffer(self.client, "run"), Buffer(self.client, "run")
        self.max_lag = max_lag
        self.epoch = begin(self.learner, groups_per_version=4, max_lag=max_lag)
        publish_next(self.learner, self.epoch)

    def lease(self, count: int) -> list[LeasedGroup]:
        return self.learner.groups.lease(self.epoch, count, 0.1)

    def commit(self, items: list[LeasedGroup]) -> int:
        return self.learner.groups.commit(self.epoch, ids(items), step=1)

    def states(self, **expected: int) -> None:
        """The ledger balances, and what is not named is 0."""
        ledger = self.actor.ledger()
        assert ledger.discrepancies == []
        assert {name: count for name, count in ledger.states.items() if count} == expected

    def base(self) -> int:
        clock = self.learner.clock.read()
        assert clock is not None
        return clock.base


def ids(items: list[LeasedGroup]) -> list[str]:
    return [item.entry_id for item in items]


@pytest.fixture
def scene(server_directory: Path) -> Iterator[Scene]:
    scene = Scene(server_directory)
    yield scene
    scene.client.close()


def test_what_the_learner_finished_is_finished_again(scene: Scene) -> None:
    submit_new(scene.actor, 6)
    leased = scene.lease(5)
    with forgetting(scene.server):
        scene.commit(leased[:2])
        scene.learner.groups.return_stale(scene.epoch, leased[2:3])
        scene.learner.groups.mark_filtered(scene.epoch, leased[3:4])
        leased += scene.lease(1)
    scene.states(issued=6, leased=5, buffered=1)
    assert scene.lease(8) == []
    scene.states(issued=6, trained=2, retry=1, filtered=1, leased=2)
    assert scene.base() == 0
    assert scene.commit(leased[4:]) == 2


def test_a_lost_publication_does_not_stop_synchronous_training(server_directory: Path) -> None:
    scene = Scene(server_directory, max_lag=0)
    submit_new(scene.actor, 4)
    leased = scene.lease(4)
    with forgetting(scene.server):
        scene.commit(leased)
        publish_next(scene.learner, scene.epoch)
    assert scene.actor.tickets.issue(1, 8, 60).reason == "admission"
    assert scene.lease(4) == []
    assert len(scene.actor.tickets.issue(1, 8, 60).tickets) == 4
    scene.states(issued=8, trained=4, generating=4)
    scene.client.close()


def test_a_group_whose_delivery_is_lost_is_trained_once(scene: Scene) -> None:
    (held,) = scene.actor.tickets.issue(0, 1, 60).tickets
    with forgetting(scene.server):
        assert scene.actor.groups.submit(make_group(held), 1)
        leased = scene.lease(1)
    scene.states(issued=1, generating=1)
    assert scene.commit(leased) == 1
    scene.states(issued=1, trained=1)
    assert not scene.actor.groups.submit(make_group(held), 1)
    assert scene.base() == 0


def test_tickets_whose_issue_is_lost_are_in_order_again_after_the_commit(scene: Scene) -> None:
    with forgetting(scene.server):
        tickets = submit_new(scene.actor, 3)
        leased = scene.lease(3)
    scene.states()
    assert scene.commit(leased[1:2]) == 1
    scene.states(issued=2, trained=1, retry=1)
    assert scene.actor.tickets.issue(0, 2, 60).tickets == [tickets[0], tickets[2]]


def test_a_group_generated_again_is_not_trained_again(scene: Scene) -> None:
    with forgetting(scene.server):
        submit_new(scene.actor, 3)
        leased = scene.lease(3)
    assert submit_new(scene.actor, 4)[0] == Ticket(0, 0)
    assert [item.group.ticket for item in scene.lease(8)] == [Ticket(3, 0)]
    scene.learner.groups.return_stale(scene.epoch, leased[1:2])
    scene.learner.groups.mark_filtered(scene.epoch, leased[2:3])
    scene.states(issued=4, leased=2, retry=1, filtered=1)
    assert scene.commit(leased[:1]) == 1
    scene.states(issued=4, leased=1, retry=1, filtered=1, trained=1)


@pytest.mark.parametrize("place", ["generating", "retry", "buffered", "dead"])
def test_a_checkpoint_takes_its_tickets_from_wherever_they_are(scene: Scene, place: str) -> None:
    with forgetting(scene.server):
        submit_new(scene.actor, 1)
        checkpoint = ids(scene.lease(1))
    epoch = begin(scene.learner, max_attempts=1 if place == "dead" else 3)
    publish_next(scene.learner, epoch)
    (ticket,) = scene.actor.tickets.issue(1, 1, 60).tickets
    if place == "buffered":
        assert scene.actor.groups.submit(make_group(ticket), 1)
    elif place != "generating":
        scene.actor.tickets.fail(ticket, "scorer")
    scene.states(**{"issued": 1, place: 1})
    assert scene.learner.groups.commit(epoch, checkpoint, step=1) == 1
    scene.states(issued=1, trained=1)
    assert scene.base() == 1
    assert scene.learner.groups.commit(epoch, checkpoint, step=1) == 0


def test_a_checkpoint_that_lists_recent_commits_survives_both_crashes(scene: Scene) -> None:
    submit_new(scene.actor, 4)
    leased = scene.lease(4)
    with forgetting(scene.server):
        scene.commit(leased[:2])
        checkpoint = [*scene.learner.groups.recently_committed(), *ids(leased[2:])]
        scene.commit(leased[2:])
    resumed = Buffer(scene.client, "run")
    epoch = begin(resumed)
    assert resumed.groups.commit(epoch, checkpoint, step=2) == 4
    assert resumed.groups.lease(epoch, 8, 0.1) == []
    scene.states(issued=4, trained=4)


def test_what_others_build_on_is_on_the_disk_before_it_is_said(server_directory: Path) -> None:
    client = connect(EmbeddedServer.start(server_directory).url)
    buffer = Buffer(client, "run")
    for act in (lambda: begin(buffer), lambda: buffer.control.set_state("finished", "")):
        before = client.info("commandstats").get("cmdstat_waitaof", {"calls": 0})["calls"]
        act()
        assert client.info("commandstats")["cmdstat_waitaof"]["calls"] == before + 1
    client.close()


def test_a_mere_restart_changes_nothing(scene: Scene) -> None:
    submit_new(scene.actor, 3)
    leased = scene.lease(2)
    scene.commit(leased[:1])
    scene.learner.groups.return_stale(scene.epoch, leased[1:])
    kill(scene.server)
    EmbeddedServer.start(scene.server.directory)
    assert len(scene.lease(3)) == 1
    scene.states(issued=3, trained=1, retry=1, leased=1)
    assert scene.actor.ledger().events["stale"] == 1
