"""Where a run's server is: at a fixed address, the master that Sentinels name, or the Cluster node that owns the run.

All keys of a run share one hash slot, so that one server holds a run at any instant. What Sentinel and Cluster add is
that it may be another one tomorrow. So a client of either is a plain one whose connections look the server up whenever
they connect, and that give up their connection when its server says that it is not the right one (any more): the
client's retry then connects anew, until its deadline.

Left out: reading from replicas, and following ASK. While the run's slot is being moved every call waits for the end of
it, as scripts over all keys of a run would have to anyway.
"""

import re
import socket
import ssl
from dataclasses import dataclass
from typing import Any, Protocol
from urllib.parse import parse_qsl, quote, unquote, urlencode

import redis
from redis.backoff import NoBackoff
from redis.connection import Connection, SSLConnection
from redis.retry import Retry

from buffer.keys import Keys

URL_FORMS = (
    "redis://, rediss://, unix://, redis+sentinel://[USER:PASSWORD@]HOST:PORT,HOST:PORT/SERVICE[/DB], "
    "redis+cluster://[USER:PASSWORD@]HOST:PORT,HOST:PORT; rediss+... for TLS"
)
LOOKUP_SECONDS = 2.0
"""Longest silence of a node that is asked where the server is, before the next one is asked."""
DEFAULT_PORTS = {"sentinel": 26379, "cluster": 6379}
ELSEWHERE = (
    redis.exceptions.AskError,  # MovedError is one
    redis.exceptions.TryAgainError,
    redis.exceptions.ClusterDownError,
    redis.exceptions.MasterDownError,
    redis.exceptions.ReadOnlyError,
)
"""Replies by which a server says that another one is, or soon will be, the right one to ask."""
_URL = re.compile(r"(rediss?)\+(sentinel|cluster)://(?:([^?]*)@)?([^/?@]*)(/[^?]*)?(?:\?(.*))?")

Address = tuple[str, int]


class Locator(Protocol):
    """Finds the server of a run."""

    def locate(self) -> Address:
        """Address of the server at this moment.

        Raises:
            redis.ConnectionError: nobody who was asked could say.
        """
        ...

    def __str__(self) -> str:
        """Who is asked, for messages."""
        ...


@dataclass(frozen=True, slots=True)
class Nodes:
    """Sentinels or Cluster nodes that can be asked, and how.

    Attributes:
        addresses: of each; one that answers is enough.
        url: a plain Redis URL with scheme, credentials, database and options, whose host and port mean nothing.
    """

    addresses: tuple[Address, ...]
    url: str

    def ask(self, address: Address, *command: str) -> Any:
        """Reply of one node to one command, without retries."""
        client = redis.Redis.from_url(
            self.url,
            protocol=2,
            retry=Retry(NoBackoff(), 0),
            socket_timeout=LOOKUP_SECONDS,
            socket_connect_timeout=LOOKUP_SECONDS,
        )
        client.connection_pool.connection_kwargs.update(host=address[0], port=address[1])
        with client:
            return client.execute_command(*command)  # type: ignore[no-untyped-call]

    def __str__(self) -> str:
        return ",".join(f"{host}:{port}" for host, port in self.addresses)


class SentinelLocator:
    """Asks Sentinels for the master of a service."""

    def __init__(self, sentinels: Nodes, service: str) -> None:
        self._sentinels = sentinels
        self._service = service

    def locate(self) -> Address:
        answers = []
        for sentinel in self._sentinels.addresses:
            try:
                found = self._sentinels.ask(sentinel, "SENTINEL GET-MASTER-ADDR-BY-NAME", self._service)
            except (redis.ConnectionError, redis.TimeoutError, redis.ResponseError) as error:
                if is_final(error):
                    raise
                answers.append(str(error))
                continue
            if found:
                return found[0].decode(), int(found[1])
            answers.append(f"{sentinel[0]}:{sentinel[1]} knows no service {self._service!r}")
        raise redis.ConnectionError(f"no Sentinel names a master: {'; '.join(answers)}")

    def __str__(self) -> str:
        return f"master of {self._service} by Sentinels {self._sentinels}"


class ClusterLocator:
    """Asks nodes of a Cluster for a key of the run: the one that owns it answers, others name the owner."""

    def __init__(self, nodes: Nodes, key: str) -> None:
        self._nodes = nodes
        self._key = key

    def locate(self) -> Address:
        answers = []
        for node in self._nodes.addresses:
            try:
                self._nodes.ask(node, "EXISTS", self._key)
            except redis.exceptions.MovedError as moved:
                return moved.host if moved.host not in ("", "?") else node[0], moved.port
            except (redis.exceptions.AskError, redis.exceptions.TryAgainError):
                return node  # its slot is on the way to another, and still its own
            except (redis.ConnectionError, redis.TimeoutError, redis.exceptions.ClusterDownError) as error:
                if is_final(error):
                    raise
                answers.append(str(error))
                continue
            return node
        raise redis.ConnectionError(f"no Cluster node names the owner of the run: {'; '.join(answers)}")

    def __str__(self) -> str:
        return f"owner of the run by Cluster nodes {self._nodes}"


def is_final(error: Exception) -> bool:
    """Wrong credentials and certificates do not become right by waiting; redis-py files both under ConnectionError."""
    return isinstance(error, redis.AuthenticationError) or isinstance(error.__context__, ssl.SSLCertVerificationError)


class LocatedConnection(Connection):
    """A connection that looks its server up whenever it connects, and ends when that is no longer the right one."""

    def __init__(self, *, locator: Locator, **options: Any) -> None:
        self._locator = locator
        super().__init__(**options)  # type: ignore[no-untyped-call]

    def _connect(self) -> socket.socket:
        self.host, self.port = self._locator.locate()
        return super()._connect()  # type: ignore[no-untyped-call, no-any-return]

    def on_connect_check_health(self, check_health: bool = True) -> None:
        super().on_connect_check_health(check_health)
        self.send_command("INFO", "replication", check_health=False)  # type: ignore[no-untyped-call]
        require_master(self.read_response(), f"{self.host}:{self.port}")

    def read_response(self, *arguments: Any, **options: Any) -> Any:
        try:
            return super().read_response(*arguments, **options)
        except ELSEWHERE as error:
            self.disconnect()  # type: ignore[no-untyped-call]
            raise redis.ConnectionError(elsewhere(error, f"{self.host}:{self.port}")) from error


class LocatedTlsConnection(LocatedConnection, SSLConnection):
    """`LocatedConnection` over TLS."""


def require_master(replication: bytes, address: str) -> None:
    """Refuse a replica, which whoever named it does not know yet for one.

    Raises:
        redis.ConnectionError: the server is no master.
    """
    if b"role:master" not in replication:
        raise redis.ConnectionError(f"{address} is a replica")


def elsewhere(error: Exception, address: str) -> str:
    """What a reply of `ELSEWHERE` means, for messages."""
    return f"{address} says {getattr(error, 'status_code', None) or ''} {error}"


@dataclass(frozen=True, slots=True)
class Target:
    """What a URL of a client means: a plain Redis URL, and who finds the address where it does not say."""

    url: str
    locator: Locator | None = None

    @property
    def tls(self) -> bool:
        """Whether connections are encrypted."""
        return self.url.startswith("rediss://")


def parse_target(url: str, run: str | None) -> Target:
    """Read a URL of any of `URL_FORMS`.

    Args:
        run: name of the run, which in a Cluster decides the node.

    Raises:
        ValueError: what is wrong with `url`, without its secrets; plain URLs are left to redis-py.
    """
    if "+" not in url.partition("://")[0]:
        return Target(url)
    match = _URL.fullmatch(url)
    if match is None:
        raise ValueError("it is none of these forms")
    scheme, kind, credentials, hosts, path, query = match.groups(default="")
    addresses = tuple(_address(host, DEFAULT_PORTS[kind]) for host in hosts.split(","))
    options = dict(parse_qsl(query))
    if kind == "cluster":
        return _cluster_target(scheme, credentials, addresses, path, options, run)
    return _sentinel_target(scheme, credentials, addresses, path, options)


def _cluster_target(
    scheme: str, credentials: str, nodes: tuple[Address, ...], path: str, options: dict[str, str], run: str | None
) -> Target:
    if path.strip("/") not in ("", "0"):
        raise ValueError(f"a Cluster has no database but 0, and no {path!r}")
    if run is None:
        raise ValueError("in a Cluster the name of the run decides the node, and none is given")
    url = _plain_url(scheme, credentials, "0", options)
    return Target(url, ClusterLocator(Nodes(nodes, url), Keys(run).clock))


def _sentinel_target(
    scheme: str, credentials: str, sentinels: tuple[Address, ...], path: str, options: dict[str, str]
) -> Target:
    service, _, database = path.lstrip("/").partition("/")
    if not service:
        raise ValueError("the name of the service is missing: /SERVICE after the Sentinels")
    if database and not database.isdigit():
        raise ValueError(f"database {database!r} is no number")
    user, password = (quote(options.pop(f"sentinel_{name}", ""), safe="") for name in ("username", "password"))
    asked = Nodes(sentinels, _plain_url(scheme, f"{user}:{password}" if user or password else "", "0", options))
    url = _plain_url(scheme, credentials, database or "0", options)
    return Target(url, SentinelLocator(asked, unquote(service)))


def _plain_url(scheme: str, credentials: str, database: str, options: dict[str, str]) -> str:
    user, _, password = (quote(unquote(part), safe="") for part in credentials.partition(":"))
    start = f"{scheme}://{user}:{password}@" if user or password else f"{scheme}://"
    return f"{start}localhost/{database}" + (f"?{urlencode(options)}" if options else "")


def _address(text: str, default_port: int) -> Address:
    """Of HOST, HOST:PORT or [IPv6]:PORT."""
    host, separator, port = text.rpartition(":")
    if not separator or port.endswith("]"):
        host, port = text, str(default_port)
    host = host.strip("[]")
    if not host or not port.isdigit() or not 0 < int(port) < 65536:
        raise ValueError(f"{text!r} is no HOST:PORT")
    return host, int(port)
