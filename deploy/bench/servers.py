"""A server for benches: the embedded one as a run gets it, reachable over TCP too."""

import socket
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import redis

from buffer.embedded import EmbeddedServer

REWRITE_PAUSE_SECONDS = 0.02
REWRITE_SECONDS = 30.0


@dataclass(frozen=True, slots=True)
class BenchServer:
    """A live server with an append-only file on disk, as `buffer.embedded` configures it.

    Attributes:
        urls: its addresses, by transport: "unix" and "tcp".
        version: which server it is.
    """

    urls: dict[str, str]
    version: str

    def clear(self) -> None:
        """Delete all data and start the append-only file anew, so that no measurement pays for the one before.

        Raises:
            TimeoutError: the server does not finish.
        """
        with redis.Redis.from_url(self.urls["unix"]) as client:
            client.flushall(asynchronous=False)
            client.bgrewriteaof()
            deadline = time.monotonic() + REWRITE_SECONDS
            while client.info("persistence")["aof_rewrite_in_progress"]:  # the server tells nobody when it is done
                if time.monotonic() > deadline:
                    raise TimeoutError(f"the bench's server still rewrites its file after {REWRITE_SECONDS:g} s")
                time.sleep(REWRITE_PAUSE_SECONDS)


@contextmanager
def serving() -> Iterator[BenchServer]:
    """A server in a temporary directory, ended at the end. It rewrites its append-only file in `clear` alone.

    Raises:
        BufferUnavailableError: it does not start.
    """
    with tempfile.TemporaryDirectory(prefix="vespo-bench-") as directory:
        server = EmbeddedServer.start(Path(directory))
        try:
            with redis.Redis.from_url(server.url) as client:
                port = _free_port()
                client.config_set("bind", "127.0.0.1")
                client.config_set("port", port)
                client.config_set("auto-aof-rewrite-percentage", 0)
                info = client.info("server")
            version = str(info.get("valkey_version") or info["redis_version"])
            yield BenchServer({"unix": server.url, "tcp": f"redis://127.0.0.1:{port}"}, version)
        finally:
            server.stop()


def _free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])
