"""Loads the Lua scripts, runs them by their hash, and turns the errors they raise into typed ones.

Each file of `scripts/` is one transition; `common.lua` is put before each, below its `#!lua` line.
"""

import hashlib
import re
from functools import cache
from pathlib import Path
from typing import Any

import redis

from buffer.connection import command
from buffer.keys import Keys
from protocol.errors import FencedError, RunMismatchError, VespoError

FOLDER = Path(__file__).parent / "scripts"
TYPED_ERRORS: dict[str, type[Exception]] = {
    "FENCED": FencedError,
    "MISMATCH": RunMismatchError,
    "INVALID": ValueError,
}
_POSITION = re.compile(r" script: .*on @user_script:\d+\.$")  # Lua's error() appends where it was raised


@cache
def load(name: str) -> tuple[str, str]:
    """Source of script `name` with the common part, and its SHA-1."""
    shebang, body = (FOLDER / f"{name}.lua").read_text("utf-8").split("\n", 1)
    source = f"{shebang}\n{(FOLDER / 'common.lua').read_text('utf-8')}\n{body}"
    return source, hashlib.sha1(source.encode(), usedforsecurity=False).hexdigest()


class Scripts:
    """Runs transitions of one run."""

    def __init__(self, client: redis.Redis, keys: Keys) -> None:
        self._client = client
        self._keys = keys.all()

    def run(self, name: str, *arguments: str | bytes | int | float) -> Any:
        """Run a script atomically and return its reply, bytes and integers nested in lists.

        Raises:
            FencedError, RunMismatchError, ValueError: what the script itself refused.
            BufferUnavailableError: the server is away or refuses to write.
        """
        source, digest = load(name)
        try:
            try:
                return self._execute("EVALSHA", digest, arguments)
            except redis.exceptions.NoScriptError:
                return self._execute("EVAL", source, arguments)
        except redis.ResponseError as error:
            raise typed_error(error) from error

    def _execute(self, verb: str, script: str, arguments: tuple[str | bytes | int | float, ...]) -> Any:
        return command(self._client, verb, script, len(self._keys), *self._keys, *arguments)


def typed_error(error: redis.ResponseError) -> VespoError | ValueError | redis.ResponseError:
    """The exception that an error reply of a script stands for; `error` itself where it stands for none."""
    code, _, message = str(error).partition(" ")
    kind = TYPED_ERRORS.get(code)
    if kind is None:
        return error
    typed = kind(_POSITION.sub("", message))
    assert isinstance(typed, (VespoError, ValueError))
    return typed
