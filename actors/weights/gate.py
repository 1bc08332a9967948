"""Loads versions into the engine and lets one be served only after its parity probe.

Parity is the largest absolute difference, over the probe's tokens, between the engine's log-probs and those the learner
published with the version. A version that exceeds the tolerance quarantines the actor; it is loaded once more in full,
and if that does not help the engine is given up.
"""

import logging
import time
from enum import Enum

import numpy as np

from actors.engine.base import Engine, Scored
from actors.weights.follower import StagedVersion
from protocol.errors import ParityError

log = logging.getLogger(__name__)


class Verdict(Enum):
    """What an answer to the probe means."""

    PENDING = "more answers are to come"
    VERIFIED = "the loaded version may be served"
    VIOLATED = "the loaded version must not be served"


class VersionGate:
    """State of the loaded version: verifying, served or quarantined."""

    def __init__(self, engine: Engine, tolerance: float) -> None:
        self._engine = engine
        self._tolerance = tolerance
        self._staged: StagedVersion | None = None
        self._loaded: StagedVersion | None = None
        self._probes: dict[str, tuple[float, ...]] = {}
        self._worst = 0.0
        self.served_version = -1
        self.parity = 0.0
        self.parity_max = 0.0
        self.versions_loaded = 0
        self.update_seconds = 0.0
        self.error = ""

    @property
    def verifying(self) -> bool:
        """Whether a loaded version waits for its probe; what finishes meanwhile must be held back."""
        return bool(self._probes)

    @property
    def quarantined(self) -> bool:
        """Whether the loaded version failed its probe."""
        return bool(self.error)

    def offer(self, staged: StagedVersion) -> None:
        """Take a fetched version; a newer one replaces it if it has not been loaded yet."""
        if staged.manifest.version > self._engine.version:
            self._staged = staged

    def load_offered(self) -> None:
        """Load the offered version, if there is one and the last one has its verdict, and start its probe.

        Raises:
            EngineError: the engine is lost.
        """
        if self._staged is None or self.verifying:
            return
        self._loaded, self._staged = self._staged, None
        manifest = self._loaded.manifest
        started = time.monotonic()
        self._engine.load(manifest, self._loaded.tensors)
        self.update_seconds += time.monotonic() - started
        self.versions_loaded += 1
        self._worst = 0.0
        for number, (tokens, logprobs) in enumerate(zip(manifest.probe.tokens, manifest.probe.logprobs, strict=True)):
            request_id = f"probe:{manifest.version}:{number}"
            self._probes[request_id] = logprobs
            self._engine.score(request_id, tokens)

    def answer(self, scored: Scored) -> Verdict:
        """Judge one probe sequence.

        Raises:
            ParityError: the second violation in a row.
        """
        difference = float(np.max(np.abs(np.subtract(scored.logprobs, self._probes.pop(scored.request_id)))))
        self._worst = difference if np.isnan(difference) else max(self._worst, difference)
        if not self._worst <= self._tolerance:  # true for NaN too
            return self._violated()
        if self._probes:
            return Verdict.PENDING
        self.served_version, self.error = self._engine.version, ""
        self.parity, self.parity_max = self._worst, max(self.parity_max, self._worst)
        return Verdict.VERIFIED

    def _violated(self) -> Verdict:
        again = self.quarantined
        self.parity = self._worst
        self.error = (
            f"version {self._engine.version} differs from the learner by {self._worst:.3g} in log-prob, over the "
            f"tolerance of {self._tolerance:.3g}"
        )
        log.error("quarantined: %s", self.error)
        self._engine.abort(list(self._probes))
        self._probes.clear()
        if again:
            raise ParityError(f"{self.error}, also after a full reload")
        self._staged = self._staged or self._loaded
        return Verdict.VIOLATED
