"""Layout of a run directory, and who the run is: its identity and history survive every restart.

run.json            identity, sessions (one per `vespo run`), restarts of processes
settings.json       resolved settings with origins, secrets left out
metrics.jsonl       one line per optimizer step            summary.json   the run in numbers
report.html         plots and tables                       model/         the trained model
buffer/             embedded server, if the run has its own
weights/            weight store, unless `weights.store` says otherwise
checkpoints/        the learner's state                    toy_model/     model of `[model.toy]`
logs/               one file per process
"""

import fcntl
import json
import os
import time
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from protocol.errors import LauncherError, RunMismatchError
from protocol.recipe import Row


class RunFile(BaseModel):
    """The part of run.json that is written once."""

    model_config = ConfigDict(extra="ignore")

    run_id: str
    name: str
    created_at: float


class Session(BaseModel):
    """One stretch of work on the run; it has no end if its driver was killed."""

    model_config = ConfigDict(extra="forbid")

    started_at: float
    ended_at: float | None = None


class History(BaseModel):
    """Contents of history.json. `restarts` counts processes that were started again, by name, over all sessions."""

    model_config = ConfigDict(extra="forbid")

    sessions: list[Session] = Field(default_factory=list)
    restarts: dict[str, int] = Field(default_factory=dict)


class RunDirectory:
    """Paths and small files of one run."""

    def __init__(self, path: Path) -> None:
        self.path = path.expanduser().resolve()
        self.identity = self.path / "run.json"
        self.history = self.path / "history.json"
        self.settings = self.path / "settings.json"
        self.environment = self.path / "environment.json"
        self.metrics = self.path / "metrics.jsonl"
        self.summary = self.path / "summary.json"
        self.report = self.path / "report.html"
        self.model = self.path / "model"
        self.toy_model = self.path / "toy_model"
        self.server = self.path / "buffer"
        self.weights = self.path / "weights"
        self.logs = self.path / "logs"

    def create(self, name: str) -> RunFile:
        """Make the directory, or re-open it for the same run.

        Raises:
            LauncherError: it cannot be written.
            RunMismatchError: it belongs to a run of another name.
        """
        try:
            self.logs.mkdir(parents=True, exist_ok=True)
            probe = self.path / f".probe-{os.getpid()}"
            probe.write_bytes(b"vespo")
            probe.unlink()
        except OSError as error:
            raise LauncherError(f"run directory {self.path} cannot be written: {error.strerror}") from error
        known = self.read()
        if known is None:
            known = RunFile(run_id=str(uuid.uuid4()), name=name, created_at=time.time())
            write_atomically(self.identity, known.model_dump_json(indent=2) + "\n")
        if known.name != name:
            raise RunMismatchError(
                f"run directory {self.path} belongs to run {known.name!r}, the recipe says run.name = {name!r}; "
                "give another --run-dir or the recipe it was started with"
            )
        return known

    def read(self) -> RunFile | None:
        """The run's identity, or None in a directory that has none.

        Raises:
            LauncherError: run.json is damaged.
        """
        try:
            return RunFile.model_validate_json(self.identity.read_bytes())
        except FileNotFoundError:
            return None
        except (ValidationError, OSError) as error:
            raise LauncherError(f"{self.identity} cannot be read: {error}") from error

    def read_history(self) -> History:
        """Contents of history.json, empty if there is none.

        Raises:
            LauncherError: it is damaged.
        """
        try:
            return History.model_validate_json(self.history.read_bytes())
        except FileNotFoundError:
            return History()
        except (ValidationError, OSError) as error:
            raise LauncherError(f"{self.history} cannot be read: {error}") from error

    @contextmanager
    def session(self) -> Iterator[History]:
        """Record a session around a block, together with what the block changes in the history."""
        history = self.read_history()
        history.sessions.append(Session(started_at=time.time()))
        write_atomically(self.history, history.model_dump_json(indent=2) + "\n")
        try:
            yield history
        finally:
            history.sessions[-1].ended_at = time.time()
            write_atomically(self.history, history.model_dump_json(indent=2) + "\n")

    def write_settings(self, rows: Sequence[Row]) -> None:
        """Replace settings.json; rows carry no secrets."""
        write_atomically(self.settings, json.dumps([asdict(row) for row in rows], indent=2) + "\n")

    def read_settings(self) -> list[dict[str, Any]]:
        """Rows of settings.json, none if there is no such file."""
        try:
            rows: list[dict[str, Any]] = json.loads(self.settings.read_text("utf-8"))
        except FileNotFoundError:
            return []
        return rows

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Hold the directory for one `vespo run` or `vespo learner`; the kernel releases it when the process dies.

        Raises:
            LauncherError: another process holds it.
        """
        with (self.path / ".lock").open("a+") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                file.seek(0)
                raise LauncherError(
                    f"{self.path} is in use by process {file.read().strip() or '?'}; wait for it or stop it"
                ) from None
            file.truncate(0)
            file.write(str(os.getpid()))
            file.flush()
            yield


def write_atomically(path: Path, text: str) -> None:
    """Write a file that readers see complete or not at all."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text(text, "utf-8")
    temporary.replace(path)
