"""The buffer's tests are its contract: they run on the embedded Valkey, and on Debian's Redis where it is installed."""

import pytest

SERVERS = ("embedded", "redis-server")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Ask `redis_url` for each server in turn."""
    if metafunc.module.__name__.startswith("test_buffer_") and "redis_url" in metafunc.fixturenames:
        metafunc.parametrize("redis_url", SERVERS, indirect=True, scope="session")
