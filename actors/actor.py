"""The process of one actor: engine, links and rollout loop, put together and taken down in order."""

import logging
import os
import secrets
import socket
import tempfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from wsgiref.simple_server import WSGIServer

import numpy as np
from prometheus_client import CollectorRegistry, start_http_server

from actors.links import LinkFailed, Links
from actors.rollout import Rollout
from actors.tasks import load_task
from actors.weights.follower import WeightFollower
from buffer.run import Buffer
from buffer.store import WeightStore
from protocol.errors import SettingsError
from protocol.metrics import ActorCollector
from protocol.records import ActorStatus
from protocol.settings import Settings

FIRST_VERSION_WAIT_SECONDS = 2.0
MAX_ACTORS_PER_HOST = 64

log = logging.getLogger(__name__)


def run_actor(
    settings: Settings,
    *,
    name: str,
    run_dir: Path,
    buffer: Buffer,
    store: WeightStore,
    stop: threading.Event | None = None,
) -> None:
    """Run one actor with vLLM until the run ends, it is drained, or `stop` is set.

    Args:
        settings: the run's settings.
        name: the actor's name; its incarnation gets a suffix, so that a restarted actor is counted anew.
        run_dir: where vLLM may leave files.
        buffer: the run's state in Redis.
        store: the weight store, which also holds the model's configuration and tokenizer.
        stop: drains this actor alone when set.

    Raises:
        VespoError: see `Rollout.run`.
    """
    stop = stop or threading.Event()
    task = load_task(settings.task.name, dict(settings.task.options))
    incarnation = f"{name}.{os.getpid()}-{secrets.token_hex(2)}"
    rollout: Rollout | None = None
    follower: WeightFollower | None = None

    def status() -> ActorStatus:
        if rollout is None or follower is None:
            return ActorStatus(state="starting", pid=os.getpid(), host=socket.gethostname())
        return rollout.status().model_copy(
            update={
                "fetching_version": follower.fetching_version,
                "fetch_failures": follower.fetch_failures,
                "fetch_fallbacks": follower.fetch_fallbacks,
            }
        )

    exporter = _export(settings, incarnation, status)
    links = Links(buffer, incarnation, settings.buffer.lease_seconds, status)
    links.start()
    try:
        from actors.engine.vllm_engine import VllmEngine, prepare_environment

        prepare_environment(settings, run_dir)
        import vllm  # noqa: F401  # takes seconds: done while the learner prepares the first version
        from transformers import AutoTokenizer

        # The skeleton stays for the actor's life: an engine that fails is built anew from it.
        with tempfile.TemporaryDirectory(prefix="vespo-skeleton-") as directory:
            if not _wait_for_first_version(buffer, stop):
                return
            skeleton = Path(directory)
            store.read_skeleton(skeleton)
            tokenizer = AutoTokenizer.from_pretrained(skeleton, trust_remote_code=settings.model.trust_remote_code)
            seeds = _seeds(settings.run.seed, incarnation)
            rollout = Rollout(
                settings, incarnation, links, lambda: VllmEngine(settings, skeleton, next(seeds)), task, tokenizer
            )
            follower = WeightFollower(
                buffer.clock, store, rollout.deliver, lambda error: links.inbox.put(LinkFailed(error))
            )
            follower.start()
            try:
                rollout.run(stop)
            finally:
                follower.stop()
                rollout.close()
    finally:
        links.close(settings.buffer.lease_seconds)
        if exporter is not None:
            exporter.shutdown()
            exporter.server_close()


def _seeds(run_seed: int, incarnation: str) -> Iterator[int]:
    """A sampling seed for each engine of each actor, all different."""
    generator = np.random.default_rng([run_seed, *incarnation.encode()])
    while True:
        yield int(generator.integers(2**31))


def _export(settings: Settings, incarnation: str, status: Callable[[], ActorStatus]) -> WSGIServer | None:
    """Open the actor's Prometheus endpoint on the first free port from `metrics.actor_port`, if there is one."""
    if settings.metrics.actor_port is None:
        return None
    registry = CollectorRegistry()
    registry.register(ActorCollector(settings.run.name, incarnation, status))
    first = settings.metrics.actor_port
    for port in range(first, first + MAX_ACTORS_PER_HOST):
        try:
            server, _ = start_http_server(port, addr="127.0.0.1", registry=registry)
        except OSError:
            continue
        log.info("metrics at http://127.0.0.1:%d/metrics", port)
        return server
    raise SettingsError(
        f"metrics.actor_port: the {MAX_ACTORS_PER_HOST} ports from {settings.metrics.actor_port} are taken"
    )


def _wait_for_first_version(buffer: Buffer, stop: threading.Event) -> bool:
    """Whether there is one; False when this actor was stopped or the run ended before."""
    while not stop.is_set() and buffer.control.state() not in ("finished", "failed"):
        if buffer.clock.wait_for_version(-1, FIRST_VERSION_WAIT_SECONDS) is not None:
            return True
        log.info("waiting for the learner's first version")
    return False
