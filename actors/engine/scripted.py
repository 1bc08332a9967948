"""An engine without a model: samples from a script, for everything that is tested or measured around a real one.

It satisfies the contract of `actors.engine.base.Engine`, version spans and in-flight updates included: each step adds
one token to every running sample, whatever version is loaded then. Updates go wrong as told: a load whose probe is
off, or one that raises and leaves the engine lost.
"""

from collections.abc import Callable, Mapping, Sequence
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
    """Generates `script(prompt, number)`; parity is exact unless `faults` say otherwise."""

    def __init__(self, script: Script, faults: Mapping[int, float | EngineError] | None = None) -> None:
        """`faults`: number of a load, from 0 → by how much its probe is off, or what it raises."""
        self._script = script
        self._faults = faults or {}
        self._num_loads = 0
        self._lost = False
        self._running: dict[str, _Running] = {}
        self._probes: dict[str, tuple[int, ...]] = {}
        self._probe_logprobs: dict[tuple[int, ...], tuple[float, ...]] = {}
        self._probe_error = 0.0
        self._version = -1

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
        self._check()
        self._running[request_id] = _Running([list(self._script(prompt_tokens, n)) for n in range(num_samples)])

    def score(self, request_id: str, tokens: Sequence[int]) -> None:
        """Queue a probe sequence of the loaded manifest."""
        self._check()
        self._probes[request_id] = tuple(tokens)

    def abort(self, request_ids: Sequence[str]) -> None:
        """Forget requests; unknown ones are ignored."""
        self._check()
        for request_id in request_ids:
            self._running.pop(request_id, None)
            self._probes.pop(request_id, None)

    def step(self) -> list[Finished | Scored]:
        """Advance every running request by one token and return what finished."""
        self._check()
        results: list[Finished | Scored] = [
            Scored(request_id, tuple(p + self._probe_error for p in self._probe_logprobs[tokens]))
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
        self._check()
        fault = self._faults.get(self._num_loads, 0.0)
        self._num_loads += 1
        if isinstance(fault, EngineError):
            self._lost = True
            raise fault
        self._probe_error = fault
        self._version = manifest.version
        self._probe_logprobs = dict(zip(manifest.probe.tokens, manifest.probe.logprobs, strict=True))

    def close(self) -> None:
        """Nothing is held, and nothing may be asked for any more."""
        self._lost = True

    def _check(self) -> None:
        if self._lost:
            raise EngineError("this scripted engine is lost or closed")


def _sample(response: list[int], versions: list[int]) -> Sample:
    spans: list[VersionSpan] = []
    for position, version in enumerate(versions[: len(response)]):
        if spans and spans[-1].version == version:
            spans[-1] = VersionSpan(spans[-1].start, position + 1, version)
        else:
            spans.append(VersionSpan(position, position + 1, version))
    tokens = np.asarray(response, np.int32)
    return Sample(tokens, np.full(len(response), LOGPROB, np.float32), tuple(spans), "stop")
