"""What stays in the weight store: the newest versions, what they build on, what somebody reads; and nothing else."""

import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest
from buffer_samples import begin
from weight_samples import Learner

from buffer.retention import Retention
from buffer.run import Buffer
from buffer.store import WeightStore
from protocol.errors import FencedError
from protocol.records import ActorStatus


class RetainingLearner(Learner):
    """A learner that retires and collects after each publication."""

    def __init__(self, buffer: Buffer, store: WeightStore, epoch: int, kept: int = 2) -> None:
        super().__init__(buffer, store, epoch)
        self.retention = Retention(buffer.clock, buffer.actors, store, epoch=epoch, versions_kept=kept)

    def keep_to(self, last: int, first: int = 0, full: tuple[int, ...] = ()) -> None:
        for version in range(first, last + 1):
            manifest = self.manifests[version] = self.write(version, full=version in full)
            retired = self.retention.retired_by(manifest)
            self.buffer.clock.publish(manifest, retired)
            self.retention.published(manifest, retired)
            self.retention.collect()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "weights"


@pytest.fixture
def store(folder: Path) -> WeightStore:
    return WeightStore(str(folder))


@pytest.fixture
def no_grace(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr("buffer.retention.GRACE_SECONDS", 0.0)
    yield


def payloads(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_the_newest_stay_and_what_they_build_on(
    buffer: Buffer, store: WeightStore, folder: Path, no_grace: None
) -> None:
    learner = RetainingLearner(buffer, store, begin(buffer))
    learner.keep_to(3)
    assert buffer.clock.versions() == [0, 1, 2, 3]  # 2 and 3 build on 1, and 1 on 0
    learner.keep_to(6, first=4, full=(4,))
    assert buffer.clock.versions() == [4, 5, 6]
    assert payloads(folder) == {"v00000004-e1.safetensors", "v00000005-e1.delta", "v00000006-e1.delta"}
    learner.keep_to(8, first=7, full=(7, 8))
    assert payloads(folder) == {"v00000007-e1.safetensors", "v00000008-e1.safetensors"}


def test_what_a_living_actor_reads_stays_with_its_whole_chain(
    buffer: Buffer, store: WeightStore, folder: Path, no_grace: None
) -> None:
    learner = RetainingLearner(buffer, store, begin(buffer))
    learner.keep_to(2)
    buffer.actors.heartbeat("a", ActorStatus(state="serving", pid=1, host="h", served_version=0, fetching_version=1))
    learner.keep_to(5, first=3, full=(3, 4, 5))
    assert buffer.clock.versions() == [0, 1, 4, 5]
    assert {"v00000000-e1.safetensors", "v00000001-e1.delta"} < payloads(folder)
    buffer.actors.leave("a")
    learner.keep_to(6, first=6, full=(6,))
    assert payloads(folder) == {"v00000005-e1.safetensors", "v00000006-e1.safetensors"}


def test_an_actor_that_fell_silent_holds_nothing_back(
    buffer: Buffer, store: WeightStore, no_grace: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("buffer.retention.ALIVE_SECONDS", 0.0)
    learner = RetainingLearner(buffer, store, begin(buffer))
    learner.keep_to(0)
    buffer.actors.heartbeat("a", ActorStatus(state="serving", pid=1, host="h", fetching_version=0))
    learner.keep_to(3, first=1, full=(1, 2, 3))
    assert buffer.clock.versions() == [2, 3]


def test_a_payload_outlives_its_manifest_for_a_while(
    buffer: Buffer, store: WeightStore, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An actor that read the manifest just before can still read the payload."""
    monkeypatch.setattr("buffer.retention.GRACE_SECONDS", 1e6)
    learner = RetainingLearner(buffer, store, begin(buffer))
    learner.keep_to(3, full=(1, 2, 3))
    assert buffer.clock.versions() == [2, 3]
    assert len(payloads(folder)) == 4
    monkeypatch.setattr("buffer.retention.GRACE_SECONDS", 0.0)
    assert set(learner.retention.collect()) == {"v00000000-e1.safetensors", "v00000001-e1.safetensors"}


def test_orphans_and_partial_uploads_go_with_the_next_epoch_and_other_files_never(
    buffer: Buffer, store: WeightStore, folder: Path, no_grace: None
) -> None:
    first = RetainingLearner(buffer, store, begin(buffer))
    first.keep_to(1)
    first.write(2)
    number = uuid.uuid4().hex
    left = {f".part-{number}-v00000003-e1.safetensors", f"check-{number}", "v00000002-e1.safetensors"}
    newer = {f".part-{number}-v00000002-e3.safetensors", "v00000002-e3.safetensors"}
    others = {"notes.txt", "v00000002-e1.gguf"}
    for name in (left | newer | others) - {"v00000002-e1.safetensors"}:
        (folder / name).write_bytes(b"x")
    second = RetainingLearner(buffer, store, begin(buffer))
    second.keep_to(2, first=2)
    kept = {"v00000000-e1.safetensors", "v00000001-e1.delta", "v00000002-e2.safetensors"}
    assert payloads(folder) - {"v00000002-e1.delta"} == kept | newer | others
    assert "v00000002-e1.delta" not in payloads(folder)


def test_a_learner_that_was_replaced_deletes_nothing(
    buffer: Buffer, store: WeightStore, folder: Path, no_grace: None
) -> None:
    first = RetainingLearner(buffer, store, begin(buffer), kept=1)
    first.keep_to(0)
    second = RetainingLearner(buffer, store, begin(buffer), kept=4)
    second.keep_to(1, first=1)
    before = payloads(folder)
    with pytest.raises(FencedError):
        first.keep_to(2, first=2, full=(2,))
    first.retention.collect()
    assert payloads(folder) >= before


def test_a_damaged_manifest_is_retired_like_any_other(
    buffer: Buffer, store: WeightStore, no_grace: None, redis_client, run_name: str, caplog: pytest.LogCaptureFixture
) -> None:  # type: ignore[no-untyped-def]
    RetainingLearner(buffer, store, begin(buffer)).keep_to(0)
    redis_client.hset(f"vespo:{{{run_name}}}:weights", "0", "{}")
    RetainingLearner(buffer, store, begin(buffer)).keep_to(3, first=1, full=(1, 2, 3))
    assert buffer.clock.versions() == [2, 3]
    assert "version 0 is given up: weight manifest is invalid" in caplog.text
