"""What a weight store is built on: blobs with names, which appear whole or not at all.

Names are plain, or `FOLDER/NAME` with one folder. `buffer.stores.files` keeps them in any file system or object store
that fsspec reaches, `buffer.stores.server` in the run's Redis server. Ray's object store is left out: its objects die
with their owner, and a new learner epoch has to find what the last one left.
"""

from collections.abc import Iterable
from contextlib import AbstractContextManager
from typing import Any, Protocol

PARTIAL_PREFIX = ".part-"
"""Begins the names of blobs that are being written; what is left of them belongs to a writer that was interrupted."""

Part = bytes | bytearray | memoryview


class Blobs(Protocol):
    """Named blobs. Every method raises whatever the driver raises, `FileNotFoundError` for a name that is not there
    (object stores do not say so when they delete); the caller attributes it.

    Attributes:
        url: where this is, for messages, without secrets.
        limit_bytes: the largest payload it takes, or None.
    """

    url: str
    limit_bytes: int | None

    def write(self, name: str, parts: Iterable[Part]) -> None:
        """Store the parts one after the other; replaces a blob of that name. A failure leaves no blob."""

    def size(self, name: str) -> int:
        """Bytes of a blob."""

    def open(self, name: str) -> AbstractContextManager[Any]:
        """A file object to read and seek in."""

    def names(self, folder: str = "") -> list[str]:
        """Plain names of the blobs directly in a folder, those being written included; none if there is no folder."""

    def delete(self, name: str) -> None:
        """Remove a blob, complete or being written."""
