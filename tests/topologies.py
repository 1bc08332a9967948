"""Several servers that belong together: a master with its replica and Sentinels, and a Cluster."""

import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import redis
from plain_servers import wait_until_ready
from redis.crc import key_slot

DEADLINE_SECONDS = 20.0
DOWN_AFTER_MILLISECONDS = 400
LOCAL = ["--bind", "127.0.0.1", "--save", "", "--repl-diskless-sync-delay", "0", "--daemonize", "no"]


@dataclass(frozen=True, slots=True)
class Node:
    """A server on a port of 127.0.0.1."""

    process: subprocess.Popen[bytes]
    port: int

    @property
    def url(self) -> str:
        return f"redis://127.0.0.1:{self.port}"

    def do(self, *command: str | int | bytes) -> Any:
        """Reply to one command, as it came."""
        with redis.Redis.from_url(self.url) as client:
            client.response_callbacks.clear()
            return client.execute_command(*command)

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()


def free_ports(count: int) -> list[int]:
    """Ports that nobody listens on; low enough for a Cluster's second port, 10000 above."""
    found: list[int] = []
    port = 20000 + time.monotonic_ns() % 20000
    while len(found) < count:
        port += 1
        with socket.socket() as first, socket.socket() as second:
            try:
                first.bind(("127.0.0.1", port))
                second.bind(("127.0.0.1", port + 10000))
            except OSError:
                continue
            found.append(port)
    return found


@contextmanager
def node(binary: str, directory: Path, port: int, *arguments: str) -> Iterator[Node]:
    """One server with its files in `directory`."""
    directory.mkdir()
    log = directory / "log"
    options = ["--port", str(port), "--dir", str(directory), "--logfile", str(log), *arguments]
    process = subprocess.Popen([binary, *options], stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    try:
        wait_until_ready(process, f"redis://127.0.0.1:{port}", log)
        yield Node(process, port)
    finally:
        process.send_signal(signal.SIGCONT)
        process.kill()
        process.wait()


def until(condition: Callable[[], object], what: str) -> None:
    """Wait for a condition."""
    deadline = time.monotonic() + DEADLINE_SECONDS
    while not condition():
        assert time.monotonic() < deadline, f"{what}: not within {DEADLINE_SECONDS} s"
        time.sleep(0.02)


@dataclass(frozen=True, slots=True)
class Replicated:
    """Master and replica of the service `vespo`, watched by Sentinels."""

    master: Node
    replica: Node
    sentinels: list[Node]

    @property
    def url(self) -> str:
        return f"redis+sentinel://{','.join(f'127.0.0.1:{s.port}' for s in self.sentinels)}/vespo"


@contextmanager
def replicated(binary: str, directory: Path, *, sentinels: int = 3) -> Iterator[Replicated]:
    """Ready to fail over."""
    with ExitStack() as stack:
        ports = free_ports(2 + sentinels)
        common = [*LOCAL, "--appendonly", "yes", "--appendfsync", "always"]
        master = stack.enter_context(node(binary, directory / "master", ports[0], *common))
        follow = ["--replicaof", f"127.0.0.1 {master.port}"]
        replica = stack.enter_context(node(binary, directory / "replica", ports[1], *common, *follow))
        master.do("SET", "seen", "by the replica")  # Sentinels promote none that has an offset of 0
        until(lambda: replica.do("EXISTS", "seen"), "replica in sync")
        watchers = [
            stack.enter_context(_sentinel(binary, directory, port, master.port, 1 + sentinels // 2))
            for port in ports[2:]
        ]
        for watcher in watchers:
            until(lambda w=watcher: _ready(w, sentinels), "Sentinels that know each other and the replica")  # type: ignore[misc]
        yield Replicated(master, replica, watchers)


@contextmanager
def _sentinel(binary: str, directory: Path, port: int, master_port: int, quorum: int) -> Iterator[Node]:
    config = directory / f"sentinel-{port}.conf"
    lines = [
        f"sentinel monitor vespo 127.0.0.1 {master_port} {quorum}",
        f"sentinel down-after-milliseconds vespo {DOWN_AFTER_MILLISECONDS}",
        "sentinel failover-timeout vespo 3000",
    ]
    config.write_text("\n".join(lines) + "\n")
    options = [str(config), "--sentinel", "--bind", "127.0.0.1"]
    log = directory / f"sentinel-{port}.log"
    arguments = [*options, "--port", str(port), "--dir", str(directory), "--logfile", str(log)]
    process = subprocess.Popen([binary, *arguments], stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    try:
        wait_until_ready(process, f"redis://127.0.0.1:{port}", log)
        yield Node(process, port)
    finally:
        process.kill()
        process.wait()


def _ready(watcher: Node, sentinels: int) -> bool:
    with redis.Redis.from_url(watcher.url) as client:
        state = client.sentinel_master("vespo")
        others = client.sentinel_slaves("vespo")
    knows_all = int(state["num-other-sentinels"]) == sentinels - 1
    return knows_all and any(int(other["slave-repl-offset"]) > 0 for other in others)


@dataclass(frozen=True, slots=True)
class Cluster:
    """Masters that share the slots evenly, in order."""

    nodes: list[Node]

    @property
    def url(self) -> str:
        return f"redis+cluster://{self.addresses}"

    @property
    def addresses(self) -> str:
        return ",".join(f"127.0.0.1:{member.port}" for member in self.nodes)

    def owner(self, run: str) -> int:
        """Position of the node that got the slot of `run` in the beginning."""
        return min(slot_of(run) // (16384 // len(self.nodes)), len(self.nodes) - 1)

    def move(self, run: str, source: int, target: int) -> None:
        """Move the slot of a run with all it holds, key by key."""
        slot = slot_of(run)
        names = [member.do("CLUSTER MYID") for member in self.nodes]
        self.nodes[target].do("CLUSTER SETSLOT", slot, "IMPORTING", names[source])
        self.nodes[source].do("CLUSTER SETSLOT", slot, "MIGRATING", names[target])
        while keys := self.nodes[source].do("CLUSTER GETKEYSINSLOT", slot, 10):
            for key in keys:
                self.nodes[source].do("MIGRATE", "127.0.0.1", self.nodes[target].port, key, 0, 5000)
        for member in (self.nodes[target], self.nodes[source], *self.nodes):
            member.do("CLUSTER SETSLOT", slot, "NODE", names[target])


def slot_of(run: str) -> int:
    """Hash slot of a run's keys."""
    return key_slot(run.encode())


@contextmanager
def cluster(binary: str, directory: Path, *, masters: int = 3) -> Iterator[Cluster]:
    """A Cluster that is up."""
    with ExitStack() as stack:
        options = [*LOCAL, "--appendonly", "yes", "--appendfsync", "always"]
        options += ["--cluster-enabled", "yes", "--cluster-node-timeout", "2000"]
        nodes = [
            stack.enter_context(node(binary, directory / f"node-{position}", port, *options))
            for position, port in enumerate(free_ports(masters))
        ]
        share = 16384 // masters
        for position, member in enumerate(nodes):
            last = 16383 if position == masters - 1 else (position + 1) * share - 1
            member.do("CLUSTER ADDSLOTSRANGE", position * share, last)
            member.do("CLUSTER SET-CONFIG-EPOCH", position + 1)
            nodes[0].do("CLUSTER MEET", "127.0.0.1", member.port)
        for member in nodes:
            until(lambda m=member: _all_know(m, masters), "a Cluster that agrees")  # type: ignore[misc]
        yield Cluster(nodes)


def _all_know(member: Node, masters: int) -> bool:
    info = member.do("CLUSTER INFO")
    return b"cluster_state:ok" in info and f"cluster_size:{masters}".encode() in info
