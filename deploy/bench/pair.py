"""A producer and a consumer, each in a process of its own that lives through all rounds, timed from start to last."""

import multiprocessing
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing.synchronize import Barrier
from threading import BrokenBarrierError
from typing import Any, Self

START_SECONDS = 60.0

Start = Callable[[], None]
"""Called by each side when it is ready; returns when both are, and the time counts."""
Side = Callable[[Any, Start], None]
"""One side of a measurement, a function of a module: gets its job, prepares, calls start, works."""
_barrier: Barrier


class Pair:
    """Two processes. Use it as a context manager."""

    def __init__(self) -> None:
        context = multiprocessing.get_context("spawn")
        barrier = context.Barrier(2)
        self._producer, self._consumer = (
            ProcessPoolExecutor(1, mp_context=context, initializer=_keep, initargs=(barrier,)) for _ in range(2)
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for side in (self._producer, self._consumer):
            side.shutdown(cancel_futures=True)

    def seconds(self, produce: Side, consume: Side, job: Any) -> float:
        """Wall time from when both sides were ready until both were done.

        Raises:
            whatever a side raises.
        """
        sides = [self._producer.submit(_play, produce, job), self._consumer.submit(_play, consume, job)]
        errors = [error for side in sides if (error := side.exception()) is not None]
        if errors:  # who waits for one that fails breaks off too, which explains nothing
            raise min(errors, key=lambda error: isinstance(error, BrokenBarrierError))
        times = [side.result() for side in sides]
        return max(ended for _, ended in times) - min(started for started, _ in times)


def _keep(barrier: Barrier) -> None:
    global _barrier
    _barrier = barrier


def _play(side: Side, job: Any) -> tuple[float, float]:
    started = 0.0

    def start() -> None:
        nonlocal started
        _barrier.wait(START_SECONDS)
        started = time.monotonic()  # one clock for all processes of a machine

    try:
        side(job, start)
    except BaseException:
        _barrier.abort()
        raise
    return started, time.monotonic()
