"""One task at a time in a thread of its own, and what it failed with raised where the next step is taken."""

import logging
import threading
from collections.abc import Callable

log = logging.getLogger(__name__)


class Background:
    """Runs tasks one after the other, never two at once."""

    def __init__(self, name: str) -> None:
        """`name` is that of the thread."""
        self._name = name
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None

    @property
    def busy(self) -> bool:
        """Whether a task is under way."""
        return self._thread is not None and self._thread.is_alive()

    def start(self, task: Callable[[], None]) -> None:
        """Begin a task, after the one before has ended.

        Raises:
            VespoError: what the one before failed with.
        """
        self.finish()
        # A daemon: a disk that hangs must not keep the process alive.
        self._thread = threading.Thread(target=self._run, args=(task,), name=self._name, daemon=True)
        self._thread.start()

    def check(self) -> None:
        """Raise what a task failed with."""
        if self._error is not None:
            raise self._error

    def finish(self) -> None:
        """Wait until nothing is under way, and raise what it failed with."""
        if self._thread is not None:
            self._thread.join()
        self.check()

    def close(self, timeout_seconds: float) -> None:
        """Give what is under way time to end; its failure is logged, since another ends the process."""
        if self._thread is not None:
            self._thread.join(timeout_seconds)
        if self.busy:
            log.warning("the %s has not ended within %g s and is left behind", self._name, timeout_seconds)

    def _run(self, task: Callable[[], None]) -> None:
        try:
            task()
        except BaseException as error:  # handed to the thread that waits, which raises it
            log.error("%s: %s: %s", self._name, type(error).__name__, error)
            self._error = error
