"""An engine without a model: samples from a script, for everything that is tested or measured around a real one.

It satisfies the contract of `actors.engine.base.Engine`, version spans and in-flight updates included: each step adds
one token to every running sample, whatever version is loaded then.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

from actors.engine.base import Finished, Sample, Scored
from buffer.store import RawTensor
from protocol.errors import EngineError
from protocol.manifest import Manifest
from protocol.trajectory import VersionSpan

LOGPROB = -0.5

Script = Callable[[Sequence[int], int], Sequence[int]]
"""Maps prompt tokens and sample number to the tokens of the response, at least one."""


@dataclass(slots=True)
class _Running:
    responses: list[list[int]]
    versions: list[int] = field(default_factory=list)


class ScriptedEngine:
    """Generates `script(prompt, number)`; parity is exact unless `probe_error` says otherwise."""

    def __init__(self, script: Script, probe_error: float = 0.0, fail_at_version: int | None = None) -> None:
        self._script = script
        self._fail_at_version = fail_at_version
        self._running: dict[str, _Running] = {}
        self._probes: dict[str, tuple[int, ...]] = {}
        self._probe_logprobs: dict[tuple[int, ...], tuple[float, ...]] = {}
        self._version = -1
        self.probe_error = probe_error

    @property
    def version(self) -> int:
        """Policy version of the loaded weights, -1 before the first `load`."""
        return self._version

    @property
    def num_running(self) -> int:
        """Requests not finished yet, probes included."""
        return len(self._running) + len(self._probes)

    def generate(self, request_id: str, prompt_tokens: Sequence[int], num_samples: int) -> None:
        """Queue `num_samples` scripted completions."""
        self._running[request_id] = _Running([list(self._script(prompt_tokens, n)) for n in range(num_samples)])

    def score(self, request_id: str, tokens: Sequence[int]) -> None:
        """Queue a probe sequence of the loaded manifest."""
        self._probes[request_id] = tuple(tokens)

    def abort(self, request_ids: Sequence[str]) -> None:
        """Forget requests; unknown ones are ignored."""
        for request_id in request_ids:
            self._running.pop(request_id, None)
            self._probes.pop(request_id, None)

    def step(self) -> list[Finished | Scored]:
        """Advance every running request by one token and return what finished."""
        results: list[Finished | Scored] = [
            Scored(request_id, tuple(p + self.probe_error for p in self._probe_logprobs[tokens]))
            for request_id, tokens in self._probes.items()
        ]
        self._probes.clear()
        for request_id, running in list(self._running.items()):
            running.versions.append(self._version)
            if len(running.versions) >= max(map(len, running.responses)):
                del self._running[request_id]
                results.append(Finished(request_id, tuple(_sample(r, running.versions) for r in running.responses)))
        return results

    def load(self, manifest: Manifest, tensors: Sequence[RawTensor]) -> None:
        """Take over version and probe of a manifest; the tensors are not looked at."""
        if manifest.version == self._fail_at_version:
            raise EngineError(f"scripted failure at version {manifest.version}")
        self._version = manifest.version
        self._probe_logprobs = dict(zip(manifest.probe.tokens, manifest.probe.logprobs, strict=True))

    def close(self) -> None:
        """Nothing is held."""


def _sample(response: list[int], versions: list[int]) -> Sample:
    spans: list[VersionSpan] = []
    for position, version in enumerate(versions[: len(response)]):
        if spans and spans[-1].version == version:
            spans[-1] = VersionSpan(spans[-1].start, position + 1, version)
        else:
            spans.append(VersionSpan(position, position + 1, version))
    tokens = np.asarray(response, np.int32)
    return Sample(tokens, np.full(len(response), LOGPROB, np.float32), tuple(spans), "stop")
