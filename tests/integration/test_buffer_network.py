"""Clients on a bad network: connections cut or silent, a server that is stopped; few rights, TLS, Cluster."""

import os
import shutil
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import redis
from buffer_samples import begin, make_group, publish_next, submit_new
from failing_network import Proxy
from plain_servers import VALKEY, debian_redis, serving

import buffer.connection
import buffer.events
from buffer.connection import check_server, connect
from buffer.embedded import EmbeddedServer
from buffer.registry import ActorStatus
from buffer.run import Buffer
from protocol.errors import BufferUnavailableError

RIGHTS = {"categories": ["-@all", "+@read", "+@write", "+@scripting", "+@connection", "-@dangerous"]}
RIGHTS["commands"] = ["+info", "+waitaof", "+time"]


@pytest.fixture
def server(server_directory: Path) -> EmbeddedServer:
    return EmbeddedServer.start(server_directory)


@pytest.fixture
def proxy(server: EmbeddedServer) -> Iterator[Proxy]:
    proxy = Proxy(server.url.removeprefix("unix://"))
    yield proxy
    proxy.stop()


@pytest.fixture
def pair(server: EmbeddedServer, proxy: Proxy) -> Iterator[tuple[Buffer, Buffer]]:
    """A learner beside the server, and an actor behind the proxy."""
    near, far = connect(server.url), connect(f"redis://127.0.0.1:{proxy.port}", reconnect_seconds=20)
    yield Buffer(near, "run"), Buffer(far, "run")
    near.close()
    far.close()


def test_a_cut_connection_is_made_again_and_nothing_counts_twice(pair: tuple[Buffer, Buffer], proxy: Proxy) -> None:
    learner, actor = pair
    epoch = begin(learner, groups_per_version=400)
    publish_next(learner, epoch)
    stop = threading.Event()

    def cut_often() -> None:
        while not stop.wait(0.01):
            proxy.cut()

    cutter = threading.Thread(target=cut_often)
    cutter.start()
    try:
        tickets = [ticket for _ in range(20) for ticket in actor.tickets.issue(0, 5, 60).tickets]
        for ticket in tickets:
            actor.groups.submit(make_group(ticket), 20)  # False if the answer to the first try was lost
    finally:
        stop.set()
        cutter.join()
    ledger = learner.ledger()
    assert ledger.discrepancies == []
    assert ledger.states["buffered"] == len(tickets) >= 50
    # tickets whose issue was answered into the void are in generation until their leases end
    assert ledger.states["issued"] == ledger.states["buffered"] + ledger.states["generating"]
    assert len({item.group.ticket for item in learner.groups.lease(epoch, 1000, 1)}) == len(tickets)


def test_a_cut_does_not_end_a_wait(pair: tuple[Buffer, Buffer], proxy: Proxy) -> None:
    learner, actor = pair
    epoch = begin(learner)
    issued = actor.tickets.issue(0, 1, 60)
    timers = [threading.Timer(0.2, proxy.cut), threading.Timer(0.5, publish_next, (learner, epoch))]
    for timer in timers:
        timer.start()
    started = time.monotonic()
    while not actor.tickets.issue(0, 1, 60).tickets:
        actor.tickets.wait(issued.cursor, 20)
    assert time.monotonic() - started < 5
    for timer in timers:
        timer.join()


def test_a_silent_network_is_an_error_in_time(
    server: EmbeddedServer, proxy: Proxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(buffer.connection, "SOCKET_TIMEOUT_SECONDS", 0.6)
    monkeypatch.setattr(buffer.events, "BLOCK_SECONDS", 0.3)
    client = connect(f"redis://127.0.0.1:{proxy.port}", reconnect_seconds=1.0)
    actor = Buffer(client, "run")
    assert actor.tickets.issue(0, 1, 60).reason == "no run"
    proxy.hold()
    started = time.monotonic()
    with pytest.raises(BufferUnavailableError, match=r"127\.0\.0\.1:\d+/0 cannot be reached"):
        actor.tickets.wait("0-1", 60)
    assert time.monotonic() - started < 5
    proxy.release()
    assert actor.tickets.issue(0, 1, 60).reason == "no run"
    client.close()


def test_a_stopped_server_is_waited_for(server: EmbeddedServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(buffer.connection, "SOCKET_TIMEOUT_SECONDS", 0.5)
    client = connect(server.url, reconnect_seconds=20)
    run = Buffer(client, "run")
    publish_next(run, begin(run))
    (ticket,) = run.tickets.issue(0, 1, 60).tickets
    os.kill(server.pid, signal.SIGSTOP)
    timer = threading.Timer(1.5, os.kill, (server.pid, signal.SIGCONT))
    timer.start()
    started = time.monotonic()
    run.groups.submit(make_group(ticket), 20)  # several tries reach a server that wakes up
    assert 1.0 < time.monotonic() - started < 10
    timer.join()
    ledger = run.ledger()
    assert ledger.discrepancies == []
    assert (ledger.states["buffered"], ledger.states["issued"]) == (1, 1)
    client.close()


def test_a_server_stopped_for_good_is_an_error_in_time(server: EmbeddedServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(buffer.connection, "SOCKET_TIMEOUT_SECONDS", 0.5)
    client = connect(server.url, reconnect_seconds=1.0)
    os.kill(server.pid, signal.SIGSTOP)
    try:
        started = time.monotonic()
        with pytest.raises(BufferUnavailableError, match="cannot be reached"):
            Buffer(client, "run").ledger()
        assert time.monotonic() - started < 5
    finally:
        os.kill(server.pid, signal.SIGCONT)
        client.close()


def test_a_user_with_few_rights_is_enough(server: EmbeddedServer, proxy: Proxy) -> None:
    """The rights that docs ask for: the run's keys, and the commands below."""
    admin = connect(server.url)
    admin.acl_setuser("vespo", enabled=True, passwords=["+s3cret"], keys=["vespo:*"], **RIGHTS)
    client = connect(f"redis://vespo:s3cret@127.0.0.1:{proxy.port}/0", reconnect_seconds=1.0)
    tour(client)
    with pytest.raises(redis.exceptions.NoPermissionError):
        client.flushall()
    with pytest.raises(redis.exceptions.NoPermissionError):
        client.set("elsewhere", "1")
    client.close()
    for url in (f"redis://vespo:wrong@127.0.0.1:{proxy.port}", f"redis://nobody:s3cret@127.0.0.1:{proxy.port}"):
        started = time.monotonic()
        with pytest.raises(BufferUnavailableError, match="refuses the credentials") as raised:
            connect(url, reconnect_seconds=20)
        assert time.monotonic() - started < 5
        assert "wrong" not in str(raised.value).split("credentials")[0]
        assert "s3cret" not in str(raised.value)
    admin.close()


def tour(client: redis.Redis) -> None:
    """Every transition once."""
    run = Buffer(client, "tour")
    epoch = begin(run, groups_per_version=20, max_attempts=1)
    publish_next(run, epoch)
    submit_new(run, 4)
    tickets = run.tickets.issue(0, 4, 60).tickets
    assert run.tickets.renew(tickets, 60) == []
    run.tickets.fail(tickets[0], "scorer")
    run.tickets.give_back(tickets[1:2])
    assert run.tickets.retry_dead() == 1
    run.tickets.wait("0-0", 1)
    leased = run.groups.lease(epoch, 3, 1)
    run.groups.return_stale(epoch, leased[:1])
    run.groups.mark_filtered(epoch, leased[1:2])
    assert run.groups.commit(epoch, [item.entry_id for item in leased[2:]], step=1) == 1
    assert run.groups.lease(epoch, 3, 1)[0].group.ticket.index == 3
    assert run.groups.lease(epoch, 3, 0.05) == []
    assert run.peek(3) == []
    run.actors.heartbeat("a", ActorStatus(state="serving", pid=1, host="here"))
    assert len(run.actors.list(60)) == run.actors.totals().actors == 1
    run.actors.leave("a")
    assert run.tickets.expire() == 0
    assert begin(run) == 2
    run.control.set_state("draining", "")
    assert run.repair() == []
    assert run.ledger().discrepancies == []
    assert run.groups.depth().buffered == 1
    assert run.purge()


@pytest.fixture
def certificates(tmp_path: Path) -> Path:
    """Directory with a self-signed certificate for 127.0.0.1."""
    if shutil.which("openssl") is None:
        pytest.skip("no openssl on the PATH to make a certificate with; on Debian: apt-get install openssl")
    subject = ["-subj", "/CN=127.0.0.1", "-addext", "subjectAltName=IP:127.0.0.1"]
    files = ["-keyout", str(tmp_path / "key.pem"), "-out", str(tmp_path / "cert.pem")]
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", *subject, *files],
        check=True,
        capture_output=True,
        timeout=60,
    )
    return tmp_path


def test_tls_with_a_certificate_of_ones_own(certificates: Path, tmp_path: Path) -> None:
    """With Debian's server: the embedded one is built without TLS, and needs none on its unix socket."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    cert, key = certificates / "cert.pem", certificates / "key.pem"
    options = f"--tls-port {port} --tls-cert-file {cert} --tls-key-file {key} --tls-ca-cert-file {cert}".split()
    with serving(debian_redis(), tmp_path, *options, "--tls-auth-clients", "no"):
        client = connect(f"rediss://127.0.0.1:{port}/0?ssl_ca_certs={cert}", reconnect_seconds=5)
        tour(client)
        client.close()
        started = time.monotonic()
        with pytest.raises(BufferUnavailableError, match="CERTIFICATE"):
            connect(f"rediss://127.0.0.1:{port}/0", reconnect_seconds=30)
        assert time.monotonic() - started < 5
        with pytest.raises(BufferUnavailableError):
            connect(f"redis://127.0.0.1:{port}/0", wait=False)


def test_all_that_a_run_touches_is_in_one_slot_of_a_cluster(tmp_path: Path) -> None:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    bus = port + 1 if port < 65535 else port - 1
    options = ["--cluster-enabled", "yes", "--bind", "127.0.0.1", "--cluster-port", str(bus), "--port", str(port)]
    with serving(VALKEY, tmp_path, *options) as url:
        client = connect(url, reconnect_seconds=5)
        client.execute_command("CLUSTER", "ADDSLOTSRANGE", 0, 16383)
        deadline = time.monotonic() + 20
        while b"cluster_state:ok" not in client.execute_command("CLUSTER", "INFO"):
            assert time.monotonic() < deadline
            time.sleep(0.05)
        assert check_server(client, embedded=False) == []
        tour(client)
        client.close()
