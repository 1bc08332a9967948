"""What `vespo status` says of actors."""

from deploy.snapshot import Snapshot
from deploy.status import actor_lines
from protocol.records import ActorStatus


def snapshot(*statuses: ActorStatus) -> Snapshot:
    return Snapshot("running", None, None, None, [(f"actor-{n}", 1.5, status) for n, status in enumerate(statuses)])


def test_an_actor_shows_what_it_serves_since_when_and_how_exactly() -> None:
    status = ActorStatus(state="serving", pid=1, host="h", served_version=7, served_seconds=63.0, parity=6.2e-6)
    assert actor_lines(snapshot(status)) == ["  actor-0  serving      v7 for 1:04, parity 6.2e-06"]


def test_an_actor_that_serves_nothing_yet_claims_nothing() -> None:
    assert actor_lines(snapshot(ActorStatus(state="starting", pid=1, host="h"))) == ["  actor-0  starting"]


def test_a_quarantined_actor_says_why_and_what_was_tried() -> None:
    status = ActorStatus(
        state="quarantined",
        pid=1,
        host="h",
        served_version=7,
        parity=0.3,
        parity_violations=2,
        reloads=1,
        engine_rebuilds=1,
        error="version 8 differs from the learner by 0.3",
    )
    line = actor_lines(snapshot(status))[0]
    for fact in ("quarantined", "v7", "parity 3.0e-01", "2 parity violations", "1 reloads", "1 engines replaced"):
        assert fact in line
    assert line.endswith("version 8 differs from the learner by 0.3")


def test_no_actors_no_lines() -> None:
    assert actor_lines(snapshot()) == []
