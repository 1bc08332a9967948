"""Every place that can hold weights, by one contract: blobs are whole or not there, and names are what they were."""

import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
import redis
from buffer_samples import PROBE
from object_store import object_store

from buffer.payloads import RawTensor, StagedVersion
from buffer.store import WeightStore
from buffer.stores.base import PARTIAL_PREFIX, Blobs
from buffer.stores.files import FolderBlobs
from buffer.stores.server import CHUNK_BYTES, ServerBlobs
from protocol.errors import WeightStoreError

KINDS = ("path", "file", "memory", "s3", "server")


@contextmanager
def opened(kind: str, folder: Path, client: redis.Redis, run: str) -> Iterator[Blobs]:
    match kind:
        case "path":
            yield FolderBlobs(str(folder / "weights"))
        case "file":
            yield FolderBlobs((folder / "weights").as_uri())
        case "memory":
            yield FolderBlobs(f"memory://{uuid.uuid4().hex}")
        case "s3":
            with object_store() as url:
                yield FolderBlobs(url)
        case "server":
            yield ServerBlobs(client, run)


@pytest.fixture(params=KINDS)
def blobs(request: pytest.FixtureRequest, tmp_path: Path, redis_client: redis.Redis, run_name: str) -> Iterator[Blobs]:
    with opened(request.param, tmp_path, redis_client, run_name) as found:
        yield found


def content(blobs: Blobs, name: str) -> bytes:
    with blobs.open(name) as file:
        data: bytes = file.read()
    assert len(data) == blobs.size(name)
    return data


def test_what_is_written_is_read_again_in_parts_too(blobs: Blobs) -> None:
    assert blobs.names() == blobs.names("folder") == []
    large = bytes(range(256)) * (CHUNK_BYTES // 256 + 3)
    blobs.write("name", [b"ab", memoryview(b"cdef"), bytearray(b""), b"g"])
    blobs.write("folder/name", [large, b"end"])
    assert content(blobs, "name") == b"abcdefg"
    assert content(blobs, "folder/name") == large + b"end"
    assert blobs.names() == ["name"]
    assert blobs.names("folder") == ["name"]
    with blobs.open("folder/name") as file:
        file.seek(CHUNK_BYTES - 1)
        target = bytearray(4)
        assert file.readinto(target) == 4
        assert bytes(target) == large[CHUNK_BYTES - 1 : CHUNK_BYTES + 3]


def test_writing_again_replaces_and_leaves_nothing_of_the_old(blobs: Blobs) -> None:
    blobs.write("name", [bytes(CHUNK_BYTES + 1)])
    blobs.write("name", [b"new"])
    assert content(blobs, "name") == b"new"
    assert blobs.names() == ["name"]


def test_what_is_not_there_is_not_found(blobs: Blobs) -> None:
    blobs.write("name", [b"x"])
    blobs.delete("name")
    with suppress(FileNotFoundError):
        blobs.delete("name")
    with pytest.raises(FileNotFoundError):
        blobs.size("name")
    with pytest.raises(FileNotFoundError), blobs.open("name") as file:
        file.read()
    assert blobs.names() == []


def test_a_write_that_fails_leaves_the_old_blob_and_nothing_else(blobs: Blobs) -> None:
    def failing() -> Iterator[bytes]:
        yield bytes(CHUNK_BYTES + 1)
        raise OSError("the source is gone")

    blobs.write("name", [b"old"])
    for name in ("name", "other"):
        with pytest.raises(OSError, match="the source is gone"):
            blobs.write(name, failing())
    assert content(blobs, "name") == b"old"
    assert blobs.names() == ["name"]


def test_versions_and_deltas_survive(blobs: Blobs) -> None:
    store = WeightStore(blobs)
    store.check()
    tensors = [RawTensor("w", "BF16", (5000,), bytes(10_000)), RawTensor("scalar", "I64", (), bytes(8))]
    base = StagedVersion(store.write(0, 1, 0, tensors, PROBE), tensors)
    changed = [RawTensor("w", "BF16", (5000,), bytes(4000) + b"\1" + bytes(5999)), tensors[1]]
    manifest = store.write(1, 1, 1, changed, PROBE, base)
    assert (manifest.kind, manifest.base, manifest.payload) == ("delta", 0, "v00000001-e1.delta")
    assert manifest.payload_bytes < 500
    read = store.read(base.manifest)
    again = store.read(manifest, StagedVersion(base.manifest, read))
    assert [bytes(t.data) for t in again] == [bytes(t.data) for t in changed]
    assert again[1] is read[1]
    assert {s.name for s in store.written()} == {base.manifest.payload, manifest.payload}


def test_the_server_refuses_a_payload_that_is_too_large(
    redis_client: redis.Redis, run_name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    blobs = ServerBlobs(redis_client, run_name)
    blobs.limit_bytes = 1 << 20
    store = WeightStore(blobs)
    with pytest.raises(WeightStoreError, match=r"takes payloads of at most 1 MiB, this model has 2 MiB; set weights"):
        store.write(0, 1, 0, [RawTensor("w", "U8", (2 << 20,), bytes(2 << 20))], PROBE)
    assert store.written() == []


def test_chunks_of_an_interrupted_upload_are_listed_and_can_be_deleted(
    redis_client: redis.Redis, run_name: str
) -> None:
    blobs = ServerBlobs(redis_client, run_name)
    left = f"{PARTIAL_PREFIX}{uuid.uuid4().hex}-v00000004-e1.delta"
    redis_client.hset(f"vespo:{{{run_name}}}:store", mapping={f"{left}/0": b"x", f"{left}/1": b"y"})
    assert blobs.names() == [left]
    assert [(s.name, s.epoch) for s in WeightStore(blobs).written()] == [(left, 1)]
    blobs.delete(left)
    assert redis_client.hlen(f"vespo:{{{run_name}}}:store") == 0


def test_a_server_that_is_out_of_memory_is_a_weight_store_error(
    buffer, redis_client: redis.Redis, run_name: str
) -> None:  # type: ignore[no-untyped-def]
    store = WeightStore(ServerBlobs(redis_client, run_name))
    redis_client.config_set("maxmemory", 1 << 20)
    try:
        with pytest.raises(WeightStoreError, match="OOM"):
            store.write(0, 1, 0, [RawTensor("w", "U8", (4,), bytes(4))], PROBE)
    finally:
        redis_client.config_set("maxmemory", 0)
    assert store.written() == []
