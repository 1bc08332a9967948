"""Which versions stay: the newest ones, what they build on, and what a living actor reads right now.

A version is given up in two steps. Its manifest goes in the script that publishes a newer version, so that no actor
sets out to read it any more; its payload goes a while later, so that whoever had set out arrives. What a learner left
that was killed between payload and clock, or in the middle of an upload, never had a manifest: to the next epoch it is
the same thing. Payloads carry the epoch that wrote them, and only those of this epoch and earlier ones are touched:
this epoch's publications and collections take turns in one thread, and whatever an earlier epoch still writes can not
be published any more. A newer epoch's are its own business.

An actor's served version is not kept for its sake: it holds its tensors in memory, and any actor gets to the newest
version from the newest full one.
"""

import logging
import time
from dataclasses import dataclass

from buffer.clock import PolicyClock
from buffer.registry import ActorRegistry
from buffer.store import WeightStore
from protocol.errors import CodecError
from protocol.manifest import Manifest

GRACE_SECONDS = 10.0
"""From a manifest's end to its payload's: several heartbeats, in which an actor says what it has begun to read."""
ALIVE_SECONDS = 30.0

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class _Known:
    base: int | None
    payload: str


class Retention:
    """Retention of one learner epoch's run."""

    def __init__(
        self,
        clock: PolicyClock,
        actors: ActorRegistry,
        store: WeightStore,
        *,
        epoch: int,
        versions_kept: int,
    ) -> None:
        """`versions_kept`: newest versions that stay, what they build on aside."""
        if versions_kept < 1:
            raise ValueError(f"versions_kept is {versions_kept}; the newest version must stay")
        self._clock = clock
        self._actors = actors
        self._store = store
        self._epoch = epoch
        self._versions_kept = versions_kept
        self._known: dict[int, _Known] | None = None
        self._useless_since: dict[str, float] = {}

    def retired_by(self, manifest: Manifest) -> list[int]:
        """Versions whose manifests are to go when this one is published.

        Raises:
            BufferUnavailableError: the server is away.
        """
        known = self._versions() | {manifest.version: _Known(manifest.base, manifest.payload)}
        needed = set(sorted(known)[-self._versions_kept :])
        needed |= {status.fetching_version for _, _, status in self._actors.list(ALIVE_SECONDS)} & known.keys()
        for version in sorted(needed, reverse=True):
            base = known[version].base
            while base is not None and base in known and base not in needed:
                needed.add(base)
                base = known[base].base
        return sorted(known.keys() - needed)

    def published(self, manifest: Manifest, retired: list[int]) -> None:
        """Note what was published; the next `collect` follows it."""
        known = self._versions()
        known[manifest.version] = _Known(manifest.base, manifest.payload)
        for version in retired:
            known.pop(version, None)

    def collect(self) -> list[str]:
        """Delete what no manifest has named for the time of grace; returns what was deleted.

        Raises:
            WeightStoreError: the store cannot be listed, or something cannot be deleted.
        """
        named = {known.payload for known in self._versions().values()}
        useless = [s.name for s in self._store.written() if s.epoch <= self._epoch and s.name not in named]
        now = time.monotonic()
        self._useless_since = {name: self._useless_since.get(name, now) for name in useless}
        due = [name for name, since in self._useless_since.items() if now - since >= GRACE_SECONDS]
        for name in due:
            self._store.delete(name)
            del self._useless_since[name]
        return due

    def _versions(self) -> dict[int, _Known]:
        if self._known is None:
            self._known = {}
            for version in self._clock.versions():
                try:
                    manifest = self._clock.manifest(version)
                except CodecError as error:
                    log.warning("version %d is given up: %s", version, error)
                    self._known[version] = _Known(None, "")
                    continue
                if manifest is not None:
                    self._known[version] = _Known(manifest.base, manifest.payload)
        return self._known
