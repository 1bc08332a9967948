"""The weight store on a local folder and in memory: what comes back is what went in, or an error that says why not."""

import math
import struct
import uuid
from pathlib import Path

import numpy as np
import pytest
import xxhash
from buffer_samples import PROBE
from safetensors.numpy import load_file

from buffer.safetensors_format import encode_header
from buffer.store import RawTensor, WeightStore
from protocol.errors import WeightStoreError
from protocol.manifest import Manifest, TensorEntry


def sample_tensors() -> list[RawTensor]:
    random = np.random.default_rng(0)
    return [
        RawTensor("model.embed", "F32", (4, 3), random.normal(size=(4, 3)).astype("<f4").tobytes()),
        RawTensor("model.norm", "BF16", (5,), memoryview(random.bytes(10))),
        RawTensor("model.scalar", "I64", (), struct.pack("<q", 7)),
        RawTensor("model.empty", "F32", (0, 3), b""),
    ]


@pytest.fixture
def store(tmp_path: Path) -> WeightStore:
    return WeightStore(str(tmp_path / "weights"))


def payload_path(store: WeightStore, manifest: Manifest) -> Path:
    return Path(store.url) / manifest.payload


@pytest.mark.parametrize("kind", ["path", "file", "memory"])
def test_tensors_come_back_bit_for_bit(tmp_path: Path, kind: str) -> None:
    urls = {"path": str(tmp_path), "file": tmp_path.as_uri(), "memory": f"memory://{uuid.uuid4().hex}"}
    store = WeightStore(urls[kind])
    store.check()
    manifest = store.write(3, 2, 12, sample_tensors(), PROBE)
    assert (manifest.version, manifest.epoch, manifest.step) == (3, 2, 12)
    assert manifest.payload == "v00000003-e2.safetensors"
    returned = store.read(Manifest.parse(manifest.model_dump_json().encode()))
    assert [(t.name, t.dtype, t.shape, bytes(t.data)) for t in returned] == [
        (t.name, t.dtype, t.shape, bytes(t.data)) for t in sample_tensors()
    ]


def test_payloads_are_files_that_the_safetensors_library_reads(store: WeightStore) -> None:
    tensors = [sample_tensors()[0], sample_tensors()[2], sample_tensors()[3]]
    manifest = store.write(0, 1, 0, tensors, PROBE)
    arrays = load_file(payload_path(store, manifest))
    assert arrays["model.embed"].tobytes() == tensors[0].data
    assert arrays["model.scalar"] == 7
    assert payload_path(store, manifest).stat().st_size == manifest.payload_bytes


def test_a_changed_byte_is_found_and_named(store: WeightStore) -> None:
    manifest = store.write(0, 1, 0, sample_tensors(), PROBE)
    path = payload_path(store, manifest)
    data = bytearray(path.read_bytes())
    data[-10] ^= 1  # inside model.norm: the last 8 bytes are model.scalar
    path.write_bytes(data)
    with pytest.raises(WeightStoreError, match=r"version 0 .*tensor model\.norm does not match its checksum"):
        store.read(manifest)


def test_missing_and_truncated_payloads_are_errors(store: WeightStore) -> None:
    manifest = store.write(0, 1, 0, sample_tensors(), PROBE)
    path = payload_path(store, manifest)
    data = path.read_bytes()
    path.write_bytes(data[:-1])
    with pytest.raises(WeightStoreError, match=f"has {len(data) - 1} bytes, its manifest says {len(data)}"):
        store.read(manifest)
    path.unlink()
    with pytest.raises(WeightStoreError, match=r"version 0 .* is missing"):
        store.read(manifest)


@pytest.mark.parametrize(
    "content",
    [
        b"short",
        struct.pack("<Q", 1 << 60) + b"{}",
        struct.pack("<Q", 2) + b"[]",
        struct.pack("<Q", 9) + b"not json!",
        encode_header([("w", "F32", (2,), 1 << 40)], {}),
        encode_header([("w", "F32", (3,), 8)], {}) + bytes(8),
        encode_header([("w", "F32", (2,), 4)], {}) + bytes(8),
        encode_header([("other", "F32", (2,), 8)], {}) + bytes(8),
        struct.pack("<Q", 56) + b'{"w":{"dtype":"F32","shape":[2],"data_offsets":[-9,-1]}}' + bytes(8),
    ],
)
def test_malformed_payloads_are_errors_before_anything_is_allocated(store: WeightStore, content: bytes) -> None:
    store.check()
    entry = TensorEntry(name="w", dtype="F32", shape=(2,), xxh3=xxhash.xxh3_64_hexdigest(bytes(8)))
    size = max(len(content), 8)
    manifest = Manifest(
        version=0, step=0, epoch=1, kind="full", payload="w", payload_bytes=size, tensors=(entry,), probe=PROBE
    )
    (Path(store.url) / "w").write_bytes(content.ljust(8, b" "))
    with pytest.raises(WeightStoreError):
        store.read(manifest)


@pytest.mark.parametrize("payload", ["../secret", "/etc/passwd", "..", ".hidden", "a/b", ""])
def test_a_manifest_cannot_name_a_file_outside_the_store(payload: str) -> None:
    entry = TensorEntry(name="w", dtype="F32", shape=(2,), xxh3="0")
    with pytest.raises(ValueError, match="plain file name"):
        Manifest(
            version=0, step=0, epoch=1, kind="full", payload=payload, payload_bytes=8, tensors=(entry,), probe=PROBE
        )


@pytest.mark.parametrize(
    "tensors",
    [
        [RawTensor("w", "F32", (2,), bytes(7))],
        [RawTensor("w", "F33", (2,), bytes(8))],
        [RawTensor("w", "F32", (2,), bytes(8)), RawTensor("w", "F32", (2,), bytes(8))],
    ],
)
def test_tensors_that_cannot_be_right_are_not_written(store: WeightStore, tensors: list[RawTensor]) -> None:
    with pytest.raises(ValueError, match="tensor w"):
        store.write(0, 1, 0, tensors, PROBE)
    assert not Path(store.url).exists()


def test_what_publications_and_checks_left_is_listed_with_its_epoch(store: WeightStore) -> None:
    store.write(3, 2, 3, sample_tensors(), PROBE)
    folder, number = Path(store.url), uuid.uuid4().hex
    names = {f".part-{number}-v00000004-e1.delta": 1, f".part-{number}-check-{number}": 0, f"check-{number}": 0}
    for name in [*names, "notes.txt", ".part-other", f".part-{number}-notes"]:
        (folder / name).write_bytes(b"")
    assert {s.name: s.epoch for s in store.written()} == {**names, "v00000003-e2.safetensors": 2}
    for stored in store.written():
        store.delete(stored.name)
        store.delete(stored.name)
    assert store.written() == []
    assert (folder / "notes.txt").exists()


def test_the_skeleton_is_everything_but_weights(store: WeightStore, tmp_path: Path) -> None:
    model, copy = tmp_path / "model", tmp_path / "copy"
    model.mkdir()
    for name in ("config.json", "tokenizer.json", "chat_template.jinja", "modeling_custom.py"):
        (model / name).write_text(name)
    for name in ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", ".gitattributes"):
        (model / name).write_text("weights")
    with pytest.raises(WeightStoreError, match="no model skeleton"):
        store.read_skeleton(copy)
    store.write_skeleton(model)
    store.write_skeleton(model)
    store.read_skeleton(copy)
    assert {path.name: path.read_text() for path in copy.iterdir()} == {
        name: name for name in ("config.json", "tokenizer.json", "chat_template.jinja", "modeling_custom.py")
    }
    (Path(store.url) / "skeleton" / "..evil").write_text("")
    with pytest.raises(WeightStoreError, match=r"'\.\.evil' has an unsafe name"):
        store.read_skeleton(copy)


def test_an_unusable_store_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(WeightStoreError, match="file/weights"):
        WeightStore(str(tmp_path / "file" / "weights")).check()
    with pytest.raises(WeightStoreError, match="nonsense"):
        WeightStore("nonsense://bucket/run")


def test_tensor_sizes_follow_from_dtype_and_shape() -> None:
    assert TensorEntry(name="w", dtype="BF16", shape=(3, 4), xxh3="0").num_bytes == 2 * math.prod((3, 4))
