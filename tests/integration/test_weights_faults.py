"""Whatever happens to store, learner or actor: the old version stays, or the new one arrives whole, never a mixture."""

import errno
import multiprocessing
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import pytest
import torch
from buffer_samples import PROBE, begin
from fsspec.implementations.local import LocalFileSystem
from weight_samples import Actor, ControlledBlobs, Learner, flip_a_byte, following, until, weights

import learner.publisher
from actors.weights.chain import ChainReader
from buffer.connection import connect
from buffer.payloads import Deadline
from buffer.retention import Retention
from buffer.run import Buffer
from buffer.store import WeightStore
from buffer.stores.files import FolderBlobs
from learner.publisher import Publisher, Snapshot
from protocol.errors import FencedError, WeightsDamagedError, WeightStoreError
from protocol.records import ActorStatus


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "weights"


@pytest.fixture
def blobs(folder: Path) -> ControlledBlobs:
    return ControlledBlobs(folder)


@pytest.fixture
def store(blobs: ControlledBlobs) -> WeightStore:
    return WeightStore(blobs)


@pytest.fixture
def publishing(buffer: Buffer, store: WeightStore) -> Learner:
    return Learner(buffer, store, begin(buffer))


@pytest.fixture
def actor(buffer: Buffer, store: WeightStore, monkeypatch: pytest.MonkeyPatch) -> Iterator[Actor]:
    monkeypatch.setattr("actors.weights.follower.LAST_BACKOFF_SECONDS", 0.3)
    with following(buffer, store) as started:
        yield started
        assert not started.failed


def test_a_late_joiner_reads_a_full_version_and_its_chain_others_read_the_delta_alone(
    publishing: Learner, blobs: ControlledBlobs, actor: Actor
) -> None:
    for version in range(3):
        publishing.publish(version)
    assert actor.reaches(2)
    blobs.opened.clear()
    publishing.publish(3)
    assert actor.reaches(3)
    assert blobs.opened == ["v00000003-e1.delta"]
    blobs.opened.clear()
    with following(publishing.buffer, publishing.store) as joiner:
        assert joiner.reaches(3)
    assert blobs.opened == ["v00000000-e1.safetensors", *(f"v0000000{v}-e1.delta" for v in (1, 2, 3))]
    assert actor.follower.fetch_fallbacks == joiner.follower.fetch_fallbacks == 0


def test_skipped_versions_are_read_as_links_only(publishing: Learner, blobs: ControlledBlobs, actor: Actor) -> None:
    publishing.publish(0)
    assert actor.reaches(0)
    blobs.answering.clear()
    for version in (1, 2, 3):
        publishing.publish(version)
    blobs.answering.set()
    assert actor.reaches(3)


def test_an_overtaken_chain_is_left_for_the_newest_full_version(
    publishing: Learner, blobs: ControlledBlobs, buffer: Buffer
) -> None:
    reader = ChainReader(buffer.clock, publishing.store)
    reader.fetch(publishing.publish(0), Deadline.after(10))
    blobs.opened.clear()
    publishing.publish(1)
    publishing.publish(2, full=True)
    reader.fetch(publishing.publish(3), Deadline.after(10))
    assert blobs.opened == ["v00000002-e1.safetensors", "v00000003-e1.delta"]
    assert reader.num_fallbacks == 0


def test_a_corrupt_delta_falls_back_to_the_newest_full_version(
    publishing: Learner, folder: Path, buffer: Buffer
) -> None:
    reader = ChainReader(buffer.clock, publishing.store)
    reader.fetch(publishing.publish(0), Deadline.after(10))
    publishing.publish(1, full=True)
    target = publishing.publish(2)
    flip_a_byte(folder / target.payload)
    assert reader.fetch(target, Deadline.after(10)).manifest.version == 1
    assert reader.num_fallbacks == 1
    with pytest.raises(WeightsDamagedError, match="version 2"):
        reader.fetch(target, Deadline.after(10))
    assert reader.fetch(publishing.publish(3, full=True), Deadline.after(10)).manifest.version == 3


def test_a_corrupt_delta_keeps_the_old_version_served_until_the_next_full_one(
    publishing: Learner, folder: Path, actor: Actor
) -> None:
    publishing.publish(0)
    assert actor.reaches(0)
    manifest = publishing.write(1)
    flip_a_byte(folder / manifest.payload)
    publishing.manifests[1] = manifest
    publishing.buffer.clock.publish(manifest)
    assert until(lambda: actor.follower.fetch_failures > 1)
    assert actor.follower.fetch_fallbacks > 0
    publishing.publish(2)  # builds on the one that cannot be read
    publishing.publish(3, full=True)
    assert actor.reaches(3)
    assert actor.versions == [0, 3]


def test_a_corrupt_full_version_is_never_delivered(publishing: Learner, folder: Path, actor: Actor) -> None:
    manifest = publishing.write(0)
    flip_a_byte(folder / manifest.payload)
    publishing.buffer.clock.publish(manifest)
    assert until(lambda: actor.follower.fetch_failures > 1)
    assert actor.versions == []
    publishing.publish(1)
    assert actor.reaches(1)


def test_a_late_joiner_takes_an_older_full_version_when_the_newest_is_corrupt(
    publishing: Learner, folder: Path, actor: Actor
) -> None:
    publishing.publish(0)
    assert actor.reaches(0)
    manifest = publishing.publish(1, full=True)
    assert actor.reaches(1)
    flip_a_byte(folder / manifest.payload)
    publishing.publish(2)
    assert actor.reaches(2)  # it holds the base
    with following(publishing.buffer, publishing.store) as joiner:
        assert joiner.reaches(0)
        publishing.publish(3, full=True)
        assert joiner.reaches(3)


@pytest.mark.parametrize("what", ["payload", "manifest"])
def test_a_missing_link_falls_back(publishing: Learner, folder: Path, buffer: Buffer, what: str) -> None:
    reader = ChainReader(buffer.clock, publishing.store)
    reader.fetch(publishing.publish(0), Deadline.after(10))
    publishing.publish(1, full=True)
    publishing.publish(2)
    if what == "payload":
        (folder / "v00000002-e1.delta").unlink()
    target = publishing.write(3)
    buffer.clock.publish(target, [2] if what == "manifest" else [])
    assert reader.fetch(target, Deadline.after(10)).manifest.version == 1
    assert reader.num_fallbacks == 1


def test_a_delta_of_another_base_is_never_applied(publishing: Learner, buffer: Buffer) -> None:
    reader = ChainReader(buffer.clock, publishing.store)
    held = reader.fetch(publishing.publish(0), Deadline.after(10))
    delta = publishing.publish(1)
    with pytest.raises(ValueError, match="builds on version 0"):
        publishing.store.read(delta)
    spoilt = list(held.tensors)
    spoilt[0] = weights(5)[0]
    with pytest.raises(WeightsDamagedError, match="tensor w0 does not match its checksum"):
        publishing.store.read(delta, type(held)(held.manifest, spoilt))


def test_a_store_that_is_too_slow_is_given_up_and_tried_again(
    publishing: Learner, blobs: ControlledBlobs, actor: Actor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("actors.weights.follower.FETCH_SECONDS", 0.2)
    publishing.publish(0)
    assert actor.reaches(0)
    blobs.seconds_per_read = 0.3
    publishing.publish(1, full=True)
    assert until(lambda: actor.follower.fetch_failures > 0)
    assert actor.versions == [0]
    assert actor.follower.fetch_fallbacks == 0
    blobs.seconds_per_read = 0.0
    assert actor.reaches(1)


def test_a_store_that_hangs_is_left_behind_at_the_deadline(
    publishing: Learner,
    blobs: ControlledBlobs,
    actor: Actor,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr("actors.weights.follower.FETCH_SECONDS", 0.2)
    monkeypatch.setattr("actors.weights.follower.WAIT_SECONDS", 0.1)
    publishing.publish(0)
    assert actor.reaches(0)
    blobs.answering.clear()
    publishing.publish(1)
    assert until(lambda: actor.follower.fetch_failures > 0)
    assert "has not answered for 0.2 s" in caplog.text
    blobs.answering.set()
    assert actor.reaches(1)
    time.sleep(0.2)  # what was left behind has ended by now, and delivers nothing
    assert actor.versions == [0, 1]


class TinyDisk(LocalFileSystem):
    """A disk of `capacity` bytes."""

    protocol = "tiny"
    capacity = 0
    root = Path()

    def _open(self, path: str, mode: str = "rb", **options: Any) -> Any:
        file = super()._open(path, mode, **options)
        return _TinyFile(file) if "w" in mode else file


class _TinyFile:
    def __init__(self, file: Any) -> None:
        self._file = file

    def write(self, data: Any) -> int:
        used = sum(path.stat().st_size for path in TinyDisk.root.rglob("*") if path.is_file())
        if used + memoryview(data).nbytes > TinyDisk.capacity:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        written: int = self._file.write(data)
        self._file.flush()
        return written

    def __enter__(self) -> "_TinyFile":
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()


@pytest.fixture
def tiny(folder: Path, monkeypatch: pytest.MonkeyPatch) -> WeightStore:
    fsspec.register_implementation("tiny", TinyDisk, clobber=True)
    folder.mkdir()
    monkeypatch.setattr(TinyDisk, "root", folder)
    monkeypatch.setattr(TinyDisk, "capacity", 1 << 20)
    monkeypatch.setattr(learner.publisher, "RETRY_SECONDS", (0.05, 0.05))
    monkeypatch.setattr("buffer.retention.GRACE_SECONDS", 0.0)
    return WeightStore(f"tiny://{folder}")


def snapshot(version: int) -> Snapshot:
    return Snapshot(version, version, {"w": torch.full((50_000,), float(version))}, PROBE)


def test_a_full_disk_ends_the_learner_by_name_and_leaves_the_old_version(
    buffer: Buffer, tiny: WeightStore, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    publisher = Publisher(buffer, tiny, epoch=begin(buffer), versions_kept=2)
    publisher.submit(snapshot(0))
    publisher.finish()
    monkeypatch.setattr(TinyDisk, "capacity", 300_000)
    publisher.submit(snapshot(1))
    with pytest.raises(WeightStoreError, match="No space left on device"):
        publisher.finish()
    publisher.close()
    assert [path.name for path in folder.iterdir()] == ["v00000000-e1.safetensors"]
    with following(buffer, tiny) as joiner:
        assert until(lambda: [s.manifest.version for s in joiner.delivered] == [0])


def test_a_disk_that_gets_room_again_takes_the_version(
    buffer: Buffer, tiny: WeightStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Room that its own old versions take is made by collecting them before the next try."""
    epoch = begin(buffer)
    monkeypatch.setattr("buffer.retention.GRACE_SECONDS", 0.02)  # less than the pause before the next try
    publisher = Publisher(buffer, tiny, epoch=epoch, versions_kept=2)
    monkeypatch.setattr(TinyDisk, "capacity", 700_000)  # three versions of 200 kB
    for version in range(6):
        publisher.submit(snapshot(version))
        publisher.finish()
    publisher.close()
    assert buffer.clock.versions() == [4, 5]


def _learner_that_dies(url: str, run: str, folder: str, epoch: int, where: str) -> None:
    """Write version 1 and be killed after its payload, or in the middle of it."""
    if where == "payload":
        FolderBlobs(folder).write("v00000001-e1.safetensors", _dying_parts())
    Learner(Buffer(connect(url), run), WeightStore(folder), epoch).write(1)
    os.kill(os.getpid(), signal.SIGKILL)


def _dying_parts() -> Iterator[bytes]:
    yield bytes(1000)
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.parametrize("where", ["payload", "clock"])
def test_a_learner_killed_before_the_clock_leaves_nothing_that_stays_or_is_served(
    publishing: Learner,
    folder: Path,
    actor: Actor,
    buffer: Buffer,
    redis_url: str,
    run_name: str,
    where: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    publishing.publish(0)
    assert actor.reaches(0)
    arguments = (redis_url, run_name, str(folder), publishing.epoch, where)
    child = multiprocessing.get_context("spawn").Process(target=_learner_that_dies, args=arguments)
    child.start()
    child.join(60)
    assert child.exitcode == -signal.SIGKILL
    (left,) = {path.name for path in folder.iterdir()} - {"v00000000-e1.safetensors"}
    assert left.endswith("v00000001-e1.safetensors")
    time.sleep(0.2)
    assert actor.versions == [0]
    monkeypatch.setattr("buffer.retention.GRACE_SECONDS", 0.0)
    epoch = begin(buffer)
    successor = Learner(buffer, publishing.store, epoch)
    successor.publish(1)
    retention = Retention(buffer.clock, buffer.actors, publishing.store, epoch=epoch, versions_kept=2)
    assert retention.collect() == [left]
    assert actor.reaches(1)
    assert actor.delivered[-1].manifest.epoch == epoch


def test_of_two_learners_only_the_newer_is_heard(publishing: Learner, actor: Actor, buffer: Buffer) -> None:
    publishing.publish(0)
    assert actor.reaches(0)
    successor = Learner(buffer, publishing.store, begin(buffer))
    orphan = publishing.write(1)
    successor.publish(1)
    with pytest.raises(FencedError):
        buffer.clock.publish(orphan)
    assert actor.reaches(1)
    assert actor.delivered[-1].manifest.epoch == successor.epoch
    assert orphan.payload != successor.manifests[1].payload


def _actor_that_is_killed(url: str, run: str, folder: str) -> None:
    """Say what is read, and read it for ever."""
    buffer = Buffer(connect(url), run)
    blobs = ControlledBlobs(Path(folder))
    blobs.answering.clear()
    actor = Actor(buffer, WeightStore(blobs))
    actor.follower.start()
    while actor.follower.fetching_version < 0:
        time.sleep(0.01)
    status = ActorStatus(state="starting", pid=1, host="h", fetching_version=actor.follower.fetching_version)
    buffer.actors.heartbeat("doomed", status)
    time.sleep(60)


def test_an_actor_killed_while_it_fetches_disturbs_nobody(
    publishing: Learner,
    folder: Path,
    actor: Actor,
    buffer: Buffer,
    redis_url: str,
    run_name: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    publishing.publish(0)
    arguments = (redis_url, run_name, str(folder))
    child = multiprocessing.get_context("spawn").Process(target=_actor_that_is_killed, args=arguments)
    child.start()
    try:
        assert until(lambda: bool(buffer.actors.list(60)), 60)
    finally:
        child.kill()
        child.join()
    monkeypatch.setattr("buffer.retention.GRACE_SECONDS", 0.0)
    retention = Retention(buffer.clock, buffer.actors, publishing.store, epoch=publishing.epoch, versions_kept=1)
    full = publishing.write(1, full=True)
    assert retention.retired_by(full) == []  # it may be alive, as far as anybody knows
    buffer.clock.publish(full)
    retention.published(full, [])
    assert actor.reaches(1)
    monkeypatch.setattr("buffer.retention.ALIVE_SECONDS", 0.0)
    assert retention.retired_by(publishing.write(2, full=True)) == [0, 1]


def test_stopping_does_not_wait_for_a_store_that_hangs(
    publishing: Learner, blobs: ControlledBlobs, buffer: Buffer
) -> None:
    blobs.answering.clear()
    publishing.publish(0)
    with following(buffer, publishing.store) as actor:
        assert until(lambda: actor.follower.fetching_version == 0)
        started = time.monotonic()
    assert time.monotonic() - started < 2
    assert actor.follower.fetching_version == -1
    blobs.answering.set()
