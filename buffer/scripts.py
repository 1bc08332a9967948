"""Loads the Lua scripts, runs them by their hash, and turns the errors they raise into typed ones.

Each file of `scripts/` is one transition; `common.lua` is put before each, below its `#!lua` line.

A server that crashes forgets what it had not written to disk, a second's worth; one that fails over, what its replica
had not got. Scripts are atomic, so what comes back is an earlier state that balances, but the learner is further: it
published, committed and returned groups since, and would wait for ever for what it has done already. So what it
changed lately is remembered here, and repeated when another server process answers. For what is rare and on which
everybody else builds (a new epoch, the end of a run), the caller waits until it is on disk instead.
"""

import hashlib
import re
import threading
import time
from collections import deque
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import redis

from buffer.connection import guard
from buffer.exchange import Argument, Line, exchange
from buffer.keys import Keys
from protocol.errors import BufferUnavailableError, FencedError, RunMismatchError, VespoError

FOLDER = Path(__file__).parent / "scripts"
TYPED_ERRORS: dict[str, type[Exception]] = {
    "FENCED": FencedError,
    "MISMATCH": RunMismatchError,
    "INVALID": ValueError,
    "LOST": BufferUnavailableError,
    "NOGROUP": BufferUnavailableError,
}
UNSYNCED_SECONDS = 10.0
"""Longer than what a server with `appendfsync everysec` may lose, which is two seconds."""
SYNC_DEADLINE_SECONDS = 5.0
_POSITION = re.compile(r" script: .*on @user_script:\d+\.$")  # Lua's error() appends where it was raised


@cache
def load(name: str) -> tuple[str, str]:
    """Source of script `name` with the common part, and its SHA-1."""
    shebang, body = (FOLDER / f"{name}.lua").read_text("utf-8").split("\n", 1)
    source = f"{shebang}\n{(FOLDER / 'common.lua').read_text('utf-8')}\n{body}"
    return source, hashlib.sha1(source.encode(), usedforsecurity=False).hexdigest()


class Scripts:
    """Runs transitions of one run. Threads may share it."""

    def __init__(self, client: redis.Redis, keys: Keys) -> None:
        self._client = client
        self._keys = keys.all()
        self._lines: dict[str, Line] = {}
        self._lock = threading.Lock()
        self._recent: deque[tuple[float, str, tuple[Argument, ...]]] = deque()

    def run(self, name: str, *arguments: Argument) -> Any:
        """Run a script atomically and return its reply, bytes and integers nested in lists.

        Raises:
            FencedError, RunMismatchError, ValueError: what the script itself refused.
            BufferUnavailableError: the server is away or refuses to write.
        """
        (reply,) = self._send(self._by_digest(name, arguments))
        return self._known(reply, name, arguments)

    def _known(self, reply: Any, name: str, arguments: Sequence[Argument]) -> Any:
        """`reply` to a script that was run by its hash, and now by its source if the server did not know it."""
        if isinstance(reply, redis.exceptions.NoScriptError):
            (reply,) = self._send(Line(*by_source(name, self._keys, arguments)).pieces())
        return self._judged(reply)

    def _by_digest(self, name: str, arguments: Sequence[Argument]) -> list[bytes]:
        if (line := self._lines.get(name)) is None:
            line = self._lines[name] = Line(*by_digest(name, self._keys, ()))
        return line.pieces(*arguments)

    def run_repeatably(self, name: str, *arguments: Argument) -> Any:
        """`run` a script that changes nothing when it is run twice, and remember it for `repeat_recent`."""
        reply = self.run(name, *arguments)
        now = time.monotonic()
        with self._lock:
            self._recent.append((now, name, arguments))
            while self._recent[0][0] < now - UNSYNCED_SECONDS:
                self._recent.popleft()
        return reply

    def repeat_recent(self) -> None:
        """Run again, in their order, what the server may have forgotten when it went away."""
        for name, arguments in self.recent():
            try:
                self.run(name, *arguments)
            except ValueError:  # a version that a newer one has superseded
                continue

    def forget_recent(self) -> None:
        """What was run before a new epoch is not to be repeated in it."""
        with self._lock:
            self._recent.clear()

    def recent(self) -> list[tuple[str, tuple[Argument, ...]]]:
        """Scripts that `run_repeatably` ran within `UNSYNCED_SECONDS` before the newest of them."""
        with self._lock:
            return [(name, arguments) for _, name, arguments in self._recent]

    def run_durably(self, name: str, *arguments: Argument) -> Any:
        """`run`, and wait until the effect is on the server's disk, where the server can tell (since Redis 7.2)."""
        wait = ("WAITAOF", 1, 0, round(1000 * SYNC_DEADLINE_SECONDS))
        # the second reply may be an error: an older server, or one without an append-only file
        reply, _ = self._send(Line(*by_source(name, self._keys, arguments)).pieces(), Line(*wait).pieces())
        return self._judged(reply)

    def run_after(self, first: Sequence[Argument], name: str, *arguments: Argument) -> Any:
        """Send a plain command and a script in one go, not atomically; the script's reply."""
        first_reply, reply = self._send(Line().pieces(*first), self._by_digest(name, arguments))
        self._judged(first_reply)
        return self._known(reply, name, arguments)

    def _send(self, *commands: Sequence[bytes]) -> list[Any]:
        """Replies to several commands on one connection, errors among them."""
        with guard(self._client):
            return exchange(self._client, *commands)

    def _judged(self, reply: Any) -> Any:
        """`reply` unless it is an error, which is raised."""
        if isinstance(reply, redis.ResponseError):
            with guard(self._client):
                raise typed_error(reply) from reply
        return reply


def by_digest(name: str, keys: Sequence[str], arguments: Sequence[Argument]) -> tuple[Argument, ...]:
    """Command that runs script `name`, if the server has it."""
    return ("EVALSHA", load(name)[1], len(keys), *keys, *arguments)


def by_source(name: str, keys: Sequence[str], arguments: Sequence[Argument]) -> tuple[Argument, ...]:
    """Command that runs script `name`, and has the server keep it."""
    return ("EVAL", load(name)[0], len(keys), *keys, *arguments)


def typed_error(error: redis.ResponseError) -> VespoError | ValueError | redis.ResponseError:
    """The exception that an error reply of a script stands for; `error` itself where it stands for none."""
    code, _, message = str(error).partition(" ")
    kind = TYPED_ERRORS.get(code)
    if kind is None:
        return error
    message = _POSITION.sub("", message)
    if code == "NOGROUP":
        message += "; other hands deleted the stream of groups, restore it with: vespo buffer audit --repair"
    typed = kind(message)
    assert isinstance(typed, (VespoError, ValueError))
    return typed
