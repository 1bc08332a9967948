"""The policy clock: which version is newest, what it consists of, and waiting for the next one."""

import time
from collections.abc import Sequence

import redis

from buffer.connection import command
from buffer.events import Events
from buffer.keys import Keys
from buffer.scripts import Scripts
from protocol.clock import ClockState
from protocol.manifest import Manifest

_FIELDS = ("version", "step", "epoch", "groups_per_version", "max_lag", "base", "base_version")


class PolicyClock:
    """The run's clock. Only the learner's current epoch moves it; everybody reads."""

    def __init__(self, client: redis.Redis, keys: Keys, scripts: Scripts, versions: Events) -> None:
        self._client = client
        self._keys = keys
        self._scripts = scripts
        self._versions = versions

    def read(self) -> ClockState | None:
        """One atomic reading, or None if no learner has begun this run. Version -1: nothing is published yet."""
        return parse_clock(command(self._client, *clock_line(self._keys)))

    def publish(self, manifest: Manifest, retired: Sequence[int] = ()) -> None:
        """Make a version the newest one; its payload must be in the weight store. Safe to repeat.

        Args:
            retired: versions that nobody is to load any more (`buffer.retention`); their manifests go.

        Raises:
            ValueError: the version is not above the published one.
            FencedError: `manifest.epoch` is not the current learner epoch.
        """
        self._scripts.run_repeatably(
            "publish", manifest.epoch, manifest.version, manifest.step, manifest.model_dump_json(), *retired
        )

    def latest_manifest(self) -> Manifest | None:
        """Manifest of the newest version, or None if there is none."""
        version = command(self._client, "HGET", self._keys.weights, "latest")
        return None if version is None else self.manifest(int(version))

    def manifest(self, version: int) -> Manifest | None:
        """Manifest of `version`, or None if it is unknown or no longer kept.

        Raises:
            CodecError: what is stored is no manifest.
        """
        data = command(self._client, "HGET", self._keys.weights, str(version))
        return None if data is None else Manifest.parse(data)

    def versions(self) -> list[int]:
        """Versions that have a manifest, ascending."""
        fields = command(self._client, "HKEYS", self._keys.weights)
        return sorted(int(field) for field in fields if field != b"latest")

    def wait_for_version(self, newer_than: int, timeout_seconds: float) -> Manifest | None:
        """Block until a version above `newer_than` is published; the newest one's manifest, or None at the timeout."""
        deadline = time.monotonic() + timeout_seconds
        while True:
            cursor = self._versions.cursor()
            manifest = self.latest_manifest()
            if manifest is not None and manifest.version > newer_than:
                return manifest
            if not self._versions.wait(cursor, deadline - time.monotonic()):
                return None


def clock_line(keys: Keys) -> tuple[str, ...]:
    """Command whose reply `parse_clock` reads."""
    return ("HMGET", keys.clock, *_FIELDS)


def parse_clock(values: Sequence[bytes | None]) -> ClockState | None:
    """The clock's state; None if no learner has begun the run."""
    if values[0] is None:
        return None
    return ClockState(**{name: int(value or 0) for name, value in zip(_FIELDS, values, strict=True)})
