"""The process of one actor: engine, links and rollout loop, put together and taken down in order."""

import logging
import os
import secrets
import socket
import tempfile
import threading
from pathlib import Path

import numpy as np

from actors.links import LinkFailed, Links
from actors.rollout import Rollout
from actors.tasks import load_task
from actors.weights.follower import WeightFollower
from buffer.registry import ActorStatus
from buffer.run import Buffer
from buffer.store import WeightStore
from protocol.settings import Settings

FIRST_VERSION_WAIT_SECONDS = 2.0

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

    def status() -> ActorStatus:
        if rollout is not None:
            return rollout.status()
        return ActorStatus(state="starting", pid=os.getpid(), host=socket.gethostname())

    links = Links(buffer, incarnation, settings.buffer.lease_seconds, status)
    links.start()
    try:
        from actors.engine.vllm_engine import VllmEngine, prepare_environment

        prepare_environment(settings, run_dir)
        import vllm  # noqa: F401  # takes seconds: done while the learner prepares the first version
        from transformers import AutoTokenizer

        with tempfile.TemporaryDirectory(prefix="vespo-skeleton-") as directory:
            if not _wait_for_first_version(buffer, stop):
                return
            skeleton = Path(directory)
            store.read_skeleton(skeleton)
            tokenizer = AutoTokenizer.from_pretrained(skeleton, trust_remote_code=settings.model.trust_remote_code)
            seed = np.random.SeedSequence([settings.run.seed, *incarnation.encode()]).generate_state(1)[0]
            engine = VllmEngine(settings, skeleton, int(seed) % 2**31)
        rollout = Rollout(settings, incarnation, links, engine, task, tokenizer)
        follower = WeightFollower(
            buffer.clock, store, links.inbox.put, lambda error: links.inbox.put(LinkFailed(error))
        )
        follower.start()
        try:
            rollout.run(stop)
        finally:
            follower.stop()
            engine.close()
    finally:
        links.close(settings.buffer.lease_seconds)


def _wait_for_first_version(buffer: Buffer, stop: threading.Event) -> bool:
    """Whether there is one; False when this actor was stopped or the run ended before."""
    while not stop.is_set() and buffer.control.state() not in ("finished", "failed"):
        if buffer.clock.wait_for_version(-1, FIRST_VERSION_WAIT_SECONDS) is not None:
            return True
        log.info("waiting for the learner's first version")
    return False
