"""Checkpoints on disk: complete under their name or not there at all, verified before they are used.

A checkpoint is a directory with the engine's state (a share of it from each rank), the policy as a Hugging Face model,
and `checkpoint.json`: where the run is, which groups' effect it holds, and the checksum of every file. It is written
beside its place, synced, and renamed; groups are committed to the buffer only then, so a crash between the two is made
good by committing the listed groups again on resume. Directories are ordered by learner session first: what a fenced
learner may still write never outranks its successor's.
"""

import logging
import os
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import xxhash
from pydantic import BaseModel, ConfigDict, ValidationError

from protocol.errors import CheckpointError

log = logging.getLogger(__name__)

MANIFEST = "checkpoint.json"
MODEL = "model"  # the policy as a Hugging Face directory
NAME = re.compile(r"session-(\d{6})-step-(\d{9})")
BLOCK_BYTES = 8 << 20


class StoredFile(BaseModel):
    """Size and xxh3-64 (hex) of one file."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    num_bytes: int
    xxh3: str


class Totals(BaseModel):
    """Counted over the whole lineage of a run."""

    model_config = ConfigDict(extra="forbid")

    wall_seconds: float = 0.0
    groups_trained: int = 0
    sequences_trained: int = 0
    tokens_trained: int = 0
    skipped_steps: int = 0
    stale_groups: int = 0
    filtered_groups: int = 0
    silenced_sequences: int = 0


class Checkpoint(BaseModel):
    """Content of `checkpoint.json`.

    Attributes:
        run_id: identity of the run directory.
        session: number of the learner process in the run's life, from 1.
        step, version, epoch: optimizer updates done, version last snapshotted, epoch that wrote it.
        layout: what the state depends on (model shapes, precision, sharding); another layout cannot load it.
        first_ticket: where the run in the buffer started counting tickets.
        next_ticket: where tickets go on if the buffer is lost.
        entry_ids: groups trained since the checkpoint before, to be committed once this one is complete.
        totals: cumulative counters.
        files: path relative to the checkpoint → size and checksum.
    """

    model_config = ConfigDict(extra="forbid")

    run_id: str
    session: int
    step: int
    version: int
    epoch: int
    layout: str
    first_ticket: int
    next_ticket: int
    entry_ids: list[str]
    totals: Totals
    files: dict[str, StoredFile] = {}


class Checkpoints:
    """The checkpoints of one run directory."""

    def __init__(self, directory: Path, *, keep: int) -> None:
        """`keep` complete checkpoints stay on disk, the newest ones."""
        self._directory = directory
        self._keep = keep

    def begin(self, checkpoint: Checkpoint) -> Path:
        """An empty directory for the state of a checkpoint, which `complete` will put in its place.

        Raises:
            CheckpointError: the disk refused.
        """
        fresh = self._fresh(checkpoint)
        try:
            shutil.rmtree(fresh, ignore_errors=True)
            fresh.mkdir(parents=True)
        except OSError as error:
            raise self._refused(checkpoint, error) from error
        return fresh

    def complete(self, checkpoint: Checkpoint, write: Callable[[], None]) -> Path:
        """Have `write` put the state where `begin` said, and seal it; returns its place.

        Raises:
            CheckpointError: the disk refused; nothing that was complete before is harmed.
        """
        fresh = self._fresh(checkpoint)
        place = self._directory / _name(checkpoint)
        try:
            write()
            files = {str(path.relative_to(fresh)): _stored(path) for path in _files(fresh)}
            complete = checkpoint.model_copy(update={"files": files})
            (fresh / MANIFEST).write_text(complete.model_dump_json(indent=1) + "\n")
            _sync_tree(fresh)
            fresh.rename(place)
            _sync(self._directory)
            self._prune()
        except OSError as error:
            raise self._refused(checkpoint, error) from error
        return place

    def _fresh(self, checkpoint: Checkpoint) -> Path:
        return self._directory / f".{_name(checkpoint)}.new"

    def _refused(self, checkpoint: Checkpoint, error: OSError) -> CheckpointError:
        return CheckpointError(
            f"checkpoint of step {checkpoint.step} cannot be written to {self._directory / _name(checkpoint)}: {error}"
        )

    def load_newest(self, load: Callable[[Path, Checkpoint], None]) -> Checkpoint | None:
        """Verify and load the newest checkpoint, or the newest before it that is whole.

        Args:
            load: takes the state from the directory; a `CheckpointError` of it counts as damage.

        Returns:
            What was loaded; None if the directory holds no checkpoint.

        Raises:
            CheckpointError: there are checkpoints, but none that can be loaded.
        """
        problems = []
        for place in self._complete():
            try:
                checkpoint = _verified(place)
                load(place, checkpoint)
            except CheckpointError as error:
                log.warning("checkpoint %s is passed over: %s", place.name, error)
                problems.append(f"{place.name}: {error}")
            else:
                return checkpoint
        if problems:
            raise CheckpointError(
                f"no checkpoint in {self._directory} can be loaded; {'; '.join(problems)}. Repair the newest, or move "
                "the run directory away to start again"
            )
        return None

    def find(self, step: int | None = None) -> tuple[Path, Checkpoint]:
        """The newest checkpoint, or the newest of `step`, verified but not loaded.

        Raises:
            CheckpointError: there is none, or it is damaged.
        """
        there = self._complete()
        wanted = [place for place in there if step in (None, int(place.name.rpartition("-")[2]))]
        if not wanted:
            steps = ", ".join(str(int(place.name.rpartition("-")[2])) for place in there)
            asked = "" if step is None else f" of step {step}"
            raise CheckpointError(f"{self._directory} holds no checkpoint{asked}; there are {steps or 'none at all'}")
        try:
            return wanted[0], _verified(wanted[0])
        except CheckpointError as error:
            raise CheckpointError(f"checkpoint {wanted[0].name} is damaged: {error}; name another step") from error

    def _complete(self) -> list[Path]:
        """Newest first."""
        if not self._directory.is_dir():
            return []
        named = [(m[1], m[2], path) for path in self._directory.iterdir() if (m := NAME.fullmatch(path.name))]
        return [path for _, _, path in sorted(named, reverse=True)]

    def _prune(self) -> None:
        leftovers = [p for p in self._directory.iterdir() if p.name.startswith(".") and p.name.endswith(".new")]
        for path in [*self._complete()[self._keep :], *leftovers]:
            shutil.rmtree(path, ignore_errors=True)


def _name(checkpoint: Checkpoint) -> str:
    return f"session-{checkpoint.session:06d}-step-{checkpoint.step:09d}"


def _verified(place: Path) -> Checkpoint:
    try:
        checkpoint = Checkpoint.model_validate_json((place / MANIFEST).read_bytes())
        for name, expected in checkpoint.files.items():
            if (found := _stored(place / name)) != expected:
                raise CheckpointError(f"{name} has {found.num_bytes} bytes and xxh3 {found.xxh3}, expected {expected}")
    except (OSError, ValidationError) as error:
        raise CheckpointError(f"it is incomplete: {error}") from error
    return checkpoint


def _files(directory: Path) -> Iterator[Path]:
    return (path for path in sorted(directory.rglob("*")) if path.is_file())


def _stored(path: Path) -> StoredFile:
    digest = xxhash.xxh3_64()
    with path.open("rb") as file:
        while block := file.read(BLOCK_BYTES):
            digest.update(block)
    return StoredFile(num_bytes=path.stat().st_size, xxh3=digest.hexdigest())


def _sync_tree(directory: Path) -> None:
    for path in _files(directory):
        _sync(path)
    for path in [*(p for p in directory.rglob("*") if p.is_dir()), directory]:
        _sync(path)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
