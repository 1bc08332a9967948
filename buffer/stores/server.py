"""Blobs in the run's Redis server, for models small enough not to be in its way: nothing else has to be set up.

One hash of the run, `store`, holds the chunks of each blob and, under the blob's name, what they are; that entry is
written last, so that a blob appears whole. The server keeps everything in memory and in its append-only file, which is
why a payload has a limit. Left out: reading a part of a blob.
"""

import io
import uuid
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, suppress

import msgpack
import redis

from buffer.connection import command, describe
from buffer.keys import Keys
from buffer.stores.base import PARTIAL_PREFIX, Part

LIMIT_BYTES = 128 << 20
CHUNK_BYTES = 4 << 20


class ServerBlobs:
    """Blobs of one run in Redis; see `buffer.stores.base.Blobs`."""

    limit_bytes: int | None = LIMIT_BYTES

    def __init__(self, client: redis.Redis, run: str) -> None:
        self.url = f"redis (run {run} at {describe(client)})"
        self._client = client
        self._key = Keys(run).store

    def write(self, name: str, parts: Iterable[Part]) -> None:
        """See `Blobs`."""
        old = self._entry(name)
        folder, _, plain = name.rpartition("/")
        stem = f"{folder}/{PARTIAL_PREFIX}{uuid.uuid4().hex}-{plain}".lstrip("/")
        chunks, num_bytes = 0, 0
        try:
            for chunk in _chunked(parts):
                command(self._client, "HSET", self._key, f"{stem}/{chunks}", chunk)
                chunks, num_bytes = chunks + 1, num_bytes + len(chunk)
            command(self._client, "HSET", self._key, name, msgpack.packb([stem, chunks, num_bytes]))
        except BaseException:
            with suppress(Exception):  # the first error tells more, and leftovers are collected later
                self._delete_chunks(stem, chunks + 1)
            raise
        if old is not None:
            self._delete_chunks(old[0], old[1])

    def size(self, name: str) -> int:
        """See `Blobs`."""
        return self._known(name)[2]

    def open(self, name: str) -> AbstractContextManager[io.BytesIO]:
        """See `Blobs`."""
        stem, chunks, num_bytes = self._known(name)
        data = b"".join(self._chunk(name, f"{stem}/{number}") for number in range(chunks))
        if len(data) != num_bytes:
            raise FileNotFoundError(f"{name} has {len(data)} of {num_bytes} bytes")
        return io.BytesIO(data)

    def names(self, folder: str = "") -> list[str]:
        """See `Blobs`."""
        fields = {field.decode() for field in command(self._client, "HKEYS", self._key)}
        complete = {name for name in fields if PARTIAL_PREFIX not in name}
        used = {entry[0] for entry in map(self._entry, complete) if entry is not None}
        partial = {name.rpartition("/")[0] for name in fields - complete} - used
        pairs = (name.rpartition("/") for name in complete | partial)
        return sorted(plain for parent, _, plain in pairs if parent == folder)

    def delete(self, name: str) -> None:
        """See `Blobs`."""
        entry = self._entry(name)
        if entry is not None:
            command(self._client, "HDEL", self._key, name)
            self._delete_chunks(entry[0], entry[1])
            return
        fields = [field.decode() for field in command(self._client, "HKEYS", self._key)]
        left = [field for field in fields if field.rpartition("/")[0] == name]
        if not left:
            raise FileNotFoundError(name)
        command(self._client, "HDEL", self._key, *left)

    def _entry(self, name: str) -> tuple[str, int, int] | None:
        data = command(self._client, "HGET", self._key, name)
        if data is None:
            return None
        stem, chunks, num_bytes = msgpack.unpackb(data)
        if not 0 <= num_bytes <= LIMIT_BYTES or not 0 <= chunks <= LIMIT_BYTES:
            raise ValueError(f"{name} claims {chunks} chunks of {num_bytes} bytes together")
        return str(stem), int(chunks), int(num_bytes)

    def _known(self, name: str) -> tuple[str, int, int]:
        entry = self._entry(name)
        if entry is None:
            raise FileNotFoundError(name)
        return entry

    def _chunk(self, name: str, field: str) -> bytes:
        chunk: bytes | None = command(self._client, "HGET", self._key, field)
        if chunk is None:
            raise FileNotFoundError(f"a chunk of {name}")
        return chunk

    def _delete_chunks(self, stem: str, chunks: int) -> None:
        if chunks:
            command(self._client, "HDEL", self._key, *(f"{stem}/{number}" for number in range(chunks)))


def _chunked(parts: Iterable[Part]) -> Iterator[bytes]:
    """The parts as chunks of `CHUNK_BYTES`, the last one shorter."""
    gathered = bytearray()
    for part in parts:
        view = memoryview(part).cast("B") if memoryview(part).nbytes else memoryview(b"")
        while len(view):
            taken = view[: CHUNK_BYTES - len(gathered)]
            gathered += taken
            view = view[len(taken) :]
            if len(gathered) == CHUNK_BYTES:
                yield bytes(gathered)
                gathered.clear()
    if gathered:
        yield bytes(gathered)
