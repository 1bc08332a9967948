"""What a version's payload holds: every tensor, or how each differs from the version before.

Both are safetensors files. A full one holds the tensors themselves, as any reader of that format expects. A delta
holds, under the name of each tensor whose bits changed, the bytes of `buffer.delta`. Files are written and read piece
by piece, and every tensor that is returned matches its checksum in the manifest.
"""

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import xxhash

from buffer import delta
from buffer.safetensors_format import Placement, encode_header, read_header
from buffer.stores.base import Part
from protocol.errors import WeightsDamagedError, WeightStoreError
from protocol.manifest import DTYPE_BYTES, Manifest, TensorEntry

READ_BYTES = 32 << 20
"""Read at once, between two looks at the clock."""
DELTA_PAYS = 0.5
"""Share of the tensors' bytes above which a delta is not worth it: a late joiner reads a chain of them."""


@dataclass(frozen=True, slots=True, eq=False)
class RawTensor:
    """A tensor as bytes: contiguous, little-endian, named as in the Hugging Face checkpoint; `dtype` as in
    safetensors ("F32", "BF16", ...)."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    data: Part


@dataclass(frozen=True, slots=True, eq=False)
class StagedVersion:
    """A version in memory: its tensors are those of its manifest, in that order, and match their checksums."""

    manifest: Manifest
    tensors: list[RawTensor]


@dataclass(frozen=True, slots=True)
class Deadline:
    """The end of a transfer's time; `at` is monotonic."""

    at: float
    seconds: float

    @classmethod
    def after(cls, seconds: float) -> "Deadline":
        """From now on."""
        return cls(time.monotonic() + seconds, seconds)

    @property
    def seconds_left(self) -> float:
        """Until it; negative once it has passed."""
        return self.at - time.monotonic()

    def check(self) -> None:
        """Raise `WeightStoreError` once it has passed."""
        if self.seconds_left < 0:
            raise WeightStoreError(f"the weight store is too slow: not done within {self.seconds:g} s")


@dataclass(frozen=True, slots=True, eq=False)
class Payload:
    """A payload to be written, and the manifest's entries for the tensors that it stands for."""

    parts: list[Part]
    entries: tuple[TensorEntry, ...]

    @property
    def num_bytes(self) -> int:
        """Bytes of the parts together."""
        return sum(memoryview(part).nbytes for part in self.parts)


def encode_full(tensors: Sequence[RawTensor], metadata: dict[str, str]) -> Payload:
    """The payload that holds every tensor; shares their memory.

    Raises:
        ValueError: a tensor's bytes do not fit its dtype and shape, or a name occurs twice.
    """
    views = [_bytes_of(tensor) for tensor in tensors]
    header = encode_header(
        [(t.name, t.dtype, t.shape, view.nbytes) for t, view in zip(tensors, views, strict=True)], metadata
    )
    entries = tuple(_entry(t, xxhash.xxh3_64_hexdigest(view)) for t, view in zip(tensors, views, strict=True))
    return Payload([header, *views], entries)


def encode_delta(tensors: Sequence[RawTensor], base: StagedVersion, metadata: dict[str, str]) -> Payload | None:
    """The payload that turns `base` into `tensors`; None if it would not pay, or they are not the same tensors.

    Raises:
        ValueError: as `encode_full`.
    """
    if [(t.name, t.dtype, t.shape) for t in tensors] != [(t.name, t.dtype, t.shape) for t in base.tensors]:
        return None
    most_bytes = DELTA_PAYS * sum(entry.num_bytes for entry in base.manifest.tensors)
    entries: list[TensorEntry] = []
    changes: list[tuple[str, bytes]] = []
    num_bytes = 0
    for tensor, old, entry in zip(tensors, base.tensors, base.manifest.tensors, strict=True):
        view = _bytes_of(tensor)
        change = delta.encode(_bytes_of(old), view, DTYPE_BYTES[tensor.dtype]) if view.nbytes else b""
        entries.append(_entry(tensor, xxhash.xxh3_64_hexdigest(view)) if change else entry)
        if change:
            changes.append((tensor.name, change))
        num_bytes += len(change)
        if num_bytes > most_bytes:
            return None
    header = encode_header([(name, "U8", (len(change),), len(change)) for name, change in changes], metadata)
    payload = Payload([header, *(change for _, change in changes)], tuple(entries))
    return payload if payload.num_bytes <= most_bytes else None


def read_full(file: Any, manifest: Manifest, deadline: Deadline) -> list[RawTensor]:
    """The tensors of a full payload in an open file.

    Raises:
        WeightsDamagedError: it is not what the manifest describes.
    """
    placements = read_header(file, manifest.payload_bytes)
    return [_read_tensor(file, entry, placements.get(entry.name), deadline) for entry in manifest.tensors]


def read_delta(file: Any, manifest: Manifest, base: StagedVersion, deadline: Deadline) -> list[RawTensor]:
    """The tensors that a delta payload in an open file makes of `base`; those that did not change share its memory.

    Raises:
        WeightsDamagedError: it is not what the manifest describes.
    """
    placements = read_header(file, manifest.payload_bytes)
    known = {tensor.name: (tensor, entry) for tensor, entry in zip(base.tensors, base.manifest.tensors, strict=True)}
    if unknown := placements.keys() - {entry.name for entry in manifest.tensors}:
        raise WeightsDamagedError(f"the delta changes tensor {min(unknown)}, which the manifest does not have")
    return [_read_change(file, entry, known, placements.get(entry.name), deadline) for entry in manifest.tensors]


def _read_tensor(file: Any, entry: TensorEntry, placement: Placement | None, deadline: Deadline) -> RawTensor:
    if placement is None or (placement.dtype, placement.shape) != (entry.dtype, entry.shape):
        raise WeightsDamagedError(f"tensor {entry.name} is {placement}, its manifest says {entry}")
    if placement.num_bytes != entry.num_bytes:
        raise WeightsDamagedError(f"tensor {entry.name} has {placement.num_bytes} of {entry.num_bytes} bytes")
    return _verified(_read_bytes(file, placement, deadline), entry)


def _read_change(
    file: Any,
    entry: TensorEntry,
    known: Mapping[str, tuple[RawTensor, TensorEntry]],
    placement: Placement | None,
    deadline: Deadline,
) -> RawTensor:
    old, old_entry = known.get(entry.name, (None, None))
    if old is None or old_entry is None or (old.dtype, old.shape) != (entry.dtype, entry.shape):
        raise WeightsDamagedError(f"tensor {entry.name} is not one of the version that the delta builds on")
    if placement is None:
        if old_entry.xxh3 != entry.xxh3:
            raise WeightsDamagedError(f"tensor {entry.name} has changed, but the delta does not have it")
        return old
    if placement.dtype != "U8" or placement.shape != (placement.num_bytes,):
        raise WeightsDamagedError(f"the delta of tensor {entry.name} is {placement}")
    change = _read_bytes(file, placement, deadline)
    target = bytearray(_bytes_of(old))  # a copy: the old version may be on its way into the engine
    if not target:
        raise WeightsDamagedError(f"the delta changes tensor {entry.name}, which is empty")
    try:
        delta.apply(target, bytes(change), DTYPE_BYTES[entry.dtype])
    except WeightsDamagedError as error:
        raise WeightsDamagedError(f"tensor {entry.name}: {error}") from error
    return _verified(target, entry)


def _read_bytes(file: Any, placement: Placement, deadline: Deadline) -> bytearray:
    """Bytes whose number is known to fit the file."""
    data = bytearray(placement.num_bytes)
    view = memoryview(data)
    file.seek(placement.offset)
    while len(view):
        deadline.check()
        if not (num_read := file.readinto(view[:READ_BYTES])):
            raise WeightsDamagedError(f"the payload ends {len(view)} bytes too early")
        view = view[num_read:]
    return data


def _verified(data: bytearray, entry: TensorEntry) -> RawTensor:
    if xxhash.xxh3_64_hexdigest(data) != entry.xxh3:
        raise WeightsDamagedError(f"tensor {entry.name} does not match its checksum")
    return RawTensor(entry.name, entry.dtype, entry.shape, data)


def _entry(tensor: RawTensor, xxh3: str) -> TensorEntry:
    return TensorEntry(name=tensor.name, dtype=tensor.dtype, shape=tensor.shape, xxh3=xxh3)


def _bytes_of(tensor: RawTensor) -> memoryview:
    if tensor.dtype not in DTYPE_BYTES:
        raise ValueError(f"tensor {tensor.name}: dtype {tensor.dtype} is none of {sorted(DTYPE_BYTES)}")
    view = memoryview(tensor.data)
    if view.nbytes != (expected := DTYPE_BYTES[tensor.dtype] * math.prod(tensor.shape)):
        raise ValueError(f"tensor {tensor.name}: {view.nbytes} bytes, {expected} for {tensor.dtype} {tensor.shape}")
    return view.cast("B") if view.nbytes else memoryview(b"")
