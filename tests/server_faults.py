"""What can happen to an embedded server: killed, stopped for a while, killed with its last moments lost."""

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from buffer.embedded import EmbeddedServer


def kill(server: EmbeddedServer) -> None:
    """SIGKILL, and wait until the process has ended."""
    process = os.pidfd_open(server.pid)
    try:
        signal.pidfd_send_signal(process, signal.SIGKILL)
        os.waitid(os.P_PIDFD, process, os.WEXITED)
    except ChildProcessError:  # another process started it
        pass
    finally:
        os.close(process)


@contextmanager
def forgetting(server: EmbeddedServer) -> Iterator[None]:
    """What is written inside is lost: the server is killed and starts again with the file it had before.

    The server must write its file before it answers (`appendfsync always`).
    """
    (log,) = (server.directory / "appendonlydir").glob("*.incr.aof")
    size = log.stat().st_size
    yield
    kill(server)
    truncate(log, size)
    EmbeddedServer.start(server.directory)


def truncate(log: Path, size: int) -> None:
    """Cut an append-only file; the server drops a transaction that is no longer whole."""
    with log.open("r+b") as file:
        file.truncate(size)
