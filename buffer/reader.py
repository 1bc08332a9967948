"""Reads large values from a Redis connection straight into place.

redis-py's own reader passes every byte through a growing buffer and copies a value of 128 KB five times, which costs
the learner more than decoding it. Only the reading of large values is replaced. Where hiredis is installed, redis-py
parses in C, and nothing is replaced.
"""

from typing import Any

import redis
from redis._parsers.resp2 import _RESP2Parser
from redis._parsers.socket import SERVER_CLOSED_CONNECTION_ERROR, SocketBuffer
from redis.connection import AbstractConnection, DefaultParser
from redis.utils import SENTINEL

READ_BYTES = 1 << 14
"""Bytes asked for when it is unknown how many come; larger values are received in place."""
LINE_END_BYTES = 2


class _DirectBuffer(SocketBuffer):
    def read(self, length: int, timeout: float | object = SENTINEL) -> bytes:
        """One value of `length` bytes, without the line end after it."""
        num_there = self.unread_bytes()
        whole = length + LINE_END_BYTES
        if timeout is not SENTINEL or length < READ_BYTES or num_there >= whole:
            return super().read(length, timeout)
        value = bytearray(whole)
        view = memoryview(value)
        position = self._buffer.readinto(view[:num_there])
        try:
            while position < whole:
                received = self._sock.recv_into(view[position:])
                if received == 0:
                    raise redis.ConnectionError(SERVER_CLOSED_CONNECTION_ERROR)
                position += received
        except TimeoutError as error:
            raise redis.TimeoutError("Timeout reading from socket") from error
        return bytes(view[:length])


class _DirectParser(_RESP2Parser):
    def on_connect(self, connection: AbstractConnection) -> None:
        super().on_connect(connection)  # type: ignore[no-untyped-call]
        stock = self._buffer
        assert stock is not None
        self._buffer = _DirectBuffer(stock._sock, stock.socket_read_size, stock.socket_timeout)


def connection_options() -> dict[str, Any]:
    """Keyword arguments for a client of protocol 2."""
    if DefaultParser is not _RESP2Parser:  # hiredis
        return {}
    return {"parser_class": _DirectParser, "socket_read_size": READ_BYTES}
