"""Learner, actor and server as foreground processes, for clusters and people that start things themselves."""

import logging
import sys
import threading
from pathlib import Path

from buffer.embedded import EmbeddedServer
from deploy.connect import open_run, placed, server_url
from deploy.environment import write_environment
from deploy.interrupts import Interrupts
from deploy.live import Lines
from deploy.preflight import preflight
from deploy.results import leave_results
from deploy.roles import prepare_process, run_actor_role, run_follower_role, run_learner_role
from deploy.rundir import RunDirectory
from deploy.snapshot import Trend, take_snapshot
from protocol.errors import LauncherError, VespoError
from protocol.recipe import Resolved
from protocol.settings import Settings

SIGNAL_WAIT_SECONDS = 0.5
ATTEND_SECONDS = 1.0

log = logging.getLogger(__name__)


def learner_by_hand(resolved: Resolved, directory: RunDirectory) -> None:
    """Train in this process. The first Ctrl-C drains the run; the second ends the process.

    Raises:
        VespoError: something is wrong with the settings, or the learner gave up.
    """
    directory.create(resolved.settings.run.name)
    with directory.lock(), Interrupts() as interrupts, directory.session() as history:
        settings = _join(resolved.settings, directory, learner=True)
        directory.write_settings(resolved.rows())
        write_environment(directory)
        ended = threading.Event()
        threading.Thread(target=_attend, args=(settings, interrupts, ended), daemon=True).start()
        try:
            run_learner_role(settings, directory)
        finally:
            ended.set()
        leave_results(settings, directory, open_run(settings).buffer, history)


def follower_by_hand(resolved: Resolved, directory: RunDirectory) -> None:
    """Train along in this process, as a rank other than 0, until rank 0 is done. The second Ctrl-C ends the process.

    Raises:
        VespoError: another rank failed, or went away.
    """
    with Interrupts():
        settings = placed(resolved.settings, directory, "")
        prepare_process(settings)
        run_follower_role(settings, directory)


def _attend(settings: Settings, interrupts: Interrupts, ended: threading.Event) -> None:
    """Show progress; once asked to, set the run's state to draining, again if the learner's start overwrites it."""
    view, trend = Lines(settings, sys.stdout), Trend(settings.run.steps)
    told = False
    try:
        buffer = open_run(settings).buffer
        while not ended.wait(ATTEND_SECONDS):
            snapshot = take_snapshot(buffer)
            trend.add(snapshot)
            if snapshot.progress is not None:
                view.update("", snapshot, trend)
            if interrupts.requested.is_set() and snapshot.state == "running":
                buffer.control.set_state("draining", "interrupted")
            if interrupts.requested.is_set() and not told:
                view.note("draining: a checkpoint is written; Ctrl-C again ends at once")
                told = True
    except VespoError as error:
        view.note(f"no progress is shown and Ctrl-C does not drain: {error}")


def actor_by_hand(resolved: Resolved, directory: RunDirectory, name: str) -> None:
    """Generate in this process. The first Ctrl-C finishes or returns what is in generation, the second ends it.

    Raises:
        VespoError: something is wrong with the settings, or the actor gave up.
    """
    directory.path.mkdir(parents=True, exist_ok=True)
    with Interrupts() as interrupts:
        settings = _join(resolved.settings, directory, learner=False)
        run_actor_role(settings, name, directory, interrupts.requested)


def server_by_hand(directory: Path) -> None:
    """Keep an embedded server until Ctrl-C."""
    with Interrupts() as interrupts:
        server = EmbeddedServer.start(directory)
        print(server.url, flush=True)
        while not interrupts.requested.wait(SIGNAL_WAIT_SECONDS):
            if EmbeddedServer.find(directory) is None:
                raise LauncherError(f"the server of {directory} ended by itself; its log is there")
        server.stop()


def _join(settings: Settings, directory: RunDirectory, *, learner: bool) -> Settings:
    settings = placed(settings, directory, server_url(settings, directory))
    for warning in preflight(settings, directory, learner=learner):
        log.warning(warning)
    prepare_process(settings)
    return settings
