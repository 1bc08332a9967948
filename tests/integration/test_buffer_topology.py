"""Clients of Sentinel and of a Cluster find the run's server, follow it where it goes, and wait no longer than told."""

import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import redis
from buffer_samples import begin, make_group, publish_next, submit_new
from plain_servers import VALKEY, debian_redis
from test_buffer_network import RIGHTS, tour
from topologies import Cluster, Replicated, cluster, replicated, slot_of

from buffer.connection import check_server, connect
from buffer.run import Buffer
from protocol.errors import BufferUnavailableError


@pytest.fixture(params=["valkey", "redis-server"])
def binary(request: pytest.FixtureRequest) -> str:
    return VALKEY if request.param == "valkey" else debian_redis()


@pytest.fixture
def watched(binary: str, tmp_path: Path) -> Iterator[Replicated]:
    with replicated(binary, tmp_path) as servers:
        yield servers


@pytest.fixture
def sharded(binary: str, tmp_path: Path) -> Iterator[Cluster]:
    with cluster(binary, tmp_path) as servers:
        yield servers


def during(action: Callable[[], object], *, seconds: float = 0.2) -> threading.Thread:
    """`action` in a thread, after a moment."""
    timer = threading.Timer(seconds, action)
    timer.start()
    return timer


def test_a_failover_is_followed_and_what_the_replica_missed_is_repeated(watched: Replicated) -> None:
    client = connect(watched.url, reconnect_seconds=15)
    assert check_server(client, embedded=False) == []
    run = Buffer(client, "run")
    epoch = begin(run)
    publish_next(run, epoch)
    submit_new(run, 4)
    leased = run.groups.lease(epoch, 4, 1)
    assert client.execute_command("WAIT", 1, 5000) == 1
    watched.replica.process.send_signal(signal.SIGSTOP)
    watched.master.do("CLIENT KILL", "TYPE", "replica")
    assert run.groups.commit(epoch, [item.entry_id for item in leased[:3]], step=1) == 3
    watched.master.kill()
    watched.replica.process.send_signal(signal.SIGCONT)

    started = time.monotonic()
    cursor = run.tickets.issue(0, 1, 60).cursor  # waits for the failover
    assert time.monotonic() - started < 12
    assert run.ledger().states["trained"] == 0  # the replica never got that commit
    assert run.groups.lease(epoch, 4, 0.1) == []
    ledger = run.ledger()
    assert ledger.discrepancies == []
    assert (ledger.states["trained"], ledger.states["leased"]) == (3, 1)
    publisher = during(lambda: publish_next(run, epoch))
    run.tickets.wait(cursor, 10)
    publisher.join()
    assert run.clock.read().version == 1  # type: ignore[union-attr]
    client.close()


def test_a_master_that_became_a_replica_is_left(watched: Replicated) -> None:
    client = connect(watched.url, reconnect_seconds=15)
    run = Buffer(client, "run")
    begin(run)
    assert client.execute_command("WAIT", 1, 5000) == 1
    watched.sentinels[0].do("SENTINEL FAILOVER", "vespo")
    deadline = time.monotonic() + 14  # Sentinels turn the old master into a replica after 8 seconds
    while client.info("server")["tcp_port"] != watched.replica.port:
        assert time.monotonic() < deadline
        run.control.set_state("running", "")  # refused by a replica; never an error here
    assert run.clock.read() is not None
    client.close()


def test_sentinels_that_know_no_such_service_are_named_at_once(watched: Replicated) -> None:
    started = time.monotonic()
    with pytest.raises(BufferUnavailableError, match=r"master of other by Sentinels .*knows no service 'other'"):
        connect(watched.url.replace("/vespo", "/other"), wait=False)
    assert time.monotonic() - started < 2


def test_without_a_successor_the_deadline_holds(watched: Replicated) -> None:
    client = connect(watched.url, reconnect_seconds=1.0)
    run = Buffer(client, "run")
    begin(run)
    for member in (watched.replica, watched.master, *watched.sentinels[:2]):
        member.kill()
    started = time.monotonic()
    with pytest.raises(BufferUnavailableError, match="cannot be reached"):
        run.ledger()
    assert time.monotonic() - started < 5
    client.close()


def runs_of_two_nodes(servers: Cluster) -> tuple[str, str]:
    """Names of two runs that belong to different nodes."""
    names = (f"run-{number}" for number in range(1000))
    first = next(names)
    return first, next(name for name in names if servers.owner(name) != servers.owner(first))


def keys_on(servers: Cluster, run: str) -> list[int]:
    """How many keys of a run each node holds."""
    return [int(str(member.do("CLUSTER COUNTKEYSINSLOT", slot_of(run)))) for member in servers.nodes]


def test_each_run_lives_on_the_node_of_its_slot(sharded: Cluster) -> None:
    names = runs_of_two_nodes(sharded)
    clients = [connect(sharded.url, run=name, reconnect_seconds=5) for name in names]
    for client, name in zip(clients, names, strict=True):
        run = Buffer(client, name)
        epoch = begin(run)
        publish_next(run, epoch)
        submit_new(run, 2)
        assert run.ledger().discrepancies == []
        assert check_server(client, embedded=False) == []
        counts = keys_on(sharded, name)
        assert counts.pop(sharded.owner(name)) > 0
        assert not any(counts)
        assert run.purge()
        assert not any(keys_on(sharded, name))
        client.close()


def test_every_transition_works_in_a_cluster_with_few_rights(sharded: Cluster, binary: str) -> None:
    rights = RIGHTS | {"commands": [right for right in RIGHTS["commands"] if binary == VALKEY or right != "+waitaof"]}
    for member in sharded.nodes:
        with redis.Redis.from_url(member.url) as admin:
            admin.acl_setuser("vespo", enabled=True, passwords=["+s3/cr@t"], keys=["vespo:*"], **rights)
    client = connect(f"redis+cluster://vespo:s3%2Fcr%40t@{sharded.addresses}", run="tour", reconnect_seconds=5)
    tour(client)
    client.close()
    with pytest.raises(BufferUnavailableError, match="refuses the credentials") as raised:
        connect(f"redis+cluster://vespo:wrong@{sharded.addresses}", run="tour", reconnect_seconds=20)
    assert "wrong" not in str(raised.value).split("credentials")[0]


def test_a_slot_that_moves_takes_the_run_with_it(sharded: Cluster) -> None:
    name = "moving"
    client = connect(sharded.url, run=name, reconnect_seconds=15)
    run = Buffer(client, name)
    epoch = begin(run, groups_per_version=200)
    publish_next(run, epoch)
    source = sharded.owner(name)
    target = (source + 1) % 3
    mover = during(lambda: sharded.move(name, source, target))
    submitted = 0
    while mover.is_alive() or submitted < 50:
        (ticket,) = run.tickets.issue(0, 1, 60).tickets
        submitted += run.groups.submit(make_group(ticket), 10)
    mover.join()
    counts = keys_on(sharded, name)
    assert counts.pop(target) > 0
    assert not any(counts)
    assert run.ledger().discrepancies == []
    leased = run.groups.lease(epoch, submitted, 1)
    assert len(leased) == submitted
    assert run.groups.commit(epoch, [item.entry_id for item in leased], step=1) == submitted
    # whoever comes later finds it, and so does one who has an old view
    late = connect(sharded.url, run=name, reconnect_seconds=5)
    assert Buffer(late, name).ledger().states["trained"] == submitted
    late.close()
    client.close()


def test_a_node_that_is_gone_is_not_needed_to_find_the_owner(sharded: Cluster) -> None:
    name = next(name for name in (f"run-{n}" for n in range(100)) if sharded.owner(name) == 2)
    for member in sharded.nodes:
        member.do("CONFIG SET", "cluster-require-full-coverage", "no")
    sharded.nodes[0].kill()
    client = connect(sharded.url, run=name, reconnect_seconds=10)
    assert begin(Buffer(client, name)) == 1
    client.close()


def test_a_cluster_that_lost_the_runs_node_is_an_error_in_time(sharded: Cluster) -> None:
    name = next(name for name in (f"run-{n}" for n in range(100)) if sharded.owner(name) == 2)
    client = connect(sharded.url, run=name, reconnect_seconds=1.0)
    run = Buffer(client, name)
    begin(run)
    sharded.nodes[2].kill()
    started = time.monotonic()
    with pytest.raises(BufferUnavailableError, match=r"owner of the run by Cluster nodes .*cannot be reached"):
        run.ledger()
    assert time.monotonic() - started < 5
    client.close()
