"""Reaching the Redis server: one way to connect, to retry, to check its policy and to name it in messages.

Left out: Sentinel and Cluster clients. All keys of a run share a hash slot, so a client of either kind will do.
"""

import re
import ssl
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import redis
from redis.backoff import ExponentialWithJitterBackoff
from redis.retry import Retry

from buffer.reader import connection_options
from protocol.errors import BufferPolicyError, BufferUnavailableError

T = TypeVar("T")

SOCKET_TIMEOUT_SECONDS = 10.0
"""Silence after which a connection counts as dead; blocking reads ask for less (`events.BLOCK_SECONDS`)."""
PROBE_TIMEOUT_SECONDS = 1.0
MINIMUM_VERSION = (7, 0)
REFUSALS = ("OOM", "READONLY", "MISCONF", "NOPERM", "NOREPLICAS", "MASTERDOWN", "CLUSTERDOWN")


class DeadlineRetry(Retry):
    """Retries a dropped connection with growing pauses until `seconds` have passed since the first failure."""

    def __init__(self, seconds: float) -> None:
        super().__init__(ExponentialWithJitterBackoff(base=0.02, cap=1.0), retries=-1)
        self.seconds = seconds

    def call_with_retry(
        self,
        do: Callable[[], T],
        fail: Callable[..., Any],
        is_retryable: Callable[[Exception], bool] | None = None,
        with_failure_count: bool = False,
    ) -> T:
        deadline: float | None = None
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
                if _is_final(error) or (is_retryable and not is_retryable(error)):
                    raise
                # counted from the first failure: a blocking read may have waited long before its connection broke
                deadline = deadline or time.monotonic() + self.seconds
                pause = self._backoff.compute(failures)
                if time.monotonic() + pause > deadline:
                    raise
                time.sleep(pause)


def _is_final(error: Exception) -> bool:
    """Wrong credentials and certificates do not become right by waiting; redis-py files both under ConnectionError."""
    return isinstance(error, redis.AuthenticationError) or isinstance(error.__context__, ssl.SSLCertVerificationError)


def connect(url: str, *, reconnect_seconds: float = 60.0, wait: bool = True) -> redis.Redis:
    """Connect to `redis://`, `rediss://` or `unix://` and prove it with a ping.

    Args:
        url: may carry user, password and database number.
        reconnect_seconds: how long any later command tries to reach a server that went away.
        wait: whether the first ping may wait that long too; without it an unreachable server is an error at once.

    Returns:
        A thread-safe client whose replies are bytes.

    Raises:
        ValueError: `url` is not a Redis URL.
        BufferUnavailableError: the server cannot be reached, or refuses the credentials.
    """
    probe_seconds = reconnect_seconds if wait else 0.0
    timeout_seconds = SOCKET_TIMEOUT_SECONDS if wait else PROBE_TIMEOUT_SECONDS
    probe = _client(url, probe_seconds, timeout_seconds)
    try:
        with guard(probe):
            probe.ping()
    finally:
        probe.close()
    return _client(url, reconnect_seconds, SOCKET_TIMEOUT_SECONDS)


def _client(url: str, reconnect_seconds: float, timeout_seconds: float) -> redis.Redis:
    try:
        return redis.Redis.from_url(
            url,
            protocol=2,
            retry=DeadlineRetry(reconnect_seconds),
            socket_timeout=timeout_seconds,
            socket_connect_timeout=min(timeout_seconds, 5.0),
            **connection_options(),
        )
    except ValueError as error:
        raise ValueError(f"{redact_url(url)!r} is not a Redis URL (redis://, rediss://, unix://): {error}") from None


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
def guard(client: redis.Redis) -> Iterator[None]:
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


def describe(client: redis.Redis) -> str:
    """The server's address without credentials."""
    options = client.connection_pool.connection_kwargs
    if "path" in options:
        return f"unix://{options['path']}"
    return f"{options.get('host', 'localhost')}:{options.get('port', 6379)}/{options.get('db') or 0}"


def redact_url(url: str) -> str:
    """`url`, which need not be well formed, with passwords before the host and secrets in the query as stars."""
    url = re.sub(r"://([^:@/]*):.*@", r"://\1:***@", url)  # up to the last @: a password may hold any character
    return re.sub(r"([?&][^=&]*(?:password|secret|token|key)[^=&]*=)[^&]*", r"\1***", url, flags=re.IGNORECASE)
