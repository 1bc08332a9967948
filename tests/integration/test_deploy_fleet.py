"""Processes in a real local Ray: what they print, how they end, and that none is left behind."""

import contextlib
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from deploy.connect import placed
from deploy.fleet import Ended, RayProcesses
from deploy.rundir import RunDirectory
from protocol.errors import SettingsError
from tests.deploy_samples import make_settings

WAIT_SECONDS = 60.0
TASK = '''
import os
import time
from pathlib import Path

from protocol.errors import SettingsError

class Scripted:
    """Prints in both ways, then does what a file beside this one says."""

    num_prompts = 1

    def __init__(self) -> None:
        print("through Python")
        os.system("echo through a descriptor")
        match (Path(__file__).parent / "behaviour").read_text():
            case "sleep":
                time.sleep(600)
            case "misfit":
                raise SettingsError("the task does not fit")
            case _:
                raise KeyError("no such data")

    def prompt(self, index: int) -> str:
        return "1"

    def score(self, index: int, completion: str) -> float:
        return 0.0
'''


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> RunDirectory:
    directory = RunDirectory(tmp_path_factory.mktemp("run"))
    directory.create("run")
    (directory.path / "scripted_task_of_a_test.py").write_text(TASK)
    return directory


@pytest.fixture(scope="module")
def processes(redis_url: str, directory: RunDirectory) -> Iterator[RayProcesses]:
    patch = pytest.MonkeyPatch()
    patch.syspath_prepend(str(directory.path))  # workers search where the driver does
    settings = make_settings(task={"name": "scripted_task_of_a_test:Scripted"})
    processes = RayProcesses(placed(settings, directory, redis_url), directory)
    yield processes
    processes.close()
    patch.undo()


def behave(directory: RunDirectory, behaviour: str) -> None:
    """Say what the next process does."""
    (directory.path / "behaviour").write_text(behaviour)


def find_worker(log: Path) -> psutil.Process | None:
    for process in psutil.Process().children(recursive=True):
        try:
            if any(file.path == str(log) for file in process.open_files()):
                return process
        except psutil.Error:
            continue
    return None


def wait_for_output(processes: RayProcesses, name: str, text: str) -> str:
    for _ in range(int(WAIT_SECONDS / 0.1)):
        log = processes.log_file(name)
        if log.exists() and text in log.read_text():
            return log.read_text()
        assert processes.wait(0.1) == []
    raise AssertionError(f"{name} never wrote {text!r}")


def test_output_goes_to_a_file_and_a_killed_process_has_no_outcome(
    processes: RayProcesses, directory: RunDirectory
) -> None:
    behave(directory, "sleep")
    processes.spawn("actor-0", "actor")
    log = wait_for_output(processes, "actor-0", "through a descriptor")
    assert "through Python" in log
    worker = find_worker(processes.log_file("actor-0"))
    assert worker is not None
    worker.kill()
    assert processes.wait(WAIT_SECONDS) == [Ended("actor-0", None)]
    assert processes.running() == []


def test_a_process_can_be_ended_and_its_name_used_again(processes: RayProcesses, directory: RunDirectory) -> None:
    behave(directory, "sleep")
    for life in ("first", "second"):
        processes.log_file("actor-1").unlink(missing_ok=True)
        processes.spawn("actor-1", "actor")
        wait_for_output(processes, "actor-1", "through a descriptor")
        worker = find_worker(processes.log_file("actor-1"))
        assert worker is not None, life
        processes.kill("actor-1")
        worker.wait(WAIT_SECONDS)
        assert processes.running() == []


def test_errors_arrive_as_outcomes(processes: RayProcesses, directory: RunDirectory) -> None:
    found = []
    for behaviour in ("misfit", "fail"):
        behave(directory, behaviour)
        processes.spawn("actor-2", "actor")
        (ended,) = processes.wait(WAIT_SECONDS)
        assert ended.outcome is not None
        found.append(ended.outcome)
    assert (found[0].typed, found[0].message) == (SettingsError, "the task does not fit")
    assert (found[1].error, found[1].typed) == ("KeyError", None)
    assert "no such data" in found[1].details


def test_ray_listens_on_the_loopback_interface_only(processes: RayProcesses) -> None:
    listening = []
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):  # Ray starts helpers that end by themselves
            connections = process.net_connections("inet")
            listening += [connection.laddr.ip for connection in connections if connection.status == psutil.CONN_LISTEN]
    assert listening
    assert {address.removeprefix("::ffff:") for address in listening} == {"127.0.0.1"}
