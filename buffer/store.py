"""Weights at rest: a payload per version, full or a delta against the version before, named by a manifest in Redis.

Also holds the skeleton of the model (configuration, tokenizer), so that an actor needs only Redis and this store. Where
the bytes lie is `buffer.stores`' business, what a payload holds `buffer.payloads`', and which are still needed
`buffer.retention`'s. Left out: sharded payloads; one rank of the learner writes each version as one blob.
"""

import re
import uuid
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from buffer.connection import redact_url
from buffer.payloads import (
    Deadline,
    Payload,
    RawTensor,
    StagedVersion,
    encode_delta,
    encode_full,
    read_delta,
    read_full,
)
from buffer.stores.base import PARTIAL_PREFIX, Blobs
from buffer.stores.files import FolderBlobs
from protocol.errors import WeightsDamagedError, WeightStoreError
from protocol.manifest import Manifest, Probe

__all__ = ["RawTensor", "StagedVersion", "Stored", "WeightStore"]

PAYLOAD = re.compile(r"v(\d{8,})-e(\d+)\.(?:safetensors|delta)")
WRITTEN = re.compile(rf"(?:{re.escape(PARTIAL_PREFIX)}[0-9a-f]{{32}}-)?(.*)")
CHECK = re.compile(r"check-[0-9a-f]{32}")
READ_SECONDS = 600.0
SKELETON = "skeleton"
SKELETON_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,199}")
WEIGHT_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".index.json")
MAX_SKELETON_BYTES = 256 << 20


@dataclass(frozen=True, slots=True)
class Stored:
    """A blob that a publication left, complete or not, and the learner epoch that wrote it; 0 if that is unknown."""

    name: str
    epoch: int


class WeightStore:
    """The weight files of one run; no other run may use the same place.

    Attributes:
        url: where it is, for messages.
    """

    def __init__(self, where: str | Blobs) -> None:
        """`where`: a plain path or an fsspec URL (`file:///...`, `s3://...`), or blobs that are open already.

        Raises:
            WeightStoreError: no such protocol, or its driver is not installed.
        """
        self.url = redact_url(where) if isinstance(where, str) else where.url
        with self._attributed("opened"):
            self._blobs: Blobs = FolderBlobs(where) if isinstance(where, str) else where

    def check(self) -> None:
        """Prove that a small file can be written, read and deleted.

        Raises:
            WeightStoreError: it cannot; names the store.
        """
        name = f"check-{uuid.uuid4().hex}"
        with self._attributed("written, read and deleted in"):
            self._blobs.write(name, [b"vespo"])
            with self._blobs.open(name) as file:
                found = file.read()
            self._blobs.delete(name)
        if found != b"vespo":
            raise WeightStoreError(f"weight store {self.url} returns other bytes than it was given")

    def check_size(self, num_bytes: int) -> None:
        """Refuse a payload that is over the store's limit.

        Raises:
            WeightStoreError: it is; says what to do.
        """
        limit = self._blobs.limit_bytes
        if limit is not None and num_bytes > limit:
            raise WeightStoreError(
                f"weight store {self.url} takes payloads of at most {limit >> 20} MiB, this model has "
                f"{num_bytes / 2**20:.0f} MiB; set weights.store to a shared folder or an object store"
            )

    def write(
        self,
        version: int,
        epoch: int,
        step: int,
        tensors: Iterable[RawTensor],
        probe: Probe,
        base: StagedVersion | None = None,
    ) -> Manifest:
        """Write a version's payload; it appears under its name when it is complete, or not at all.

        Args:
            base: a published version, to write only what differs from it, if that pays (`payloads.DELTA_PAYS`).

        Returns:
            The manifest, ready to be published.

        Raises:
            ValueError: a tensor's bytes do not fit its dtype and shape, or a name occurs twice.
            WeightStoreError: the store cannot be written, or does not take that many bytes.
        """
        every = list(tensors)
        metadata = {"format": "pt", "version": str(version), "epoch": str(epoch), "step": str(step)}
        change = None if base is None else encode_delta(every, base, metadata)
        payload: Payload = change or encode_full(every, metadata)
        self.check_size(payload.num_bytes)
        manifest = Manifest(
            version=version,
            step=step,
            epoch=epoch,
            kind="delta" if change else "full",
            base=base.manifest.version if change and base else None,
            payload=f"v{version:08d}-e{epoch}.{'delta' if change else 'safetensors'}",
            payload_bytes=payload.num_bytes,
            tensors=payload.entries,
            probe=probe,
        )
        with self._attributed(f"written as {manifest.payload} to"):
            self._blobs.write(manifest.payload, payload.parts)
        return manifest

    def read(
        self, manifest: Manifest, base: StagedVersion | None = None, deadline: Deadline | None = None
    ) -> list[RawTensor]:
        """Read a version's tensors, in the manifest's order, each verified against its checksum.

        Args:
            base: the version that a delta builds on; a full version needs none.
            deadline: when to give up, default in 600 s. A call that hangs inside a driver does not notice it.

        Raises:
            WeightsDamagedError: the payload is missing, or is not what the manifest describes.
            WeightStoreError: the store cannot be read, or is too slow.
        """
        if manifest.base is not None and (base is None or base.manifest.version != manifest.base):
            raise ValueError(f"version {manifest.version} builds on version {manifest.base}, which was not given")
        deadline = deadline or Deadline.after(READ_SECONDS)
        where = f"version {manifest.version} ({manifest.payload}) in weight store {self.url}"
        with self._attributed(f"read for version {manifest.version} from"):
            try:
                size = self._blobs.size(manifest.payload)
                if size != manifest.payload_bytes:
                    raise WeightsDamagedError(f"it has {size} bytes, its manifest says {manifest.payload_bytes}")
                with self._blobs.open(manifest.payload) as file:
                    if base is None or manifest.base is None:
                        return read_full(file, manifest, deadline)
                    return read_delta(file, manifest, base, deadline)
            except FileNotFoundError as error:
                raise WeightsDamagedError(f"{where} is missing") from error
            except WeightStoreError as error:
                raise type(error)(f"{where}: {error}") from error

    def written(self) -> list[Stored]:
        """What publications and checks have left in the store, complete or not; not the skeleton.

        Raises:
            WeightStoreError: the store cannot be listed.
        """
        with self._attributed("listed in"):
            names = self._blobs.names()
        found = []
        for name in names:
            match = WRITTEN.fullmatch(name)
            complete = match[1] if match else name
            if payload := PAYLOAD.fullmatch(complete):
                found.append(Stored(name, int(payload[2])))
            elif CHECK.fullmatch(complete):
                found.append(Stored(name, 0))
        return found

    def delete(self, name: str) -> None:
        """Delete what `written` named; one that is gone already is fine.

        Raises:
            WeightStoreError: it cannot be deleted.
        """
        with self._attributed("deleted in"):
            try:
                self._blobs.delete(name)
            except FileNotFoundError:
                return

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
            with self._attributed(f"written as {SKELETON}/{path.name} to"):
                self._blobs.write(f"{SKELETON}/{path.name}", [path.read_bytes()])

    def read_skeleton(self, directory: Path) -> None:
        """Copy the model's files that are not weights into `directory`.

        Raises:
            WeightStoreError: there are none, one has an unsafe name, or they are over 256 MiB.
        """
        directory.mkdir(parents=True, exist_ok=True)
        with self._attributed("read as skeleton from"):
            names = [name for name in self._blobs.names(SKELETON) if not name.startswith(PARTIAL_PREFIX)]
            if not names:
                raise WeightStoreError(f"weight store {self.url} holds no model skeleton; has the learner started?")
            if unsafe := [name for name in names if not _is_skeleton(name)]:
                raise WeightStoreError(f"weight store {self.url}: skeleton file {unsafe[0]!r} has an unsafe name")
            if (size := sum(self._blobs.size(f"{SKELETON}/{name}") for name in names)) > MAX_SKELETON_BYTES:
                raise WeightStoreError(
                    f"weight store {self.url}: skeleton of {size} bytes is over {MAX_SKELETON_BYTES}"
                )
            for name in names:
                with self._blobs.open(f"{SKELETON}/{name}") as file:
                    (directory / name).write_bytes(file.read())

    @contextmanager
    def _attributed(self, action: str) -> Iterator[None]:
        """Attribute whatever a storage driver raises, each its own types, to the store."""
        try:
            yield
        except WeightStoreError:
            raise
        except Exception as error:
            raise WeightStoreError(f"weights cannot be {action} weight store {self.url}: {error!r}") from error


def _is_skeleton(name: str) -> bool:
    return SKELETON_NAME.fullmatch(name) is not None and not name.endswith(WEIGHT_SUFFIXES)
