"""From the version in memory, or from a full one, to the newest: which payloads to read, and what if one is bad.

    held ── delta ── delta ── newest        as long as nobody overtook the chain that the held version is in
    frozen ── adapters of the newest        with LoRA, where every version builds on the full one of its epoch
    full ── delta ── delta ── newest        a late joiner, or after a damaged or missing link
    newest full that can be read            after a damaged link behind it: the old version would be older still

Every link is verified against its own manifest before the next is applied, so what is returned is some published
version, whole. A store that does not answer is no reason for another way: all of them lead through it.
"""

import logging
from collections.abc import Iterator

from buffer.adapter import holds_adapters
from buffer.clock import PolicyClock
from buffer.payloads import Deadline, StagedVersion
from buffer.store import WeightStore
from protocol.errors import CodecError, WeightsDamagedError
from protocol.manifest import Manifest

log = logging.getLogger(__name__)


class ChainReader:
    """Reads versions one after the other, and keeps the last one's tensors to apply deltas to.

    Attributes:
        held: the last version read.
        frozen: the full version that adapters were last read for; they share its tensors, so it costs no memory.
        num_fallbacks: fetches that did not get to their version by the shortest way.
    """

    def __init__(self, clock: PolicyClock, store: WeightStore, held: StagedVersion | None = None) -> None:
        self.held = held
        self.frozen: StagedVersion | None = None
        self.num_fallbacks = 0
        self._clock = clock
        self._store = store

    def fetch(self, target: Manifest, deadline: Deadline) -> StagedVersion:
        """The target; or, where damage is in the way, the newest version behind it that can be read.

        Raises:
            WeightsDamagedError: there is none that is newer than the held one.
            WeightStoreError: the store does not answer, or is too slow.
            BufferUnavailableError: the server is away.
        """
        best, failure = self.held, None
        for start, links in self._routes(target):
            if links[-1].version <= _version(best):
                continue
            reached, error = self._follow(links, start, deadline)
            best = reached if _version(reached) > _version(best) else best
            failure = failure or error
            if _version(best) == target.version:
                break
        if failure is not None:
            self.num_fallbacks += 1
            log.warning("version %d is not reached by its chain: %s", target.version, failure)
            if best is self.held:
                raise failure
        assert best is not None
        self.held = best
        return best

    def _routes(self, target: Manifest) -> Iterator[tuple[StagedVersion | None, list[Manifest]]]:
        """Where to start and what to read from there, the best way first."""
        tried: set[int] = set()
        starts = [start for start in (self.held, self.frozen) if start is not None]
        routes = [(start, self._links(target, start)) for start in (*starts, None)]
        for start, links in sorted(routes, key=lambda route: len(route[1])):
            if links[0].version not in tried:
                tried.add(links[0].version)
                yield start, links
        for version in reversed(self._clock.versions()):
            manifest = self._manifest(version)
            if version < target.version and version not in tried and manifest is not None and manifest.base is None:
                yield None, [manifest]

    def _links(self, target: Manifest, start: StagedVersion | None) -> list[Manifest]:
        """What leads to the target, the first a full version or one that builds on `start`; less where links are
        missing."""
        links = [target]
        while (base := links[0].base) is not None and base != _version(start):
            manifest = self._manifest(base)
            if manifest is None:
                break
            links.insert(0, manifest)
        return links

    def _manifest(self, version: int) -> Manifest | None:
        try:
            return self._clock.manifest(version)
        except CodecError as error:
            log.warning("version %d: %s", version, error)
            return None

    def _follow(
        self, links: list[Manifest], version: StagedVersion | None, deadline: Deadline
    ) -> tuple[StagedVersion | None, WeightsDamagedError | None]:
        """Read one link after the other; where that ended, and why if it was not at the last."""
        for manifest in links:
            if manifest.base is not None and manifest.base != _version(version):
                return version, WeightsDamagedError(f"version {manifest.base} has no manifest any more")
            try:
                base, version = version, StagedVersion(manifest, self._store.read(manifest, version, deadline))
                self.frozen = base if manifest.base is not None and holds_adapters(manifest) else None
            except WeightsDamagedError as error:
                return version, error
        return version, None


def _version(staged: StagedVersion | None) -> int:
    return -1 if staged is None else staged.manifest.version
