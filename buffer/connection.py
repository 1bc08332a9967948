"""Reaching the Redis server: one way to connect, to retry, to check its policy and to name it in messages.

One server, Sentinel and Cluster differ only in how the address is found (`buffer.topology`), clients of asyncio only in
who waits (`buffer.aio_connection`).
"""

import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import redis
import redis.asyncio
from redis.backoff import ExponentialWithJitterBackoff, NoBackoff
from redis.retry import Retry

from buffer.reader import connection_options
from buffer.topology import URL_FORMS, LocatedConnection, LocatedTlsConnection, is_final, parse_target
from protocol.errors import BufferPolicyError, BufferUnavailableError

T = TypeVar("T")
Client = redis.Redis | redis.asyncio.Redis

SOCKET_TIMEOUT_SECONDS = 10.0
"""Silence after which a connection counts as dead; blocking reads ask for less (`events.BLOCK_SECONDS`)."""
PROBE_TIMEOUT_SECONDS = 1.0
MINIMUM_VERSION = (7, 0)
REFUSALS = ("OOM", "READONLY", "MISCONF", "NOPERM", "NOREPLICAS", "MASTERDOWN", "CLUSTERDOWN")


class Patience:
    """Growing pauses between tries, until `seconds` have passed since the first failure."""

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._backoff = ExponentialWithJitterBackoff(base=0.02, cap=1.0)
        self._deadline: float | None = None
        self._failures = 0

    def pause_seconds(self, error: Exception) -> float | None:
        """How long to wait after `error` before trying again; None: give up."""
        if is_final(error):
            return None
        # counted from the first failure: a blocking read may have waited long before its connection broke
        self._deadline = self._deadline or time.monotonic() + self._seconds
        self._failures += 1
        pause: float = self._backoff.compute(self._failures)
        return None if time.monotonic() + pause > self._deadline else pause


class DeadlineRetry(Retry):
    """Retries a dropped connection as long as `Patience` lasts."""

    def __init__(self, seconds: float) -> None:
        super().__init__(NoBackoff(), retries=-1)
        self.seconds = seconds

    def call_with_retry(
        self,
        do: Callable[[], T],
        fail: Callable[..., Any],
        is_retryable: Callable[[Exception], bool] | None = None,
        with_failure_count: bool = False,
    ) -> T:
        patience = Patience(self.seconds)
        failures = 0
        while True:
            try:
                return do()
            except self._supported_errors as error:
                failures += 1
                if with_failure_count:
                    fail(error, failures)
                else:
                    fail(error)
                pause = patience.pause_seconds(error)
                if pause is None or (is_retryable and not is_retryable(error)):
                    raise
                time.sleep(pause)


def connect(url: str, *, run: str | None = None, reconnect_seconds: float = 60.0, wait: bool = True) -> redis.Redis:
    """Connect to the server of a run and prove it with a ping.

    Args:
        url: of one of `buffer.topology.URL_FORMS`; may carry user, password and database number.
        run: the run that the client is for. A Cluster client needs it, and must not be used for another run.
        reconnect_seconds: how long any later command tries to reach a server that went away, or its successor.
        wait: whether the first ping may wait that long too; without it an unreachable server is an error at once.

    Returns:
        A thread-safe client whose replies are bytes.

    Raises:
        ValueError: `url` is not a Redis URL, or lacks something.
        BufferUnavailableError: the server cannot be reached, or refuses the credentials.
    """
    probe_seconds = reconnect_seconds if wait else 0.0
    timeout_seconds = SOCKET_TIMEOUT_SECONDS if wait else PROBE_TIMEOUT_SECONDS
    probe = _client(url, run, probe_seconds, timeout_seconds)
    try:
        with guard(probe):
            probe.ping()
    finally:
        probe.close()
    return _client(url, run, reconnect_seconds, SOCKET_TIMEOUT_SECONDS)


def _client(url: str, run: str | None, reconnect_seconds: float, timeout_seconds: float) -> redis.Redis:
    with url_mistakes(url):
        target = parse_target(url, run)
        options = connection_options() | timeouts(timeout_seconds)
        if target.locator is not None:
            options["locator"] = target.locator
            options["connection_class"] = LocatedTlsConnection if target.tls else LocatedConnection
        return redis.Redis.from_url(target.url, protocol=2, retry=DeadlineRetry(reconnect_seconds), **options)


def timeouts(seconds: float) -> dict[str, float]:
    """How long a socket may be silent, as a client's keyword arguments."""
    return {"socket_timeout": seconds, "socket_connect_timeout": min(seconds, 5.0)}


@contextmanager
def url_mistakes(url: str) -> Iterator[None]:
    """What is wrong with `url`, in words that do not show its secrets."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{redact_url(url)!r} is not a Redis URL ({URL_FORMS}): {error}") from None


def check_server(client: redis.Redis, *, embedded: bool) -> list[str]:
    """Check that the server can be trusted with a run.

    Returns:
        Warnings for a person: no persistence, unless the server is `embedded` (then it is configured by us).

    Raises:
        BufferPolicyError: the server may evict keys, or is older than Redis 7.0.
        BufferUnavailableError: it does not answer.
    """
    where = describe(client)
    with guard(client):
        server, memory, persistence = (client.info(section) for section in ("server", "memory", "persistence"))
    version = str(server["redis_version"])
    if tuple(int(part) for part in re.findall(r"\d+", version)[:2]) < MINIMUM_VERSION:
        raise BufferPolicyError(f"Redis at {where} is version {version}; use 7.0 or newer, or Valkey")
    policy = str(memory["maxmemory_policy"])
    if policy != "noeviction":
        raise BufferPolicyError(
            f"Redis at {where} has maxmemory-policy {policy} and may drop parts of a run when memory is short; "
            "set it with: CONFIG SET maxmemory-policy noeviction"
        )
    if not embedded and not persistence["aof_enabled"]:
        return [f"Redis at {where} keeps no append-only file (appendonly no): the buffer is lost if it restarts"]
    return []


def command(client: redis.Redis, *arguments: str | bytes | int | float) -> Any:
    """Send one command under `guard`; returns redis-py's reading of the reply."""
    with guard(client):
        return client.execute_command(*arguments)  # type: ignore[no-untyped-call]


@contextmanager
def guard(client: Client) -> Iterator[None]:
    """Attribute failures of the connection, after its retries, and refusals of the server to the buffer boundary.

    Raises:
        BufferUnavailableError: names the server and what it said.
    """
    try:
        yield
    except redis.AuthenticationError as error:
        raise BufferUnavailableError(f"Redis at {describe(client)} refuses the credentials: {error}") from error
    except (redis.ConnectionError, redis.TimeoutError) as error:
        raise BufferUnavailableError(
            f"Redis at {describe(client)} cannot be reached: {error}; start it, or correct buffer.url"
        ) from error
    except redis.ResponseError as error:
        code = str(getattr(error, "status_code", None) or str(error).split(" ", 1)[0])
        if code not in REFUSALS:
            raise
        raise BufferUnavailableError(f"Redis at {describe(client)} refuses commands: {code} {error}") from error


def describe(client: Client) -> str:
    """The server's address without credentials, or who is asked for it."""
    options = client.connection_pool.connection_kwargs
    if "locator" in options:
        return str(options["locator"])
    if "path" in options:
        return f"unix://{options['path']}"
    return f"{options.get('host', 'localhost')}:{options.get('port', 6379)}/{options.get('db') or 0}"


def redact_url(url: str) -> str:
    """`url`, which need not be well formed, with passwords before the host and secrets in the query as stars."""
    url = re.sub(r"://([^:@/]*):.*@", r"://\1:***@", url)  # up to the last @: a password may hold any character
    return re.sub(r"([?&][^=&]*(?:password|secret|token|key)[^=&]*=)[^&]*", r"\1***", url, flags=re.IGNORECASE)
