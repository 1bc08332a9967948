"""The state of a run, for everybody to obey, and the learner's newest numbers, for everybody to see."""

import time
from typing import Literal, get_args

import redis

from buffer.connection import command
from buffer.events import Events
from buffer.keys import Keys
from buffer.scripts import Scripts
from protocol.records import StepRecord

RunState = Literal["running", "draining", "finished", "failed"]


class Control:
    """State and progress of one run."""

    def __init__(self, client: redis.Redis, keys: Keys, scripts: Scripts, events: Events) -> None:
        self._client = client
        self._keys = keys
        self._scripts = scripts
        self._events = events

    def state(self) -> str:
        """State of the run: running, draining, finished or failed; "none" if nobody has set one."""
        return self._read()[0]

    def reason(self) -> str:
        """Why the run is in its state; empty while nobody gave a reason."""
        return self._read()[1]

    def _read(self) -> tuple[str, str]:
        state, reason = command(self._client, "HMGET", self._keys.control, "state", "reason")
        return (state or b"none").decode(), (reason or b"").decode()

    def set_state(self, state: RunState, reason: str) -> None:
        """Change the state and wake whoever waits; returns once the change would survive a crash of the server."""
        if state not in get_args(RunState):
            raise ValueError(f"state {state!r} is none of {get_args(RunState)}")
        self._scripts.run_durably("control", state, reason)

    def wait_change(self, current: str, timeout_seconds: float) -> str:
        """Block until the state is not `current`, or the timeout; returns the state then."""
        deadline = time.monotonic() + timeout_seconds
        while True:
            cursor = self._events.cursor()
            state = self.state()
            if state != current or not self._events.wait(cursor, deadline - time.monotonic()):
                return state

    def put_progress(self, record: StepRecord) -> None:
        """Show the newest step."""
        command(self._client, "SET", self._keys.progress, record.model_dump_json())

    def progress(self) -> StepRecord | None:
        """The newest step shown, or None."""
        data = command(self._client, "GET", self._keys.progress)
        return None if data is None else StepRecord.model_validate_json(data)
