"""Weights on their way from learner to actor: how small a delta is, how long each leg takes, how long generation stops.

A model is trained as a learner trains it: AdamW at the learning rate of a real run on float32 master weights, published
in bfloat16. Its master weights begin anywhere between two bfloat16 numbers, as they lie after many updates; weights
that begin on them, as a freshly loaded checkpoint's, would change more rarely at first and flatter the figures. Every
update is published twice, as a delta and in full, to a folder. In a process of its own an actor fetches it, applies the
delta to the version it holds, and loads the result into vLLM: that is the pause. vLLM's own reload of the same tensors
from memory, and a plain copy of as many bytes, stand beside it. Where vLLM does not start, the pause is not measured
and its targets are missed.
"""

import multiprocessing
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from buffer.payloads import RawTensor, StagedVersion
from buffer.store import WeightStore
from deploy.bench.harness import Reading, Round, Target, progress
from deploy.bench.weights_actor import Legs, begin, receive
from deploy.bench.weights_learner import Size, Trajectory
from protocol.errors import EngineError
from protocol.manifest import Manifest, Probe

SIZE = Size(vocabulary=16_000, width=512, layers=6)
QUICK_SIZE = Size(vocabulary=64, width=64, layers=1)
NUM_ROUNDS = 5
NUM_UPDATES_BEFORE = 5  # Adam's first updates are larger than those that follow
PROBE = Probe(tokens=((1, 2),), logprobs=((-1.0,),))  # an actor's verdict is not measured here

TARGETS = (
    Target("delta_over_full", 0.1, at_most=True),
    Target("pause_over_own_load", 1.5, at_most=True),
    Target("reads_during_pause", 0.0, at_most=True),
)


@dataclass(frozen=True, slots=True, eq=False)
class _Published:
    """One update, published both ways; seconds include encoding, checksums and writing."""

    delta: Manifest
    full: Manifest
    delta_seconds: float
    full_seconds: float


def rounds(quick: bool) -> Iterator[Round]:
    """One update a round: published, fetched, loaded; delta before full and full before delta by turns."""
    with tempfile.TemporaryDirectory(prefix="vespo-bench-") as directory:
        root = Path(directory)
        trajectory = Trajectory(QUICK_SIZE if quick else SIZE, root / "skeleton")
        stores = {kind: WeightStore(str(root / kind)) for kind in ("delta", "full")}
        for _ in range(NUM_UPDATES_BEFORE):
            trajectory.update()
        tensors = trajectory.tensors()
        base = StagedVersion(stores["full"].write(0, 1, 0, tensors, PROBE), tensors)
        stores["delta"].write(0, 1, 0, tensors, PROBE)
        context = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(1, mp_context=context) as actor:
            _begin(actor, root, base.manifest)
            for version in range(1, 2 if quick else NUM_ROUNDS + 1):
                delta_first = version % 2 == 1
                trajectory.update()
                tensors = trajectory.tensors()
                published = _publish(stores, version, base, tensors, delta_first)
                copy_seconds = _copy_seconds(tensors)
                legs = actor.submit(receive, published.delta, published.full, delta_first).result()
                base = StagedVersion(published.full, tensors)
                yield _figures(published, legs, copy_seconds)


def _begin(actor: ProcessPoolExecutor, root: Path, first: Manifest) -> None:
    """Have the actor's process hold the first version, in vLLM if that starts."""
    try:
        actor.submit(begin, root, first, engine=True).result()
    except (EngineError, ImportError) as error:
        progress(f"bench weights: no pause is measured: {error}")
        actor.submit(begin, root, first, engine=False).result()


def _publish(
    stores: dict[str, WeightStore], version: int, base: StagedVersion, tensors: list[RawTensor], delta_first: bool
) -> _Published:
    """Write one version to both stores."""

    def write(kind: str) -> tuple[Manifest, float]:
        started = time.perf_counter()
        manifest = stores[kind].write(version, 1, version, tensors, PROBE, base if kind == "delta" else None)
        return manifest, time.perf_counter() - started

    written = {kind: write(kind) for kind in (("delta", "full") if delta_first else ("full", "delta"))}
    return _Published(written["delta"][0], written["full"][0], written["delta"][1], written["full"][1])


def _copy_seconds(tensors: list[RawTensor]) -> float:
    """Of copying as many bytes from memory to memory, the bound of whatever touches every byte once."""
    source = np.concatenate([np.frombuffer(tensor.data, np.uint8) for tensor in tensors])
    target = np.empty_like(source)
    target[:] = 0  # so that its pages are there
    started = time.perf_counter()
    np.copyto(target, source)
    return time.perf_counter() - started


def _figures(published: _Published, legs: Legs, copy_seconds: float) -> Round:
    delta_bytes, full_bytes = published.delta.payload_bytes, published.full.payload_bytes
    figures: Round = {
        "full_bytes": Reading(full_bytes / 1e6, "MB"),
        "delta_bytes": Reading(delta_bytes / 1e6, "MB"),
        "delta_over_full": Reading(delta_bytes / full_bytes),
        "copy_seconds": Reading(copy_seconds, "s"),
        "publish_full_seconds": Reading(published.full_seconds, "s"),
        "publish_delta_seconds": Reading(published.delta_seconds, "s"),
        "fetch_full_seconds": Reading(legs.fetch_full_seconds, "s"),
        "fetch_delta_seconds": Reading(legs.fetch_delta_seconds, "s"),
        "apply_delta_seconds": Reading(legs.apply_delta_seconds, "s"),
        "apply_over_copy": Reading(legs.apply_delta_seconds / copy_seconds),
    }
    if legs.pause_seconds is not None and legs.own_load_seconds is not None:
        figures["pause_seconds"] = Reading(legs.pause_seconds, "s")
        figures["own_load_seconds"] = Reading(legs.own_load_seconds, "s")
        figures["pause_over_own_load"] = Reading(legs.pause_seconds / legs.own_load_seconds)
        figures["reads_during_pause"] = Reading(float(legs.reads_during_pause))
    return figures
