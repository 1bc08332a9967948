"""The learner's state, copied in memory while training stands still, written to disk while it goes on.

DeepSpeed's `save_checkpoint` returns when everything is on disk, and its asynchronous writers need an NVMe library and
leave the state they write unprotected from the next step. So it is given a checkpoint engine that only copies what it
is told to save; the copies are written later, by whoever calls what `capture` returned. The price is host memory, a
second copy of this rank's shard. It is kept from one checkpoint to the next: most of the time that copying into new
memory takes goes to the kernel, which clears the pages. What offloading to NVMe keeps on disk is still copied at once,
by DeepSpeed itself.
"""

import copy
import os
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from protocol.errors import CheckpointError

TAG = "state"  # DeepSpeed's name for the one state in a checkpoint's directory


class StateCopies:
    """Copies of one rank's state; a new one may be made once the last one is written."""

    def __init__(self) -> None:
        self._tensors: list[Tensor] = []  # of the newest capture
        self._reusable: Iterator[Tensor] = iter(())  # of the one before, in the same order

    def capture(self, engine: Any, directory: Path, rank: int) -> Callable[[], None]:
        """Copy this rank's share of model, optimizer and random state; every rank must call.

        Args:
            engine: a DeepSpeed engine.
            directory: exists, and will hold the state.

        Returns:
            Writes the copies into `directory`, synced to disk; may run in another thread.
        """
        copies: list[tuple[Path, Any]] = []
        original, engine.checkpoint_engine = engine.checkpoint_engine, _recorder(self, copies)
        earlier, self._tensors = self._tensors, []
        self._reusable = iter(earlier)
        try:
            engine.save_checkpoint(str(directory), tag=TAG, save_latest=False)
        finally:
            engine.checkpoint_engine = original
        copies.append((_random_file(directory, rank), _random_state()))

        def write() -> None:
            for path, state in copies:
                path.parent.mkdir(parents=True, exist_ok=True)
                with path.open("wb") as file:
                    torch.save(state, file)
                    file.flush()
                    os.fsync(file.fileno())

        return write

    def copied(self, value: Any) -> Any:
        """A deep copy with every tensor on the CPU, in a storage of its own."""
        if isinstance(value, Tensor):
            return self._copied_tensor(value.detach())
        if isinstance(value, dict):
            return type(value)((key, self.copied(item)) for key, item in value.items())
        if isinstance(value, list) or type(value) is tuple:
            return type(value)(self.copied(item) for item in value)
        return copy.deepcopy(value)

    def _copied_tensor(self, tensor: Tensor) -> Tensor:
        kept = next(self._reusable, None)
        if kept is not None and (kept.shape, kept.dtype) == (tensor.shape, tensor.dtype):
            kept.copy_(tensor)
        else:
            kept = tensor.to("cpu", copy=True)
        self._tensors.append(kept)
        return kept


def restore(engine: Any, directory: Path, rank: int) -> None:
    """Load what `StateCopies.capture` wrote; every rank must call.

    Raises:
        CheckpointError: DeepSpeed finds no state there, or there is no random state of this rank.
    """
    path, _ = engine.load_checkpoint(str(directory), tag=TAG)
    if path is None:
        raise CheckpointError(f"{directory} holds no DeepSpeed state")
    try:
        state = torch.load(_random_file(directory, rank), weights_only=True)
    except FileNotFoundError as error:
        raise CheckpointError(f"{directory} holds no random state of rank {rank}") from error
    torch.set_rng_state(state["torch"])
    random.setstate(state["python"])
    name, keys, *rest = state["numpy"]
    np.random.set_state((name, np.array(keys, np.uint32), *rest))
    if state["cuda"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])


def _recorder(copier: StateCopies, copies: list[tuple[Path, Any]]) -> Any:
    """A checkpoint engine of DeepSpeed that keeps copies instead of writing."""
    from deepspeed.runtime.checkpoint_engine.checkpoint_engine import CheckpointEngine  # once the accelerator is chosen

    class Recorder(CheckpointEngine):  # type: ignore[misc]  # DeepSpeed is not analysed
        def create(self, info: Any) -> None:
            pass

        def save(self, state_dict: Any, path: str) -> None:
            copies.append((Path(path), copier.copied(state_dict)))

        def load(self, path: str, map_location: Any = None) -> Any:
            raise NotImplementedError("states are read by DeepSpeed's own engine")

        def commit(self, info: Any) -> bool:
            return True

        def preserves_storage_sharing(self) -> bool:
            return False

    return Recorder()


def _random_state() -> dict[str, Any]:
    name, keys, *rest = np.random.get_state()
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state() if torch.cuda.is_available() else None,
        "python": random.getstate(),
        "numpy": (name, np.asarray(keys).tolist(), *rest),
    }


def _random_file(directory: Path, rank: int) -> Path:
    return directory / TAG / f"random_rank_{rank:05d}.pt"
