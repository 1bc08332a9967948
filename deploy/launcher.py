"""`vespo run`: everything a run needs on one machine, from an empty directory to report, and back from any crash.

    preflight → embedded server → Ray → actors and learner in parallel → watch → end of the run → summary, report

The first Ctrl-C drains: no new tickets, a checkpoint, then the summary. The second ends everything at once; what was
committed is safe either way, and the same command goes on from there. Only processes started here are ended.
"""

import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, redirect_stderr, redirect_stdout

from buffer.embedded import EmbeddedServer
from buffer.run import Buffer
from deploy.connect import check_identity, connect_url, placed
from deploy.environment import write_environment
from deploy.fleet import RayProcesses
from deploy.interrupts import Interrupts
from deploy.live import View, make_view
from deploy.preflight import preflight
from deploy.results import leave_results
from deploy.rundir import History, RunDirectory
from deploy.snapshot import Snapshot, Trend, take_snapshot
from deploy.summary import format_summary, read_metrics, read_summary
from deploy.supervisor import Supervisor
from protocol.errors import BufferUnavailableError, FencedError, LauncherError, VespoError
from protocol.recipe import Resolved
from protocol.settings import Settings

REFRESH_SECONDS = 0.5
RECONNECT_SECONDS = 2.0  # of the driver alone: it must stay responsive; the others wait as long as the recipe says
RECONNECT_SLACK_SECONDS = 30.0
ACTORS_END_SECONDS = 20.0
DRAIN_SLACK_SECONDS = 60.0


def launch(resolved: Resolved, directory: RunDirectory) -> None:
    """Run to the end, or to the end of draining, and leave summary and report in the run directory.

    Raises:
        VespoError: the run cannot start or go on.
        KeyboardInterrupt: the second Ctrl-C.
    """
    settings = resolved.settings
    directory.create(settings.run.name)
    with directory.lock():
        done = read_summary(directory)
        if done is not None and done.complete and done.steps >= settings.run.steps:
            print(format_summary(done, directory))
            return
        for warning in preflight(settings, directory):
            print(f"vespo: warning: {warning}", file=sys.stderr)
        directory.write_settings(resolved.rows())
        write_environment(directory)
        try:
            with Interrupts() as interrupts, directory.session() as history:
                _Launch(settings, directory, history, interrupts).run()
        except KeyboardInterrupt:
            print("vespo: stopped at once; the same command goes on from what was committed", file=sys.stderr)
            raise


class _Launch:
    """One session of `vespo run`."""

    def __init__(self, settings: Settings, directory: RunDirectory, history: History, interrupts: Interrupts) -> None:
        self._directory = directory
        self._history = history
        self._interrupts = interrupts
        self._server = None if settings.buffer.url is not None else EmbeddedServer.start(directory.server)
        url = self._server.url if self._server is not None else str(settings.buffer.url)
        self._settings = placed(settings, directory, url)
        self._trend = Trend(settings.run.steps, read_metrics(directory.metrics))
        self._snapshot: Snapshot | None = None
        self._unreachable_since: float | None = None
        self._drain_deadline: float | None = None

    def run(self) -> None:
        """From start to summary."""
        with ExitStack() as stack:
            stack.callback(self._stop_server)
            client = connect_url(str(self._settings.buffer.url), self._settings.run.name, RECONNECT_SECONDS, wait=False)
            stack.callback(client.close)
            check_identity(client, self._settings, self._directory)
            buffer = Buffer(client, self._settings.run.name)
            clock = buffer.clock.read()
            self._earlier_epoch = 0 if clock is None else clock.epoch
            if buffer.control.state() != "none":
                buffer.control.set_state("running", "vespo run")  # actors would obey the end of the last session
            try:
                with _closing(make_view(self._settings, sys.stdout)) as view, self._ray_output():
                    self._work(buffer, view)
            except FencedError:
                raise  # a newer learner owns the run's state
            except VespoError as error:
                _try_to_fail(buffer, error)
                raise
            finally:
                if self._worth_reporting(sys.exception()):
                    leave_results(self._settings, self._directory, buffer, self._history)

    def _worth_reporting(self, error: BaseException | None) -> bool:
        """Whoever ends everything at once does not wait for a report, and a run that never began has none."""
        return not isinstance(error, KeyboardInterrupt) and (error is None or self._directory.metrics.exists())

    def _work(self, buffer: Buffer, view: View) -> None:
        """Start everything, watch until the learner is done, end everything."""
        view.update("starting Ray", None, self._trend)
        processes = RayProcesses(self._settings, self._directory)
        self._interrupts.install()  # Ray has taken SIGTERM
        try:
            supervisor = Supervisor(
                self._settings,
                processes,
                buffer,
                logs=self._directory.logs,
                history=self._history,
                note=view.note,
            )
            supervisor.start()
            while not supervisor.learner_done:
                supervisor.tick(REFRESH_SECONDS)
                self._refresh(buffer, view)
                if self._interrupts.requested.is_set() and self._drain(buffer, view, supervisor):
                    return
            self._await_actors(processes, supervisor, view)
        finally:
            processes.close()

    @contextmanager
    def _ray_output(self) -> Iterator[None]:
        """Send what Ray prints in this process, which no option silences, to a log file instead of into the view."""
        with (self._directory.logs / "ray.log").open("a") as file, redirect_stdout(file), redirect_stderr(file):
            yield

    def _refresh(self, buffer: Buffer, view: View) -> None:
        """Read and show the buffer; bring the embedded server back if it is gone."""
        try:
            self._snapshot = take_snapshot(buffer)
        except BufferUnavailableError as error:
            now = time.monotonic()
            if self._unreachable_since is None:
                self._unreachable_since = now
                view.note(str(error))
            if now - self._unreachable_since > self._settings.buffer.reconnect_seconds + RECONNECT_SLACK_SECONDS:
                raise
            self._revive_server(view)
            return
        self._unreachable_since = None
        self._trend.add(self._snapshot)
        view.update(self._phase(self._snapshot), self._snapshot, self._trend)

    def _revive_server(self, view: View) -> None:
        if self._server is None:
            return  # somebody else's; clients wait for it as long as the recipe allows, then the learner says so
        server = EmbeddedServer.start(self._directory.server)
        if server.url != self._server.url:
            raise LauncherError(f"the embedded server came back elsewhere ({server.url}); start the run again")
        if server.pid != self._server.pid:
            view.note("the embedded server had died and was started again from its append-only file")
        self._server = server

    def _stop_server(self) -> None:
        """Stop the server of this run, whichever process it is by now."""
        if self._server is not None:
            self._server.stop()

    def _phase(self, snapshot: Snapshot) -> str:
        """What goes on before this session's first step, empty afterwards."""
        if self._drain_deadline is not None:
            return "draining: finishing what is in generation, writing a checkpoint"
        clock, progress = snapshot.clock, snapshot.progress
        if clock is None or clock.epoch == self._earlier_epoch:
            if self._settings.model.toy is not None and not self._directory.toy_model.exists():
                return "loading libraries, building the toy model"
            return "loading libraries and model"
        if progress is not None and progress.epoch > self._earlier_epoch:
            return ""
        if any(status.served_version >= 0 for _, _, status in snapshot.actors):
            return "generating the first groups"
        return "starting engines" if clock.version >= 0 else "publishing the first version"

    def _drain(self, buffer: Buffer, view: View, supervisor: Supervisor) -> bool:
        """Let the run come to rest; True if there is nothing to wait for any more."""
        now = time.monotonic()
        if self._drain_deadline is None:
            self._drain_deadline = now + self._settings.buffer.lease_seconds + DRAIN_SLACK_SECONDS
            supervisor.ending = True
            view.note("draining: a checkpoint is written, tickets are returned; Ctrl-C again ends everything at once")
        clock = None if self._snapshot is None else self._snapshot.clock
        if clock is None or clock.epoch == self._earlier_epoch:
            view.note("the learner had not begun: there is nothing to save")
            return True
        if self._unreachable_since is None and buffer.control.state() == "running":
            buffer.control.set_state("draining", "interrupted")
        if now > self._drain_deadline:
            view.note("draining took too long; the run goes on from its last checkpoint next time")
            return True
        return False

    def _await_actors(self, processes: RayProcesses, supervisor: Supervisor, view: View) -> None:
        """Give actors time to return their tickets and to say how much they did."""
        deadline = time.monotonic() + ACTORS_END_SECONDS
        if self._drain_deadline is not None:
            deadline = max(deadline, self._drain_deadline)
        while processes.running() and time.monotonic() < deadline:
            supervisor.tick(REFRESH_SECONDS)
        for name in processes.running():
            view.note(f"{name} did not end in time and is killed; its tickets expire")


@contextmanager
def _closing(view: View) -> Iterator[View]:
    try:
        yield view
    finally:
        view.close()


def _try_to_fail(buffer: Buffer, error: VespoError) -> None:
    """Tell actors elsewhere that the run is over; the error itself is what matters."""
    try:
        buffer.control.set_state("failed", f"{type(error).__name__}: {error}")
    except VespoError as second:
        print(f"vespo: the run's state could not be set: {second}", file=sys.stderr)
