"""Weights at rest: one safetensors file per version in any folder fsspec reaches, named by a manifest in Redis.

Also holds the skeleton of the model (configuration, tokenizer), so that an actor needs only Redis and this store.
Left out: deltas against an older version; every payload is complete.
"""

import math
import re
import time
import uuid
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import xxhash
from fsspec.core import url_to_fs

from buffer.connection import redact_url
from buffer.safetensors_format import Placement, encode_header, read_header
from protocol.errors import WeightStoreError
from protocol.manifest import DTYPE_BYTES, Manifest, Probe, TensorEntry

PAYLOAD = re.compile(r"v(\d{8,})-e(\d+)\.safetensors")
TEMPORARY_PREFIX = ".part-"
LEFTOVER_SECONDS = 3600.0
SKELETON = "skeleton"
SKELETON_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,199}")
WEIGHT_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".index.json")
MAX_SKELETON_BYTES = 256 << 20


@dataclass(frozen=True, slots=True, eq=False)
class RawTensor:
    """A tensor as bytes: contiguous, little-endian, named as in the Hugging Face checkpoint; `dtype` as in
    safetensors ("F32", "BF16", ...)."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    data: bytes | bytearray | memoryview


class WeightStore:
    """The weight files of one run."""

    def __init__(self, url: str) -> None:
        """`url`: a plain path, or an fsspec URL (`file:///...`, `s3://...`).

        Raises:
            WeightStoreError: no such protocol, or its driver is not installed.
        """
        self.url = redact_url(url)
        with self._attributed("opened"):
            filesystem, root = url_to_fs(url)
        self._fs: Any = filesystem
        self._root = str(root).rstrip("/")

    def check(self) -> None:
        """Prove that a small file can be written, read and deleted.

        Raises:
            WeightStoreError: it cannot; names the store.
        """
        path = self._path(f"{TEMPORARY_PREFIX}check-{uuid.uuid4().hex}")
        with self._attributed("written, read and deleted in"):
            self._fs.makedirs(self._root, exist_ok=True)
            self._fs.pipe_file(path, b"vespo")
            found = self._fs.cat_file(path)
            self._fs.rm_file(path)
        if found != b"vespo":
            raise WeightStoreError(f"weight store {self.url} returns other bytes than it was given")

    def write(self, version: int, epoch: int, step: int, tensors: Iterable[RawTensor], probe: Probe) -> Manifest:
        """Write a version's payload; it appears under its name when it is complete, or not at all.

        Returns:
            The manifest, ready to be published.

        Raises:
            ValueError: a tensor's bytes do not fit its dtype and shape, or a name occurs twice.
            WeightStoreError: the store cannot be written.
        """
        every = list(tensors)
        views = [_bytes_of(tensor) for tensor in every]
        metadata = {"format": "pt", "version": str(version), "epoch": str(epoch), "step": str(step)}
        header = encode_header(
            [(t.name, t.dtype, t.shape, view.nbytes) for t, view in zip(every, views, strict=True)], metadata
        )
        payload = f"v{version:08d}-e{epoch}.safetensors"
        manifest = Manifest(
            version=version,
            step=step,
            epoch=epoch,
            kind="full",
            payload=payload,
            payload_bytes=len(header) + sum(view.nbytes for view in views),
            tensors=tuple(
                TensorEntry(name=t.name, dtype=t.dtype, shape=t.shape, xxh3=xxhash.xxh3_64_hexdigest(view))
                for t, view in zip(every, views, strict=True)
            ),
            probe=probe,
        )
        self._write_file(payload, [header, *views])
        return manifest

    def read(self, manifest: Manifest) -> list[RawTensor]:
        """Read a version's tensors, in the manifest's order, each verified against its checksum.

        Raises:
            WeightStoreError: the payload is missing, or is not what the manifest describes.
        """
        where = f"version {manifest.version} ({manifest.payload}) in weight store {self.url}"
        path = self._path(manifest.payload)
        with self._attributed(f"read for version {manifest.version} from"):
            size = int(self._fs.size(path))
            if size != manifest.payload_bytes:
                raise WeightStoreError(f"{where} has {size} bytes, its manifest says {manifest.payload_bytes}")
            with self._fs.open(path, "rb") as file:
                placements = read_header(file, size)
                return [self._read_tensor(file, entry, placements.get(entry.name), where) for entry in manifest.tensors]

    def _read_tensor(self, file: Any, entry: TensorEntry, placement: Placement | None, where: str) -> RawTensor:
        if placement is None or (placement.dtype, placement.shape) != (entry.dtype, entry.shape):
            raise WeightStoreError(f"{where}: tensor {entry.name} is {placement}, its manifest says {entry}")
        if placement.num_bytes != entry.num_bytes:
            raise WeightStoreError(f"{where}: tensor {entry.name} has {placement.num_bytes} of {entry.num_bytes} bytes")
        file.seek(placement.offset)
        data = file.read(entry.num_bytes)
        if len(data) != entry.num_bytes or xxhash.xxh3_64_hexdigest(data) != entry.xxh3:
            raise WeightStoreError(f"{where}: tensor {entry.name} does not match its checksum")
        return RawTensor(entry.name, entry.dtype, entry.shape, data)

    def prune(self, keep: int) -> None:
        """Delete all payloads but the newest `keep`, and what interrupted writes left more than an hour ago."""
        if keep < 1:
            raise ValueError(f"keep is {keep}; the newest payload must stay")
        with self._attributed("pruned in"):
            names = self._names("")
            payloads = sorted((int(m[1]), int(m[2]), m[0]) for m in map(PAYLOAD.fullmatch, names) if m)
            for _, _, name in payloads[:-keep]:
                self._fs.rm_file(self._path(name))
            for name in names:
                path = self._path(name)
                if name.startswith(TEMPORARY_PREFIX) and self._age_seconds(path) > LEFTOVER_SECONDS:
                    self._fs.rm_file(path)

    def write_skeleton(self, directory: Path) -> None:
        """Store the files of a model directory that are not weights.

        Raises:
            ValueError: they are larger than 256 MiB together.
            WeightStoreError: the store cannot be written.
        """
        files = [p for p in sorted(directory.iterdir()) if p.is_file() and _is_skeleton(p.name)]
        if (size := sum(p.stat().st_size for p in files)) > MAX_SKELETON_BYTES:
            raise ValueError(f"{directory}: {size} bytes besides the weights are over {MAX_SKELETON_BYTES}")
        for path in files:
            self._write_file(f"{SKELETON}/{path.name}", [path.read_bytes()])

    def read_skeleton(self, directory: Path) -> None:
        """Copy the model's files that are not weights into `directory`.

        Raises:
            WeightStoreError: there are none, one has an unsafe name, or they are over 256 MiB.
        """
        directory.mkdir(parents=True, exist_ok=True)
        with self._attributed("read as skeleton from"):
            names = [name for name in self._names(SKELETON) if not name.startswith(TEMPORARY_PREFIX)]
            if not names:
                raise WeightStoreError(f"weight store {self.url} holds no model skeleton; has the learner started?")
            if unsafe := [name for name in names if not _is_skeleton(name)]:
                raise WeightStoreError(f"weight store {self.url}: skeleton file {unsafe[0]!r} has an unsafe name")
            paths = {name: self._path(f"{SKELETON}/{name}") for name in names}
            if (size := sum(int(self._fs.size(path)) for path in paths.values())) > MAX_SKELETON_BYTES:
                raise WeightStoreError(
                    f"weight store {self.url}: skeleton of {size} bytes is over {MAX_SKELETON_BYTES}"
                )
            for name, path in paths.items():
                (directory / name).write_bytes(self._fs.cat_file(path))

    def _write_file(self, name: str, parts: list[Any]) -> None:
        folder, _, plain = name.rpartition("/")
        temporary = self._path(f"{folder}/{TEMPORARY_PREFIX}{uuid.uuid4().hex}-{plain}".lstrip("/"))
        with self._attributed(f"written as {name} to"):
            self._fs.makedirs(self._path(folder).rstrip("/"), exist_ok=True)
            with self._fs.open(temporary, "wb") as file:
                for part in parts:
                    file.write(part)
            self._fs.mv(temporary, self._path(name))

    def _names(self, folder: str) -> list[str]:
        """Plain names of the files directly in `folder`; none if it does not exist."""
        path = self._path(folder).rstrip("/")
        if not self._fs.isdir(path):
            return []
        self._fs.invalidate_cache(path)
        return [item["name"].rpartition("/")[2] for item in self._fs.ls(path, detail=True) if item["type"] == "file"]

    def _age_seconds(self, path: str) -> float:
        try:
            return time.time() - float(self._fs.modified(path).timestamp())
        except FileNotFoundError:
            return 0.0  # its writer has just finished it

    def _path(self, name: str) -> str:
        return f"{self._root}/{name}"

    @contextmanager
    def _attributed(self, action: str) -> Iterator[None]:
        """Attribute whatever a storage driver raises, each its own types, to the store."""
        try:
            yield
        except WeightStoreError:
            raise
        except Exception as error:
            raise WeightStoreError(f"weights cannot be {action} weight store {self.url}: {error!r}") from error


def _bytes_of(tensor: RawTensor) -> memoryview:
    if tensor.dtype not in DTYPE_BYTES:
        raise ValueError(f"tensor {tensor.name}: dtype {tensor.dtype} is none of {sorted(DTYPE_BYTES)}")
    view = memoryview(tensor.data)
    if view.nbytes != (expected := DTYPE_BYTES[tensor.dtype] * math.prod(tensor.shape)):
        raise ValueError(f"tensor {tensor.name}: {view.nbytes} bytes, {expected} for {tensor.dtype} {tensor.shape}")
    return view.cast("B") if view.nbytes else memoryview(b"")


def _is_skeleton(name: str) -> bool:
    return SKELETON_NAME.fullmatch(name) is not None and not name.endswith(WEIGHT_SUFFIXES)
