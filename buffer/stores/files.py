"""Blobs in a folder of any file system or object store that fsspec reaches.

A file system shows a file while it is written, so blobs are written under another name and renamed. An object store
shows an object once its upload is complete, and renaming would copy it, so there a blob is uploaded under its name and
an upload that fails is aborted. Uploads of a killed writer are the store's own to expire.
"""

import uuid
from collections.abc import Iterable
from contextlib import AbstractContextManager, suppress
from typing import Any

from fsspec.core import url_to_fs

from buffer.connection import redact_url
from buffer.stores.base import PARTIAL_PREFIX, Part

OBJECT_STORES = frozenset({"s3", "s3a", "gs", "gcs", "abfs", "abfss", "az"})
BLOCK_BYTES = 16 << 20


class FolderBlobs:
    """Blobs as files below one folder; see `buffer.stores.base.Blobs`."""

    limit_bytes: int | None = None

    def __init__(self, url: str) -> None:
        """`url`: a plain path, or an fsspec URL. Raises what fsspec does about a protocol it does not know."""
        self.url = redact_url(url)
        # another process writes: what a listing showed a while ago says nothing
        filesystem, root = url_to_fs(url, use_listings_cache=False)
        self._fs: Any = filesystem
        self._root = str(root).rstrip("/")
        protocol = self._fs.protocol
        self._is_object_store = not OBJECT_STORES.isdisjoint([protocol] if isinstance(protocol, str) else protocol)

    def write(self, name: str, parts: Iterable[Part]) -> None:
        """See `Blobs`."""
        if self._is_object_store:
            self._upload(name, parts)
            return
        folder, _, plain = name.rpartition("/")
        partial = self._path(f"{folder}/{PARTIAL_PREFIX}{uuid.uuid4().hex}-{plain}".lstrip("/"))
        self._fs.makedirs(self._path(folder).rstrip("/"), exist_ok=True)
        try:
            with self._fs.open(partial, "wb") as file:
                for part in parts:
                    file.write(part)
            self._fs.mv(partial, self._path(name))
        except BaseException:
            with suppress(Exception):  # the first error tells more, and leftovers are collected later
                self._fs.rm_file(partial)
            raise

    def _upload(self, name: str, parts: Iterable[Part]) -> None:
        file = self._fs.open(self._path(name), "wb", autocommit=False, block_size=BLOCK_BYTES)
        try:
            for part in parts:
                file.write(part)
            file.close()
        except BaseException:
            with suppress(Exception):
                file.discard()
            raise
        file.commit()

    def size(self, name: str) -> int:
        """See `Blobs`."""
        return int(self._fs.size(self._path(name)))

    def open(self, name: str) -> AbstractContextManager[Any]:
        """See `Blobs`."""
        file: AbstractContextManager[Any] = self._fs.open(self._path(name), "rb", block_size=BLOCK_BYTES)
        return file

    def names(self, folder: str = "") -> list[str]:
        """See `Blobs`."""
        path = self._path(folder).rstrip("/")
        if not self._fs.isdir(path):
            return []
        self._fs.invalidate_cache(path)
        return [item["name"].rpartition("/")[2] for item in self._fs.ls(path, detail=True) if item["type"] == "file"]

    def delete(self, name: str) -> None:
        """See `Blobs`."""
        self._fs.rm_file(self._path(name))

    def _path(self, name: str) -> str:
        return f"{self._root}/{name}"
