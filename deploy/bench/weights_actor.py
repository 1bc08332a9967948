"""The actor of the weights bench, in a process of its own: fetches, applies, and loads into vLLM."""

import io
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from buffer.payloads import Deadline, StagedVersion, read_delta
from buffer.store import WeightStore
from buffer.stores.files import FolderBlobs
from protocol.manifest import Manifest
from protocol.settings import Settings

FETCH_SECONDS = 60.0


@dataclass(frozen=True, slots=True)
class Legs:
    """Seconds that one version takes here: its payload's bytes into memory, applied and verified, into the engine.

    Attributes:
        fetch_full_seconds: of the full payload, checksums included: nothing is left to apply.
        pause_seconds: of the engine's `load`, during which nothing is generated.
        own_load_seconds: of vLLM's own reload of the same tensors from memory.
        reads_during_pause: how often the store was opened meanwhile.
    """

    fetch_full_seconds: float
    fetch_delta_seconds: float
    apply_delta_seconds: float
    pause_seconds: float | None = None
    own_load_seconds: float | None = None
    reads_during_pause: int = 0


class _CountedFolder(FolderBlobs):
    """Counts how often a blob is opened."""

    num_opened = 0

    def open(self, name: str) -> Any:
        self.num_opened += 1
        return super().open(name)


class _Actor:
    def __init__(self, root: Path, first: Manifest, engine: bool) -> None:
        self._folders = {kind: _CountedFolder(str(root / kind)) for kind in ("delta", "full")}
        self._full = WeightStore(self._folders["full"])
        self._held = StagedVersion(first, self._full.read(first))
        self._engine: Any = _start_engine(root) if engine else None
        if self._engine is not None:
            self._engine.load(first, self._held.tensors)  # the first load allocates what later ones use again
            self._own_load()

    def receive(self, delta: Manifest, full: Manifest, pause_first: bool) -> Legs:
        started = time.perf_counter()
        with self._folders["delta"].open(delta.payload) as file:
            payload = file.read()
        fetched = time.perf_counter()
        tensors = read_delta(io.BytesIO(payload), delta, self._held, Deadline.after(FETCH_SECONDS))
        applied = time.perf_counter()
        expected = self._full.read(full)
        read = time.perf_counter()
        assert [bytes(t.data) for t in tensors] == [bytes(t.data) for t in expected]
        self._held = StagedVersion(delta, tensors)
        legs = Legs(read - applied, fetched - started, applied - fetched)
        return legs if self._engine is None else self._load(legs, pause_first)

    def _load(self, legs: Legs, pause_first: bool) -> Legs:
        own_load_seconds = 0.0 if pause_first else self._own_load()
        opened = self._opened()
        started = time.perf_counter()
        self._engine.load(self._held.manifest, self._held.tensors)
        pause_seconds = time.perf_counter() - started
        reads = self._opened() - opened
        own_load_seconds = self._own_load() if pause_first else own_load_seconds
        return replace(legs, pause_seconds=pause_seconds, own_load_seconds=own_load_seconds, reads_during_pause=reads)

    def _own_load(self) -> float:
        """vLLM's own way to load tensors that are in memory already."""
        from actors.weights.plugin import as_torch

        weights = [(tensor.name, as_torch(tensor)) for tensor in self._held.tensors]
        started = time.perf_counter()
        # not a verb of our engine: nothing but this comparison wants it
        self._engine._llm.collective_rpc("reload_weights", kwargs={"weights_iterator": iter(weights)})
        return time.perf_counter() - started

    def _opened(self) -> int:
        return sum(folder.num_opened for folder in self._folders.values())


def _start_engine(root: Path) -> Any:
    from actors.engine.vllm_engine import VllmEngine, prepare_environment

    settings = Settings.model_validate(
        {
            "model": {"path": str(root), "dtype": "bfloat16"},
            "task": {"max_prompt_tokens": 32, "max_completion_tokens": 32},
            "actors": {"concurrency": 8, "kv_cache_gib": 0.1, "gpu_memory_utilization": 0.3},
        }
    )
    prepare_environment(settings, root)
    return VllmEngine(settings, root / "skeleton", seed=0)


_actors: list[_Actor] = []  # of this process: the one that `begin` made


def begin(root: Path, first: Manifest, *, engine: bool) -> None:
    """Hold version `first` of the stores below `root`, and start vLLM if `engine`.

    Raises:
        EngineError: vLLM does not start.
    """
    _actors[:] = [_Actor(root, first, engine)]


def receive(delta: Manifest, full: Manifest, pause_first: bool) -> Legs:
    """Take the next version; `full` is the same version, and is compared with what the delta made."""
    return _actors[0].receive(delta, full, pause_first)
