"""Who is started again, how often, and what ends a run; on a real buffer, with processes that end on command."""

from pathlib import Path

import pytest

from buffer.connection import connect
from buffer.embedded import EmbeddedServer
from buffer.run import Buffer
from deploy import supervisor as supervisor_module
from deploy.fleet import Ended
from deploy.roles import Outcome
from deploy.rundir import History
from deploy.supervisor import Supervisor
from protocol.errors import LauncherError, SettingsError, StarvedError
from protocol.records import ActorStatus
from tests.deploy_samples import make_settings

DONE = Outcome()


class ScriptedProcesses:
    """`Processes` that end when a test says so."""

    def __init__(self) -> None:
        self.spawned: list[str] = []
        self._running: list[str] = []
        self._ended: list[Ended] = []

    def spawn(self, name: str, role: str) -> None:
        assert name not in self._running
        self.spawned.append(name)
        self._running.append(name)

    def wait(self, timeout_seconds: float) -> list[Ended]:
        ended, self._ended = self._ended, []
        return ended

    def running(self) -> list[str]:
        return list(self._running)

    def kill(self, name: str) -> None:
        self._running.remove(name)

    def end(self, name: str, outcome: Outcome | None = None) -> None:
        """The process is gone at the next `wait`."""
        self._running.remove(name)
        self._ended.append(Ended(name, outcome))


class Scene:
    """A supervisor with everything around it; pauses are short."""

    def __init__(self, buffer: Buffer, tmp_path: Path, **actors: object) -> None:
        self.buffer = buffer
        self.processes = ScriptedProcesses()
        self.history = History()
        self.notes: list[str] = []
        buffer.begin_epoch(run_id="x", groups_per_version=4, max_lag=1, max_attempts=3, max_bytes=1 << 20)
        self.supervisor = Supervisor(
            make_settings(actors=actors),
            self.processes,
            buffer,
            logs=tmp_path,
            history=self.history,
            note=self.notes.append,
        )
        self.supervisor.start()

    def end(self, name: str, outcome: Outcome | None = None) -> None:
        """End a process and let the supervisor restart it."""
        self.processes.end(name, outcome)
        for _ in range(3):
            self.supervisor.tick(0.01)

    def delivered(self, groups: int, incarnation: str = "actor-0.1-a") -> None:
        """An incarnation says how many groups it has delivered."""
        self.buffer.actors.heartbeat(
            incarnation, ActorStatus(state="serving", pid=1, host="h", groups_submitted=groups)
        )


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(supervisor_module, "FIRST_PAUSE_SECONDS", 0.0)


def test_actors_start_before_the_learner(buffer: Buffer, tmp_path: Path) -> None:
    scene = Scene(buffer, tmp_path, count=2)
    assert scene.processes.spawned == ["actor-0", "actor-1", "learner"]


def test_an_actor_that_dies_is_started_again(buffer: Buffer, tmp_path: Path) -> None:
    (tmp_path / "actor-0.log").write_text("something\nSegmentation fault\n\n")
    scene = Scene(buffer, tmp_path)
    scene.end("actor-0")
    assert scene.processes.running() == ["learner", "actor-0"]
    assert scene.history.restarts == {"actor-0": 1}
    assert "Segmentation fault" in scene.notes[0]


def test_an_actor_that_keeps_dying_ends_the_run(buffer: Buffer, tmp_path: Path) -> None:
    scene = Scene(buffer, tmp_path, max_restarts=2)
    scene.end("actor-0")
    scene.end("actor-0")
    with pytest.raises(LauncherError, match=r"actor-0 ended 3 times.*EngineError: out of memory.*actor-0\.log"):
        scene.end("actor-0", Outcome("EngineError", "out of memory"))


def test_a_delivered_group_forgives_earlier_deaths(buffer: Buffer, tmp_path: Path) -> None:
    scene = Scene(buffer, tmp_path, max_restarts=1)
    for life in range(4):
        scene.delivered(1, f"actor-0.{life}-x")
        scene.end("actor-0")
    assert scene.history.restarts == {"actor-0": 4}


def test_groups_of_other_actors_do_not_count(buffer: Buffer, tmp_path: Path) -> None:
    scene = Scene(buffer, tmp_path, max_restarts=1, count=2)
    scene.end("actor-0")
    scene.delivered(5, "actor-1.1-a")
    with pytest.raises(LauncherError):
        scene.end("actor-0")


def test_an_actor_with_hopeless_settings_ends_the_run_at_once(buffer: Buffer, tmp_path: Path) -> None:
    scene = Scene(buffer, tmp_path)
    with pytest.raises(SettingsError, match="no such task"):
        scene.end("actor-0", Outcome("SettingsError", "no such task"))


def test_a_learner_that_dies_is_started_again_three_times(buffer: Buffer, tmp_path: Path) -> None:
    scene = Scene(buffer, tmp_path)
    for _ in range(3):
        scene.end("learner")
    assert scene.history.restarts == {"learner": 3}
    with pytest.raises(LauncherError, match="learner ended 4 times without a new step"):
        scene.end("learner")


def test_an_error_of_the_learner_ends_the_run_as_what_it_is(buffer: Buffer, tmp_path: Path) -> None:
    scene = Scene(buffer, tmp_path)
    with pytest.raises(StarvedError, match="no groups"):
        scene.end("learner", Outcome("StarvedError", "no groups"))


def test_an_exception_of_the_learner_without_progress_is_not_repeated(buffer: Buffer, tmp_path: Path) -> None:
    scene = Scene(buffer, tmp_path)
    with pytest.raises(LauncherError, match="KeyError: 'x'"):
        scene.end("learner", Outcome("KeyError", "'x'", "Traceback"))


def test_nothing_is_started_again_at_the_end(buffer: Buffer, tmp_path: Path) -> None:
    scene = Scene(buffer, tmp_path)
    scene.end("learner", DONE)
    assert scene.supervisor.learner_done
    scene.end("actor-0")
    assert scene.processes.running() == []


def test_an_actor_that_saw_the_end_first_is_not_started_again(buffer: Buffer, tmp_path: Path) -> None:
    scene = Scene(buffer, tmp_path)
    buffer.control.set_state("finished", "all steps are done")
    scene.end("actor-0", DONE)
    assert scene.processes.running() == ["learner"]


def test_a_learner_that_dies_while_draining_ends_the_run(buffer: Buffer, tmp_path: Path) -> None:
    scene = Scene(buffer, tmp_path)
    scene.supervisor.ending = True
    scene.end("learner")
    assert scene.supervisor.learner_done


def test_a_server_that_is_away_delays_a_restart_and_loses_none(
    tmp_path: Path, server_directory: Path, run_name: str
) -> None:
    server = EmbeddedServer.start(server_directory)
    scene = Scene(Buffer(connect(server.url, reconnect_seconds=0.1), run_name), tmp_path)
    server.stop()
    scene.end("actor-0")
    assert scene.processes.running() == ["learner"]
    EmbeddedServer.start(server_directory)
    scene.supervisor.tick(0.01)
    assert scene.processes.running() == ["learner", "actor-0"]


def test_outcomes_keep_their_type_across_processes() -> None:
    assert Outcome.of(StarvedError("x")).typed is StarvedError
    assert Outcome.of(StarvedError("x")).details == ""
    assert Outcome.of(KeyError("x")).typed is None
    assert "KeyError" in Outcome.of(KeyError("x")).details
    assert Outcome().typed is None
    assert Outcome("FORMAT", "no class").typed is None
