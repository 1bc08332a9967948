"""Reaching the Redis server from asyncio: what `buffer.connection` is to threads, with the same checks and messages."""

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any, TypeVar

import redis
import redis.asyncio
from redis.asyncio.connection import Connection, SSLConnection
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff

from buffer.connection import PROBE_TIMEOUT_SECONDS, SOCKET_TIMEOUT_SECONDS, Patience, guard, timeouts, url_mistakes
from buffer.topology import ELSEWHERE, Locator, elsewhere, parse_target, require_master

T = TypeVar("T")


class AsyncDeadlineRetry(Retry):
    """Retries a dropped connection as long as `Patience` lasts."""

    def __init__(self, seconds: float) -> None:
        super().__init__(NoBackoff(), retries=-1)
        self.seconds = seconds

    async def call_with_retry(
        self,
        do: Callable[[], Awaitable[T]],
        fail: Callable[..., Any],
        is_retryable: Callable[[Exception], bool] | None = None,
        with_failure_count: bool = False,
    ) -> T:
        patience = Patience(self.seconds)
        failures = 0
        while True:
            try:
                return await do()
            except self._supported_errors as error:
                failures += 1
                await (fail(error, failures) if with_failure_count else fail(error))
                pause = patience.pause_seconds(error)
                if pause is None or (is_retryable and not is_retryable(error)):
                    raise
                await asyncio.sleep(pause)


class AsyncLocatedConnection(Connection):
    """`buffer.topology.LocatedConnection` for asyncio; the look-up itself runs in a thread."""

    def __init__(self, *, locator: Locator, **options: Any) -> None:
        self._locator = locator
        super().__init__(**options)

    async def connect_check_health(self, *arguments: Any, **options: Any) -> None:
        if not self.is_connected:
            self.host, self.port = await asyncio.to_thread(self._locator.locate)
        await super().connect_check_health(*arguments, **options)

    async def on_connect_check_health(self, check_health: bool = True) -> None:
        await super().on_connect_check_health(check_health)
        await self.send_command("INFO", "replication", check_health=False)
        require_master(await self.read_response(), f"{self.host}:{self.port}")

    async def read_response(self, *arguments: Any, **options: Any) -> Any:
        try:
            return await super().read_response(*arguments, **options)
        except ELSEWHERE as error:
            await self.disconnect(nowait=True)
            raise redis.ConnectionError(elsewhere(error, f"{self.host}:{self.port}")) from error


class AsyncLocatedTlsConnection(AsyncLocatedConnection, SSLConnection):
    """`AsyncLocatedConnection` over TLS."""


async def connect_async(
    url: str, *, run: str | None = None, reconnect_seconds: float = 60.0, wait: bool = True
) -> redis.asyncio.Redis:
    """`buffer.connection.connect` for asyncio: same arguments, same errors.

    Returns:
        A client for the tasks of one event loop, whose replies are bytes; end it with `aclose()`.
    """
    probe_seconds = reconnect_seconds if wait else 0.0
    timeout_seconds = SOCKET_TIMEOUT_SECONDS if wait else PROBE_TIMEOUT_SECONDS
    probe = _client(url, run, probe_seconds, timeout_seconds)
    try:
        with guard(probe):
            await probe.execute_command("PING")  # type: ignore[no-untyped-call]
    finally:
        await probe.aclose()
    return _client(url, run, reconnect_seconds, SOCKET_TIMEOUT_SECONDS)


def _client(url: str, run: str | None, reconnect_seconds: float, timeout_seconds: float) -> redis.asyncio.Redis:
    with url_mistakes(url):
        target = parse_target(url, run)
        options: dict[str, Any] = dict(timeouts(timeout_seconds))
        if target.locator is not None:
            options["locator"] = target.locator
            options["connection_class"] = AsyncLocatedTlsConnection if target.tls else AsyncLocatedConnection
        retry = AsyncDeadlineRetry(reconnect_seconds)
        return redis.asyncio.Redis.from_url(target.url, protocol=2, retry=retry, **options)
