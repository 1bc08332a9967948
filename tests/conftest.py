"""Fixtures shared by all rooms: one embedded server for the session, and a run of its own for each test."""

import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest
import redis
from plain_servers import debian_redis, serving

from buffer.connection import connect
from buffer.embedded import EmbeddedServer
from buffer.run import Buffer


@pytest.fixture(scope="session")
def redis_url(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """URL of a real server for the whole session: the embedded one, unless the test asks for another."""
    directory = tmp_path_factory.mktemp("redis")
    if getattr(request, "param", "embedded") == "redis-server":
        with serving(debian_redis(), directory) as url:
            yield url
        return
    server = EmbeddedServer.start(directory)
    with redis.Redis.from_url(server.url) as client:
        client.config_set("appendfsync", "always")  # an epoch waits for the disk; tests begin hundreds
    yield server.url
    server.stop()


@pytest.fixture
def redis_client(redis_url: str) -> Iterator[redis.Redis]:
    """A client of the session's server."""
    client = connect(redis_url, reconnect_seconds=5.0)
    yield client
    client.close()


@pytest.fixture
def run_name() -> str:
    """Name of a run that no other test uses."""
    return f"test-{uuid.uuid4().hex[:12]}"


@pytest.fixture
def buffer(redis_client: redis.Redis, run_name: str) -> Iterator[Buffer]:
    """The buffer of the test's run, which nobody has begun."""
    buffer = Buffer(redis_client, run_name)
    yield buffer
    buffer.purge()


@pytest.fixture
def server_directory(tmp_path: Path) -> Iterator[Path]:
    """Directory for a server of the test's own; whatever lives there at the end is stopped."""
    yield tmp_path
    if EmbeddedServer.find(tmp_path) is not None:
        EmbeddedServer.start(tmp_path).stop()
