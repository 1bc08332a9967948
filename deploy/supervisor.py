"""Keeps the processes of a run alive, and decides when a death is one too many.

An actor that dies is started again with growing pauses; more than `actors.max_restarts` deaths without a delivered
group in between end the run. A learner that crashes resumes from its checkpoint; more than `LEARNER_RESTARTS` crashes
without a new step end the run, and so does any error it raises on purpose. What is ending is never started again.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from buffer.run import Buffer
from deploy.fleet import Ended, Processes
from deploy.rundir import History
from protocol.errors import (
    BufferPolicyError,
    BufferUnavailableError,
    LauncherError,
    RunMismatchError,
    SettingsError,
)
from protocol.settings import Settings

LEARNER = "learner"
LEARNER_RESTARTS = 3
FIRST_PAUSE_SECONDS = 0.5
LONGEST_PAUSE_SECONDS = 30.0
HOPELESS = (SettingsError, RunMismatchError, BufferPolicyError)  # a new process would meet the same
EVER_SECONDS = 1e8
LOG_TAIL_BYTES = 4096


@dataclass(slots=True)
class _Slot:
    """One process of the run through all its lives."""

    name: str
    role: str
    failures: int = 0  # in a row, without progress
    progress: int = 0
    restart_at: float | None = None


class Supervisor:
    """Starts the learner and all actors of a run and watches over them."""

    def __init__(
        self,
        settings: Settings,
        processes: Processes,
        buffer: Buffer,
        *,
        logs: Path,
        history: History,
        note: Callable[[str], None],
    ) -> None:
        self._settings = settings
        self._processes = processes
        self._buffer = buffer
        self._logs = logs
        self._history = history
        self._note = note
        # actors first: their engines load while the learner prepares the first version
        self._slots = {f"actor-{i}": _Slot(f"actor-{i}", "actor") for i in range(settings.actors.count)}
        self._slots[LEARNER] = _Slot(LEARNER, LEARNER)
        self.ending = False
        self.learner_done = False

    def start(self) -> None:
        """Start every process."""
        for slot in self._slots.values():
            slot.progress = self._progress(slot)
            self._processes.spawn(slot.name, slot.role)

    def tick(self, timeout_seconds: float) -> None:
        """Wait for something to happen, at most `timeout_seconds`, and deal with it.

        Raises:
            VespoError: the run cannot go on.
        """
        if self._processes.running():
            for ended in self._processes.wait(timeout_seconds):
                self._deal_with(ended, self._slots[ended.name])
        else:
            time.sleep(timeout_seconds)
        for slot in self._slots.values():
            if slot.restart_at is not None and time.monotonic() >= slot.restart_at:
                self._restart(slot)

    def _restart(self, slot: _Slot) -> None:
        try:
            going_on = not self.ending and self._buffer.control.state() in ("running", "none")
        except BufferUnavailableError:
            return  # at a later tick; the launcher sees to it that the server does not stay away for ever
        slot.restart_at = None
        if going_on:
            self._history.restarts[slot.name] = self._history.restarts.get(slot.name, 0) + 1
            self._processes.spawn(slot.name, slot.role)

    def _deal_with(self, ended: Ended, slot: _Slot) -> None:
        outcome = ended.outcome
        if outcome is not None and not outcome.error and slot.role == LEARNER:
            self.learner_done = True
            self.ending = True
            return
        typed = None if outcome is None else outcome.typed
        if typed is not None and outcome is not None and (slot.role == LEARNER or issubclass(typed, HOPELESS)):
            raise typed(outcome.message)
        if self.ending:
            self.learner_done |= slot.role == LEARNER
            return
        what = self._describe(ended)
        progress = self._progress(slot)
        moved = progress > slot.progress
        if slot.role == LEARNER and outcome is not None and not moved:  # an exception that will come again
            raise LauncherError(f"the learner failed: {what}; its log: {self._logs / 'learner.log'}")
        slot.failures = 1 if moved else slot.failures + 1
        slot.progress = progress
        limit = LEARNER_RESTARTS if slot.role == LEARNER else self._settings.actors.max_restarts
        if slot.failures > limit:
            missing = "a new step" if slot.role == LEARNER else "delivering a group"
            raise LauncherError(
                f"{slot.name} ended {slot.failures} times without {missing}, the last time: {what}; its log: "
                f"{self._logs / f'{slot.name}.log'}"
            )
        pause = min(LONGEST_PAUSE_SECONDS, FIRST_PAUSE_SECONDS * 2 ** (slot.failures - 1))
        slot.restart_at = time.monotonic() + pause
        self._note(f"{slot.name} ended ({what}); started again in {pause:g} s")

    def _progress(self, slot: _Slot) -> int:
        """Steps done by the learner, or groups delivered by all incarnations of an actor, as far as can be known."""
        try:
            if slot.role == LEARNER:
                clock = self._buffer.clock.read()
                return max(slot.progress, -1 if clock is None else clock.step)
            every = self._buffer.actors.list(EVER_SECONDS)
        except BufferUnavailableError:
            return slot.progress
        delivered = (s.groups_submitted for name, _, s in every if name.rpartition(".")[0] == slot.name)
        return max(slot.progress, sum(delivered))

    def _describe(self, ended: Ended) -> str:
        outcome = ended.outcome
        if outcome is None:
            last = _last_line(self._logs / f"{ended.name}.log")
            return "its process died" + (f"; last line of its log: {last}" if last else "")
        return f"{outcome.error}: {outcome.message}" if outcome.error else "it returned"


def _last_line(path: Path) -> str:
    try:
        with path.open("rb") as file:
            file.seek(0, 2)
            file.seek(max(0, file.tell() - LOG_TAIL_BYTES))
            lines = file.read().decode("utf-8", "replace").split("\n")
    except OSError:
        return ""
    return next((line.strip() for line in reversed(lines) if line.strip()), "")
