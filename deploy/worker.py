"""Body of a Ray worker process: one role, with its output in a log file of its own.

Errors leave as an `Outcome`, never as a pickled exception: the driver may not have the module an exception came from.
"""

import os
import sys
from dataclasses import asdict
from pathlib import Path

from deploy.roles import Outcome, prepare_process, run_actor_role, run_learner_role
from deploy.rundir import RunDirectory
from protocol.settings import Settings


class Worker:
    """A process that plays one role once."""

    def __init__(self, log_file: str, search_path: list[str]) -> None:
        """Send everything this process and its libraries print to `log_file`, descriptors included.

        Args:
            log_file: opened for appending.
            search_path: where the driver finds modules; a user's task may be there.
        """
        stream = Path(log_file).open("a", buffering=1, encoding="utf-8")  # noqa: SIM115  # lives as long as the process
        os.dup2(stream.fileno(), 1)
        os.dup2(stream.fileno(), 2)
        sys.stdout = sys.stderr = stream
        sys.path += [place for place in search_path if place not in sys.path]

    def play(self, role: str, name: str, settings_json: str, run_dir: str) -> dict[str, str]:
        """Play "learner" or "actor" to its end; returns the fields of an `Outcome`."""
        try:
            settings = Settings.model_validate_json(settings_json)
            prepare_process(settings)
            directory = RunDirectory(Path(run_dir))
            if role == "learner":
                run_learner_role(settings, directory)
            else:
                run_actor_role(settings, name, directory)
        except Exception as error:
            outcome = Outcome.of(error)
            print(outcome.details or f"{outcome.error}: {outcome.message}", file=sys.stderr)
            return asdict(outcome)
        return asdict(Outcome())


class LearnerProcess(Worker):
    """A learner; Ray shows the class name as the process title."""


class ActorProcess(Worker):
    """An actor."""
