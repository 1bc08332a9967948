"""Everything that can be wrong with a run and can be found in a moment, before anything heavy is loaded or started."""

import importlib.util
import json
import math
from pathlib import Path
from typing import Any

from actors.tasks import BUILT_IN, load_task
from buffer.connection import check_server
from buffer.safetensors_format import read_header
from buffer.store import WeightStore
from buffer.stores.server import LIMIT_BYTES
from deploy.connect import SERVER_STORE, check_identity, connect_url, open_store, placed
from deploy.rundir import RunDirectory
from protocol.deepspeed_keys import deepspeed_table
from protocol.errors import SettingsError, WeightsDamagedError, WeightStoreError
from protocol.objectives import OBJECTIVES
from protocol.settings import Settings

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json")
WEIGHT_PATTERNS = ("*.safetensors", "pytorch_model*.bin")
INDEX_FILE = "model.safetensors.index.json"
GPU_DEVICES = ("/dev/nvidiactl", "/dev/kfd", "/dev/dxg")


def preflight(settings: Settings, directory: RunDirectory, *, learner: bool = True) -> list[str]:
    """Check settings against this machine.

    Args:
        settings: resolved settings.
        directory: the run's directory, which exists.
        learner: whether this machine holds the model; an actor needs only the server and the store.

    Returns:
        Warnings for a person.

    Raises:
        VespoError: what is wrong, where, and what to do.
    """
    check_task(settings)
    check_objective(settings)
    if settings.model.device == "cuda" and not any(Path(device).exists() for device in GPU_DEVICES):
        raise SettingsError('model.device = "cuda", but this machine shows no GPU; use "auto" or "cpu"')
    if learner:
        deepspeed_table(settings.learner.deepspeed)
    if learner and settings.model.path is not None:
        check_model(Path(settings.model.path).expanduser(), settings)
    if learner and settings.model.reference is not None:
        check_model(Path(settings.model.reference).expanduser(), settings, "model.reference")
    store = placed(settings, directory, "").weights.store
    if store is None:
        raise WeightStoreError("no weight store")
    if learner and store == SERVER_STORE and settings.model.path is not None:
        check_fits_server(Path(settings.model.path).expanduser(), settings)
    warnings: list[str] = []
    if settings.buffer.url is not None:
        client = connect_url(settings.buffer.url, settings.run.name, settings.buffer.reconnect_seconds, wait=False)
        try:
            warnings = check_server(client, embedded=False)
            if learner:
                check_identity(client, settings, directory)
            open_store(store, client, settings).check()
        finally:
            client.close()
    elif store != SERVER_STORE:  # the embedded server, which is not started yet, takes what it is given
        WeightStore(store).check()
    return warnings


def check_task(settings: Settings) -> None:
    """A built-in task takes its options; of one's own, the module exists: importing it may take long.

    Raises:
        SettingsError: it is neither built in nor importable, or does not take the options.
    """
    name = settings.task.name
    if name in BUILT_IN:
        try:
            load_task(name, settings.task.options)
        except ValueError as error:
            raise SettingsError(f"[task.options] of {name}: {error}") from error
        return
    module, _, class_name = name.partition(":")
    if not module or not class_name.isidentifier():
        raise SettingsError(f'task.name = {name!r} is neither one of {sorted(BUILT_IN)} nor "package.module:Class"')
    _check_module("task.name", name, module)


def check_objective(settings: Settings) -> None:
    """The module of an objective of one's own exists; the learner checks the rest, for importing it needs torch.

    Raises:
        SettingsError: there is no such module.
    """
    name = settings.objective.name
    if name not in OBJECTIVES:
        _check_module("objective.name", name, name.partition(":")[0])


def _check_module(key: str, name: str, module: str) -> None:
    try:
        found = importlib.util.find_spec(module) is not None
    except (ImportError, ValueError):  # a parent package is missing, or no package
        found = False
    if not found:
        raise SettingsError(
            f"{key} = {name!r}: there is no module {module}; run in the directory that holds it, or install it"
        )


def check_model(path: Path, settings: Settings, key: str = "model.path") -> None:
    """The directory holds a configuration, a tokenizer and all weight files, and is long enough for the task.

    Raises:
        SettingsError: names the directory and what is missing.
    """
    where = f"{key} = {str(path)!r}"
    if not path.is_dir():
        raise SettingsError(f"{where} is no directory (looked at {path.absolute()})")
    config = _read_json(path / "config.json", where)
    if not any((path / name).exists() for name in TOKENIZER_FILES):
        raise SettingsError(f"{where} has no tokenizer: none of {', '.join(TOKENIZER_FILES)}")
    if (path / INDEX_FILE).exists():
        shards = set(_read_json(path / INDEX_FILE, where).get("weight_map", {}).values())
        if missing := sorted(name for name in shards if not (path / name).exists()):
            raise SettingsError(f"{where} lacks {len(missing)} of {len(shards)} weight files, first {missing[0]}")
    elif not any(next(path.glob(pattern), None) for pattern in WEIGHT_PATTERNS):
        raise SettingsError(f"{where} has no weights: no file {' or '.join(WEIGHT_PATTERNS)}")
    _check_length(config, settings, where)


def check_fits_server(path: Path, settings: Settings) -> None:
    """The model's safetensors files, in the published dtype, are not too large for `weights.store = "redis"`.

    Raises:
        SettingsError: they are, or one cannot be read.
    """
    item_bytes = {"float32": 4, "bfloat16": 2}[settings.model.dtype]
    num_bytes = 0
    for file_path in path.glob("*.safetensors"):
        try:
            with file_path.open("rb") as file:
                placements = read_header(file, file_path.stat().st_size)
        except (OSError, WeightsDamagedError) as error:
            raise SettingsError(f"{file_path} cannot be read: {error}") from error
        num_bytes += item_bytes * sum(math.prod(placement.shape) for placement in placements.values())
    if num_bytes > LIMIT_BYTES:
        raise SettingsError(
            f'weights.store = "redis" takes models of at most {LIMIT_BYTES >> 20} MiB, {str(path)!r} has '
            f"{num_bytes / 2**20:.0f} MiB in {settings.model.dtype}; take a shared folder or an object store"
        )


def _check_length(config: dict[str, Any], settings: Settings, where: str) -> None:
    longest = config.get("max_position_embeddings")
    rope = config.get("rope_scaling") or config.get("rope_parameters") or {}
    stretched = rope.get("rope_type", rope.get("type", "default")) != "default"
    wanted = settings.task.max_prompt_tokens + settings.task.max_completion_tokens
    if isinstance(longest, int) and not stretched and wanted > longest:
        raise SettingsError(
            f"task.max_prompt_tokens + task.max_completion_tokens = {wanted}, but {where} has {longest} positions"
        )


def _read_json(path: Path, where: str) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text("utf-8"))
    except FileNotFoundError:
        raise SettingsError(f"{where} has no {path.name}: not a Hugging Face model directory") from None
    except (OSError, ValueError) as error:
        raise SettingsError(f"{where}: {path.name} cannot be read: {error}") from error
    if not isinstance(content, dict):
        raise SettingsError(f"{where}: {path.name} is not a JSON object")
    return content
