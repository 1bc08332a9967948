"""The learner's life: resume, publish, then lease, train, publish, checkpoint until the run is done or drained.

    feed (thread)       lease and decode groups ahead              ◄── buffer
    main                gather → train → snapshot → record → checkpoint, then commit
    publisher (thread)  write weights, publish, prune              ──► weight store, clock

Nothing but a lack of groups makes the optimizer wait. The version is the number last snapshotted: lag counts from
there. Several ranks are left out: this loop drives one process.
"""

import logging
import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

from prometheus_client import CollectorRegistry, start_http_server

from buffer.groups import LeasedGroup
from buffer.run import Buffer
from buffer.store import WeightStore
from learner.batch import build_step_batch
from learner.engine import Engine
from learner.feed import Feed
from learner.journal import Journal
from learner.lineage import Lineage
from learner.publisher import Publisher, Snapshot
from learner.stats import StepContext, step_record
from learner.waiting import Wait
from learner.weights import write_model_directory
from protocol.errors import SettingsError
from protocol.metrics import LearnerMetrics
from protocol.records import StepRecord
from protocol.settings import Settings

log = logging.getLogger(__name__)

TICK_SECONDS = 1.0
MODEL_DIRECTORY = "model"


def run_learner(
    settings: Settings,
    *,
    run_dir: Path,
    model_dir: Path,
    buffer: Buffer,
    store: WeightStore,
    probe_tokens: list[list[int]],
) -> None:
    """Train until `run.steps` updates are done, or until the run is no longer "running"; resumes what `run_dir` holds.

    When all steps are done, `run_dir/model` holds the trained model as a Hugging Face directory and the run's state is
    "finished". A drained run has written a checkpoint and committed everything it was trained on.

    Args:
        run_dir: checkpoints, metrics.jsonl, run.json and the final model live here.
        model_dir: Hugging Face directory of the initial model.
        probe_tokens: sequences of at least two tokens on which actors measure their parity.

    Raises:
        StarvedError: no groups for `learner.starvation_seconds`, and no actor alive.
        FencedError: another learner has taken over the run.
        NonFiniteError: gradients were not finite in three steps in a row.
        SettingsError, CheckpointError, WeightStoreError, BufferUnavailableError, RunMismatchError: what they say.
    """
    with ExitStack() as stack:
        metrics = _export(settings, stack)
        engine = Engine(settings, model_dir)
        lineage = Lineage(settings, run_dir, buffer, engine)
        if lineage.step < settings.run.steps:
            learner = _Learner(settings, run_dir, buffer, store, probe_tokens, engine, lineage, metrics, stack)
            store.write_skeleton(model_dir)
            learner.train()
        if lineage.step < settings.run.steps:
            log.info("drained after step %d of %d", lineage.step, settings.run.steps)
            return
        write_model_directory(engine.tensors(), model_dir, run_dir / MODEL_DIRECTORY)
        buffer.control.set_state("finished", f"all {lineage.step} steps are done")
        log.info("finished after step %d", lineage.step)


def _export(settings: Settings, stack: ExitStack) -> LearnerMetrics | None:
    """Start the Prometheus endpoint, if the recipe asks for one."""
    port = settings.metrics.learner_port
    if port is None:
        return None
    registry = CollectorRegistry()
    try:
        server, _ = start_http_server(port, addr="127.0.0.1", registry=registry)
    except OSError as error:
        raise SettingsError(f"metrics.learner_port = {port} cannot be used: {error}") from error
    stack.callback(server.server_close)
    stack.callback(server.shutdown)
    return LearnerMetrics(registry, settings.run.name)


class _Learner:
    """One session of training, from the first publication to the last commit."""

    def __init__(
        self,
        settings: Settings,
        run_dir: Path,
        buffer: Buffer,
        store: WeightStore,
        probe_tokens: list[list[int]],
        engine: Engine,
        lineage: Lineage,
        metrics: LearnerMetrics | None,
        stack: ExitStack,
    ) -> None:
        self._settings = settings
        self._buffer = buffer
        self._probe_tokens = probe_tokens
        self._engine = engine
        self._lineage = lineage
        self._metrics = metrics
        self._stale = 0
        self._step_ended = self._wait_started = time.monotonic()
        self._journal = Journal(run_dir, step=lineage.step)
        stack.callback(self._journal.close)
        kept = settings.weights.versions_kept
        self._publisher = Publisher(buffer, store, epoch=lineage.epoch, versions_kept=kept)
        stack.callback(self._publisher.close)
        self._feed = Feed(buffer, epoch=lineage.epoch, capacity=2 * settings.learner.groups_per_step)
        stack.callback(self._feed.close)

    def train(self) -> None:
        """Publish the current weights, then train until all steps are done or the run drains."""
        self._publish()
        # Actors start from this version: waiting for groups before it is out would wait for ever.
        self._publisher.finish()
        every = self._settings.learner.checkpoint_every_steps
        while self._lineage.step < self._settings.run.steps and (leased := self._gather()) is not None:
            self._update(leased)
            # Trained groups stay in the buffer until they are committed; their bytes must not fill the server.
            crowded = self._lineage.uncommitted_bytes > self._settings.buffer.max_bytes
            if crowded or self._lineage.step % every == 0:
                self._lineage.checkpoint()
        self._lineage.checkpoint()
        self._publisher.finish()

    def _gather(self) -> list[LeasedGroup] | None:
        """The groups of the next step, none of them too old; None if the run drains."""
        needed = self._settings.learner.groups_per_step
        wait = Wait(self._buffer, needed=needed, starvation_seconds=self._settings.learner.starvation_seconds)
        chosen: list[LeasedGroup] = []
        self._wait_started = time.monotonic()
        if self._stopping():
            return None
        while len(chosen) < needed:
            if arrived := self._feed.take(needed - len(chosen), TICK_SECONDS):
                wait.progressed()
                chosen += self._usable(arrived)
                continue
            if self._stopping():
                return None
            self._publisher.check()
            if wait.silent_seconds > self._settings.learner.starvation_seconds / 2:
                self._lineage.checkpoint()  # what it commits may be the memory that submitters wait for
            wait.tick(len(chosen))
        return chosen

    def _stopping(self) -> bool:
        return self._buffer.control.state() != "running"

    def _usable(self, arrived: Sequence[LeasedGroup]) -> list[LeasedGroup]:
        """Send back what is too old, and drop what the model cannot read."""
        gate = self._lineage.version - self._settings.buffer.lag_gate
        stale = [item for item in arrived if item.group.oldest_version < gate]
        if stale:
            self._stale += len(stale)
            log.info("%d groups are older than version %d and are generated again", len(stale), gate)
            self._buffer.groups.return_stale(self._lineage.epoch, stale)
        fresh = [item for item in arrived if item.group.oldest_version >= gate]
        alien = [item for item in fresh if _largest_token(item) >= self._engine.vocab_size]
        if alien:
            log.error(
                "%d groups have tokens outside the vocabulary of %d and are dropped; does actor %s run another model?",
                len(alien),
                self._engine.vocab_size,
                alien[0].group.actor,
            )
            self._buffer.groups.mark_filtered(self._lineage.epoch, alien)
        return [item for item in fresh if item not in alien] if alien else fresh

    def _update(self, leased: list[LeasedGroup]) -> None:
        """Train on the groups, publish if a version is due, and write down what happened."""
        settings, lineage = self._settings, self._lineage
        train_started = time.monotonic()
        batch = build_step_batch(
            [item.group for item in leased],
            micro_batch_tokens=settings.learner.micro_batch_tokens,
            normalise_std=settings.objective.normalise_std,
        )
        update = self._engine.update(batch)
        train_ended = time.monotonic()
        version = lineage.version
        lineage.trained(leased)
        if lineage.step % settings.weights.updates_per_publish == 0:
            self._publish()
        now = time.monotonic()
        context = StepContext(
            step=lineage.step,
            version=version,
            epoch=lineage.epoch,
            learning_rate=settings.learner.learning_rate,
            wall_seconds=lineage.wall_seconds,
            stale=self._stale,
            buffered_groups=self._buffer.groups.depth().buffered + len(self._feed),
            wait_seconds=train_started - self._wait_started,
            step_seconds=now - self._step_ended,
            train_seconds=train_ended - train_started,
            publish_seconds=now - train_ended,
        )
        self._step_ended, self._stale = now, 0
        self._record(step_record(batch, update, context))

    def _record(self, record: StepRecord) -> None:
        self._lineage.count(record)
        self._journal.append(record)
        self._buffer.control.put_progress(record)
        if self._metrics is not None:
            self._metrics.observe(record)
            self._metrics.version.set(self._lineage.version)
            self._metrics.publish_seconds.set(self._publisher.last_seconds)
            self._metrics.superseded.set(self._publisher.num_superseded)

    def _publish(self) -> None:
        """Give the current weights the next version number and hand a copy to the publisher."""
        self._lineage.version += 1
        tensors = self._engine.tensors()
        probe = self._engine.probe(self._probe_tokens)
        self._publisher.submit(Snapshot(self._lineage.version, self._lineage.step, tensors, probe))


def _largest_token(item: LeasedGroup) -> int:
    group = item.group
    return max(int(group.prompt_tokens.max()), *(int(c.tokens.max()) for c in group.completions))
