"""From settings to the buffer and weight store of a run: which server, which store, with every path made absolute."""

from dataclasses import dataclass
from pathlib import Path

import redis

from buffer.connection import command, connect
from buffer.embedded import EmbeddedServer
from buffer.keys import Keys
from buffer.run import Buffer
from buffer.store import WeightStore
from buffer.stores.server import ServerBlobs
from deploy.rundir import RunDirectory
from protocol.errors import LauncherError, RunMismatchError, SettingsError
from protocol.recipe import REDACTED
from protocol.settings import Settings

SERVER_STORE = "redis"
"""The value of `weights.store` that keeps weights in the buffer's server."""


@dataclass(frozen=True, slots=True)
class Connected:
    """What a process of a run works with."""

    client: redis.Redis
    buffer: Buffer
    store: WeightStore


def placed(settings: Settings, directory: RunDirectory, url: str) -> Settings:
    """Settings that mean the same in every process of the run: server known, paths absolute."""
    model, weights = settings.model, settings.weights
    if model.path is not None:
        model = model.model_copy(update={"path": str(Path(model.path).expanduser().resolve())})
    if model.reference is not None:
        model = model.model_copy(update={"reference": str(Path(model.reference).expanduser().resolve())})
    store = weights.store or str(directory.weights)
    if "://" not in store and store != SERVER_STORE:
        store = str(Path(store).expanduser().resolve())
    return settings.model_copy(
        update={
            "model": model,
            "weights": weights.model_copy(update={"store": store}),
            "buffer": settings.buffer.model_copy(update={"url": url}),
        }
    )


def open_run(settings: Settings) -> Connected:
    """Connect to the server and store of `placed` settings.

    Raises:
        BufferUnavailableError, WeightStoreError: one of them cannot be reached.
    """
    if settings.buffer.url is None or settings.weights.store is None:
        raise ValueError("settings name no server or no store; see placed()")
    client = connect_url(settings.buffer.url, settings.run.name, settings.buffer.reconnect_seconds)
    return Connected(client, Buffer(client, settings.run.name), open_store(settings.weights.store, client, settings))


def open_store(store: str, client: redis.Redis, settings: Settings) -> WeightStore:
    """The weight store of that name or URL; `client` is used where the buffer's server is the store.

    Raises:
        WeightStoreError: no such protocol, or its driver is not installed.
    """
    return WeightStore(ServerBlobs(client, settings.run.name) if store == SERVER_STORE else store)


def connect_url(url: str, run: str, reconnect_seconds: float, *, wait: bool = True) -> redis.Redis:
    """`buffer.connection.connect`, with a malformed URL as a mistake in the settings."""
    try:
        return connect(url, run=run, reconnect_seconds=reconnect_seconds, wait=wait)
    except ValueError as error:
        raise SettingsError(f"buffer.url: {error}") from error


def server_url(settings: Settings, directory: RunDirectory) -> str:
    """URL of a server that runs already: the recipe's, or the embedded one of the run directory.

    Raises:
        LauncherError: there is neither.
    """
    url = settings.buffer.url or EmbeddedServer.find(directory.server)
    if url is None:
        raise LauncherError(
            f"no server to join: buffer.url is not set and no embedded server is alive in {directory.server}; give "
            f"buffer.url=redis://HOST:PORT, or start one with: vespo server --dir {directory.server}"
        )
    return url


def settings_of(directory: RunDirectory) -> tuple[str, str]:
    """Name and server URL of the run in a directory, as far as the directory tells.

    Raises:
        LauncherError: it holds no run, or its server is gone or needs a password that is not kept here.
    """
    run = directory.read()
    if run is None:
        raise LauncherError(f"{directory.path} holds no run: it has no {directory.identity.name}")
    url = EmbeddedServer.find(directory.server)
    if url is None:
        used = {row["key"]: row["value"] for row in directory.read_settings()}.get("buffer.url")
        url = used if used is not None and REDACTED not in used else None
    if url is None:
        raise LauncherError(
            f"run {run.name!r} in {directory.path} has no live server of its own; give --url URL --run {run.name}"
        )
    return run.name, url


def check_identity(client: redis.Redis, settings: Settings, directory: RunDirectory) -> None:
    """Make sure that the run the server holds under this name, if any, is the one of this directory.

    Raises:
        RunMismatchError: it is another run.
    """
    stored = command(client, "HGET", Keys(settings.run.name).clock, "run_id")
    known = directory.read()
    if stored is None or (known is not None and stored.decode() == known.run_id):
        return
    raise RunMismatchError(
        f"the server holds a run {settings.run.name!r} of another run directory (run_id {stored.decode()}, that of "
        f"{directory.path} is {known.run_id if known else 'new'}); choose another run.name, give the --run-dir it was "
        "started with, or delete it with: vespo buffer purge"
    )
