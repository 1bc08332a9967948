"""What the learner keeps in the run directory besides checkpoints: whose run it is, and a line per step."""

import json
import os
import uuid
from pathlib import Path
from typing import TypeVar

from protocol.records import StepRecord

T = TypeVar("T")


def open_session(run_dir: Path) -> tuple[str, int]:
    """Identity of the run directory (`run_id` of run.json, made if there is none) and number of this session, from 1.

    Sessions are counted in learner.json: each start of the learner is one, whatever became of it.

    Raises:
        ValueError: one of the two files is damaged.
    """
    run_dir.mkdir(parents=True, exist_ok=True)
    identity, counter = run_dir / "run.json", run_dir / "learner.json"
    if not identity.exists():
        _write(identity, {"run_id": uuid.uuid4().hex})
    run_id = _read(identity, "run_id", str)
    session = 1 + (_read(counter, "sessions", int) if counter.exists() else 0)
    _write(counter, {"sessions": session})
    return run_id, session


def _read(path: Path, key: str, kind: type[T]) -> T:
    try:
        value = json.loads(path.read_text())[key]
        if isinstance(value, kind):
            return value
        problem = f"{key} is {value!r}"
    except (KeyError, TypeError, ValueError) as error:
        problem = repr(error)
    raise ValueError(f"{path} is damaged: {problem}; restore it, or take another run directory")


def _write(path: Path, content: dict[str, object]) -> None:
    fresh = path.with_name(f".{path.name}.new")
    with fresh.open("w") as file:
        file.write(json.dumps(content) + "\n")
        file.flush()
        os.fsync(file.fileno())
    fresh.replace(path)


class Journal:
    """`metrics.jsonl`: one line per step of the lineage that survives."""

    def __init__(self, run_dir: Path, *, step: int) -> None:
        """Open for appending after `step`; lines of later steps, which a resume repeats, are removed."""
        self._path = run_dir / "metrics.jsonl"
        kept = [line for line in self._lines() if _step_of(line) is not None and (_step_of(line) or 0) <= step]
        fresh = self._path.with_name(".metrics.jsonl.new")
        fresh.write_text("".join(kept))
        fresh.replace(self._path)
        self._file = self._path.open("a")

    def _lines(self) -> list[str]:
        if not self._path.exists():
            return []
        with self._path.open() as file:
            return [line for line in file if line.endswith("\n")]

    def append(self, record: StepRecord) -> None:
        """Write one line; readers see it at once."""
        self._file.write(record.model_dump_json() + "\n")
        self._file.flush()

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def _step_of(line: str) -> int | None:
    """Step of a line; None for one that a crash or a disk cut."""
    try:
        return int(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return None
