"""The learner's loss path against TRL's and the plain formula: time and peak memory of one forward and backward pass.

From hidden states to the gradients of hidden states and head, the same numbers in all, each in a process of its own
that lives through all rounds. TRL is installed on demand; where that fails, the targets are held against the plain
formula instead, and `theirs_is_trl` is 0. TRL's head has a Triton kernel, which CPUs do not run: times say nothing
about GPUs. Memory shrinks with the bench: more tokens only widen the gap.
"""

import multiprocessing
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from math import isclose
from pathlib import Path

from deploy.bench.harness import Reading, Round, Target, progress
from deploy.bench.loss_paths import Cost, Size, measure, prepare
from deploy.bench.trl import trl_libraries
from protocol.errors import VespoError

SIZES = (Size("32k", 32_768, 32, 64, 256), Size("152k", 151_936, 32, 32, 256))
QUICK_SIZES = (Size("tiny", 1_000, 4, 8, 16),)
NUM_ROUNDS = 3
AGREEMENT = 1e-3  # relative difference of loss and gradient norms above which two paths are not the same computation

TARGETS = tuple(
    Target(f"{figure}_over_theirs_{size.name}", bound, at_most=True)
    for size in SIZES
    for figure, bound in (("seconds", 0.9), ("memory", 0.25))
)


def rounds(quick: bool) -> Iterator[Round]:
    """Every path once a round, in an order that turns round; TRL's is left out where it cannot be had."""
    libraries = trl_libraries(install=not quick)
    paths = ["ours", "plain", *(["trl"] if libraries else [])]
    if libraries is None:
        progress("bench loss: TRL is not installed and was not fetched; compared with the plain formula instead")
    with ExitStack() as stack:
        workers = {path: stack.enter_context(_worker(path, libraries if path == "trl" else None)) for path in paths}
        for number in range(1 if quick else NUM_ROUNDS):
            order = paths if number % 2 == 0 else paths[::-1]
            figures: Round = {"theirs_is_trl": Reading(float(libraries is not None))}
            for size in QUICK_SIZES if quick else SIZES:
                costs = {path: workers[path].submit(measure, path, size).result() for path in order}
                figures |= _figures(size, {path: costs[path] for path in paths})
            yield figures


def _worker(path: str, libraries: Path | None) -> ProcessPoolExecutor:
    context = multiprocessing.get_context("spawn")
    return ProcessPoolExecutor(1, mp_context=context, initializer=prepare, initargs=(path, libraries))


def _figures(size: Size, costs: dict[str, Cost]) -> Round:
    """Readings of one size, `costs` by path.

    Raises:
        VespoError: the paths did not compute the same.
    """
    ours, theirs = costs["ours"], costs.get("trl", costs["plain"])
    figures: Round = {}
    for path, cost in costs.items():
        pairs = zip(cost.results, ours.results, strict=True)
        if not all(isclose(value, right, rel_tol=AGREEMENT) for value, right in pairs):
            raise VespoError(
                f"at {size.name}, loss and gradient norms are {ours.results}, but {cost.results} by {path}"
            )
        figures[f"{path}_seconds_{size.name}"] = Reading(cost.seconds, "s")
        figures[f"{path}_memory_{size.name}"] = Reading(cost.peak_bytes / 1e6, "MB")
    for name, other in (("plain", costs["plain"]), ("theirs", theirs)):
        figures[f"seconds_over_{name}_{size.name}"] = Reading(ours.seconds / other.seconds)
        figures[f"memory_over_{name}_{size.name}"] = Reading(ours.peak_bytes / other.peak_bytes)
    return figures
