"""`vespo bench buffer`: groups from a producer's process to a consumer's, through the buffer and through other things.

All of one size and transport is measured back to back: throughput from when both sides are ready to the last group.

vespo      the product's path. The producer takes tickets 32 at a time, then validates, encodes and submits a group for
           each and waits for the answer, as an actor's submitter does. The consumer leases up to 32, decodes and
           validates them, and commits by the 32. All guarantees hold: admission, leases, ledger, exactly once.
raw        the limit: stock redis-py and one stream on the same server, through the same processes. XADD of a group's
           encoded bytes, one a round trip like ours; XREADGROUP of up to 32; XACK and XDEL of 32 in one round trip.
           Bytes only: nothing is encoded, decoded, checksummed or counted, so our codec on both sides is our cost.
ray_deque  a Ray actor around a deque, bytes of the same size, one put or get a call; `_batched` gets up to 32 a call
ray_queue  ray.util.queue.Queue

The server is the embedded one, with its append-only file on disk; 1 KB is 1024 bytes and 1 MB is 1024 KB. Left out:
more than one producer, which `vespo bench scale` has.
"""

from collections.abc import Callable, Iterator
from functools import partial

from deploy.bench import ray_queues, streams
from deploy.bench.harness import Reading, Round, Target, progress
from deploy.bench.pair import Pair
from deploy.bench.servers import BenchServer, serving

SIZES = {"4KB": 4 << 10, "128KB": 128 << 10, "1MB": 1 << 20}
"""Bytes of a group."""
NUM_GROUPS = {"4KB": 1500, "128KB": 600, "1MB": 100}
"""Groups of one measurement: half a second or so."""
NUM_RAY_ITEMS = {"4KB": 300, "128KB": 200, "1MB": 60}
NUM_ROUNDS = 7
QUICK_GROUPS = 40
TRANSPORTS = ("tcp", "unix")
OF_RAW, OF_RAY_DEQUE = 0.8, 5.0
TARGETS = (
    *(Target(f"vespo_{transport}_{size}_of_raw", OF_RAW) for size in ("128KB", "1MB") for transport in TRANSPORTS),
    *(Target(f"vespo_{transport}_128KB_of_ray_deque", OF_RAY_DEQUE) for transport in TRANSPORTS),
)

Measurement = Callable[[], float]
"""Groups a second."""


def rounds(quick: bool) -> Iterator[Round]:
    """Every transport and size once a round, in turn forwards and backwards."""
    with serving() as server, Pair() as pair, ray_queues.ray_queues() as queues:
        progress("bench buffer: warming up")
        _round(server, pair, queues, quick=True, backwards=False)
        for number in range(1 if quick else NUM_ROUNDS):
            yield _round(server, pair, queues, quick=quick, backwards=number % 2 == 1)


def _round(server: BenchServer, pair: Pair, queues: ray_queues.RayQueues, *, quick: bool, backwards: bool) -> Round:
    figures: Round = {}
    for size, num_bytes in SIZES.items():
        num_groups = QUICK_GROUPS if quick else NUM_GROUPS[size]
        num_items = QUICK_GROUPS if quick else NUM_RAY_ITEMS[size]
        cases: dict[str, Measurement] = {}
        for transport in TRANSPORTS:
            job = streams.Job(server.urls[transport], num_bytes, num_groups)
            cases[f"vespo_{transport}"] = partial(_vespo, server, pair, job)
            cases[f"raw_{transport}"] = partial(_raw, server, pair, job)
        for kind in ray_queues.KINDS:
            cases[kind] = partial(_ray, queues, kind, num_bytes, num_items)
        names = list(reversed(cases)) if backwards else list(cases)
        rates = {name: cases[name]() for name in names}
        figures |= _figures(size, num_bytes, {name: rates[name] for name in cases})
    return figures


def _figures(size: str, num_bytes: int, rates: dict[str, float]) -> Round:
    """What one size's rates, in groups/s, amount to."""
    figures: Round = {}
    for name, rate in rates.items():
        figures[f"{name}_{size}_groups"] = Reading(rate, "groups/s")
        figures[f"{name}_{size}_bytes"] = Reading(rate * num_bytes / (1 << 20), "MB/s")
    for transport in TRANSPORTS:
        ours = rates[f"vespo_{transport}"]
        for other, rate in (("raw", rates[f"raw_{transport}"]), *((kind, rates[kind]) for kind in ray_queues.KINDS)):
            figures[f"vespo_{transport}_{size}_of_{other}"] = Reading(ours / rate)
    return figures


def _vespo(server: BenchServer, pair: Pair, job: streams.Job) -> float:
    server.clear()
    streams.begin_run(job)
    return job.num_groups / pair.seconds(streams.deliver_groups, streams.train_groups, job)


def _raw(server: BenchServer, pair: Pair, job: streams.Job) -> float:
    server.clear()
    streams.begin_stream(job)
    return job.num_groups / pair.seconds(streams.add_entries, streams.read_entries, job)


def _ray(queues: ray_queues.RayQueues, kind: str, num_bytes: int, num_items: int) -> float:
    return num_items / queues.seconds(kind, num_bytes, num_items)
