"""A Hugging Face model out of a run directory: any checkpoint, verified, without server, learner or its sharding.

Every checkpoint holds the policy as rank 0 would have published it, whatever the ranks' shares look like, so that
nothing has to be put together, and nothing is unpickled.
"""

from pathlib import Path

from protocol.errors import CheckpointError, LauncherError, SettingsError

DTYPES = ("float32", "bfloat16", "float16")


def export_model(run_dir: Path, target: Path, *, step: int | None, dtype: str | None, force: bool) -> str:
    """Write the model of a checkpoint to `target`, complete or not at all; returns the checkpoint's name.

    Args:
        step: the checkpoint's; the newest by default.
        dtype: one of `DTYPES`; that of the checkpoint by default.
        force: replace what `target` holds.

    Raises:
        LauncherError: `target` exists and is not empty, or cannot be written.
        CheckpointError: there is no such checkpoint, or it is damaged.
        SettingsError: an unknown dtype.
    """
    if dtype is not None and dtype not in DTYPES:
        raise SettingsError(f"dtype {dtype!r} is none of {', '.join(DTYPES)}")
    if target.exists() and not force and (not target.is_dir() or any(target.iterdir())):
        raise LauncherError(f"{target} exists and is not empty; give another directory, or --force to replace it")
    from learner.checkpoint import MODEL, Checkpoints

    checkpoints = Checkpoints(run_dir / "checkpoints", keep=1)
    place, checkpoint = checkpoints.find(step)
    model = place / MODEL
    if not model.is_dir():
        raise CheckpointError(f"checkpoint {place.name} holds no model")
    try:
        if target.exists() and not target.is_dir():
            target.unlink()
        target.parent.mkdir(parents=True, exist_ok=True)
        _write(model, target, dtype)
    except OSError as error:
        raise LauncherError(f"{target} cannot be written: {error}") from error
    return f"{place.name} (step {checkpoint.step}, version {checkpoint.version})"


def _write(model: Path, target: Path, dtype: str | None) -> None:
    import torch
    from safetensors.torch import load_file

    from learner.weights import write_model_directory

    tensors = load_file(model / "model.safetensors")
    if dtype is not None:
        wanted = getattr(torch, dtype)
        tensors = {name: t.to(wanted) if t.is_floating_point() else t for name, t in tensors.items()}
    write_model_directory(tensors, model, target)
