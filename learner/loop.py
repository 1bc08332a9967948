"""The learner's life: resume, publish, then lease, train, publish, checkpoint until the run is done or drained.

    feed (thread)         lease, decode, select and lay out the next step        ◄── buffer
    main                  take → train → snapshot → record → copy the state
    publisher (thread)    write weights, publish, prune                          ──► weight store, clock
    checkpoint (thread)   write, sync, rename, then commit the groups            ──► disk, buffer

Nothing but a lack of groups makes the optimizer wait. The version counts every `weights.updates_per_publish` updates,
whether it is published or left out (`learner.cadence`): lag counts from there. Of several ranks, rank 0 does all of
this and takes the others along (`learner.crew`).
"""

import logging
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from prometheus_client import CollectorRegistry, start_http_server

from buffer.run import Buffer
from buffer.store import WeightStore
from learner.cadence import Cadence
from learner.crew import LeadEngine, follow
from learner.engine import Engine
from learner.feed import Feed, NextStep
from learner.journal import Journal
from learner.lineage import Lineage
from learner.publisher import Publisher, Snapshot
from learner.ranks import Ranks
from learner.selection import Selection
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
    """As rank 0, train until `run.steps` updates are done or the run is no longer "running"; resumes what there is.

    When all steps are done, `run_dir/model` holds the trained model as a Hugging Face directory and the run's state is
    "finished". A drained run has written a checkpoint and committed everything it was trained on.

    Args:
        run_dir: checkpoints, metrics.jsonl, run.json and the final model live here.
        model_dir: Hugging Face directory of the initial model.
        probe_tokens: sequences of at least two tokens on which actors measure their parity.

    Raises:
        RankError: another rank of this learner failed, or went away.
        StarvedError: no groups for `learner.starvation_seconds`, and no actor alive.
        FencedError: another learner has taken over the run.
        NonFiniteError: gradients were not finite in three steps in a row.
        SettingsError, CheckpointError, WeightStoreError, BufferUnavailableError, RunMismatchError: what they say.
    """
    with _on_this_rank(settings, model_dir) as (engine, ranks):
        _lead(settings, run_dir, model_dir, buffer, store, probe_tokens, LeadEngine(engine, ranks), ranks)


def follow_learner(settings: Settings, *, model_dir: Path) -> None:
    """What every rank but 0 does instead: train along until rank 0, which alone has a buffer, says that it is done.

    Raises:
        RankError: another rank of this learner failed, or went away.
    """
    with _on_this_rank(settings, model_dir) as (engine, ranks):
        follow(engine, ranks)


@contextmanager
def _on_this_rank(settings: Settings, model_dir: Path) -> Iterator[tuple[Engine, Ranks]]:
    """The policy's share of this rank, and the way to the others, who learn how this one ends."""
    engine = Engine(settings, model_dir)
    ranks = Ranks(settings.learner.rank_timeout_seconds)
    try:
        yield engine, ranks
    except BaseException as error:
        ranks.stop(f"{type(error).__name__}: {error}")
        raise
    ranks.stop()


def _lead(
    settings: Settings,
    run_dir: Path,
    model_dir: Path,
    buffer: Buffer,
    store: WeightStore,
    probe_tokens: list[list[int]],
    engine: LeadEngine,
    ranks: Ranks,
) -> None:
    """What rank 0 does."""
    with ExitStack() as stack:
        metrics = _export(settings, stack)
        lineage = Lineage(settings, run_dir, model_dir, buffer, engine)
        stack.callback(lineage.close)
        if lineage.step < settings.run.steps:
            learner = _Learner(settings, run_dir, buffer, store, probe_tokens, engine, ranks, lineage, metrics, stack)
            store.write_skeleton(model_dir)
            learner.train()
        if lineage.step < settings.run.steps:
            log.info("drained after step %d of %d", lineage.step, settings.run.steps)
            return
        write_model_directory(lineage.weights(), model_dir, run_dir / MODEL_DIRECTORY)
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
        engine: LeadEngine,
        ranks: Ranks,
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
        self._ranks = ranks
        self._checkpoint_seconds = 0.0  # since the last record
        self._turned_away = (0, 0)  # groups too old and uninformative, up to the last record
        self._step_ended = self._wait_started = time.monotonic()
        self._journal = Journal(run_dir, step=lineage.step)
        stack.callback(self._journal.close)
        self._first_step = lineage.step
        self._cadence = Cadence(seconds=settings.weights.seconds_per_publish, max_lag=settings.buffer.max_lag)
        weights = settings.weights
        self._publisher = Publisher(
            buffer,
            store,
            epoch=lineage.epoch,
            versions_kept=weights.versions_kept,
            full_every=weights.full_every if weights.delta == "auto" else 1,
            frozen=settings.model.lora is not None,
        )
        stack.callback(self._publisher.close)
        self._feed = Feed(
            buffer,
            Selection(settings, buffer, epoch=lineage.epoch, vocab_size=engine.vocab_size),
            engine.lay_out,
            epoch=lineage.epoch,
            groups_per_step=settings.learner.groups_per_step,
        )
        stack.callback(self._feed.close)

    def train(self) -> None:
        """Publish the current weights, then train until all steps are done or the run drains."""
        self._next_version()
        # Actors start from this version: waiting for groups before it is out would wait for ever.
        self._publisher.finish()
        every = self._settings.learner.checkpoint_every_steps
        while self._lineage.step < self._settings.run.steps and (step := self._take()) is not None:
            self._update(step)
            started = time.monotonic()
            self._lineage.relieve()
            if self._lineage.step % every == 0:
                self._lineage.checkpoint()
            self._checkpoint_seconds += time.monotonic() - started
        self._lineage.checkpoint()
        self._lineage.finish()
        self._publisher.finish()

    def _take(self) -> NextStep | None:
        """The next step, no group of which is too old; None if the run drains."""
        starvation_seconds = self._settings.learner.starvation_seconds
        needed = self._settings.learner.groups_per_step
        wait = Wait(self._buffer, needed=needed, starvation_seconds=starvation_seconds)
        oldest_version = self._lineage.version - self._settings.buffer.lag_gate
        arrived = self._feed.num_arrived
        self._wait_started = time.monotonic()
        if self._stopping():
            return None
        while (step := self._feed.take(oldest_version, TICK_SECONDS)) is None:
            if self._feed.num_arrived > arrived:
                arrived = self._feed.num_arrived
                wait.progressed()
            if self._stopping():
                return None
            self._publisher.check()
            self._lineage.check()
            self._ranks.check()
            if wait.silent_seconds > starvation_seconds / 2:
                self._lineage.checkpoint()  # what it commits may be the memory that submitters wait for
            wait.tick(self._feed.num_gathered)
        return step

    def _stopping(self) -> bool:
        return self._buffer.control.state() != "running"

    def _update(self, step: NextStep) -> None:
        """Train on a step, publish if a version is due, and write down what happened."""
        settings, lineage = self._settings, self._lineage
        train_started = time.monotonic()
        update = self._engine.update(step.number, step.batch)
        train_ended = time.monotonic()
        version = lineage.version
        lineage.trained(step.leased)
        # Counted from the session's start, where the rule of admission begins to count too.
        if (lineage.step - self._first_step) % settings.weights.updates_per_publish == 0:
            self._next_version()
        now = time.monotonic()
        # Starving is waiting for groups; waiting until they are laid out is not.
        complete_at = min(max(step.complete_at, self._wait_started), train_started)
        turned_away = (step.num_stale, step.num_filtered)
        context = StepContext(
            step=lineage.step,
            version=version,
            epoch=lineage.epoch,
            learning_rate=update.learning_rate,
            wall_seconds=lineage.wall_seconds,
            stale=turned_away[0] - self._turned_away[0],
            filtered=turned_away[1] - self._turned_away[1],
            buffered_groups=self._buffer.groups.depth().buffered + len(self._feed),
            wait_seconds=complete_at - self._wait_started,
            build_seconds=train_started - complete_at,
            step_seconds=now - self._step_ended,
            train_seconds=train_ended - train_started,
            publish_seconds=now - train_ended,
            checkpoint_seconds=self._checkpoint_seconds,
        )
        self._step_ended, self._turned_away, self._checkpoint_seconds = now, turned_away, 0.0
        rewards = [completion.reward for item in step.leased for completion in item.group.completions]
        self._record(step_record(step.batch, update, context, rewards))

    def _record(self, record: StepRecord) -> None:
        self._lineage.count(record)
        self._journal.append(record)
        self._buffer.control.put_progress(record)
        if self._metrics is not None:
            self._metrics.observe(record)
            self._metrics.version.set(self._lineage.version)
            self._metrics.publish_seconds.set(self._publisher.last_seconds)
            self._metrics.superseded.set(self._publisher.num_superseded)

    def _next_version(self) -> None:
        """Give the current weights the next version number and, if it is due, hand a copy to the publisher."""
        self._lineage.version += 1
        if not self._cadence.due(self._lineage.version):
            return
        tensors = self._lineage.weights()
        probe = self._engine.probe(self._probe_tokens)
        self._publisher.submit(Snapshot(self._lineage.version, self._lineage.step, tensors, probe))
