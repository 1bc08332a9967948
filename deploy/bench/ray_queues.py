"""What peers put between actors and learner, to compare with: a Ray actor that holds a deque, and Ray's own Queue.

Producer and consumer are Ray actors, each in a process of its own. They put and get one item a call and wait for each
call, as those systems do; `get_batch` is the deque with as many items a call as our learner leases.
"""

import asyncio
import logging
import os
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from deploy.bench.streams import BATCH
from deploy.fleet import RAY_ENVIRONMENT
from protocol.errors import LauncherError

OBJECT_STORE_BYTES = 512 << 20
KINDS = ("ray_deque", "ray_deque_batched", "ray_queue")


class DequeActor:
    """A queue as Ray systems write it: an asyncio actor around a deque."""

    def __init__(self) -> None:
        self._items: deque[bytes] = deque()
        self._arrived = asyncio.Condition()

    async def put(self, item: bytes) -> None:
        """Append an item."""
        async with self._arrived:
            self._items.append(item)
            self._arrived.notify()

    async def get(self) -> bytes:
        """The oldest item, when there is one."""
        return (await self.get_batch(1))[0]

    async def get_batch(self, count: int) -> list[bytes]:
        """The 1 to `count` oldest items, when there are some."""
        async with self._arrived:
            await self._arrived.wait_for(lambda: self._items)
            return [self._items.popleft() for _ in range(min(count, len(self._items)))]


class Producer:
    """Puts items, in a process of its own."""

    def run(self, kind: str, queue: Any, num_bytes: int, num_items: int) -> float:
        """Put all, one by one; returns when it began, by the machine's monotonic clock."""
        import ray

        payload = os.urandom(num_bytes)
        started = time.monotonic()
        for _ in range(num_items):
            if kind == "ray_queue":
                queue.put(payload)
            else:
                ray.get(queue.put.remote(payload))
        return started


class Consumer:
    """Gets items, in a process of its own."""

    def run(self, kind: str, queue: Any, num_items: int) -> float:
        """Get all; returns when the last one was there."""
        import ray

        num_left = num_items
        while num_left > 0:
            if kind == "ray_queue":
                queue.get()
                num_left -= 1
            elif kind == "ray_deque":
                ray.get(queue.get.remote())
                num_left -= 1
            else:
                num_left -= len(ray.get(queue.get_batch.remote(BATCH)))
        return time.monotonic()


class RayQueues:
    """A local Ray with a producer, a consumer and a queue of each kind."""

    def __init__(self, ray: Any) -> None:
        from ray.util.queue import Queue

        options = {"num_cpus": 0}
        remote = ray.remote(**options)
        self._ray = ray
        self._producer, self._consumer = remote(Producer).remote(), remote(Consumer).remote()
        held = remote(DequeActor).remote()
        self._queues = {"ray_deque": held, "ray_deque_batched": held, "ray_queue": Queue(actor_options=options)}

    def seconds(self, kind: str, num_bytes: int, num_items: int) -> float:
        """Wall time from the first put of `num_items` items of `num_bytes` to the last get."""
        queue = self._queues[kind]
        got = self._consumer.run.remote(kind, queue, num_items)
        started, ended = self._ray.get([self._producer.run.remote(kind, queue, num_bytes, num_items), got])
        return float(ended - started)


@contextmanager
def ray_queues() -> Iterator[RayQueues]:
    """Start Ray on this machine, and end it.

    Raises:
        LauncherError: it does not start.
    """
    os.environ.update(RAY_ENVIRONMENT)
    import ray

    try:
        ray.init(
            address="local",
            include_dashboard=False,
            log_to_driver=False,
            logging_level=logging.ERROR,
            num_cpus=1,
            object_store_memory=OBJECT_STORE_BYTES,
        )
    except Exception as error:  # Ray raises whatever it meets
        raise LauncherError(f"Ray did not start on this machine: {error}") from error
    try:
        yield RayQueues(ray)
    finally:
        ray.shutdown()
