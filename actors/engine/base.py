"""What the rollout loop asks of an engine. It is driven step by step, so new requests and weights fit between steps."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from buffer.store import RawTensor
from protocol.manifest import Manifest
from protocol.trajectory import VersionSpan


@dataclass(frozen=True, slots=True, eq=False)
class Sample:
    """One finished response; see `protocol.trajectory.Completion` for the fields."""

    tokens: NDArray[np.int32]
    logprobs: NDArray[np.float32]
    spans: tuple[VersionSpan, ...]
    finish_reason: str


@dataclass(frozen=True, slots=True, eq=False)
class Finished:
    """All samples of one request."""

    request_id: str
    samples: tuple[Sample, ...]


@dataclass(frozen=True, slots=True)
class Scored:
    """Log-probs at temperature 1 of a probe sequence's tokens after the first, `[T-1]`."""

    request_id: str
    logprobs: tuple[float, ...]


class Engine(Protocol):
    """A generation engine, used from one thread.

    Any method may raise `protocol.errors.EngineError`: the engine is then lost, and its requests with it.
    """

    @property
    def version(self) -> int:
        """Policy version of the loaded weights, -1 before the first `load`."""

    @property
    def num_running(self) -> int:
        """Requests not finished yet, probes included."""

    def generate(self, request_id: str, prompt_tokens: Sequence[int], num_samples: int) -> None:
        """Queue `num_samples` completions of one prompt; they come back together."""

    def score(self, request_id: str, tokens: Sequence[int]) -> None:
        """Queue the scoring of a probe sequence under the loaded weights."""

    def abort(self, request_ids: Sequence[str]) -> None:
        """Forget requests; unknown ones are ignored."""

    def step(self) -> list[Finished | Scored]:
        """Advance every running request by one token and return what finished."""

    def load(self, manifest: Manifest, tensors: Sequence[RawTensor]) -> None:
        """Replace the weights in place; running requests go on, their later tokens under the new version."""

    def close(self) -> None:
        """Free what the engine holds, so that another may start in this process; safe to repeat."""
