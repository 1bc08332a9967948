"""Loads versions into the engine and lets one be served only after its parity probe; replaces an engine that fails.

Parity is the largest absolute difference, over the probe's tokens, between the engine's log-probs and those the learner
published with the version. What goes wrong quarantines the actor until a version is verified again:

    over the tolerance            the newest version is loaded again, in full
    over the tolerance once more  a fresh engine is built and the newest version loaded into it
    an error during an update     the same at once: layers may be left without storage
    a fresh engine fails too      the error ends the actor

The gate owns the engine, since it is the one who replaces it. It never pauses anything: whether an update must wait for
the requests in generation (`weights.update = "drain"`) follows from what is staged, so nothing can be left paused.
"""

import logging
import time
from collections.abc import Callable
from enum import Enum

import numpy as np

from actors.engine.base import Engine, Scored
from actors.weights.follower import StagedVersion
from protocol.errors import EngineError, ParityError, VespoError

log = logging.getLogger(__name__)


class Verdict(Enum):
    """What an answer to the probe means."""

    PENDING = "more answers are to come"
    VERIFIED = "the loaded version may be served"
    VIOLATED = "the loaded version must not be served"


class VersionGate:
    """The engine and the state of its version: verifying, served or quarantined.

    Attributes:
        engine: the present engine; another object after a rebuild.
        engine_lost: the engine must not be called any more; `update` replaces it.
        served_version: newest version that was verified, -1 before the first.
        parity, parity_max: of the newest version probed, and the largest with which one was served.
        error: why the actor is quarantined; empty while it is not.
        violations, reloads, rebuilds: probes over the tolerance, loads that were to cure one, and fresh engines.
    """

    def __init__(self, build: Callable[[], Engine], tolerance: float, *, drains: bool = False) -> None:
        """`drains`: a staged version waits until no request is in generation, see `draining`."""
        self.engine = build()
        self.engine_lost = False
        self._build = build
        self._tolerance = tolerance
        self._drains = drains
        self._staged: StagedVersion | None = None
        self._loaded: StagedVersion | None = None  # until its verdict, to load it again
        self._reloading = self._fresh = False  # which remedies have been tried since the last verified version
        self._probes: dict[str, tuple[float, ...]] = {}
        self._worst = 0.0
        self._served_since = 0.0
        self.served_version = -1
        self.parity = self.parity_max = 0.0
        self.versions_loaded = self.violations = self.reloads = self.rebuilds = 0
        self.update_seconds = 0.0
        self.error = ""

    @property
    def verifying(self) -> bool:
        """Whether a loaded version waits for its probe; what finishes meanwhile must be held back."""
        return bool(self._probes)

    @property
    def quarantined(self) -> bool:
        """Whether the engine failed and no version has been verified since."""
        return bool(self.error)

    @property
    def draining(self) -> bool:
        """Whether a staged version waits for the requests in generation, so that no new ones may begin."""
        return self._drains and self._staged is not None

    @property
    def served_seconds(self) -> float:
        """Time since the served version was verified; 0 before the first."""
        return time.monotonic() - self._served_since if self.served_version >= 0 else 0.0

    def offer(self, staged: StagedVersion) -> None:
        """Take a fetched version; a newer one replaces it if it has not been loaded yet."""
        if staged.manifest.version > self.engine.version:
            self._staged = staged

    def update(self, *, idle: bool) -> bool:
        """Load the staged version, if there is one and it may be loaded now, and start its probe.

        Args:
            idle: nothing is in generation.

        Returns:
            False if that failed: the engine is lost with all its requests, and the next call replaces it.

        Raises:
            EngineError: it failed in a fresh engine, or none can be built.
        """
        if self._staged is None or self.verifying or (self._drains and not idle):
            return True
        if self.engine_lost:
            self._replace_engine()
        elif self._reloading:
            self.reloads += 1
        self._loaded, self._staged = self._staged, None
        started = time.monotonic()
        try:
            self._load(self._loaded)
        except EngineError as error:
            self.lose(error)
            return False
        finally:
            self.update_seconds += time.monotonic() - started
        self.versions_loaded += 1
        return True

    def _replace_engine(self) -> None:
        log.warning("replacing the engine: %s", self.error)
        try:
            self.engine.close()
        except EngineError as error:
            log.warning("the old engine did not end cleanly: %s", error)
        self.engine = self._build()
        self.engine_lost, self._fresh = False, True
        self.rebuilds += 1

    def _load(self, staged: StagedVersion) -> None:
        manifest = staged.manifest
        self.engine.load(manifest, staged.tensors)
        self._worst = 0.0
        for number, (tokens, logprobs) in enumerate(zip(manifest.probe.tokens, manifest.probe.logprobs, strict=True)):
            request_id = f"probe:{manifest.version}:{number}"
            self._probes[request_id] = logprobs
            self.engine.score(request_id, tokens)

    def answer(self, scored: Scored) -> Verdict:
        """Judge one probe sequence.

        Raises:
            ParityError: a fresh engine violates the tolerance too.
        """
        expected = self._probes.pop(scored.request_id, None)
        if expected is None:  # it came back together with one that gave the verdict
            return Verdict.PENDING
        difference = float(np.max(np.abs(np.subtract(scored.logprobs, expected))))
        self._worst = difference if np.isnan(difference) else max(self._worst, difference)
        if not self._worst <= self._tolerance:  # true for NaN too
            self._violated()
            return Verdict.VIOLATED
        if self._probes:
            return Verdict.PENDING
        self.served_version, self._served_since = self.engine.version, time.monotonic()
        self.parity, self.parity_max = self._worst, max(self.parity_max, self._worst)
        self.error, self._loaded, self._reloading, self._fresh = "", None, False, False
        return Verdict.VERIFIED

    def _violated(self) -> None:
        self.violations += 1
        self.parity = self._worst
        self.engine.abort(list(self._probes))
        error = ParityError(
            f"version {self.engine.version} differs from the learner by {self._worst:.3g} in log-prob, over the "
            f"tolerance of {self._tolerance:.3g}"
        )
        if self._reloading:
            self.lose(error)
        else:
            self._quarantine(error)
            self._reloading = True

    def lose(self, error: VespoError) -> None:
        """Give up the engine because of `error`; nothing in it is to be used, or awaited, any more.

        Raises:
            VespoError: `error`, if the engine is a fresh one: another would fail too.
        """
        self.engine_lost = True
        self._quarantine(error)

    def _quarantine(self, error: VespoError) -> None:
        self.error = str(error)
        log.error("quarantined: %s", error)
        self._probes.clear()
        if self._fresh:
            raise type(error)(f"{error}, in a fresh engine too") from error
        self._staged = self._staged or self._loaded
