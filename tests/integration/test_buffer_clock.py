"""Versions, actors and control on a real server."""

import threading
import time

import pytest
import redis
from buffer_samples import begin, make_manifest, publish_next

from buffer.keys import Keys
from buffer.run import Buffer
from protocol.errors import CodecError, FencedError
from protocol.records import ActorStatus, StepRecord


def test_a_publication_moves_clock_and_manifest_together(buffer: Buffer) -> None:
    assert buffer.clock.read() is None
    assert buffer.clock.latest_manifest() is None
    epoch = begin(buffer)
    manifest = make_manifest(0, epoch, step=5)
    buffer.clock.publish(manifest)
    buffer.clock.publish(manifest)
    clock = buffer.clock.read()
    assert clock is not None
    assert (clock.version, clock.step) == (0, 5)
    assert buffer.clock.latest_manifest() == manifest


def test_versions_only_advance(buffer: Buffer) -> None:
    epoch = begin(buffer)
    buffer.clock.publish(make_manifest(3, epoch))
    for version in (2, 3):
        with pytest.raises(ValueError, match=f"version {version} is not above the published version 3"):
            buffer.clock.publish(make_manifest(version, epoch, step=9))


def test_manifests_go_with_the_publication_that_retires_them(buffer: Buffer) -> None:
    epoch = begin(buffer)
    for _ in range(4):
        publish_next(buffer, epoch)
    buffer.clock.publish(make_manifest(4, epoch), [0, 2, 17])
    assert buffer.clock.versions() == [1, 3, 4]
    begin(buffer)
    with pytest.raises(FencedError):
        buffer.clock.publish(make_manifest(5, epoch), [1, 3])
    assert buffer.clock.versions() == [1, 3, 4]


def test_a_damaged_manifest_is_an_error(buffer: Buffer, redis_client: redis.Redis) -> None:
    publish_next(buffer, begin(buffer))
    redis_client.hset(Keys(buffer.run).weights, "0", b"{}")
    with pytest.raises(CodecError, match="weight manifest is invalid"):
        buffer.clock.latest_manifest()


def test_waiting_for_a_version(buffer: Buffer) -> None:
    epoch = begin(buffer)
    assert buffer.clock.wait_for_version(-1, 0.05) is None
    timer = threading.Timer(0.1, publish_next, (buffer, epoch))
    timer.start()
    started = time.monotonic()
    manifest = buffer.clock.wait_for_version(-1, 20)
    assert manifest is not None
    assert manifest.version == 0
    assert time.monotonic() - started < 5
    timer.join()
    assert buffer.clock.wait_for_version(0, 0.05) is None


def status(**changes: object) -> ActorStatus:
    return ActorStatus.model_validate({"state": "serving", "pid": 1, "host": "here", **changes})


def test_actors_come_and_go_and_their_work_stays_counted(buffer: Buffer) -> None:
    buffer.actors.heartbeat("b-1", status(tokens_generated=5, parity_max=1e-6, busy_seconds=1.5, parity=float("nan")))
    buffer.actors.heartbeat("a-1", status(tokens_generated=7, groups_submitted=2, wall_seconds=2.0))
    buffer.actors.heartbeat("a-1", status(tokens_generated=8, groups_submitted=2, wall_seconds=3.0))
    alive = buffer.actors.list(60)
    assert [name for name, _, _ in alive] == ["a-1", "b-1"]
    assert all(0 <= age < 10 for _, age, _ in alive)
    assert alive[0][2] == status(tokens_generated=8, groups_submitted=2, wall_seconds=3.0)
    buffer.actors.leave("b-1")
    buffer.actors.leave("never-seen")
    assert [name for name, _, _ in buffer.actors.list(60)] == ["a-1"]
    time.sleep(0.02)
    assert buffer.actors.list(0.01) == []
    totals = buffer.actors.totals()
    assert (totals.actors, totals.tokens_generated, totals.groups_submitted) == (2, 13, 2)
    assert (totals.busy_seconds, totals.wall_seconds, totals.parity_max) == (1.5, 3.0, 1e-6)


def test_state_and_progress(buffer: Buffer) -> None:
    assert buffer.control.state() == "none"
    assert buffer.control.progress() is None
    begin(buffer)
    assert buffer.control.wait_change("running", 0.05) == "running"
    timer = threading.Timer(0.1, buffer.control.set_state, ("failed", "no data"))
    timer.start()
    started = time.monotonic()
    assert buffer.control.wait_change("running", 20) == "failed"
    assert time.monotonic() - started < 5
    timer.join()
    assert buffer.control.reason() == "no data"
    with pytest.raises(ValueError, match="'paused' is none of"):
        buffer.control.set_state("paused", "")  # type: ignore[arg-type]
    values = {
        name: {"dict[int, int]": {2: 3}, "list[float]": [0.5]}.get(str(field.annotation), 1)
        for name, field in StepRecord.model_fields.items()
    }
    record = StepRecord.model_validate({**values, "skipped": False})
    buffer.control.put_progress(record)
    assert buffer.control.progress() == record
