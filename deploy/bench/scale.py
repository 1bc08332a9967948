"""`vespo bench scale`: what a group costs the server when 10, or 2,000 actors share the same work.

The actors are scripted, written with asyncio, each with a connection of its own, and run in other processes. However
many there are, together they offer the same number of groups a second: the more, the longer each takes to generate. A
learner leases, commits and publishes, so that admission moves. What must stay flat is the server's processor time for a
group, everything included that actors say to it: asking, waiting, being woken, heartbeats. Processor time of the
server's whole process is read from `INFO cpu`; latencies are what actors see, their own process's delays included.

A figure without target is the cost where admission lets only half of the largest number work at once, so that the
others ask in vain and are woken by every version.
"""

import math
import statistics
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from threading import Event

import redis

from buffer.connection import connect
from buffer.run import Buffer
from deploy.bench.fleet import FleetJob, Latencies, running
from deploy.bench.harness import Reading, Round, Target, progress
from deploy.bench.servers import BenchServer, serving
from protocol.errors import BufferUnavailableError
from protocol.manifest import Manifest, Probe, TensorEntry

COST = "server_us_per_group_{}"
TARGETS = (Target("server_cost_growth", 1.2, at_most=True),)
RUN = "scale"
CLIENTS_BESIDE_ACTORS = 50


@dataclass(frozen=True, slots=True)
class Plan:
    """Numbers of actors, and the load that they share. Defaults are the measurement's; `quick` has its own.

    Attributes:
        actors: how many, each in turn, the first being what the others are compared with.
        processes: in how many processes they are.
        groups_per_second: what all actors together offer.
        seconds: how long is measured.
        groups_per_version, max_lag: the admission rule; it lets all actors of the largest number work.
        waiting_max_lag: lets half of them work.
    """

    actors: tuple[int, ...] = (10, 100, 1000, 2000)
    processes: int = 2
    groups_per_second: float = 400.0
    seconds: float = 5.0
    rounds: int = 2
    groups_per_version: int = 512
    max_lag: int = 6
    waiting_max_lag: int = 1


QUICK = Plan(actors=(4, 16), groups_per_second=100.0, seconds=0.6, rounds=1, groups_per_version=4, max_lag=8)


def rounds(quick: bool) -> Iterator[Round]:
    """Every number of actors once a round."""
    plan = QUICK if quick else Plan()
    with serving() as server:
        for number in range(plan.rounds):
            order = plan.actors if number % 2 == 0 else plan.actors[::-1]
            measured = {num_actors: _measure(server, plan, num_actors) for num_actors in order}
            figures = _figures({num_actors: measured[num_actors] for num_actors in plan.actors})
            if number == 0:
                crowded = _measure(server, replace(plan, max_lag=plan.waiting_max_lag), plan.actors[-1])
                figures[COST.format(f"{plan.actors[-1]}_half_waiting")] = Reading(crowded.server_us_per_group, "us")
            yield figures


@dataclass(frozen=True, slots=True)
class _Measured:
    num_groups: int
    wall_seconds: float
    server_seconds: float
    latencies: Latencies

    @property
    def server_us_per_group(self) -> float:
        return 1e6 * self.server_seconds / max(1, self.num_groups)


def _figures(measured: dict[int, _Measured]) -> Round:
    figures: Round = {}
    for num_actors, one in measured.items():
        figures[COST.format(num_actors)] = Reading(one.server_us_per_group, "us")
        figures[f"groups_per_second_{num_actors}"] = Reading(one.num_groups / one.wall_seconds, "groups/s")
        for name, seconds in (("issue", one.latencies.issue), ("submit", one.latencies.submit)):
            figures[f"{name}_p50_ms_{num_actors}"] = Reading(1e3 * _percentile(seconds, 50), "ms")
            figures[f"{name}_p99_ms_{num_actors}"] = Reading(1e3 * _percentile(seconds, 99), "ms")
    costs = [one.server_us_per_group for one in measured.values()]
    figures["server_cost_growth"] = Reading(max(costs[1:]) / costs[0])
    return figures


def _percentile(seconds: list[float], percent: int) -> float:
    if len(seconds) < 2:
        return math.nan
    return statistics.quantiles(seconds, n=100, method="inclusive")[percent - 1]


def _measure(server: BenchServer, plan: Plan, num_actors: int) -> _Measured:
    server.clear()
    url = server.urls["tcp"]
    with redis.Redis.from_url(server.urls["unix"]) as admin:
        _check_room(admin, num_actors)
        learner = _Learner(url, plan)
        generation_seconds = num_actors / plan.groups_per_second
        shares = [len(range(position, num_actors, plan.processes)) for position in range(plan.processes)]
        jobs = [FleetJob(url, RUN, share, generation_seconds) for share in shares if share]
        with ThreadPoolExecutor(1) as thread, running(jobs) as fleet:
            consuming = thread.submit(learner.consume)
            try:
                fleet.wait_connected()
                time.sleep(2 * generation_seconds + 0.2)  # every actor has delivered, and is on its own schedule
                fleet.record()
                before = learner.num_leased, time.monotonic(), _server_seconds(admin)
                time.sleep(plan.seconds)
                after = learner.num_leased, time.monotonic(), _server_seconds(admin)
                latencies = fleet.finish()
            finally:
                learner.stopped.set()
            consuming.result()
        ledger = learner.buffer.ledger()
        if not ledger.balanced:
            raise BufferUnavailableError(f"the ledger does not balance: {ledger.discrepancies}")
    groups, wall, cpu = (late - early for early, late in zip(before, after, strict=True))
    progress(f"{num_actors} actors: {groups / wall:.0f} groups/s, {1e6 * cpu / max(1, groups):.0f} us a group")
    return _Measured(int(groups), wall, cpu, latencies)


def _server_seconds(admin: redis.Redis) -> float:
    info = admin.info("cpu")
    return float(info["used_cpu_user"]) + float(info["used_cpu_sys"])


def _check_room(admin: redis.Redis, num_actors: int) -> None:
    """The server takes a connection for each actor.

    Raises:
        BufferUnavailableError: it does not, since it may not open so many files.
    """
    most = int(admin.info("clients")["maxclients"])
    if most < num_actors + CLIENTS_BESIDE_ACTORS:
        raise BufferUnavailableError(
            f"the bench's server takes {most} clients, {num_actors} actors need more: raise the limit of open files "
            "(ulimit -n)"
        )


@dataclass(slots=True)
class _Learner:
    """Leases whatever comes; as soon as it has a version's worth, publishes and commits."""

    url: str
    plan: Plan
    stopped: Event = field(default_factory=Event)
    num_leased: int = 0
    buffer: Buffer = field(init=False)
    _epoch: int = field(init=False)

    def __post_init__(self) -> None:
        self.buffer = Buffer(connect(self.url), RUN)
        self._epoch = self.buffer.begin_epoch(
            run_id="bench",
            groups_per_version=self.plan.groups_per_version,
            max_lag=self.plan.max_lag,
            max_attempts=3,
            max_bytes=1 << 30,
        )
        self.buffer.clock.publish(_manifest(0, self._epoch))

    def consume(self) -> None:
        version, entry_ids = 0, list[str]()
        while not self.stopped.is_set():
            leased = self.buffer.groups.lease(self._epoch, self.plan.groups_per_version - len(entry_ids), 0.5)
            entry_ids += [item.entry_id for item in leased]
            self.num_leased += len(leased)
            if len(entry_ids) == self.plan.groups_per_version:
                version += 1
                self.buffer.clock.publish(_manifest(version, self._epoch))
                self.buffer.groups.commit(self._epoch, entry_ids, version)
                entry_ids = []


def _manifest(version: int, epoch: int) -> Manifest:
    """Of a payload that nobody reads."""
    return Manifest(
        version=version,
        step=version,
        epoch=epoch,
        kind="full",
        payload=f"v{version:08d}.safetensors",
        payload_bytes=64,
        tensors=(TensorEntry(name="weight", dtype="F32", shape=(2,), xxh3="0" * 16),),
        probe=Probe(tokens=((1, 2, 3),), logprobs=((-0.5, -0.25),)),
    )
