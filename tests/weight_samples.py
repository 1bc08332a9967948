"""Versions of small made-up weights, a store that can be slowed down, and a follower that keeps what it got."""

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from buffer_samples import PROBE

from actors.weights.follower import WeightFollower
from buffer.payloads import RawTensor, StagedVersion
from buffer.run import Buffer
from buffer.store import WeightStore
from buffer.stores.files import FolderBlobs
from protocol.errors import VespoError
from protocol.manifest import Manifest

NUM_ELEMENTS = 4000


def weights(version: int) -> list[RawTensor]:
    """Two tensors, of which a few elements change from version to version, and one that never does."""
    random = np.random.default_rng(0)
    changing = [random.integers(0, 2**16, NUM_ELEMENTS, dtype=np.uint16) for _ in range(2)]
    for past in range(version):
        for tensor in changing:
            tensor[np.random.default_rng(past).choice(NUM_ELEMENTS, 40, replace=False)] ^= 1
    frozen = RawTensor("frozen", "F32", (3,), bytes(12))
    return [RawTensor(f"w{i}", "BF16", (NUM_ELEMENTS,), tensor.tobytes()) for i, tensor in enumerate(changing)] + [
        frozen
    ]


def is_version(staged: StagedVersion, version: int) -> bool:
    """Whether tensors are those of `weights(version)`, all of them and to the bit."""
    return staged.manifest.version == version and [(t.name, bytes(t.data)) for t in staged.tensors] == [
        (t.name, bytes(t.data)) for t in weights(version)
    ]


class Learner:
    """Publishes versions as a learner's publisher does, full or as deltas as the test says."""

    def __init__(self, buffer: Buffer, store: WeightStore, epoch: int) -> None:
        self.buffer, self.store, self.epoch = buffer, store, epoch
        self.manifests: dict[int, Manifest] = {}

    def write(self, version: int, *, full: bool = False) -> Manifest:
        """A payload without a manifest; a delta builds on the version before."""
        base = self.manifests.get(version - 1)
        staged = None if full or base is None else StagedVersion(base, weights(version - 1))
        return self.store.write(version, self.epoch, version, weights(version), PROBE, staged)

    def publish(self, version: int, *, full: bool = False) -> Manifest:
        """A payload, its manifest, the clock."""
        manifest = self.manifests[version] = self.write(version, full=full)
        assert (manifest.kind == "full") == (full or version - 1 not in self.manifests)
        self.buffer.clock.publish(manifest)
        return manifest


class Actor:
    """A follower and what it delivered."""

    def __init__(self, buffer: Buffer, store: WeightStore) -> None:
        self.delivered: list[StagedVersion] = []
        self.failed: list[VespoError] = []
        self.follower = WeightFollower(buffer.clock, store, self.delivered.append, self.failed.append)

    @property
    def versions(self) -> list[int]:
        """Versions delivered, each of which must be whole."""
        assert all(is_version(staged, staged.manifest.version) for staged in self.delivered)
        return [staged.manifest.version for staged in self.delivered]

    def reaches(self, version: int) -> bool:
        """Whether that version arrives soon."""
        return until(lambda: self.versions[-1:] == [version])


@contextmanager
def following(buffer: Buffer, store: WeightStore) -> Iterator[Actor]:
    """An actor whose follower runs."""
    actor = Actor(buffer, store)
    actor.follower.start()
    try:
        yield actor
    finally:
        actor.follower.stop()


def until(condition: Callable[[], bool], seconds: float = 10.0) -> bool:
    """Whether a condition comes to hold."""
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.01)
    return True


class ControlledBlobs(FolderBlobs):
    """A folder that counts what is opened, takes `seconds_per_read`, and answers only while `answering` is set."""

    def __init__(self, path: Path) -> None:
        super().__init__(str(path))
        self.opened: list[str] = []
        self.seconds_per_read = 0.0
        self.answering = threading.Event()
        self.answering.set()

    def open(self, name: str) -> Any:
        self.opened.append(name)
        self.answering.wait(60)
        return _SlowFile(super().open(name), self)


class _SlowFile:
    def __init__(self, file: Any, blobs: ControlledBlobs) -> None:
        self._file, self._blobs = file, blobs

    def __enter__(self) -> "_SlowFile":
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def readinto(self, target: memoryview) -> int:
        time.sleep(self._blobs.seconds_per_read)
        num_read: int = self._file.readinto(target)
        return num_read

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)


def flip_a_byte(path: Path, position: int = -20) -> None:
    """Change one bit of a file."""
    data = bytearray(path.read_bytes())
    data[position] ^= 1
    path.write_bytes(data)
