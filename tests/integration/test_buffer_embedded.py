"""The embedded server, and clients of a server that goes away."""

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from buffer_samples import begin, make_group, publish_next, submit_new

from buffer.connection import check_server, connect
from buffer.embedded import EmbeddedServer
from buffer.run import Buffer
from protocol.errors import BufferPolicyError, BufferUnavailableError


def kill(server: EmbeddedServer) -> None:
    """SIGKILL, and wait until the process has ended."""
    process = os.pidfd_open(server.pid)
    os.kill(server.pid, signal.SIGKILL)
    os.waitid(os.P_PIDFD, process, os.WEXITED)
    os.close(process)


def test_data_survive_stop_and_kill(server_directory: Path) -> None:
    assert EmbeddedServer.find(server_directory) is None
    first = EmbeddedServer.start(server_directory)
    assert EmbeddedServer.find(server_directory) == first.url
    client = connect(first.url)
    assert check_server(client, embedded=True) == []
    client.set("a", "1")
    first.stop()
    first.stop()
    assert EmbeddedServer.find(server_directory) is None
    second = EmbeddedServer.start(server_directory)
    assert client.get("a") == b"1"
    client.set("b", "2")
    kill(second)
    assert EmbeddedServer.find(server_directory) is None
    third = EmbeddedServer.start(server_directory)
    assert (client.get("a"), client.get("b")) == (b"1", b"2")
    assert third.pid != second.pid
    client.close()


def test_the_server_outlives_its_starter_and_is_adopted(server_directory: Path) -> None:
    code = "import os, sys; from pathlib import Path; from buffer.embedded import EmbeddedServer\n"
    code += "print(EmbeddedServer.start(Path(sys.argv[1])).pid, flush=True); os.kill(os.getpid(), 9)"
    starter = subprocess.run(
        [sys.executable, "-c", code, server_directory], capture_output=True, timeout=30, check=False
    )
    assert starter.returncode == -signal.SIGKILL, starter.stderr
    adopted = EmbeddedServer.start(server_directory)
    assert adopted.pid == int(starter.stdout)
    adopted.stop()
    assert EmbeddedServer.find(server_directory) is None


def test_two_starts_at_once_make_one_server(server_directory: Path) -> None:
    servers: list[EmbeddedServer] = []
    threads = [
        threading.Thread(target=lambda: servers.append(EmbeddedServer.start(server_directory))) for _ in range(3)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len({server.pid for server in servers}) == 1


def test_a_long_path_gets_its_socket_elsewhere(server_directory: Path) -> None:
    directory = server_directory / ("long name " * 12)
    server = EmbeddedServer.start(directory)
    socket = Path(server.url.removeprefix("unix://"))
    assert str(directory) not in str(socket)
    assert socket.stat().st_mode & 0o077 == 0
    assert connect(server.url).ping()
    server.stop()
    assert not socket.parent.exists()


def test_another_process_under_the_recorded_number_is_left_alone(server_directory: Path) -> None:
    (server_directory / "redis.json").write_text(
        f'{{"pid": {os.getpid()}, "url": "unix://{server_directory}/no.sock"}}'
    )
    assert EmbeddedServer.find(server_directory) is None
    EmbeddedServer(server_directory, f"unix://{server_directory}/no.sock", os.getpid()).stop()


def test_a_server_that_cannot_start_says_why(server_directory: Path) -> None:
    folder = server_directory / "appendonlydir"
    folder.mkdir()
    (folder / "appendonly.aof.manifest").write_text("nonsense\n")
    with pytest.raises(BufferUnavailableError, match=r"did not start: .*[Ii]nvalid"):
        EmbeddedServer.start(server_directory)


def test_policies_of_the_server_are_checked(server_directory: Path) -> None:
    client = connect(EmbeddedServer.start(server_directory).url)
    client.config_set("appendonly", "no")
    (warning,) = check_server(client, embedded=False)
    assert "append-only" in warning
    client.config_set("maxmemory-policy", "allkeys-lru")
    with pytest.raises(BufferPolicyError, match=r"maxmemory-policy allkeys-lru.*noeviction"):
        check_server(client, embedded=False)
    client.close()


def test_submitters_wait_when_the_servers_memory_is_short(server_directory: Path) -> None:
    client = connect(EmbeddedServer.start(server_directory).url)
    buffer = Buffer(client, "run")
    publish_next(buffer, begin(buffer))
    (ticket,) = buffer.tickets.issue(0, 1, 60).tickets
    client.config_set("maxmemory", int(client.info("memory")["used_memory"]) + 1000)
    with pytest.raises(
        BufferUnavailableError, match=r"no room for \d+ bytes within 0.1 s: Redis at unix://.* uses \d+"
    ):
        Buffer(client, "run").groups.submit(make_group(ticket), 0.1)
    client.config_set("maxmemory", 1)
    with pytest.raises(BufferUnavailableError, match="refuses commands: OOM"):
        buffer.tickets.issue(0, 1, 60)
    assert buffer.tickets.give_back([ticket]) == 1
    assert buffer.ledger().balanced
    client.close()


def test_clients_come_back_after_a_restart(server_directory: Path) -> None:
    server = EmbeddedServer.start(server_directory)
    client = connect(server.url, reconnect_seconds=20)
    learner, actor = Buffer(client, "run"), Buffer(client, "run")
    epoch = begin(learner)
    publish_next(learner, epoch)
    submit_new(actor, 2)
    first = learner.groups.lease(epoch, 1, 1)
    leased = []
    waiting = threading.Thread(target=lambda: leased.extend(learner.groups.lease(epoch, 1, 30)))
    leased.extend(learner.groups.lease(epoch, 1, 1))
    waiting.start()
    time.sleep(0.1)
    kill(server)
    timer = threading.Timer(0.3, EmbeddedServer.start, (server_directory,))
    timer.start()
    (third,) = submit_new(actor, 1)  # retried until the server is there again
    waiting.join()
    timer.join()
    assert leased[-1].group.ticket == third
    assert learner.groups.commit(epoch, [item.entry_id for item in first + leased], step=1) == 3
    assert learner.ledger().balanced
    client.close()


def test_a_server_that_stays_away_is_an_error_in_time(server_directory: Path) -> None:
    server = EmbeddedServer.start(server_directory)
    client = connect(server.url, reconnect_seconds=0.5)
    buffer = Buffer(client, "run")
    begin(buffer)
    server.stop()
    started = time.monotonic()
    with pytest.raises(BufferUnavailableError, match=r"redis\.sock cannot be reached"):
        buffer.tickets.wait("0-1", 30)
    assert time.monotonic() - started < 5
