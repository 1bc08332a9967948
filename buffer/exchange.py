"""Commands and their replies, with little Python in between: what every group passes through several times.

redis-py packs a command argument by argument and wraps each call of a pipeline in much else; for a script, which names
all keys of a run, that takes longer than the server takes to run it. Connections, their retries and their parsing of
replies stay redis-py's.
"""

from collections.abc import Sequence
from typing import Any

import redis

Argument = str | bytes | int | float
SEPARATE_BYTES = 1 << 18
"""An argument this large is sent from where it is; copying a smaller one costs less than another send."""


class Line:
    """A command in the protocol's bytes, whose first arguments are packed once for many commands."""

    __slots__ = ("_count", "_packed")

    def __init__(self, *arguments: Argument) -> None:
        self._count = len(arguments)
        self._packed = b"".join(map(_packed, arguments))

    def pieces(self, *more: Argument) -> list[bytes]:
        """Bytes to send, in pieces, for the command with `more` arguments after its first."""
        pieces, small = [], [b"*%d\r\n" % (self._count + len(more)), self._packed]
        for argument in more:
            if isinstance(argument, bytes) and len(argument) > SEPARATE_BYTES:
                small.append(b"$%d\r\n" % len(argument))
                pieces += [b"".join(small), argument]
                small = [b"\r\n"]
            else:
                small.append(_packed(argument))
        pieces.append(b"".join(small))
        return pieces


def _packed(argument: Argument) -> bytes:
    value = argument if isinstance(argument, bytes) else str(argument).encode()
    return b"$%d\r\n%b\r\n" % (len(value), value)


def exchange(client: redis.Redis, *commands: Sequence[bytes]) -> list[Any]:
    """Send commands, each as its pieces, in one go on one connection, and read a reply to each; retries as the client.

    Returns:
        The replies as the protocol has them; error replies are among them, not raised.

    Raises:
        redis.ConnectionError, redis.TimeoutError: after the client's retries.
    """
    pool = client.connection_pool
    connection: Any = pool.get_connection()
    try:
        replies: list[Any] = connection.retry.call_with_retry(
            lambda: _once(connection, commands), lambda error: connection.disconnect()
        )
        return replies
    finally:
        pool.release(connection)


def _once(connection: Any, commands: Sequence[Sequence[bytes]]) -> list[Any]:
    connection.send_packed_command(_joined(commands))
    return [_reply(connection) for _ in commands]


def _reply(connection: Any) -> Any:
    try:
        return connection.read_response()
    except redis.ResponseError as error:
        return error


def _joined(commands: Sequence[Sequence[bytes]]) -> list[bytes]:
    """All pieces in order, small ones that follow each other as one: each piece is a call of the system."""
    joined: list[bytes] = []
    small: list[bytes] = []
    for piece in (piece for pieces in commands for piece in pieces):
        if len(piece) > SEPARATE_BYTES:
            joined += [b"".join(small), piece]
            small = []
        else:
            small.append(piece)
    joined.append(b"".join(small))
    return joined
