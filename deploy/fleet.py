"""Processes of a run as Ray actors on this machine: started, watched and ended one by one.

Ray is bound to the loopback interface and belongs to the driver: the kernel ends its processes when the driver dies.
"""

import logging
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from deploy.roles import Outcome
from deploy.rundir import RunDirectory
from deploy.worker import ActorProcess, LearnerProcess
from protocol.errors import LauncherError
from protocol.settings import Settings

OBJECT_STORE_BYTES = 80 << 20  # Ray's minimum: nothing but settings and outcomes passes through it
RAY_ENVIRONMENT = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",  # despite its name: bind to 127.0.0.1 instead of every interface
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",  # leave GPUs visible to workers that reserve none
    "RAY_DEDUP_LOGS": "0",
}


@dataclass(frozen=True, slots=True)
class Ended:
    """A process that is gone: its outcome, or None if it died without one."""

    name: str
    outcome: Outcome | None


class Processes(Protocol):
    """Named processes, at most one of each name."""

    def spawn(self, name: str, role: str) -> None:
        """Start a process that plays `role`."""

    def wait(self, timeout_seconds: float) -> list[Ended]:
        """Block until a process ends, or the timeout; those that ended."""

    def running(self) -> list[str]:
        """Names of the processes that have not ended."""

    def kill(self, name: str) -> None:
        """End a process at once; nothing if it has ended."""


class RayProcesses:
    """`Processes` in a local Ray."""

    def __init__(self, settings: Settings, directory: RunDirectory) -> None:
        """Start Ray.

        Raises:
            LauncherError: it does not start.
        """
        os.environ.update(RAY_ENVIRONMENT)
        import ray

        self._ray = ray
        self._directory = directory
        self._settings_json = settings.model_dump_json()
        self._workers: dict[str, Any] = {}
        self._results: dict[Any, str] = {}
        try:
            ray.init(
                address="local",
                include_dashboard=False,
                log_to_driver=False,
                logging_level=logging.ERROR,
                num_cpus=1,  # a label: workers reserve none, so that no restart ever waits for a slot
                object_store_memory=OBJECT_STORE_BYTES,
            )
        except Exception as error:  # Ray raises whatever it meets
            raise LauncherError(f"Ray did not start on this machine: {error}") from error
        gpus = int(ray.cluster_resources().get("GPU", 0)) if settings.model.device != "cpu" else 0
        workers_per_gpu = -(-(settings.actors.count + 1) // gpus) if gpus else 0
        remote = ray.remote(num_cpus=0, num_gpus=1 / workers_per_gpu if gpus else 0, max_restarts=0, max_task_retries=0)
        self._worker_classes = {"learner": remote(LearnerProcess), "actor": remote(ActorProcess)}

    def log_file(self, name: str) -> Path:
        """Where the process of that name writes."""
        return self._directory.logs / f"{name}.log"

    def spawn(self, name: str, role: str) -> None:
        """See `Processes`."""
        worker = self._worker_classes[role].remote(str(self.log_file(name)), [place for place in sys.path if place])
        result = worker.play.remote(role, name, self._settings_json, str(self._directory.path))
        self._workers[name] = worker
        self._results[result] = name

    def wait(self, timeout_seconds: float) -> list[Ended]:
        """See `Processes`."""
        pending = list(self._results)
        ready, _ = self._ray.wait(pending, num_returns=1, timeout=timeout_seconds)
        return [self._collect(result) for result in ready]

    def _collect(self, result: Any) -> Ended:
        name = self._results.pop(result)
        try:
            outcome: Outcome | None = Outcome(**self._ray.get(result))
        except self._ray.exceptions.RayActorError:
            outcome = None
        except self._ray.exceptions.RayError as error:
            outcome = Outcome.of(error)
        self._ray.kill(self._workers.pop(name))  # what has played its role must not keep its memory
        return Ended(name, outcome)

    def running(self) -> list[str]:
        """See `Processes`."""
        return list(self._workers)

    def kill(self, name: str) -> None:
        """See `Processes`."""
        worker = self._workers.pop(name, None)
        if worker is not None:
            self._results = {result: owner for result, owner in self._results.items() if owner != name}
            self._ray.kill(worker)

    def close(self) -> None:
        """End every process and Ray."""
        for name in self.running():
            self.kill(name)
        self._ray.shutdown()
